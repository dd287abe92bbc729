"""Reading WAL out of the store: which frames and chunks hold it, and their bytes, verified, in order.

Memory: at most IN_FLIGHT_BYTES of raw WAL are fetched ahead of the reader, plus the compressed bytes they
come from. Cancelling or closing the iterator cancels what is under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from timeline.catalog.index_reader import READS, IndexReader
from timeline.catalog.line import Piece
from timeline.catalog.parallel import in_order, in_parallel
from timeline.catalog.tail import TailChunk, read_chunk
from timeline.format import keys
from timeline.format.manifest import WalFrame
from timeline.format.wal_frame import decode_wal_frame
from timeline.format.wal_index import no_commits
from timeline.lsn import Lsn
from timeline.store.base import Store

IN_FLIGHT_BYTES = 64 << 20
_IN_FLIGHT = 16
"""Objects read at once."""


@dataclass(frozen=True, slots=True)
class WalPiece:
    """WAL [start, end) of one tli, all of it in one frame or one chunk."""

    tli: int
    start: Lsn
    end: Lsn
    source: WalFrame | TailChunk
    """Holds at least this; a frame without its index."""

    @property
    def key(self) -> str:
        """Object that holds it."""
        return self.source.key if isinstance(self.source, TailChunk) else keys.pack(self.source.pack)

    @property
    def stored_bytes(self) -> int:
        """What fetching it takes."""
        if isinstance(self.source, TailChunk):
            return self.source.layout.size
        return self.source.stored_bytes


@dataclass(frozen=True, slots=True)
class WalBytes:
    """A piece with its bytes."""

    piece: WalPiece
    data: memoryview
    """``piece.end - piece.start`` bytes of raw WAL."""


async def plan_pieces(reader: IndexReader, pieces: Sequence[Piece]) -> tuple[WalPiece, ...]:
    """The frames and chunks that hold these pieces, in order; raises NotFound, DamagedStore."""
    plans = await in_parallel(pieces, lambda piece: _plan(reader, piece), limit=READS)
    return tuple(planned for plan in plans for planned in plan)


async def read_pieces(store: Store, plan: Sequence[WalPiece]) -> AsyncGenerator[WalBytes, None]:
    """The bytes of the pieces, in order; raises NotFound, DamagedStore."""
    async with aclosing(
        in_order(
            plan,
            lambda piece: read_piece(store, piece),
            limit=_IN_FLIGHT,
            cost=lambda piece: piece.source.end - piece.source.start,
            budget=IN_FLIGHT_BYTES,
        )
    ) as results:
        async for result in results:
            yield result


async def read_piece(store: Store, piece: WalPiece) -> WalBytes:
    """The bytes of one piece, verified (P5); raises NotFound, DamagedStore."""
    source = piece.source
    if isinstance(source, TailChunk):
        raw = (await read_chunk(store, source)).wal
    else:
        stored = await store.get(piece.key, source.offset, source.stored_bytes)
        raw = await asyncio.to_thread(decode_wal_frame, stored, source, piece.key)
    return WalBytes(piece, memoryview(raw)[piece.start - source.start : piece.end - source.start])


async def _plan(reader: IndexReader, piece: Piece) -> tuple[WalPiece, ...]:
    source = piece.source
    if isinstance(source, TailChunk):
        return (WalPiece(piece.tli, piece.start, piece.end, replace(source, index=None)),)
    return tuple(
        WalPiece(
            piece.tli,
            Lsn(max(piece.start, frame.start)),
            Lsn(min(piece.end, frame.end)),
            replace(frame, commits=no_commits(), events=()),
        )
        for frame in await reader.frames(source, piece.start, piece.end)
    )
