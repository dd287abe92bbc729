"""``tl status``: what can be recovered, how fresh it is, and what endangers it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.config import Settings, source_option, store_options
from cli.output import emit_json
from timeline.errors import UsageError

if TYPE_CHECKING:
    from cli.facts import Facts
    from cli.observed import DaemonState
    from timeline.clock import Clock

ALERTS = Path(__file__).with_name("alerts.yml")


@click.command("status")
@click.option("--size", is_flag=True, help="Also the store's size by kind: a LIST request per 1,000 objects.")
@click.option("--prometheus", is_flag=True, help="As metrics, for a textfile collector.")
@click.option("--alerts", is_flag=True, help="Print alert rules for Prometheus; asks nothing.")
@click.option("--facts", is_flag=True, hidden=True)
@click.option("--store-id", hidden=True)
@source_option
@store_options
def status_command(
    *, settings: Settings, size: bool, prometheus: bool, alerts: bool, facts: bool, store_id: str | None
) -> None:
    """What is recoverable, and how fresh. Line 1 is the answer; the rest is why."""
    if (alerts or prometheus) and settings.json:
        raise UsageError("--json goes with neither --alerts nor --prometheus")
    if alerts:
        click.echo(ALERTS.read_text(encoding="utf-8"), nl=False)
    elif prometheus or facts:
        _print_machine(settings, size=size, prometheus=prometheus, store_id=store_id)
    else:
        _print_status(settings, size=size)


def _print_machine(settings: Settings, *, size: bool, prometheus: bool, store_id: str | None) -> None:
    """Whatever can be told, though one or the other does not answer."""
    from timeline.clock import SystemClock

    clock = SystemClock()
    found = asyncio.run(_gather(settings, clock, size=size, strict=False, store_id=store_id))
    if prometheus:
        from cli.facts import KeptFacts
        from cli.metrics import Observed, exposition

        name = settings.cluster or settings.need_store()
        kept = KeptFacts(name, found.gathered_at).with_round(found)
        click.echo(exposition(lambda: Observed(clock.now(), None, (kept,))), nl=False)
        return
    from cli.observed_json import encode

    click.echo(encode(found))


def _print_status(settings: Settings, *, size: bool) -> None:
    from cli.status_page import print_status
    from cli.status_result import make_result
    from timeline.clock import SystemClock

    clock = SystemClock()
    found = asyncio.run(_gather(settings, clock, size=size, strict=True, store_id=None))
    state, problem = _daemon_state()
    result = make_result(
        found,
        state,
        running=state is not None and _is_alive(state.pid),
        cluster=settings.cluster,
        now=clock.now(),
    )
    if problem is not None:
        result = replace(result, remarks=(*result.remarks, problem))
    if settings.json:
        emit_json(result)
    else:
        print_status(result)


async def _gather(
    settings: Settings, clock: Clock, *, size: bool, strict: bool, store_id: str | None
) -> Facts:
    from cli.gather import gather

    return await gather(settings, clock, size=size, strict=strict, store_id=store_id)


def _daemon_state() -> tuple[DaemonState | None, str | None]:
    """The state, or why it cannot be read: what is recoverable does not depend on it."""
    from cli.observed_json import read_state, state_file
    from restore.host import state_directory

    path = state_file(state_directory(os.environ))
    try:
        return read_state(path), None
    except (OSError, ValueError) as error:
        return None, f"the daemon's state cannot be read: {path}: {error}"


def _is_alive(pid: int) -> bool:
    """Whether a process of that number lives; long after, it may be another one's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
