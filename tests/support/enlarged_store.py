"""A store whose newest snapshot has a table of any number of full segments, out of the pages of a smaller one.

Everything is what a backup of so large a table would have left: page manifests, listing and log entry, by the
writers that a backup uses. Only the packs are shared: the page rows of all segments name the extents of the
real table in turn, as deduplication has it. Heap pages do not say which block they are, so every page of every
segment is a valid one; indexes and statistics know nothing of them, and they are found by ``ctid``.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from tests.support.snapshot_files import read_listing, read_manifest
from timeline.archive.extent_writer import create_named
from timeline.catalog.branch_log import BranchLog
from timeline.clock import Clock
from timeline.format import keys
from timeline.format.branch_state import BASE, Snapshot
from timeline.format.extent import GROUP_BLOCKS, GROUP_BYTES, ExtentRef
from timeline.format.file_listing import write_file_listing
from timeline.format.log_change import AddSnapshot
from timeline.format.manifest import ManifestRef, PageRow
from timeline.format.page_manifest import write_page_manifests
from timeline.store.base import Store

SEGMENT_BYTES = 1 << 30
"""Of a relation, as Postgres is built."""
_SEGMENT_GROUPS = SEGMENT_BYTES // GROUP_BYTES


@dataclass(frozen=True, slots=True)
class EnlargedTable:
    """What the table has become."""

    snapshot: Snapshot
    bytes: int
    real_groups: int

    def real_block(self, block: int) -> int:
        """The block of the real table whose page this is."""
        group, inside = divmod(block, GROUP_BLOCKS)
        return group % self.real_groups * GROUP_BLOCKS + inside


async def enlarge(store: Store, log: BranchLog, clock: Clock, table: str, segments: int) -> EnlargedTable:
    """Commit a snapshot like the newest base backup, but with so many full segments of ``table``, the path of its
    first one."""
    head = await log.load()
    if head is None:
        raise ValueError("nothing was ever archived here")
    base = next(one for one in reversed(head.state.snapshots) if one.kind == BASE)
    rows = [row for ref in base.pages for row in await read_manifest(store, ref)]
    files = list(await read_listing(store, base))
    first = next(file for file in files if file.path == table)
    groups: dict[int, list[ExtentRef]] = defaultdict(list)
    for row in rows:
        if row.path == table and row.group < first.size // GROUP_BYTES:
            groups[row.group].append(row.extent)
    real = [groups[number] for number in range(first.size // GROUP_BYTES)]
    if not all(real):
        raise ValueError(f"{table}: expected pages in every group")
    others = [row for row in rows if not _belongs(row.path, table)]
    paths = [table, *(f"{table}.{number}" for number in range(1, segments))]
    enlarged = chain(
        (row for row in others if row.path < table),
        _rows(paths, real),
        (row for row in others if row.path > table),
    )
    pages: list[ManifestRef] = []
    for data, ref in write_page_manifests(enlarged):
        await create_named(store, keys.manifest(ref.digest), data)
        pages.append(ref)
    kept = [file for file in files if not _belongs(file.path, table)]
    kept += [dataclasses.replace(first, path=path, size=SEGMENT_BYTES) for path in paths]
    listing, listed = write_file_listing(kept)
    await create_named(store, keys.manifest(listed.digest), listing)
    snapshot = dataclasses.replace(
        base,
        id=clock.token(8),
        files=listed,
        pages=tuple(pages),
        bytes=sum(file.size for file in kept if file.kind == "f"),
    )
    await log.append(AddSnapshot(snapshot))
    return EnlargedTable(snapshot, segments * SEGMENT_BYTES, len(real))


def _belongs(path: str, table: str) -> bool:
    """Whether it is a segment of the table's main fork."""
    return path == table or path.startswith(f"{table}.")


def _rows(paths: list[str], real: list[list[ExtentRef]]) -> Iterator[PageRow]:
    """In the order of a manifest; the real groups in turn, over the ends of segments."""
    numbers = {path: number for number, path in enumerate(paths)}
    for path in sorted(paths):
        for group in range(_SEGMENT_GROUPS):
            for extent in real[(numbers[path] * _SEGMENT_GROUPS + group) % len(real)]:
                yield PageRow(path, group, extent)
