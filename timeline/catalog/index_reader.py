"""Reading what sealed ranges and chunks say about their WAL, without the WAL itself.

Memory: the last _MANIFESTS manifests or, of merged ranges, groups of rows (about 4 MiB each on a busy server, without
the relations touched) and the last _CHUNKS chunk indexes are kept.

A merged range has a long manifest. Whoever reads at one LSN gets its footer and the groups of rows in question;
``parts`` splits such a range into what its groups say, so that nobody else need know.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from timeline.catalog.line import Piece
from timeline.catalog.parallel import in_parallel
from timeline.catalog.tail import TailChunk, read_index
from timeline.errors import DamagedStore
from timeline.format import keys
from timeline.format.branch_state import SealedRange
from timeline.format.manifest import WalFrame
from timeline.format.wal_index import CommitArray, WalEvent, no_touches
from timeline.lsn import Lsn
from timeline.store.base import Store

if TYPE_CHECKING:
    from timeline.format.wal_manifest import WalGroup, WalManifestFooter

K = TypeVar("K")
V = TypeVar("V")

READS = 16
"""Manifests or chunk indexes fetched at once."""
_MANIFESTS = 8
_WHOLE_ROWS = 64
"""Manifests of at most so many rows are read whole: one request, and one group of rows anyway."""
_WHOLE_BYTES = 64 << 10
"""So are those that are no longer than this."""
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
        self._frames: collections.OrderedDict[tuple[str, int], tuple[WalFrame, ...]] = (
            collections.OrderedDict()
        )
        """By digest of the manifest and number of the group; -1: the whole manifest."""
        self._footers: collections.OrderedDict[str, WalManifestFooter] = collections.OrderedDict()
        self._chunks: collections.OrderedDict[str, Entry] = collections.OrderedDict()

    async def frames(self, sealed: SealedRange, start: int, end: int) -> tuple[WalFrame, ...]:
        """The frames of a sealed range that hold any of [start, end), without ``touches``; raises NotFound,
        DamagedStore."""
        if not is_long(sealed):
            frames = await self._group(sealed, -1)
        else:
            frames = ()
            for group in (await self._footer(sealed)).groups:
                if group.start is None or group.end is None or (group.start < end and start < group.end):
                    frames += await self._group(sealed, group.number)
        return tuple(frame for frame in frames if frame.start < end and start < frame.end)

    async def parts(self, piece: Piece) -> tuple[Piece, ...]:
        """The piece, in as many as its manifest has groups of rows; raises NotFound, DamagedStore.

        Each says of its own WAL what a sealed range says. A range that is short is one piece, and costs nothing.
        """
        sealed = piece.source
        if isinstance(sealed, TailChunk) or not is_long(sealed):
            return (piece,)
        groups = (await self._footer(sealed)).groups
        found = [_part(sealed, group) for group in groups]
        return tuple(
            replace(
                piece,
                start=Lsn(max(piece.start, part.start)),
                end=Lsn(min(piece.end, part.end)),
                source=part,
            )
            for part in found
            if part.start < piece.end and piece.start < part.end
        )

    async def have_ready(self, sealed: SealedRange, wanted: Callable[[SealedRange], bool]) -> None:
        """Read what the first part of a sealed range that is wanted says, so that whoever asks need not wait; raises
        NotFound, DamagedStore."""
        if not is_long(sealed):
            await self._group(sealed, -1)
            return
        for group in (await self._footer(sealed)).groups:
            if wanted(_part(sealed, group)):
                await self._group(sealed, group.number)
                return

    async def _footer(self, sealed: SealedRange) -> WalManifestFooter:
        from timeline.format.wal_manifest import WalManifestFooter

        ref = sealed.manifest
        known = self._footers.get(ref.digest)
        if known is None:
            key = keys.manifest(ref.digest)
            data = await self._store.get(key, ref.size - ref.footer_bytes, ref.footer_bytes)
            known = await asyncio.to_thread(WalManifestFooter, ref, data)
            _check_groups(known, sealed, key)
            _keep(self._footers, ref.digest, known, _MANIFESTS)
        else:
            self._footers.move_to_end(ref.digest)
        return known

    async def _group(self, sealed: SealedRange, number: int) -> tuple[WalFrame, ...]:
        """The frames of one group of rows, of all of them for -1."""
        name = sealed.manifest.digest, number
        known = self._frames.get(name)
        if known is not None:
            self._frames.move_to_end(name)
            return known
        if number < 0:
            frames = await read_frames(self._store, sealed)
        else:
            footer = await self._footer(sealed)
            group = footer.groups[number]
            key = keys.manifest(sealed.manifest.digest)
            data = await self._store.get(key, group.offset, group.length)
            frames = await asyncio.to_thread(footer.frames, number, data)
            _check_frames(frames, sealed.tli, group.start, group.end, key)
        known = tuple(replace(frame, touches=no_touches()) for frame in frames)
        _keep(self._frames, name, known, _MANIFESTS)
        return known

    async def entries(self, piece: Piece) -> tuple[Entry, ...]:
        """What is indexed of a piece, in WAL order; raises NotFound, DamagedStore."""
        if isinstance(piece.source, TailChunk):
            return (_on_line(await self._chunk(piece.source), piece),)
        return tuple(
            _on_line(_of_frame(frame), piece)
            for frame in await self.frames(piece.source, piece.start, piece.end)
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
            _keep(self._chunks, chunk.key, known, _CHUNKS)
        return known


async def read_frames(store: Store, sealed: SealedRange) -> tuple[WalFrame, ...]:
    """All that the WAL manifest of a sealed range says; raises NotFound, DamagedStore."""
    # Parquet takes a quarter of a second to import, which a branch at the head need not wait for.
    from timeline.format.wal_manifest import read_wal_manifest

    key = keys.manifest(sealed.manifest.digest)
    data = await store.get(key)
    frames = await asyncio.to_thread(read_wal_manifest, data, sealed.manifest)
    _check_frames(frames, sealed.tli, sealed.start, sealed.end, key)
    return frames


def _check_frames(
    frames: tuple[WalFrame, ...], tli: int, start: Lsn | None, end: Lsn | None, key: str
) -> None:
    position = start
    for frame in frames:
        if frame.tli != tli or (position is not None and frame.start != position):
            raise DamagedStore(key, 0, f"expected a frame of tli {tli} at {position}")
        position = frame.end
    if end is not None and position != end:
        raise DamagedStore(key, 0, f"expected frames up to {end}, found them up to {position}")


def _check_groups(footer: WalManifestFooter, sealed: SealedRange, key: str) -> None:
    position = sealed.start
    for group in footer.groups:
        if group.start is None or group.end is None:
            if len(footer.groups) > 1:
                raise DamagedStore(key, 0, "expected groups of rows that say which WAL they tell of")
            return
        if group.start != position:
            raise DamagedStore(key, 0, f"expected a group of rows at {position}")
        position = group.end
    if position != sealed.end:
        raise DamagedStore(key, 0, f"expected groups of rows up to {sealed.end}")


def _part(sealed: SealedRange, group: WalGroup) -> SealedRange:
    """What a sealed range would say of the rows of one group."""
    if group.start is None or group.end is None:
        return sealed
    return replace(
        sealed,
        start=group.start,
        end=group.end,
        min_commit_time=group.min_commit_time,
        max_commit_time=group.max_commit_time,
        commits=group.commits,
        restore_points=group.restore_points,
    )


def is_long(sealed: SealedRange) -> bool:
    """Whether its manifest is read group by group."""
    return sealed.manifest.rows > _WHOLE_ROWS and sealed.manifest.size > _WHOLE_BYTES


def _keep(cache: collections.OrderedDict[K, V], name: K, value: V, most: int) -> None:
    cache[name] = value
    if len(cache) > most:
        cache.popitem(last=False)


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
