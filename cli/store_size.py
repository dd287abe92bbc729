"""How large a store is, by kind of object, and how well its content compresses.

Cost: one LIST request for each thousand objects (about half a dollar per hundred million objects listed at
Amazon's list price) and a GET for each manifest that is read. So it is done when asked for, and by the daemon once an
hour (``cli.metrics_feed``). Bounds: PAGE_KEYS keys in memory, MOST_OBJECTS counted, MANIFEST_BYTES of manifests
read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cli.facts import KindSize, StoreSize

if TYPE_CHECKING:
    from timeline.catalog.history import History
    from timeline.format.branch_state import BranchState
    from timeline.format.extent_totals import ExtentTotals
    from timeline.format.manifest import ManifestRef
    from timeline.store.base import Store

PAGE_KEYS = 10_000
MOST_OBJECTS = 5_000_000
MANIFEST_BYTES = 32 << 20


async def measure(history: History) -> StoreSize:
    """The store now; raises Unavailable, NotFound (something was collected meanwhile), DamagedStore."""
    kinds, complete = await _count(history.store, history.state)
    snapshot, distinct = await _extent_ratios(history.store, history.state)
    return StoreSize(
        kinds=kinds,
        complete=complete,
        wal_stored_ratio=await _wal_ratio(history.store, history.state),
        snapshot_stored_ratio=snapshot,
        snapshot_distinct_ratio=distinct,
    )


async def _count(store: Store, state: BranchState) -> tuple[tuple[KindSize, ...], bool]:
    from timeline.format import keys

    prefixes = (
        ("chunks", [keys.chunk_prefix(state.branch, known.tli) for known in state.tlis]),
        ("packs", ["packs/"]),
        ("manifests", ["manifests/"]),
        ("log", [keys.log_prefix(state.branch)]),
        ("other", ["catalog/", "drills/", "pins/"]),
    )
    found = []
    left = MOST_OBJECTS
    for kind, places in prefixes:
        objects = size = 0
        for prefix in places:
            after = ""
            while left > 0:
                page = await store.list(prefix, after=after, limit=min(PAGE_KEYS, left))
                objects += len(page)
                left -= len(page)
                size += sum(one.size for one in page)
                if not page:
                    break
                after = page[-1].key
        found.append(KindSize(kind, objects, size))
    return tuple(found), left > 0


async def _wal_ratio(store: Store, state: BranchState) -> float | None:
    if not state.sealed:
        return None
    from timeline.catalog.index_reader import read_frames

    newest = max(state.sealed, key=lambda sealed: (sealed.tli, sealed.end))
    frames = await read_frames(store, newest)
    return sum(frame.stored_bytes for frame in frames) / (newest.end - newest.start)


async def _extent_ratios(store: Store, state: BranchState) -> tuple[float | None, float | None]:
    """Of the newest snapshot, and of all together; ``None`` for what is too long to be read."""
    if not state.snapshots:
        return None, None
    newest = {ref.digest: ref for ref in state.snapshots[-1].pages}
    every = {ref.digest: ref for snapshot in state.snapshots for ref in snapshot.pages}
    if _bytes(newest.values()) > MANIFEST_BYTES:
        return None, None
    from timeline.format.extent_totals import ExtentTotals

    totals = ExtentTotals()
    for ref in newest.values():
        await _add(totals, store, ref)
    raw, stored = await asyncio.to_thread(totals.sums)
    own = stored / raw if raw else None
    if _bytes(every.values()) > MANIFEST_BYTES:
        return own, None
    for digest, ref in every.items():
        if digest not in newest:
            await _add(totals, store, ref)
    distinct, _ = await asyncio.to_thread(totals.sums)
    listed = sum(snapshot.bytes for snapshot in state.snapshots)
    return own, distinct / listed if listed else None


async def _add(totals: ExtentTotals, store: Store, ref: ManifestRef) -> None:
    from timeline.format import keys

    data = await store.get(keys.manifest(ref.digest))
    await asyncio.to_thread(totals.add, data, ref)


def _bytes(refs: Iterable[ManifestRef]) -> int:
    return sum(ref.size for ref in refs)
