"""Sealing: the small WAL chunks of a tli become frames in packs, with one WAL manifest, named by the branch
log.

Order (P3): packs, manifest, log entry; the entry is the commit. Whatever is killed before it leaves objects
that nobody names, for the collector; the next seal does the work anew. Of several sealers at once one
commits and the others' entries no longer fit the log: they did nothing. The chunks stay: below the sealed
LSN they are void, and removing them is the collector's work (P2).

Cost: a chunk of more than half of FRAME_BYTES, as all are that an archiver cuts under load, goes into the pack
with its stored bytes as they are: they are read, verified and written again, and that is all. Only small chunks
are unpacked, put together and compressed anew.

Memory: about 70 MB. A pack under way and its finished copy (32 MiB), chunks read ahead (4 MiB) and in hand
(4 MiB) with their stored bytes, a frame raw and compressed (8 MiB), and the index of at most SEAL_BYTES of WAL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from timeline.catalog.branch_log import BranchLog
from timeline.catalog.index_merge import merge_indexes
from timeline.catalog.parallel import in_order
from timeline.catalog.tail import KnownChunks, Tail, TailChunk, find_tail, read_packed
from timeline.clock import Clock
from timeline.errors import DamagedStore, LogConflict, NotFound, Superseded, Unavailable
from timeline.format import keys, zstd_frame
from timeline.format.branch_state import SealedRange
from timeline.format.chunk import PackedChunk
from timeline.format.digest import parse_digest
from timeline.format.log_change import Seal
from timeline.format.manifest import WalFrame
from timeline.format.pack import NONCE_BYTES, WAL, PackBuilder
from timeline.format.wal_frame import encode_wal_frame
from timeline.format.wal_index import EventKind
from timeline.store.base import Store

SEAL_BYTES = 64 << 20
"""Due when so much WAL lies in chunks; also about how much one seal takes."""
SEAL_CHUNKS = 64
"""Due when so many chunks wait: each costs a reader one request."""
SEAL_SECONDS = 300
"""Due when the oldest chunk is so old."""
FRAME_BYTES = 4 << 20
"""Chunks are put together in frames of at most so much WAL; a longer chunk is a frame by itself."""
_PACK_BYTES = 12 << 20
"""A pack is finished at this size."""
_READ_AHEAD_BYTES = 4 << 20
_READS = 8


async def seal(
    store: Store,
    log: BranchLog,
    clock: Clock,
    *,
    tli: int | None = None,
    force: bool = False,
    known_chunks: KnownChunks | None = None,
) -> SealedRange | None:
    """Seal once where it is due: the range, or ``None`` when nothing was due or another sealer was faster.

    ``tli``: only that one, else all of the branch: those that the source left first. ``force``: whatever
    there is. ``known_chunks``: the caller's, so that a chunk that waits is not asked for again each time. Takes about
    SEAL_BYTES at a time: call again until ``None``. Raises DamagedStore, Unavailable.
    """
    head = await log.load()
    if head is None:
        return None
    state = head.state
    for known in sorted(state.tlis, key=lambda one: one.end is None):
        if tli is not None and known.tli != tli:
            continue
        if known_chunks is not None and known_chunks.is_done(known.tli):
            continue
        try:
            # No more than one bite: behind a backlog the rest would be read again for each of them.
            tail = await find_tail(
                store, state, known.tli, within_bytes=SEAL_BYTES, known_chunks=known_chunks
            )
            if known_chunks is not None and known.end is not None and not (tail.chunks or tail.detached):
                known_chunks.mark_done(known.tli)
            if tail.chunks and (force or known.end is not None or is_due(tail, clock)):
                return await _seal(store, log, clock, _adjoining(tail), head.number)
        except Superseded as error:
            raise Unavailable(f"sealing took too long: {error.message}", hint=error.hint) from error
        except (LogConflict, NotFound):
            # Sealed behind our back, and in the second case collected as well: the work is done.
            return None
    return None


def is_due(tail: Tail, clock: Clock) -> bool:
    """Whether a tail has grown enough in bytes, chunks or age."""
    oldest = tail.oldest
    return oldest is not None and (
        tail.bytes >= SEAL_BYTES
        or len(tail.chunks) >= SEAL_CHUNKS
        or clock.now() - oldest >= SEAL_SECONDS * 1_000_000
    )


def _adjoining(tail: Tail) -> tuple[TailChunk, ...]:
    """The chunks of one seal: up to a gap, and up to SEAL_BYTES."""
    taken: list[TailChunk] = []
    taken_bytes = 0
    for chunk in tail.chunks:
        if taken and (taken[-1].end != chunk.start or taken_bytes >= SEAL_BYTES):
            break
        taken.append(chunk)
        taken_bytes += chunk.end - chunk.start
    return tuple(taken)


async def _seal(
    store: Store, log: BranchLog, clock: Clock, chunks: Sequence[TailChunk], began: int
) -> SealedRange:
    # Parquet takes a quarter of a second to import, and an archiver may run for long before its first seal.
    from timeline.format.wal_manifest import write_wal_manifest

    frames = await _pack(store, clock, chunks)
    manifest, ref = await asyncio.to_thread(write_wal_manifest, frames, nonce=clock.token(NONCE_BYTES))
    await _create(store, keys.manifest(ref.digest), manifest)
    times = [
        (int(one.commits["time"].min()), int(one.commits["time"].max())) for one in frames if len(one.commits)
    ]
    sealed = SealedRange(
        tli=frames[0].tli,
        start=frames[0].start,
        end=frames[-1].end,
        manifest=ref,
        min_commit_time=min((earliest for earliest, _ in times), default=None),
        max_commit_time=max((latest for _, latest in times), default=None),
        commits=sum(len(frame.commits) for frame in frames),
        restore_points=sum(
            event.kind is EventKind.RESTORE_POINT for frame in frames for event in frame.events
        ),
    )
    covered = [chunk.header.coverage for chunk in chunks if chunk.header.coverage is not None]
    newest = max(covered, key=lambda coverage: (coverage.time, coverage.lsn), default=None)
    await log.append(Seal(sealed, newest, began))
    return sealed


async def _pack(store: Store, clock: Clock, chunks: Sequence[TailChunk]) -> list[WalFrame]:
    """Write the chunks' WAL into packs; the frames, where they are now."""
    packer = _Packer(store, clock, chunks[0].header.store_id)
    together: list[PackedChunk] = []
    reads = in_order(
        chunks,
        lambda chunk: read_packed(store, chunk),
        limit=_READS,
        cost=lambda chunk: chunk.end - chunk.start,
        budget=_READ_AHEAD_BYTES,
    )
    async with aclosing(reads) as results:
        async for chunk in results:
            if together and chunk.header.end - together[0].header.start > FRAME_BYTES:
                await packer.add(together)
                together = []
            together.append(chunk)
    await packer.add(together)
    await packer.flush()
    return packer.frames


class _Packer:
    """Puts frames into packs and the packs into the store."""

    def __init__(self, store: Store, clock: Clock, store_id: str) -> None:
        self._store = store
        self._clock = clock
        self._store_id = store_id
        self._builder = self._new_pack()
        self._waiting: list[WalFrame] = []
        """Frames of the pack under way, whose name is not known yet."""
        self.frames: list[WalFrame] = []

    async def add(self, chunks: Sequence[PackedChunk]) -> None:
        """One frame of adjoining chunks."""
        index = merge_indexes([chunk.index for chunk in chunks])
        stored, digest = await asyncio.to_thread(_frame_of, chunks)
        self._waiting.append(
            WalFrame(
                tli=chunks[0].header.tli,
                start=chunks[0].header.start,
                end=chunks[-1].header.end,
                pack="",
                offset=self._builder.add(stored),
                stored_bytes=len(stored),
                digest=digest,
                last_record=index.last_record,
                last_record_end=index.last_record_end,
                pending=index.pending,
                records=index.records,
                commits=index.commits,
                events=index.events,
                touches=index.touches,
            )
        )
        if self._builder.size >= _PACK_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Finish the pack under way, if it has any frame."""
        if not self._waiting:
            return
        pack, data = await asyncio.to_thread(self._builder.finish)
        await _create(self._store, keys.pack(pack), data)
        self.frames += (replace(frame, pack=pack) for frame in self._waiting)
        self._waiting = []
        self._builder = self._new_pack()

    def _new_pack(self) -> PackBuilder:
        return PackBuilder(self._store_id, WAL, nonce=self._clock.token(NONCE_BYTES))


def _frame_of(chunks: Sequence[PackedChunk]) -> tuple[bytes | memoryview, bytes]:
    """(stored frame, digest) of adjoining chunks. A chunk by itself is a frame already: it is taken over as it
    is, so that sealing what comes in full chunks neither unpacks nor compresses anything."""
    first = chunks[0]
    if len(chunks) == 1 and len(first.layout.frames) == 1:
        zstd_frame.check(first.frames, first.layout.frames[0].raw_bytes, first.key, first.layout.header_bytes)
        return first.frames, parse_digest(first.header.digest)
    return encode_wal_frame(b"".join(chunk.unpack() for chunk in chunks))


async def _create(store: Store, key: str, data: bytes) -> None:
    if not await store.create(key, data):
        raise DamagedStore(key, 0, "expected the bytes this object is named by")
