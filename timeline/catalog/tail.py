"""The tail: WAL that is in chunks and not yet sealed, found by the chunk-name rule.

Chunks of a tli form a chain from its sealed LSN, each starting where the last one ended; recorded gaps are
stepped over. A chunk is committed by its creation alone, so the chain is all there is to know: chunks off it
or below the sealed LSN are void, and a missing chunk ends it (EDGE 60, 63), whatever lies beyond.

Cost: one LIST and one ranged GET per chunk, _READS of them at once. Memory: about 2 KiB per unsealed chunk,
and the indexes of those small enough to come whole with their header.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from timeline.catalog.parallel import in_parallel
from timeline.clock import Micros
from timeline.errors import DamagedStore
from timeline.format import keys
from timeline.format.branch_state import BranchState
from timeline.format.chunk import (
    HEADER_READ_BYTES,
    Chunk,
    ChunkHeader,
    ChunkLayout,
    PackedChunk,
    decode_chunk,
    decode_index_frame,
    decode_layout,
    decode_packed,
)
from timeline.format.wal_index import Coverage, WalIndex
from timeline.lsn import Lsn
from timeline.store.base import Listed, Store

ChunkT = TypeVar("ChunkT", Chunk, PackedChunk)

_READS = 32
"""Chunks read at once while following the chain."""
_WHOLE_BYTES = 64 << 10
"""Objects up to this size are fetched whole instead of their header: the same one request."""


@dataclass(frozen=True, slots=True)
class TailChunk:
    """One chunk on the chain."""

    layout: ChunkLayout
    key: str
    index: WalIndex | None
    """Known already when the chunk was small enough to be fetched whole; see ``read_index``."""

    @property
    def header(self) -> ChunkHeader:
        """What the chunk says about itself."""
        return self.layout.header

    @property
    def start(self) -> Lsn:
        """First byte of WAL it holds."""
        return self.header.start

    @property
    def end(self) -> Lsn:
        """Just after the last one."""
        return self.header.end


@dataclass(frozen=True, slots=True)
class Tail:
    """The unsealed chain of one tli."""

    tli: int
    start: Lsn
    """Where it begins: the tli's sealed LSN (after a gap there)."""
    chunks: tuple[TailChunk, ...]
    """In WAL order; consecutive ones adjoin but for gaps that the log records."""
    end: Lsn
    """Where the chain ends, and the next chunk must start: everything below is durable. Behind a gap that
    the log records at the chain's last byte, this is the gap's end."""
    coverage: Coverage | None
    """The newest that a chunk on the chain tells."""
    epoch: int
    """Highest archiver epoch in any chunk seen, on the chain or off it; 0 without chunks."""
    detached: tuple[Lsn, ...]
    """Starts of chunks beyond ``end``: a later upload of an archiver at work that overtook an earlier one,
    or left by one that was killed, or what an unordered copy of the store left behind a missing object (EDGE
    63)."""

    @property
    def headers(self) -> tuple[ChunkHeader, ...]:
        """The chain's headers, in WAL order."""
        return tuple(chunk.header for chunk in self.chunks)

    @property
    def bytes(self) -> int:
        """Raw WAL bytes in the chain."""
        return sum(chunk.end - chunk.start for chunk in self.chunks)

    @property
    def oldest(self) -> Micros | None:
        """When the first chunk of the chain was made, by the archiver's clock."""
        return self.chunks[0].header.created if self.chunks else None


class KnownChunks:
    """Chunks of one branch that were read before, for whoever asks for a tail again and again.

    A chunk never changes, so what was read of it stays true; whether it is still there, a listing says. A tli that the
    source left gets no more chunks, so once none is left there, none will be. Bound: what the last listing of each tli
    held.
    """

    def __init__(self) -> None:
        self._of: dict[int, dict[str, TailChunk]] = {}
        self._done: set[int] = set()

    def of(self, tli: int) -> Mapping[str, TailChunk]:
        """By key."""
        return self._of.get(tli, {})

    def is_done(self, tli: int) -> bool:
        """Whether nothing waits on a tli that was left."""
        return tli in self._done

    def mark_done(self, tli: int) -> None:
        """Nothing waits on a tli that was left."""
        self._done.add(tli)

    def keep(self, tli: int, chunks: Iterable[TailChunk]) -> None:
        """All that is known of a tli from now on."""
        self._of[tli] = {chunk.key: chunk for chunk in chunks}


async def find_tail(
    store: Store,
    state: BranchState,
    tli: int,
    *,
    within_bytes: int | None = None,
    known_chunks: KnownChunks | None = None,
) -> Tail:
    """The chain of a tli as it is now; ``within_bytes``: only of chunks that start so close to its start, as if
    there were no others. ``known_chunks`` are listed, and not read again.

    Raises NotFound when a chunk vanished between listing and reading (sealed and collected meanwhile: load
    the log again), DamagedStore when a header is not what its key says or another cluster's.
    """
    known = state.find_tli(tli)
    if known is None:
        raise ValueError(f"branch {state.branch} has no tli {tli}")
    start = state.after_gap(tli, known.sealed)
    listed = await store.list(
        keys.chunk_prefix(state.branch, tli),
        after=keys.chunk(state.branch, tli, start - 1) if start else "",
    )
    if within_bytes is not None:
        listed = [item for item in listed if _starts_before(item.key, start + within_bytes)]
    before = known_chunks.of(tli) if known_chunks is not None else {}

    async def chunk_of(item: Listed) -> TailChunk | None:
        return before.get(item.key) or await _read(store, state, item)

    read = await in_parallel(listed, chunk_of, limit=_READS)
    chunks = [chunk for chunk in read if chunk is not None]
    if known_chunks is not None:
        known_chunks.keep(tli, chunks)
    by_start = {chunk.start: chunk for chunk in chunks}
    chain: list[TailChunk] = []
    position = start
    while (chunk := by_start.get(position)) is not None:
        chain.append(chunk)
        position = state.after_gap(tli, chunk.end)
    covered = [chunk.header.coverage for chunk in chain if chunk.header.coverage is not None]
    return Tail(
        tli=tli,
        start=start,
        chunks=tuple(chain),
        end=position,
        coverage=max(covered, key=lambda coverage: (coverage.time, coverage.lsn), default=None),
        epoch=max((chunk.header.epoch for chunk in chunks), default=0),
        detached=tuple(chunk.start for chunk in chunks if chunk.start > position),
    )


async def read_index(store: Store, chunk: TailChunk) -> WalIndex:
    """The chunk's index, verified, without its WAL; raises NotFound, DamagedStore."""
    if chunk.index is not None:
        return chunk.index
    frame = chunk.layout.index
    stored = await store.get(chunk.key, frame.offset, frame.stored_bytes)
    return await asyncio.to_thread(decode_index_frame, stored, chunk.layout, chunk.key)


async def read_chunk(store: Store, chunk: TailChunk) -> Chunk:
    """The whole chunk, verified; raises NotFound, DamagedStore."""
    data = await store.get(chunk.key)
    return _same(chunk, await asyncio.to_thread(decode_chunk, data, chunk.key))


async def read_packed(store: Store, chunk: TailChunk) -> PackedChunk:
    """The whole chunk with its WAL still compressed; raises NotFound, DamagedStore."""
    data = await store.get(chunk.key)
    return _same(chunk, await asyncio.to_thread(decode_packed, data, chunk.key))


def _same(chunk: TailChunk, found: ChunkT) -> ChunkT:
    if found.header != chunk.header:
        raise DamagedStore(chunk.key, 0, "expected the header that was read before: chunks never change")
    return found


def _starts_before(key: str, lsn: int) -> bool:
    named = keys.parse_chunk(key)
    return named is not None and named.start < lsn


async def _read(store: Store, state: BranchState, listed: Listed) -> TailChunk | None:
    key = listed.key
    if keys.parse_chunk(key) is None:
        return None
    whole = listed.size <= _WHOLE_BYTES
    data = await store.get(key, 0, None if whole else HEADER_READ_BYTES)
    layout = decode_layout(data, key)
    systems = {incarnation.system_identifier for incarnation in state.incarnations}
    if layout.header.system_identifier not in systems:
        raise DamagedStore(key, 0, f"expected WAL of this cluster, found {layout.header.system_identifier}")
    return TailChunk(layout, key, _index_of(data, layout, key) if whole else None)


def _index_of(data: bytes, layout: ChunkLayout, key: str) -> WalIndex | None:
    """The index of a chunk fetched whole. One that is damaged is left to those who need it: they read it
    again and raise, and nobody who asks for an earlier moment is held up by it."""
    try:
        return decode_index_frame(memoryview(data)[layout.index.offset :], layout, key)
    except DamagedStore:
        return None
