"""Where commands of ``tl`` are run when there are many of them: the values, and what an executor promises. Pure.

Snapshot builds, verification, collection and drills are commands that find out from the store what is to be done, and
commit by its own rules: run twice, at two places at once, or killed in the middle, they harm nothing. So an executor need
promise no more than that each has run to its end at least once, or that it says so.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from timeline.errors import UsageError

MAX_ATTEMPTS = 3
"""A task whose process or worker was lost is begun so many times in all."""
MAX_LOCAL = 64
"""Processes at a time on this host."""
LOST = 1
"""Exit code of a task that never came to its end."""
STOPPED = 7
"""Exit code of one that was told to end, or could not be begun: nothing is wrong with it."""
_SEVERITY = (0, 7, 1, 2, 3, 6, 5, 4)
"""Exit codes, the worst last."""
_LOCAL = re.compile(r"local(?::(\d{1,3}))?")
_TCP = re.compile(r"(?:tcp|tls)://\S+:\d{1,5}")


@dataclass(frozen=True, slots=True)
class Task:
    """One command of ``tl``."""

    key: str
    """Tells it from the others of the same run."""
    argv: tuple[str, ...]
    """Of ``tl``, with ``--json``: the last line on stdout is its document."""
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a task."""

    key: str
    exit_code: int
    """As ``tl`` has them (timeline/errors.py); LOST and STOPPED where there was none."""
    message: str
    """Why, in one line; empty for exit code 0."""
    lines: tuple[str, ...]
    """The last lines of its stderr."""
    document: str | None
    """JSON text, where it printed one."""
    worker: str
    """Where it ran last, for people."""
    seconds: float
    """Of the last attempt."""
    attempts: int
    """How many times it was begun: more than 1 where a process or a worker was lost."""
    lost: bool = False
    """Its process was killed: worth another attempt."""


class Executor(Protocol):
    """Runs tasks, several at a time."""

    async def width(self) -> int:
        """How many tasks run at once."""
        ...

    def outcomes(self, tasks: Sequence[Task], stop: asyncio.Event) -> AsyncGenerator[Outcome, None]:
        """One outcome for each task, as they end; keys are unique.

        When ``stop`` is set what runs is told to end and the rest is not begun; their outcomes say so. Tasks that were lost
        are begun again, at most MAX_ATTEMPTS times in all. Raises Unavailable when nothing can be run at all.
        """
        ...

    async def aclose(self) -> None:
        """Let go of it; what still ran was told to end."""
        ...


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """``local:N``: processes of this host."""

    width: int


@dataclass(frozen=True, slots=True)
class DaskPlace:
    """``tcp://HOST:PORT`` or ``tls://HOST:PORT``: the scheduler of a Dask cluster."""

    address: str


Place = LocalPlace | DaskPlace


def parse_place(text: str) -> Place:
    """Read ``--executor``; raises UsageError."""
    if found := _LOCAL.fullmatch(text):
        width = int(found[1] or 2)
        if 1 <= width <= MAX_LOCAL:
            return LocalPlace(width)
    elif _TCP.fullmatch(text):
        return DaskPlace(text)
    raise UsageError(
        f"not an executor: {text!r}",
        hint=f"write local:N with N from 1 to {MAX_LOCAL}, or tcp://HOST:PORT of a Dask scheduler",
    )


def worst(codes: Iterable[int]) -> int:
    """The exit code that stands for all of them; one that ``tl`` does not have counts as 1."""
    known = (code if code in _SEVERITY else 1 for code in codes)
    return max(known, key=_SEVERITY.index, default=0)


def not_run(
    task: Task, message: str, *, code: int = STOPPED, attempts: int = 0, worker: str = "-"
) -> Outcome:
    """The outcome of a task that came to no end of its own."""
    return Outcome(task.key, code, message, (), None, worker, 0.0, attempts)
