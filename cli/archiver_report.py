"""What ``tl archive --json-status`` writes: its state as one line of JSON, for whoever supervises it.

The archiver never waits for its reader: a line that does not fit into the pipe is left out, the next one says more. A
reader that is gone means that the supervisor is dead: the archiver then ends, too, so that its successor finds the
slot free.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from cli.observed import ArchiverState, SlotState
from cli.observed_json import decode, encode
from timeline.clock import Clock
from timeline.errors import UsageError
from timeline.lsn import Lsn

if TYPE_CHECKING:
    from timeline.archive.status import ArchiverStatus

KEY = "archiver"
"""Of the object on each line; nothing else that ``tl archive`` prints has it."""
REPEAT_SECONDS = 5.0
"""A line at least so often, changed or not: silence means that the event loop is stuck."""
_PIPE_BYTES = 4096
"""PIPE_BUF of Linux: a line up to this goes into a pipe as a whole or not at all."""
_ERROR_CHARACTERS = 600


class StatusWriter:
    """Writes to an inherited descriptor."""

    def __init__(self, descriptor: int, clock: Clock, on_reader_gone: Callable[[], None]) -> None:
        """Raises UsageError when the descriptor is not open."""
        self._clock = clock
        self._on_reader_gone = on_reader_gone
        self._last: ArchiverState | None = None
        self.gone = False
        """Whether the reader is."""
        try:
            is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
            self._descriptor = os.dup(descriptor)
        except OSError as error:
            raise UsageError(
                f"descriptor {descriptor} is not open", hint="--json-status 1 writes to stdout"
            ) from error
        if is_pipe:
            os.set_blocking(self._descriptor, False)

    def write(self, status: ArchiverStatus, durable: Lsn | None, *, repeat: bool) -> None:
        """Write what is new; with ``repeat`` also what is not."""
        state = describe(status, durable)
        if self.gone or (state == self._last and not repeat):
            return
        spoken = dataclasses.replace(state, reported_at=self._clock.now())
        line = _line(spoken)
        if len(line) > _PIPE_BYTES:
            # Escapes can make six bytes of one character.
            line = _line(dataclasses.replace(spoken, error="see the log"))
        try:
            os.write(self._descriptor, line)
        except BlockingIOError:
            return
        except OSError:
            self.gone = True
            self._on_reader_gone()
            return
        self._last = state

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._descriptor)


def _line(state: ArchiverState) -> bytes:
    return encode({KEY: state}).encode() + b"\n"


def describe(status: ArchiverStatus, durable: Lsn | None) -> ArchiverState:
    """The archiver as its supervisor wants to know it; fits into one pipe-sized line."""
    error = status.error
    if error is not None and status.hint:
        error = f"{error} ({status.hint})"
    return ArchiverState(
        pid=os.getpid(),
        restarts=0,
        reported_at=None,
        phase=str(status.phase),
        tli=status.tli,
        durable=durable if durable is not None else status.durable,
        received=status.received,
        source_end=status.source_end,
        last_commit_time=status.last_commit_time,
        coverage_time=status.coverage.time if status.coverage is not None else None,
        slot=SlotState(
            status.slot.name,
            str(status.slot.wal_status) if status.slot.wal_status is not None else None,
            status.slot.safe_bytes,
        )
        if status.slot is not None
        else None,
        synchronous=status.synchronous,
        chunks=status.chunks,
        wal_bytes=status.wal_bytes,
        stored_bytes=status.stored_bytes,
        uploads=status.uploads,
        upload_seconds=round(status.upload_seconds, 6),
        upload_errors=status.upload_errors,
        behind_since=status.behind_since,
        error=error[:_ERROR_CHARACTERS] if error is not None else None,
    )


def parse_report(line: str) -> ArchiverState | None:
    """The state on a line of stdout; ``None`` for any other line. Raises ValueError for a broken one."""
    if not line.startswith(f'{{"{KEY}":'):
        return None
    return decode(ArchiverState, json.dumps(json.loads(line)[KEY]))
