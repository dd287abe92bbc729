"""Many branches by many callers at once, each caller the installed ``tl`` in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.support.tl_host import Host


@dataclass(frozen=True, slots=True)
class Made:
    """What became of one `tl branch`."""

    name: str
    seconds: float
    """From the exec of `tl` to its end."""
    result: dict[str, Any] | None
    failure: str | None


def make_many(host: Host, count: int, callers: int, *arguments: str) -> list[Made]:
    """Make ``count`` branches (``many-0`` …), ``callers`` at a time; failures are told, not raised."""
    return _in_crowd(lambda name: _make(host, name, arguments), count, callers)


def delete_many(host: Host, made: Sequence[Made], callers: int) -> list[str]:
    """Delete those that were made, ``callers`` at a time; what `tl` said of each failure."""

    def delete(one: Made) -> str | None:
        done = host.run("delete", one.name, "--yes", timeout=600)
        return f"{one.name}: {done.stderr}" if done.returncode != 0 else None

    with ThreadPoolExecutor(callers) as pool:
        told = list(pool.map(delete, [one for one in made if one.failure is None]))
    return [each for each in told if each is not None]


def _make(host: Host, name: str, arguments: Sequence[str]) -> Made:
    begin = time.perf_counter()
    try:
        result, failure = host.tl("branch", name, *arguments), None
    except RuntimeError as error:
        result, failure = None, str(error)
    return Made(name, time.perf_counter() - begin, result, failure)


def _in_crowd(make: Callable[[str], Made], count: int, callers: int) -> list[Made]:
    with ThreadPoolExecutor(callers) as pool:
        return list(pool.map(make, [f"many-{number}" for number in range(count)]))
