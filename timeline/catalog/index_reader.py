"""Reading what sealed ranges and chunks say about their WAL, without the WAL itself.

Memory: the last _MANIFESTS manifests (about 4 MiB each on a busy server, without the relations touched) and
the last _CHUNKS chunk indexes are kept.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Iterable
from dataclasses import dataclass, replace

from timeline.catalog.line import Piece
from timeline.catalog.parallel import in_parallel
from timeline.catalog.tail import TailChunk, read_index
from timeline.errors import DamagedStore
from timeline.format import keys
from timeline.format.log import SealedRange
from timeline.format.manifest import WalFrame
from timeline.format.wal_index import CommitArray, WalEvent, no_touches
from timeline.lsn import Lsn
from timeline.store.base import Store

READS = 16
"""Manifests or chunk indexes fetched at once."""
_MANIFESTS = 8
_CHUNKS = 256


@dataclass(frozen=True, slots=True)
class Entry:
    """Index of one frame or chunk, as far as it lies on the line."""

    tli: int
    start: Lsn
    end: Lsn
    last_record: Lsn
    """As in WalIndex; 0 also when it is not known because the line leaves this WAL half-way."""
    last_record_end: Lsn
    pending: Lsn
    commits: CommitArray
    events: tuple[WalEvent, ...]
    cut: bool
    """Whether the line leaves this WAL before its end."""


class IndexReader:
    """Reads indexes of one branch, verified (P5)."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._frames: collections.OrderedDict[str, tuple[WalFrame, ...]] = collections.OrderedDict()
        self._chunks: collections.OrderedDict[str, Entry] = collections.OrderedDict()

    async def frames(self, sealed: SealedRange) -> tuple[WalFrame, ...]:
        """The frames of a sealed range, without ``touches``; raises NotFound, DamagedStore."""
        known = self._frames.get(sealed.manifest.digest)
        if known is None:
            known = tuple(
                replace(frame, touches=no_touches()) for frame in await read_frames(self._store, sealed)
            )
            self._frames[sealed.manifest.digest] = known
            if len(self._frames) > _MANIFESTS:
                self._frames.popitem(last=False)
        else:
            self._frames.move_to_end(sealed.manifest.digest)
        return known

    async def entries(self, piece: Piece) -> tuple[Entry, ...]:
        """What is indexed of a piece, in WAL order; raises NotFound, DamagedStore."""
        if isinstance(piece.source, TailChunk):
            return (_on_line(await self._chunk(piece.source), piece),)
        return tuple(
            _on_line(_of_frame(frame), piece)
            for frame in await self.frames(piece.source)
            if frame.start < piece.end and piece.start < frame.end
        )

    async def all_entries(self, pieces: Iterable[Piece]) -> list[Entry]:
        """The entries of many pieces, in order."""
        found = await in_parallel(pieces, self.entries, limit=READS)
        return [entry for entries in found for entry in entries]

    async def _chunk(self, chunk: TailChunk) -> Entry:
        known = self._chunks.get(chunk.key)
        if known is None:
            index = await read_index(self._store, chunk)
            known = Entry(
                tli=chunk.header.tli,
                start=chunk.start,
                end=chunk.end,
                last_record=index.last_record,
                last_record_end=index.last_record_end,
                pending=index.pending,
                commits=index.commits,
                events=index.events,
                cut=False,
            )
            self._chunks[chunk.key] = known
            if len(self._chunks) > _CHUNKS:
                self._chunks.popitem(last=False)
        return known


async def read_frames(store: Store, sealed: SealedRange) -> tuple[WalFrame, ...]:
    """All that the WAL manifest of a sealed range says; raises NotFound, DamagedStore."""
    # Parquet takes a quarter of a second to import, which a branch at the head need not wait for.
    from timeline.format.wal_manifest import read_wal_manifest

    key = keys.manifest(sealed.manifest.digest)
    data = await store.get(key)
    frames = await asyncio.to_thread(read_wal_manifest, data, sealed.manifest)
    position = sealed.start
    for frame in frames:
        if frame.tli != sealed.tli or frame.start != position:
            raise DamagedStore(key, 0, f"expected a frame of tli {sealed.tli} at {position}")
        position = frame.end
    if position != sealed.end:
        raise DamagedStore(key, 0, f"expected frames up to {sealed.end}, found them up to {position}")
    return frames


def _of_frame(frame: WalFrame) -> Entry:
    return Entry(
        tli=frame.tli,
        start=frame.start,
        end=frame.end,
        last_record=frame.last_record,
        last_record_end=frame.last_record_end,
        pending=frame.pending,
        commits=frame.commits,
        events=frame.events,
        cut=False,
    )


def _on_line(entry: Entry, piece: Piece) -> Entry:
    """Without what lies beyond the fork where the line leaves the entry (EDGE 17, 18)."""
    begins_late = entry.start < piece.start
    if entry.end <= piece.end and not begins_late:
        return entry
    first = piece.start if begins_late else Lsn(0)
    starts = entry.commits["start"]
    commits = entry.commits[(starts >= first) & (starts < piece.end)]
    events = tuple(event for event in entry.events if first <= event.start < piece.end)
    entry = replace(entry, start=max(entry.start, piece.start), commits=commits, events=events)
    if entry.end <= piece.end:
        return entry
    return replace(
        entry, end=piece.end, last_record=Lsn(0), last_record_end=Lsn(0), pending=piece.end, cut=True
    )
