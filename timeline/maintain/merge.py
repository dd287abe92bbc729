"""Merging: many adjoining sealed ranges become one in the log, with one manifest of all their rows.

A busy server is sealed every few seconds, and the state of its log names every sealed range. So ranges are merged
when there are many of one size, as a log-structured tree does: ranges come in classes by their number of frames, and
RUN of a class become one of a higher class. Packs are not touched; the manifests that a merged one replaces are named
by nobody any more, for the collector.

What bounds the state: a range is left alone for good when it is half as large as a range may be, by frames, WAL
or bytes of its manifest; of all others there are at most about 2 × RUN + SPARED on each unbroken stretch of a tli. 30
days at 10 MB/s are about 800 ranges and 0.4 MB of state. A server of very many small transactions has fewer: its
indexes are longer, and no manifest grows beyond MOST_BYTES.

The newest ranges of the current tli are spared: most branches are of a moment near the head, and they read them whole.

Memory: about 130 MB: the manifest under way (MOST_BYTES) with its finished copies, one group of rows unpacked, and what
is read ahead (_READ_AHEAD_BYTES).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from timeline.catalog.branch_log import BranchLog
from timeline.catalog.parallel import in_order
from timeline.clock import Clock
from timeline.errors import DamagedStore, LogConflict, NotFound
from timeline.format import keys
from timeline.format.log import BranchState, MergeSealed, SealedRange, merge_ranges
from timeline.store.base import Store

if TYPE_CHECKING:
    from timeline.format.wal_manifest import WalManifestFooter

RUN = 32
"""So many adjoining ranges of one class are merged; each class has ranges of RUN times as many frames."""
SPARED = 16
"""So many of the newest ranges of the current tli are left as they were sealed."""
MOST_ROWS = 8192
MOST_WAL = 32 << 30
MOST_BYTES = 32 << 20
"""A merged range has at most so many frames, bytes of WAL, bytes in its manifest."""
MERGES_AT_ONCE = 64
"""One call merges at most so often; the next goes on."""
_CLASSES = 2
_READS = 8
_READ_AHEAD_BYTES = 16 << 20


async def merge_sealed(store: Store, log: BranchLog, clock: Clock) -> tuple[SealedRange, ...]:
    """Merge what is due; the ranges made. A lost race ends it early and is no failure.

    Raises DamagedStore for a manifest that is not what the log says, Unavailable.
    """
    del clock  # Nothing is due by time.
    made: list[SealedRange] = []
    while len(made) < MERGES_AT_ONCE:
        head = await log.load()
        if head is None or not (parts := due(head.state)):
            break
        try:
            merged = await _merge(store, parts)
            await log.append(MergeSealed(merged, head.number))
        except (LogConflict, NotFound):
            # Merged or forgotten behind our back, perhaps collected as well: the next call sees what is left.
            break
        made.append(merged)
    return tuple(made)


def due(state: BranchState) -> tuple[SealedRange, ...]:
    """The next ranges to be merged into one, oldest first; empty when there is nothing to do. Pure."""
    for stretch in _stretches(state):
        for level in range(_CLASSES):
            if parts := _due_of_class(stretch, level):
                return parts
    return ()


def _stretches(state: BranchState) -> list[list[SealedRange]]:
    """Adjoining ranges, without those that are spared."""
    stretches: list[list[SealedRange]] = []
    for sealed in state.sealed:
        if stretches and stretches[-1][-1].tli == sealed.tli and stretches[-1][-1].end == sealed.start:
            stretches[-1].append(sealed)
        else:
            stretches.append([sealed])
    current = [stretch for stretch in stretches if stretch[-1].tli == state.current_tli]
    if current:
        del current[-1][-SPARED:]
    return stretches


def _due_of_class(stretch: Sequence[SealedRange], level: int) -> tuple[SealedRange, ...]:
    """The oldest that fit into one range, where there are RUN of the class between ranges of higher ones.

    Ranges of lower classes that lie between them go with them.
    """
    begin = 0
    while begin < len(stretch):
        end, count, last = begin, 0, begin
        while end < len(stretch) and count < RUN and (size := _class(stretch[end])) <= level:
            if size == level:
                count, last = count + 1, end
            end += 1
        if count >= RUN:
            parts = _fitting(stretch[begin : last + 1])
            if len(parts) > 1:
                return parts
        # What was looked at holds too few, or too little room; behind it begins another stretch.
        begin = end + 1
    return ()


def _fitting(ranges: Sequence[SealedRange]) -> tuple[SealedRange, ...]:
    rows = stored = 0
    for number, sealed in enumerate(ranges):
        rows += sealed.manifest.rows
        stored += sealed.manifest.size
        wal = sealed.end - ranges[0].start
        if rows > MOST_ROWS or stored > MOST_BYTES or wal > MOST_WAL:
            return tuple(ranges[:number])
    return tuple(ranges)


def _class(sealed: SealedRange) -> int:
    rows, stored, wal = sealed.manifest.rows, sealed.manifest.size, sealed.end - sealed.start
    if 2 * rows >= MOST_ROWS or 2 * stored >= MOST_BYTES or 2 * wal >= MOST_WAL or rows >= RUN**_CLASSES:
        return _CLASSES
    return 0 if rows < RUN else 1


async def _merge(store: Store, parts: Sequence[SealedRange]) -> SealedRange:
    # Parquet takes a quarter of a second to import, and an archiver may run for long before its first merge.
    from timeline.format.wal_manifest import MergedManifest

    manifest = MergedManifest()
    reads = in_order(
        parts,
        lambda part: _read(store, part),
        limit=_READS,
        cost=lambda part: part.manifest.size,
        budget=_READ_AHEAD_BYTES,
    )
    async with aclosing(reads) as results:
        async for footer, data in results:
            for group in footer.groups:
                rows = memoryview(data)[group.offset : group.offset + group.length]
                await asyncio.to_thread(lambda f=footer, n=group.number, r=rows: manifest.add(f.table(n, r)))
    data, ref = await asyncio.to_thread(manifest.finish)
    merged = merge_ranges(parts, ref)
    if ref.rows != sum(part.manifest.rows for part in parts):
        raise DamagedStore(keys.manifest(ref.digest), 0, "expected as many rows as the ranges it is made of")
    if not await store.create(keys.manifest(ref.digest), data):
        raise DamagedStore(keys.manifest(ref.digest), 0, "expected the bytes this object is named by")
    return merged


async def _read(store: Store, part: SealedRange) -> tuple[WalManifestFooter, bytes]:
    """The verified footer of a manifest, and all its bytes."""
    from timeline.format.wal_manifest import open_wal_manifest

    data = await store.get(keys.manifest(part.manifest.digest))
    return await asyncio.to_thread(open_wal_manifest, data, part.manifest), data
