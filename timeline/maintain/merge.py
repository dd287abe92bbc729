"""Merging: many adjoining sealed ranges become one in the log, with one manifest of all their rows.

A busy server is sealed every few seconds, and the state of its log names every sealed range. So ranges are merged
when there are many of one size, as a log-structured tree does: RUN short ones, of less than RUN frames each, become a
longer one, and RUN longer ones become one that is left alone for good, or as many as fit into one. Packs are not touched; the
manifests that a merged one replaces are named by nobody any more, for the collector.

What bounds the state: a range is left alone when it has RUN² frames or is half as large as a range may be, by WAL or by
bytes of its manifest; of all others there are at most RUN × RUN + SPARED, and mostly 2 × RUN, on each unbroken stretch of
a tli. 30 days at 10 MB/s are about 1,100 ranges and 0.5 MB of state while a thousand transactions commit per second. With more
of them indexes are longer, and no manifest grows beyond MOST_BYTES: then it is the index, about a byte of state for
each 70 kB of it.

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
from timeline.errors import DamagedStore, LogConflict, NotFound, Superseded, Unavailable
from timeline.format import keys
from timeline.format.branch_state import BranchState, SealedRange
from timeline.format.log_change import MergeSealed, merge_ranges
from timeline.format.pack import NONCE_BYTES
from timeline.store.base import Store

if TYPE_CHECKING:
    from timeline.format.wal_manifest import MergedManifest, WalManifestFooter

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
_READS = 8
_READ_AHEAD_BYTES = 16 << 20


async def merge_sealed(store: Store, log: BranchLog, clock: Clock) -> tuple[SealedRange, ...]:
    """Merge what is due; the ranges made. A lost race ends it early and is no failure.

    Raises DamagedStore for a manifest that is not what the log says, Unavailable.
    """
    made: list[SealedRange] = []
    while len(made) < MERGES_AT_ONCE:
        head = await log.load()
        if head is None or not (parts := due(head.state)):
            break
        try:
            merged = await _merge(store, clock, parts)
            await log.append(MergeSealed(merged, head.number))
        except Superseded as error:
            raise Unavailable(f"merging took too long: {error.message}", hint=error.hint) from error
        except (LogConflict, NotFound):
            # Merged or forgotten behind our back, perhaps collected as well: the next call sees what is left.
            break
        made.append(merged)
    return tuple(made)


def due(state: BranchState) -> tuple[SealedRange, ...]:
    """The next ranges to be merged into one, oldest first; empty when there is nothing to do. Pure."""
    for stretch in _stretches(state):
        if parts := _due_in(stretch):
            return parts
    return ()


def _stretches(state: BranchState) -> list[list[SealedRange]]:
    """Adjoining ranges, without those that are left alone for good and those that are spared."""
    current = [sealed for sealed in state.sealed if sealed.tli == state.current_tli]
    spared = {sealed.start for sealed in current[-SPARED:]}
    stretches: list[list[SealedRange]] = [[]]
    for sealed in state.sealed:
        last = stretches[-1]
        if last and (last[-1].tli != sealed.tli or last[-1].end != sealed.start):
            stretches.append([])
        if _is_done([sealed]) or (sealed.tli == state.current_tli and sealed.start in spared):
            stretches.append([])
        else:
            stretches[-1].append(sealed)
    return stretches


def _due_in(stretch: Sequence[SealedRange]) -> tuple[SealedRange, ...]:
    """Of ranges that adjoin: RUN short ones in a row, or all up to the RUN-th longer one."""
    short = longer = 0
    for number, sealed in enumerate(stretch):
        if sealed.manifest.rows < RUN:
            short += 1
        else:
            short, longer = 0, longer + 1
        if short < RUN and longer < RUN:
            continue
        parts = stretch[number + 1 - RUN : number + 1]
        if longer == RUN or _is_done(parts):
            # What this makes is never merged again: nothing before it may be left behind.
            parts = _fitting(stretch[: number + 1])
        return tuple(parts)
    return ()


def _fitting(ranges: Sequence[SealedRange]) -> Sequence[SealedRange]:
    """As many from the first on as one range may hold: at least two, for all are less than half as large."""
    rows = stored = 0
    for number, sealed in enumerate(ranges):
        rows += sealed.manifest.rows
        stored += sealed.manifest.size
        if rows > MOST_ROWS or stored > MOST_BYTES or sealed.end - ranges[0].start > MOST_WAL:
            return ranges[:number]
    return ranges


def _is_done(parts: Sequence[SealedRange]) -> bool:
    """Whether these, as one range, are left alone from then on."""
    rows = sum(part.manifest.rows for part in parts)
    stored = sum(part.manifest.size for part in parts)
    wal = parts[-1].end - parts[0].start
    return rows >= RUN * RUN or 2 * stored >= MOST_BYTES or 2 * wal >= MOST_WAL


async def _merge(store: Store, clock: Clock, parts: Sequence[SealedRange]) -> SealedRange:
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
                await asyncio.to_thread(_add, manifest, footer, group.number, rows)
    data, ref = await asyncio.to_thread(manifest.finish, clock.token(NONCE_BYTES))
    merged = merge_ranges(parts, ref)
    if ref.rows != sum(part.manifest.rows for part in parts):
        raise DamagedStore(keys.manifest(ref.digest), 0, "expected as many rows as the ranges it is made of")
    if not await store.create(keys.manifest(ref.digest), data):
        raise DamagedStore(keys.manifest(ref.digest), 0, "expected the bytes this object is named by")
    return merged


def _add(manifest: MergedManifest, footer: WalManifestFooter, number: int, rows: memoryview) -> None:
    manifest.add(footer.table(number, rows))


async def _read(store: Store, part: SealedRange) -> tuple[WalManifestFooter, bytes]:
    """The verified footer of a manifest, and all its bytes."""
    from timeline.format.wal_manifest import open_wal_manifest

    data = await store.get(keys.manifest(part.manifest.digest))
    return await asyncio.to_thread(open_wal_manifest, data, part.manifest), data
