"""From ``--executor`` to an executor. What each needs is imported only when it is asked for."""

from __future__ import annotations

import os

import click

from cli.executor import Executor, LocalPlace, Place, parse_place
from timeline.clock import Clock


class PlaceType(click.ParamType[Place]):
    """An option's value: ``local:N`` or ``tcp://HOST:PORT``."""

    name = "executor"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        """Raises UsageError."""
        return value if isinstance(value, Place) else parse_place(str(value))


async def open_executor(place: Place, clock: Clock) -> Executor:
    """The caller closes it. Raises UsageError when what it needs is not installed, Unavailable when nobody answers."""
    if isinstance(place, LocalPlace):
        from cli.executor_local import LocalExecutor

        return LocalExecutor(place.width, environment=os.environ, clock=clock)
    from cli.executor_dask import connect

    return await connect(place.address, clock)
