"""Folding: the newest page manifests of a built snapshot become one, so that there are never many.

``pages`` is the full manifest of a base backup and then deltas, one of each snapshot built since; a reader
opens all of them. A *tier* is the parts of one manifest: neighbours in ``pages`` with equal ``lsn``. Deltas
are folded like the runs of a merge tree: a tier with all newer ones, once those together are at least half of
its size. What a reader sees of the snapshot is the same before and after, byte for byte; what it would ignore
(files that are gone, manifests older than the file, blocks beyond its end, hidden extents) is left out.

That is nearly always a matter of rows alone. Bytes are read and stored again only where an extent is partly
hidden, because extents of one manifest do not overlap [PAG-1], and where a group has become MAX_EXTENTS
pieces: one extent then holds it again.

Order (P3): packs, then the manifests that name them; ``pages`` is for the caller to commit. Nothing is
overwritten or deleted: what a failed fold leaves, nobody names.

Memory (P9), whatever the number of rows: one decoded row group of each tier that is folded (about 0.6 MB);
BATCH_ROWS rows with what becomes of them (about 1 KB each); one manifest under construction (32 MiB) and its
finished copy; READS runs of blocks on their way in, each usually of 128 KiB and never of more than 16 extents
of so much; four packs of PACK_BYTES in the ExtentWriter. Measured: 100 MB for 1.2 million rows, 80 MB for
2,000 groups stored anew.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from restore.fetcher import Fetcher
from restore.page_index import Piece, runs_of
from timeline.archive.extent_writer import UNKNOWN, ExtentWriter, Group
from timeline.archive.page_runs import Run, read_rows, write_run
from timeline.catalog.parallel import in_order
from timeline.clock import Clock
from timeline.format.extent import BLOCK_BYTES, GROUP_BLOCKS, GROUP_BYTES, ExtentRef
from timeline.format.file_listing import FileListing
from timeline.format.manifest import FileRow, ManifestRef, PageRow
from timeline.lsn import Lsn
from timeline.store.base import Store

MAX_DELTAS = 6
"""With the full manifest and a delta not yet folded, a reader opens 8."""
MAX_EXTENTS = 4
"""A group in more pieces than this becomes one extent: each piece may cost its reader a request."""
BATCH_ROWS = 32_768
"""Rows that wait together for the packs of what is stored anew among them."""
READS = 16
"""Runs of blocks being fetched, or fetched and not yet handed to the writer."""
PACK_BYTES = 8 << 20
"""A pack is closed at this size: less than usual, for four of them are in memory."""

ReadFile = Callable[[FileRow, int, int], Awaitable[bytes]]
"""(file, offset, length): exactly that range of a file as of the snapshot; zeros where nobody names a block."""


def folds(rows: Sequence[int], most: int) -> range | None:
    """Which tiers of deltas to fold, always the newest ones; ``None``: there is nothing to do.

    ``rows``: how many rows each has, oldest first, without the full manifest. At most ``most`` are left.

    The first tier that is at most twice as large as all newer ones together is folded with them. So each
    tier left is more than twice as large as what follows it, there are at most 1 + log₃(all rows) of them,
    and as a row moves to an older tier whenever it is folded into one, it pays for that tier at most so
    often, twice its own size each time beside itself: O(n log n) rows are written in all.

    When there are more than ``most`` of them nevertheless, the tier that is closest to being due is folded.
    It is at most (all rows / the newest's) ** (1 / most) times as large as the newer ones; that, instead of
    twice, is the price once 3 ** most newest deltas are behind us.
    """
    if most < 1:
        raise ValueError("there must be room for one delta")
    newer = [0] * len(rows)
    for number in range(len(rows) - 2, -1, -1):
        newer[number] = newer[number + 1] + rows[number + 1]
    foldable = range(len(rows) - 1)
    for number in foldable:
        if 2 * newer[number] >= rows[number]:
            return range(number, len(rows))
    if len(rows) <= most:
        return None
    # None of them is empty: it would have been due.
    due = max(foldable[:most], key=lambda number: newer[number] / rows[number])
    return range(due, len(rows))


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What becomes of one group of a file in the folded manifest."""

    kept: tuple[ExtentRef, ...]
    """Extents that stay as they are."""
    anew: tuple[tuple[Piece, ...], ...]
    """Runs of adjoining pieces, each to be stored as one extent."""
    whole: bool
    """The whole group is to be stored as one extent instead."""

    @property
    def rows(self) -> int:
        """How many rows it takes."""
        return len(self.kept) + len(self.anew) + self.whole


def plan_group(layers: Sequence[Sequence[ExtentRef]], blocks: int) -> GroupPlan:
    """``layers``: the group's extents in each of the manifests, oldest first; ``blocks``: how many blocks of
    it lie inside the file."""
    owners: list[ExtentRef | None] = [None] * GROUP_BLOCKS
    for layer in layers:
        for ref in layer:
            for block in range(ref.first_block, min(ref.first_block + ref.blocks, blocks)):
                owners[block] = ref
    pieces = runs_of(owners)
    if len(pieces) > MAX_EXTENTS:
        if all(one.first_block + one.blocks == two.first_block for one, two in pairwise(pieces)):
            return GroupPlan((), (pieces,), whole=False)
        return GroupPlan((), (), whole=True)
    return GroupPlan(
        kept=tuple(piece.ref for piece in pieces if _is_all(piece, blocks)),
        anew=tuple((piece,) for piece in pieces if not _is_all(piece, blocks)),
        whole=False,
    )


def _is_all(piece: Piece, blocks: int) -> bool:
    """Whether the piece is all of its extent that lies inside the file."""
    ref = piece.ref
    end = min(ref.first_block + ref.blocks, blocks)
    return piece.first_block == ref.first_block and piece.first_block + piece.blocks == end


async def fold_deltas(
    store: Store,
    store_id: str,
    threads: Executor,
    clock: Clock,
    fetcher: Fetcher,
    pages: tuple[ManifestRef, ...],
    listing: FileListing,
    read: ReadFile,
    *,
    most: int = MAX_DELTAS,
) -> tuple[ManifestRef, ...]:
    """The page manifests of a snapshot with at most ``most`` tiers of deltas after the full manifest; as they
    were when that is so already and none is due.

    ``pages``: as of the snapshot, its own delta last; the full manifest is the first tier. ``listing`` and
    ``read`` are of the same snapshot. A folded manifest has the LSN of the newest it was made of, and may
    have several parts; one without rows is left out.

    Rests on what the writer of deltas promises anyway: a file that is made anew is ``born`` after every
    snapshot that knew another one under its path, and blocks that grow back after a truncation are named.

    Raises Unavailable, DamagedStore (P5), NotFound; ValueError for deltas that are not in ascending order.
    """
    tiers = [tuple(parts) for _, parts in groupby(pages, key=lambda ref: ref.lsn)]
    deltas = [_Tier(_lsn_of(tier), tier) for tier in tiers[1:]]
    if any(one.lsn >= two.lsn for one, two in pairwise(deltas)):
        raise ValueError("the page manifests are not in the order of their LSNs")
    due = folds([sum(ref.rows for ref in tier.parts) for tier in deltas], most)
    if due is None:
        return pages
    older = tiers[: 1 + due.start]
    fold = _Fold(store, store_id, threads, clock, fetcher, listing, read)
    folded = await write_run(store, threads, clock, fold.rows(deltas[due.start :]))
    return (
        *(ref for tier in older for ref in tier),
        *(replace(ref, lsn=deltas[-1].lsn) for ref in folded if ref.rows),
    )


@dataclass(frozen=True, slots=True)
class _Tier:
    lsn: Lsn
    parts: Run


@dataclass(frozen=True, slots=True)
class _Planned:
    file: FileRow
    group: int
    plan: GroupPlan


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks of one group that become one extent."""

    file: FileRow
    group: int
    pieces: tuple[Piece, ...]
    """Adjoining; none: the whole group as the reader gives it."""


@dataclass(frozen=True, slots=True)
class _Fold:
    store: Store
    store_id: str
    threads: Executor
    clock: Clock
    fetcher: Fetcher
    listing: FileListing
    read: ReadFile

    async def rows(self, tiers: Sequence[_Tier]) -> AsyncGenerator[PageRow, None]:
        """The rows of the folded manifest, in order; the packs they name are durable."""
        batch: list[_Planned] = []
        waiting = 0
        async for planned in self._plans(tiers):
            batch.append(planned)
            waiting += planned.plan.rows
            if waiting >= BATCH_ROWS:
                for row in await self._settle(batch):
                    yield row
                batch, waiting = [], 0
        for row in await self._settle(batch):
            yield row

    async def _plans(self, tiers: Sequence[_Tier]) -> AsyncGenerator[_Planned, None]:
        file: FileRow | None = None
        last_path: str | None = None
        async for path, group, layers in self._groups(tiers):
            if path != last_path:
                file, last_path = self.listing.get(path), path
            if file is None or file.kind != "f" or file.content is not None:
                continue
            blocks = min(GROUP_BLOCKS, -(-(file.size - group * GROUP_BYTES) // BLOCK_BYTES))
            plan = plan_group([extents for lsn, extents in layers if lsn >= file.born], blocks)
            if plan.rows:
                yield _Planned(file, group, plan)

    async def _groups(
        self, tiers: Sequence[_Tier]
    ) -> AsyncGenerator[tuple[str, int, list[tuple[Lsn, list[ExtentRef]]]], None]:
        """(path, group, its extents in each tier that has any, oldest first), in order."""
        sources = [_by_group(read_rows(self.store, self.threads, tier.parts)) for tier in tiers]
        heads = [await anext(source, None) for source in sources]
        while ahead := [head[0] for head in heads if head is not None]:
            place = min(ahead)
            layers = []
            for number, head in enumerate(heads):
                if head is not None and head[0] == place:
                    layers.append((tiers[number].lsn, head[1]))
                    heads[number] = await anext(sources[number], None)
            yield *place, layers

    async def _settle(self, batch: Sequence[_Planned]) -> list[PageRow]:
        """The rows of a batch, in order, after what is stored anew is durable."""
        anew: list[_Blocks] = []
        for one in batch:
            anew += [_Blocks(one.file, one.group, pieces) for pieces in one.plan.anew]
            if one.plan.whole:
                anew.append(_Blocks(one.file, one.group, ()))
        stored = await self._store_anew(anew) if anew else {}
        rows = []
        for one in batch:
            path, group = one.file.path, one.group
            extents = [*one.plan.kept, *stored.get((path, group), ())]
            extents.sort(key=lambda extent: extent.first_block)
            rows += [PageRow(path, group, extent) for extent in extents]
        return rows

    async def _store_anew(self, runs: Sequence[_Blocks]) -> dict[tuple[str, int], list[ExtentRef]]:
        writer = ExtentWriter(
            self.store,
            self.store_id,
            self.threads,
            self.clock,
            pack_bytes=PACK_BYTES,
            divert=lambda _: False,
            finished=lambda _: None,
        )
        extents: dict[tuple[str, int], list[ExtentRef]] = defaultdict(list)
        try:
            async with aclosing(in_order(runs, self._fetch, limit=READS)) as groups:
                async for group in groups:
                    await writer.put(group)
            for row in await writer.finish():
                extents[row.path, row.group].append(row.extent)
        finally:
            await writer.abort()
        return extents

    async def _fetch(self, run: _Blocks) -> Group:
        """The raw bytes of a run, up to the end of the file."""
        file, origin = run.file, run.group * GROUP_BYTES
        if run.pieces:
            first = run.pieces[0].first_block
            parts = await asyncio.gather(*(self._cut(piece) for piece in run.pieces))
            raw = b"".join(parts)[: file.size - origin - first * BLOCK_BYTES]
        else:
            first = 0
            length = min(GROUP_BYTES, file.size - origin)
            raw = await self.read(file, origin, length)
            if len(raw) != length:
                raise ValueError(f"{file.path}: {len(raw)} bytes at {origin} instead of {length}")
        return Group(file.path, run.group, raw, UNKNOWN, None, None, first)

    async def _cut(self, piece: Piece) -> bytes:
        """Its blocks out of its extent, whole ones: what was the short end of a file may be no more."""
        raw = await self.fetcher.fetch(piece.ref)
        at = (piece.first_block - piece.ref.first_block) * BLOCK_BYTES
        length = piece.blocks * BLOCK_BYTES
        return raw[at : at + length].ljust(length, b"\0")


def _lsn_of(tier: Run) -> Lsn:
    lsn = tier[0].lsn
    if lsn is None:
        raise ValueError(f"page manifest {tier[0].digest}: a delta without an LSN")
    return lsn


async def _by_group(
    rows: AsyncGenerator[PageRow, None],
) -> AsyncGenerator[tuple[tuple[str, int], list[ExtentRef]], None]:
    """((path, group), its extents), of sorted rows."""
    place: tuple[str, int] | None = None
    extents: list[ExtentRef] = []
    async for row in rows:
        if place is not None and (row.path, row.group) != place:
            yield place, extents
            extents = []
        place = (row.path, row.group)
        extents.append(row.extent)
    if place is not None:
        yield place, extents
