"""Cuts the stream into chunks: at every multiple of 4 MiB, and earlier when the oldest byte has waited long
enough.

Cutting at multiples makes the cuts of a backlog the same on every run, so that an archiver that died with
uploads in flight finds its own orphans under the keys where it would put them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.clock import Micros
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn

CUT_BYTES = 4 << 20
"""No chunk is longer, and none crosses a multiple of it."""


@dataclass(frozen=True, slots=True)
class RawChunk:
    """A run of WAL, cut and not yet stored."""

    start: Lsn
    wal: bytearray
    """Nobody changes it any more."""
    coverage: Coverage | None
    """The source had no WAL beyond ``coverage.lsn``, at most the end of this chunk, at that time on its
    clock."""

    @property
    def end(self) -> Lsn:
        """Exclusive."""
        return Lsn(self.start + len(self.wal))


class Chunker:
    """Collects one tli's WAL from ``position`` on. Holds less than ``cut_bytes``."""

    def __init__(self, tli: int, position: Lsn, *, cut_bytes: int = CUT_BYTES) -> None:
        self._tli = tli
        self._cut_bytes = cut_bytes
        self._start = position
        self._open = bytearray()
        self._since: float | None = None
        self._coverage: Coverage | None = None

    @property
    def position(self) -> Lsn:
        """LSN of the next byte expected."""
        return Lsn(self._start + len(self._open))

    @property
    def open_bytes(self) -> int:
        """Bytes collected and not yet cut."""
        return len(self._open)

    @property
    def oldest(self) -> float | None:
        """When the oldest byte of the open chunk came (monotonic); ``None`` when it is empty."""
        return self._since

    def add(self, data: bytes | memoryview, now: float) -> list[RawChunk]:
        """Take the next bytes; returns the chunks that are full."""
        view = memoryview(data)
        full: list[RawChunk] = []
        while len(view):
            room = self._cut_bytes - self.position % self._cut_bytes
            if self._since is None:
                self._since = now
            self._open += view[:room]
            if len(view) >= room:
                chunk = self.cut()
                if chunk is not None:
                    full.append(chunk)
            view = view[room:]
        return full

    def cover(self, lsn: Lsn, time: Micros) -> None:
        """The source had no WAL beyond ``lsn`` (at most ``position``) at ``time``; goes with the next cut.

        Coverage of what is already cut is not for us to store: the caller's heartbeat does.
        """
        if self._start < lsn <= self.position:
            self._coverage = Coverage(self._tli, lsn, time)

    def cut(self) -> RawChunk | None:
        """The open chunk, closed; ``None`` when it is empty."""
        if not self._open:
            return None
        chunk = RawChunk(self._start, self._open, self._coverage)
        self._start = chunk.end
        self._open = bytearray()
        self._since = None
        self._coverage = None
        return chunk
