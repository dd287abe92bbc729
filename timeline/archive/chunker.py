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

SPARE_BUFFERS = 3
"""Buffers kept for chunks to come, at most: those of a chunk that was just stored and of its neighbours."""


class ChunkBuffers:
    """Memory for full chunks, used again, because a new block costs a page fault for every 4 KiB."""

    def __init__(self, size: int = CUT_BYTES) -> None:
        self._size = size
        self._spare: list[bytearray] = []

    def take(self) -> bytearray:
        """``size`` bytes of anything."""
        return self._spare.pop() if self._spare else bytearray(self._size)

    def give(self, chunk: RawChunk) -> None:
        """Nobody will look at this chunk's WAL again."""
        buffer = chunk.wal.obj
        if isinstance(buffer, bytearray) and len(buffer) == self._size and len(self._spare) < SPARE_BUFFERS:
            self._spare.append(buffer)


@dataclass(frozen=True, slots=True)
class RawChunk:
    """A run of WAL, cut and not yet stored."""

    start: Lsn
    wal: memoryview
    """Nobody changes it until it is stored."""
    coverage: Coverage | None
    """The source had no WAL beyond ``coverage.lsn``, at most the end of this chunk, at that time on its
    clock."""

    @property
    def end(self) -> Lsn:
        """Exclusive."""
        return Lsn(self.start + len(self.wal))


class Chunker:
    """Collects one tli's WAL from ``position`` on, in one buffer of ``cut_bytes``.

    A chunk of more than half of that takes the buffer along, a shorter one is a copy: chunks hold at most twice
    their length (P9).
    """

    def __init__(
        self, tli: int, position: Lsn, *, cut_bytes: int = CUT_BYTES, buffers: ChunkBuffers | None = None
    ) -> None:
        self._tli = tli
        self._cut_bytes = cut_bytes
        self._buffers = buffers or ChunkBuffers(cut_bytes)
        self._start = position
        self._open: memoryview | None = None
        self._filled = 0
        self._since: float | None = None
        self._coverage: Coverage | None = None

    @property
    def position(self) -> Lsn:
        """LSN of the next byte expected."""
        return Lsn(self._start + self._filled)

    @property
    def open_bytes(self) -> int:
        """Bytes collected and not yet cut."""
        return self._filled

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
            self._fill(view[:room], now)
            if len(view) >= room:
                chunk = self.cut()
                if chunk is not None:
                    full.append(chunk)
            view = view[room:]
        return full

    def _fill(self, part: memoryview, now: float) -> None:
        if self._since is None:
            self._since = now
        if self._open is None:
            self._open = memoryview(self._buffers.take())
        end = self._filled + len(part)
        self._open[self._filled : end] = part
        self._filled = end

    def cover(self, lsn: Lsn, time: Micros) -> None:
        """The source had no WAL beyond ``lsn`` (at most ``position``) at ``time``; goes with the next cut.

        Coverage of what is already cut is not for us to store: the caller's heartbeat does.
        """
        if self._start < lsn <= self.position:
            self._coverage = Coverage(self._tli, lsn, time)

    def cut(self) -> RawChunk | None:
        """The open chunk, closed; ``None`` when it is empty."""
        if self._open is None or not self._filled:
            return None
        wal = self._open[: self._filled]
        if 2 * self._filled > self._cut_bytes:
            self._open = None
        else:
            wal = memoryview(bytes(wal))
        chunk = RawChunk(self._start, wal, self._coverage)
        self._start = chunk.end
        self._filled = 0
        self._since = None
        self._coverage = None
        return chunk
