"""One child process from start to end: its lines, its time limit, and its end, whatever it does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from timeline.clock import Clock

KEPT_LINES = 20
"""The last lines of stdout and of stderr, kept to say why a child failed."""
LONGEST_LINE_BYTES = 8192
"""Of a line; the rest of it is passed over."""
DRAIN_SECONDS = 5.0
"""How long after the child's end its pipes are read: a grandchild may hold them open for ever."""
STOPPED = -1000
"""Exit code of a child that could not even be started; below every signal's."""
_READ_BYTES = 16_384


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended."""

    code: int
    """As subprocess has it: minus the signal's number for one that was killed."""
    out: tuple[str, ...]
    errors: tuple[str, ...]
    """The last lines of stdout and stderr."""
    seconds: float
    timed_out: bool
    stopped: bool
    """Because we were told to stop."""


async def run_child(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    clock: Clock,
    stop: asyncio.Event,
    timeout_seconds: float | None,
    grace_seconds: float,
    on_start: Callable[[int], None] = lambda pid: None,
    on_out: Callable[[str], None] = lambda line: None,
    on_error: Callable[[str], None] = lambda line: None,
    text: bytes = b"",
    out_lines: int = KEPT_LINES,
    out_line_bytes: int = LONGEST_LINE_BYTES,
) -> Ended:
    """Run it in a session of its own until it ends, ``stop`` is set or its time is over.

    Then it gets SIGTERM, and after ``grace_seconds`` its whole process group gets SIGKILL. ``text`` is its stdin;
    ``out_lines`` and ``out_line_bytes`` bound what is kept of its stdout.
    Never raises for what the child does; one that cannot be started has ended with ``STOPPED``.
    """
    began = clock.monotonic()
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE if text else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(environment),
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return Ended(STOPPED, (), (f"cannot be started: {error}",), 0.0, timed_out=False, stopped=False)
    on_start(process.pid)
    out: deque[str] = deque(maxlen=out_lines)
    errors: deque[str] = deque(maxlen=KEPT_LINES)
    readers = [
        asyncio.create_task(_read(process.stdout, out, on_out, out_line_bytes)),
        asyncio.create_task(_read(process.stderr, errors, on_error, LONGEST_LINE_BYTES)),
        asyncio.create_task(_feed(process.stdin, text)),
    ]
    waiting = asyncio.create_task(process.wait())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((waiting, stopping), timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        ended_itself, stopped = waiting.done(), stopping.done() and not waiting.done()
        if not ended_itself:
            await _end(process, waiting, grace_seconds)
        # What it printed last is most often why it ended.
        await asyncio.wait(readers, timeout=DRAIN_SECONDS)
    finally:
        if not waiting.done():
            _kill_group(process.pid)
        for task in (*readers, stopping):
            task.cancel()
        await asyncio.gather(*readers, stopping, waiting, return_exceptions=True)
    code = process.returncode if process.returncode is not None else STOPPED
    return Ended(
        code,
        tuple(out),
        tuple(errors),
        clock.monotonic() - began,
        timed_out=not ended_itself and not stopped,
        stopped=stopped,
    )


async def _end(process: asyncio.subprocess.Process, waiting: asyncio.Task[int], grace_seconds: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    await asyncio.wait((waiting,), timeout=grace_seconds)
    # Also when the child itself has ended: what it left behind in its group was to end with it. The number is free
    # for others only once the group is empty.
    _kill_group(process.pid)
    await waiting


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


async def _feed(stream: asyncio.StreamWriter | None, text: bytes) -> None:
    if stream is None:
        return
    # A child may well end without having read all of it.
    with contextlib.suppress(ConnectionError, BrokenPipeError):
        stream.write(text)
        await stream.drain()
    stream.close()


async def _read(
    stream: asyncio.StreamReader | None, kept: deque[str], tell: Callable[[str], None], longest: int
) -> None:
    """Line by line to the end, however long the lines are; memory is bounded by ``longest`` bytes of each."""
    if stream is None:
        return

    def line(raw: bytes) -> None:
        text = raw.decode("utf-8", errors="replace").rstrip("\r\n")
        kept.append(text)
        tell(text)

    held = b""
    cut = False
    while piece := await stream.read(_READ_BYTES):
        *whole, rest = (held + piece).split(b"\n")
        for each in whole:
            if not cut:
                line(each[:longest])
            cut = False
        held = rest
        if len(held) > longest:
            if not cut:
                line(held[:longest])
            held, cut = b"", True
        elif cut:
            held = b""
    if held and not cut:
        line(held)
