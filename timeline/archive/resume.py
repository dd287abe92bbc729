"""Where an archiver goes on: the end of what is durable, the scan brought up to it, and bytes to compare.

Everything comes from the store, so that a restart and a reconnect are the same thing. The bytes just before
the end are asked for again from the source, and must be the same (EDGE 14, 19): nothing is acknowledged
before they were compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from timeline.archive.indexer import WalIndexer
from timeline.catalog.tail import Tail, TailChunk, find_tail, read_chunk, read_index
from timeline.format import keys
from timeline.format.branch_state import BranchState, SealedRange
from timeline.format.manifest import WalFrame
from timeline.format.wal_frame import decode_wal_frame
from timeline.lsn import Lsn
from timeline.pg.segment import segment_start
from timeline.store.base import Store

OVERLAP_BYTES = 64 << 10
"""How much is compared at least, where the source still has it for sure."""
OVERLAP_MOST_BYTES = 32 << 20
"""How much is compared at most; held in memory meanwhile."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """All that is needed to go on with a tli."""

    tail: Tail
    end: Lsn
    """The next chunk starts here; everything before is durable."""
    indexer: WalIndexer
    """Fed up to ``end``."""
    overlap: bytes
    """What the store has just before ``end``; the stream begins that much earlier."""

    @property
    def start(self) -> Lsn:
        """Where to begin to stream."""
        return Lsn(self.end - len(self.overlap))


@dataclass(frozen=True, slots=True)
class _Run:
    """A run of stored WAL."""

    start: Lsn
    end: Lsn
    read: Callable[[], Awaitable[bytes]]


async def find_resume_point(
    store: Store, state: BranchState, tli: int, *, segment_bytes: int, major: int, kept_from: Lsn | None
) -> ResumePoint:
    """Where ``tli`` goes on. ``kept_from``: the source keeps WAL from the segment of this LSN on; ``None``:
    unknown, nothing is compared.

    Raises NotFound when the tail was sealed and collected meanwhile (load the log again), DamagedStore.
    """
    tail = await find_tail(store, state, tli)
    end = tail.end
    pending = end
    overlap_from = end
    runs: list[_Run] = []
    async for run, run_pending in _backwards(store, state, tail):
        if not runs:
            if run.end != end:
                # A gap lies between: what comes after it has nothing to do with what was before.
                break
            pending = await run_pending()
            overlap_from = _overlap_from(end, kept_from, segment_bytes)
        elif run.end != runs[-1].start:
            break
        runs.append(run)
        if run.start <= min(pending, overlap_from):
            break
    # Without a run the end is where a tli or its archive begins, and the scan finds a record there or skips
    # to one.
    first = runs[-1].start if runs else end
    pending = max(pending, first)
    overlap_from = max(overlap_from, first)
    indexer = WalIndexer(segment_bytes, tli, pending, major=major)
    overlap = bytearray()
    for run in reversed(runs):
        wal = memoryview(await run.read())
        if run.end > pending:
            await asyncio.to_thread(indexer.feed, wal[max(0, pending - run.start) :])
        if run.end > overlap_from:
            overlap += wal[max(0, overlap_from - run.start) :]
    return ResumePoint(tail, end, indexer, bytes(overlap))


def _overlap_from(end: Lsn, kept_from: Lsn | None, segment_bytes: int) -> Lsn:
    if kept_from is None or kept_from > end:
        return end
    wanted = max(0, min(kept_from, end - OVERLAP_BYTES), end - OVERLAP_MOST_BYTES)
    return max(Lsn(wanted), segment_start(kept_from, segment_bytes))


_Pending = Callable[[], Awaitable[Lsn]]


async def _backwards(store: Store, state: BranchState, tail: Tail) -> AsyncIterator[tuple[_Run, _Pending]]:
    """Stored runs of the tli, newest first, each with how to learn where its last unfinished record
    begins."""
    for chunk in reversed(tail.chunks):
        yield _of_chunk(store, chunk)
    for sealed in sorted((one for one in state.sealed if one.tli == tail.tli), key=lambda one: -one.start):
        for frame in reversed(await _frames(store, sealed)):
            yield _of_frame(store, frame)


def _of_chunk(store: Store, chunk: TailChunk) -> tuple[_Run, _Pending]:
    async def read() -> bytes:
        return (await read_chunk(store, chunk)).wal

    async def pending() -> Lsn:
        return (await read_index(store, chunk)).pending

    return _Run(chunk.start, chunk.end, read), pending


def _of_frame(store: Store, frame: WalFrame) -> tuple[_Run, _Pending]:
    async def read() -> bytes:
        key = keys.pack(frame.pack)
        stored = await store.get(key, frame.offset, frame.stored_bytes)
        return await asyncio.to_thread(decode_wal_frame, stored, frame, key)

    async def pending() -> Lsn:
        return frame.pending

    return _Run(frame.start, frame.end, read), pending


async def _frames(store: Store, sealed: SealedRange) -> tuple[WalFrame, ...]:
    # Late: it brings pyarrow, which an archiver otherwise does without.
    from timeline.format.wal_manifest import read_wal_manifest

    data = await store.get(keys.manifest(sealed.manifest.digest))
    frames = await asyncio.to_thread(read_wal_manifest, data, sealed.manifest)
    return tuple(frame for frame in frames if frame.tli == sealed.tli)
