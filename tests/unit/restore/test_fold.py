"""Folding of delta manifests: which, how often, and that a reader never sees a difference."""

from __future__ import annotations

import asyncio
import builtins
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restore import fold
from restore.cache import DiskCache
from restore.fetcher import Counters, Fetcher
from restore.fold import MAX_DELTAS, MAX_EXTENTS, READS, GroupPlan, fold_deltas, folds, plan_group
from restore.source import ExtentSource
from timeline.archive import page_runs
from timeline.archive.extent_writer import UNKNOWN, ExtentWriter, Group
from timeline.clock import SystemClock
from timeline.errors import DamagedStore, Unavailable
from timeline.format import keys, page_manifest
from timeline.format.branch_state import Snapshot
from timeline.format.extent import BLOCK_BYTES, GROUP_BLOCKS, GROUP_BYTES, ExtentRef
from timeline.format.file_listing import FileListing, read_file_listing, split, write_file_listing
from timeline.format.manifest import FileRow, ManifestRef, PageRow
from timeline.format.page_manifest import read_page_rows, write_page_manifest
from timeline.lsn import Lsn
from timeline.store.base import Listed, Refused
from timeline.store.memory import MemoryStore

# --- which tiers ---------------------------------------------------------------------------------------------


def test_a_tier_is_folded_once_the_newer_ones_are_half_of_it() -> None:
    assert folds([], 6) is None
    assert folds([5], 6) is None
    assert folds([100, 49], 6) is None
    assert folds([100, 50], 6) == range(2)
    assert folds([1000, 100, 30, 20], 6) == range(1, 4)
    assert folds([1000, 400, 50, 50], 6) == range(4)
    assert folds([0, 0], 6) == range(2)


def test_of_too_many_the_one_closest_to_being_due_is_folded() -> None:
    assert folds([1000, 100, 10], 3) is None
    assert folds([1000, 100, 1], 2) == range(3)
    assert folds([1000, 10, 1], 2) == range(1, 3)
    assert folds([10**6, 10**4, 10**3, 1], 2) == range(1, 4)
    with pytest.raises(ValueError, match="room"):
        folds([1], 0)


def settle(deltas: Sequence[int], most: int) -> tuple[int, list[int]]:
    """Rows written by folding, and the tiers left, when these come one after the other and nothing is hidden."""
    written, tiers = 0, []
    for rows in deltas:
        tiers.append(rows)
        due = folds(tiers, most)
        if due is not None:
            assert due.stop == len(tiers) and len(due) > 1
            written += sum(tiers[due.start :])
            tiers[due.start :] = [sum(tiers[due.start :])]
        assert len(tiers) <= most
    return written, tiers


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=400))
def test_rows_are_written_n_log_n_times(deltas: list[int]) -> None:
    total = sum(deltas)
    levels = 1 + math.log(total, 3)
    written, tiers = settle(deltas, most=1000)
    assert sum(tiers) == total and len(tiers) <= levels
    assert written <= 3 * total * levels


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=400), st.integers(1, 7))
def test_a_bound_on_the_tiers_costs_a_root_at_most(deltas: list[int], most: int) -> None:
    """As the docstring says: a row is folded into each of the places once at most, at that price each time."""
    total = sum(deltas)
    price = max(3.0, (total / min(deltas)) ** (1 / most))
    assert settle(deltas, most)[0] <= total * most * price * (1 + 1e-9)


def test_ten_thousand_equal_deltas() -> None:
    written, _ = settle([1] * 10_000, MAX_DELTAS)
    assert written <= 10_000 * math.log2(10_000)


# --- one group -----------------------------------------------------------------------------------------------


def extent(first: int, blocks: int, mark: int = 0, *, raw_bytes: int | None = None) -> ExtentRef:
    raw_bytes = blocks * BLOCK_BYTES if raw_bytes is None else raw_bytes
    return ExtentRef(first, raw_bytes, f"{mark:064x}", 0, 9, mark.to_bytes(32, "big"))


def layer_of(cuts: list[tuple[int, int]], number: int) -> list[ExtentRef]:
    extents: list[ExtentRef] = []
    at = 0
    for gap, blocks in cuts:
        first = at + gap
        if first >= GROUP_BLOCKS:
            break
        extents.append(extent(first, min(blocks, GROUP_BLOCKS - first), number * 100 + len(extents)))
        at = first + extents[-1].blocks
    return extents


layers = st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=5), max_size=5)


@given(layers, st.integers(-3, GROUP_BLOCKS))
def test_a_plan_shows_what_painting_shows(cuts: list[list[tuple[int, int]]], blocks: int) -> None:
    chain = [layer_of(one, number) for number, one in enumerate(cuts)]
    painted: dict[int, ExtentRef] = {}
    for layer in chain:
        for ref in layer:
            painted |= {b: ref for b in range(ref.first_block, ref.first_block + ref.blocks) if b < blocks}
    plan = plan_group(chain, blocks)
    assert plan.rows <= MAX_EXTENTS
    if plan.whole:
        assert plan.rows == 1
        assert len({id(ref) for ref in painted.values()}) > 1
        assert sorted(painted) != list(range(min(painted), max(painted) + 1))
        return
    shown: dict[int, ExtentRef] = {}
    taken: set[int] = set()
    for ref in plan.kept:
        run = range(ref.first_block, ref.first_block + ref.blocks)
        assert taken.isdisjoint(run)
        taken.update(run)
        shown |= {block: ref for block in run if block < blocks}
    for pieces in plan.anew:
        for piece in pieces:
            run = range(piece.first_block, piece.first_block + piece.blocks)
            assert taken.isdisjoint(run)
            taken.update(run)
            shown |= dict.fromkeys(run, piece.ref)
    assert shown == painted
    if len(chain) == 1 and len(chain[0]) <= MAX_EXTENTS:
        assert not plan.anew


def test_many_pieces_become_one_extent_where_nothing_lies_between() -> None:
    single = [extent(block, 1, block) for block in range(2, 7)]
    joined = plan_group([single[:2], single[2:]], GROUP_BLOCKS)
    assert not joined.kept and not joined.whole
    assert [[piece.ref for piece in run] for run in joined.anew] == [single]
    assert plan_group([single[:4]], GROUP_BLOCKS).kept == tuple(single[:4])
    assert plan_group([single, [extent(9, 1)]], GROUP_BLOCKS).whole


# --- chains of snapshots -------------------------------------------------------------------------------------


class LoggedStore(MemoryStore):
    """Remembers what was created and read, in order, and can refuse to create."""

    def __init__(self) -> None:
        super().__init__()
        self.created: list[str] = []
        self.calls: list[tuple[str, str]] = []
        self.refuse = ""

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        if self.refuse and key.startswith(self.refuse):
            raise Unavailable(f"{key}: refused")
        self.created.append(key)
        self.calls.append(("create", key))
        assert await super().create(key, data), "P2: other bytes hold the key"
        return True

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        self.calls.append(("get", key))
        return await super().get(key, start, length)

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[Listed]:
        raise AssertionError("folding lists nothing")

    async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        raise AssertionError("P2: folding deletes nothing")

    def damage(self, key: str, at: int) -> None:
        """Change one byte of an object."""
        data = bytearray(self._objects[key])
        data[at] ^= 1
        self._objects[key] = bytes(data)


@dataclass(slots=True)
class ModelFile:
    """What a file should hold, and what its manifests may still say of it."""

    born: Lsn
    size: int = 0
    reach: int = 0
    """The largest size it ever had: beyond it nobody has named a block."""
    blocks: dict[int, bytes] = field(default_factory=dict)
    """Whole blocks; those that are missing are zeros."""
    changed: set[int] = field(default_factory=set)
    """Since the last snapshot."""

    def content(self) -> bytes:
        count = -(-self.size // BLOCK_BYTES)
        return b"".join(self.blocks.get(n, bytes(BLOCK_BYTES)) for n in range(count))[: self.size]

    def resize(self, size: int) -> None:
        if size < self.size:
            kept = self.content()[:size]
            count = -(-size // BLOCK_BYTES)
            self.blocks = {n: raw for n, raw in self.blocks.items() if n < count}
            if size % BLOCK_BYTES:
                self.blocks[count - 1] = kept[(count - 1) * BLOCK_BYTES :].ljust(BLOCK_BYTES, b"\0")
        elif self.reach > self.size:
            # What was cut off must not come back: the writer of a delta names it as zeros.
            self.changed.update(range(self.size // BLOCK_BYTES, -(-min(size, self.reach) // BLOCK_BYTES)))
        self.size = size
        self.reach = max(self.reach, size)


Step = tuple[str, int, int, int]
"""(verb, file, two numbers), read as what is there allows."""
PATHS = ("base/1/10", "base/1/9", "base/16/20_fsm", "global/1", "pg_xact/0000")
MOST_BLOCKS = 40


class Chain:
    """A store, a line of snapshots in it and the model of their files."""

    def __init__(self, pool: ThreadPoolExecutor, *, most: int) -> None:
        self.store = LoggedStore()
        self.pool = pool
        self.most = most
        self.fetcher = Fetcher(
            self.store,
            DiskCache(None, 0, SystemClock()),
            SystemClock(),
            pool,
            Counters(),
            patience_seconds=0.2,
        )
        self.files: dict[str, ModelFile] = {}
        self.pages: tuple[ManifestRef, ...] = ()
        self.lsn = Lsn(1000)
        self.named = 0
        """Rows of all deltas as they were written."""
        self.folded = 0
        """Rows of all folded manifests."""
        self._serial = 0

    def apply(self, step: Step) -> None:
        """Change the model as of the next snapshot."""
        verb, which, one, two = step
        path = PATHS[which % len(PATHS)]
        file = self.files.get(path)
        if file is None:
            if verb in ("write", "create"):
                self.files[path] = file = ModelFile(self.lsn)
                self.write(file, one % 20, two % 20)
        elif verb == "write":
            self.write(file, one % MOST_BLOCKS, 1 + two % 3)
        elif verb == "fill":
            self.write(file, one % MOST_BLOCKS, 1 + two % 20)
        elif verb == "scatter":
            for block in range(one % MOST_BLOCKS, MOST_BLOCKS, 2 + two % 4):
                self.write(file, block, 1)
        elif verb == "resize":
            file.resize((one % MOST_BLOCKS) * BLOCK_BYTES + two % 3 * 1000)
        elif verb == "remove":
            del self.files[path]
        elif verb == "create":
            self.files[path] = file = ModelFile(self.lsn)
            self.write(file, one % 20, two % 20)

    def write(self, file: ModelFile, first: int, count: int) -> None:
        if (first + count) * BLOCK_BYTES > file.size:
            file.resize((first + count) * BLOCK_BYTES)
        for block in range(first, first + count):
            self._serial += 1
            file.blocks[block] = self._serial.to_bytes(8, "big") * (BLOCK_BYTES // 8)
            file.changed.add(block)

    def listing(self) -> tuple[FileListing, ManifestRef, bytes]:
        """As of the snapshot being made."""
        directories = {
            "/".join(path.split("/")[: depth + 1]) for path in PATHS for depth in range(path.count("/"))
        }
        rows = [FileRow(path, "d", 0, 0o700, None, None, Lsn(0)) for path in directories]
        rows += [
            FileRow(path, "f", file.size, 0o600, None, None, file.born) for path, file in self.files.items()
        ]
        data, ref = write_file_listing(rows)
        return read_file_listing(data, ref), ref, data

    async def snapshot(self, chance: random.Random | None = None, *, whole: bool = False) -> None:
        """Write the changes as a delta, in extents as long as can be or cut by chance, or everything as a
        full manifest."""
        writer = ExtentWriter(
            self.store,
            "id",
            self.pool,
            SystemClock(),
            pack_bytes=1 << 20,
            divert=lambda _: False,
            finished=lambda _: None,
        )
        try:
            for path, file in sorted(self.files.items()):
                content = file.content()
                count = -(-file.size // BLOCK_BYTES)
                blocks = set(range(count)) if whole else {block for block in file.changed if block < count}
                for first, end in _runs(blocks, chance):
                    raw = content[first * BLOCK_BYTES : end * BLOCK_BYTES]
                    group, at = divmod(first, GROUP_BLOCKS)
                    await writer.put(Group(path, group, raw, UNKNOWN, None, None, at))
                file.changed.clear()
            rows = await writer.finish()
        finally:
            await writer.abort()
        rows.sort(key=lambda row: (row.path, row.group, row.extent.first_block))
        ref = await put_manifest(self.store, rows)
        self.pages += (replace(ref, lsn=self.lsn),)
        self.named += 0 if whole else len(rows)

    def source(self) -> tuple[ExtentSource, FileListing]:
        """A reader of the present snapshot that remembers nothing of earlier ones' manifests."""
        listing, ref, _ = self.listing()
        return ExtentSource(snapshot_of(ref, self.pages, self.lsn), self.fetcher), listing

    async def fold(self) -> None:
        """Fold what is due, and check what is promised of the result."""
        source, listing = self.source()
        before = self.pages

        async def read(file: FileRow, offset: int, length: int) -> bytes:
            return await source.content(file).read(offset, length)

        self.pages = await fold_deltas(
            self.store, "id", self.pool, SystemClock(), self.fetcher, before, listing, read, most=self.most
        )
        same = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(before, self.pages, strict=False)))
        made = self.pages[same:]
        self.folded += sum(ref.rows for ref in made)
        assert {ref.lsn for ref in made} <= {before[-1].lsn}
        assert self.pages[0].lsn == Lsn(1000)
        assert len({ref.lsn for ref in self.pages}) <= 1 + self.most
        await self._check_rows(made)

    async def _check_rows(self, made: Sequence[ManifestRef]) -> None:
        """Order, no overlaps [PAG-1], few extents in a group, none of what no file has; referents first (P3)."""
        taken: dict[tuple[str, int], list[int]] = {}
        for ref in made:
            key = keys.manifest(ref.digest)
            for row in await rows_of(self.store, ref):
                file, e = self.files[row.path], row.extent
                first = row.group * GROUP_BYTES + e.first_block * BLOCK_BYTES
                assert first < file.size
                taken.setdefault((row.path, row.group), []).extend(
                    range(e.first_block, e.first_block + e.blocks)
                )
                created = self.store.created
                assert created.index(keys.pack(e.pack)) < created.index(key)
        for blocks in taken.values():
            assert blocks == sorted(set(blocks))

    async def check(self) -> None:
        """Every file reads as the model says."""
        source, listing = self.source()
        await source.open_index()
        files = [row for row in listing if row.kind == "f"]
        assert {row.path for row in files} == set(self.files)
        for row in files:
            assert await source.content(row).read(0, row.size) == self.files[row.path].content(), row.path


def _runs(blocks: set[int], chance: random.Random | None) -> list[tuple[int, int]]:
    """The blocks in runs that cross no group, cut here and there besides."""
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        cut = block % GROUP_BLOCKS == 0 or (chance is not None and chance.random() < 0.3)
        if runs and runs[-1][1] == block and not cut:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs


async def put_manifest(store: MemoryStore, rows: Sequence[PageRow]) -> ManifestRef:
    data, ref = write_page_manifest(rows)
    await store.create(keys.manifest(ref.digest), data)
    return ref


async def rows_of(store: MemoryStore, ref: ManifestRef) -> list[PageRow]:
    return list(read_page_rows(await MemoryStore.get(store, keys.manifest(ref.digest)), ref))


def snapshot_of(files: ManifestRef, pages: tuple[ManifestRef, ...], lsn: Lsn) -> Snapshot:
    return Snapshot(
        id="s",
        kind="built",
        tli=1,
        lsn=lsn,
        checkpoint=lsn,
        end=lsn,
        time=SystemClock().now(),
        files=files,
        pages=pages,
        boot=None,
        backup_label=None,
        tablespaces=(),
        settings=(),
        parent=None,
        bytes=0,
    )


def with_chain(work: Callable[[Chain], Awaitable[None]], *, most: int = MAX_DELTAS) -> None:
    async def run() -> None:
        with ThreadPoolExecutor(2) as pool:
            chain = Chain(pool, most=most)
            await work(chain)
            await chain.fetcher.aclose()

    asyncio.run(run())


async def go_on(chain: Chain, base: Sequence[Step], deltas: Sequence[Sequence[Step]], seed: int) -> None:
    """A base backup and then a snapshot for each delta, folded and checked each time."""
    chance = random.Random(seed)
    for step in base:
        chain.apply(step)
    await chain.snapshot(whole=True)
    await chain.check()
    for steps in deltas:
        chain.lsn = Lsn(chain.lsn + 10)
        for step in steps:
            chain.apply(step)
        await chain.snapshot(chance)
        await chain.check()
        await chain.fold()
        await chain.check()


VERBS = ("write", "write", "write", "fill", "scatter", "resize", "remove", "create")
a_step = st.tuples(
    st.sampled_from(VERBS), st.integers(0, len(PATHS) - 1), st.integers(0, MOST_BLOCKS), st.integers(0, 20)
)
BASE: tuple[Step, ...] = (
    ("create", 0, 5, 19),
    ("create", 1, 0, 17),
    ("create", 3, 0, 1),
    ("fill", 0, 30, 9),
    ("resize", 1, 20, 1),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(a_step, max_size=6), min_size=1, max_size=10),
    st.integers(1, 3),
    st.integers(0, 1 << 30),
)
def test_every_snapshot_reads_as_before(deltas: list[list[Step]], most: int, seed: int) -> None:
    """Writes, growth, truncation, deletion, re-creation: folding changes nothing a reader sees (P5)."""
    with_chain(lambda chain: go_on(chain, BASE, deltas, seed), most=most)


def long_chain(seed: int) -> list[list[Step]]:
    chance = random.Random(seed)
    return [
        [
            (chance.choice(VERBS), chance.randrange(9), chance.randrange(MOST_BLOCKS), chance.randrange(20))
            for _ in range(chance.randrange(1, 9))
        ]
        for _ in range(40)
    ]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_forty_snapshots(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all there is to do to a group is done on the way."""
    kinds: set[str] = set()

    def plan_and_tell(layers: Sequence[Sequence[ExtentRef]], blocks: int) -> GroupPlan:
        plan = plan_group(layers, blocks)
        kinds.update(["kept"] * bool(plan.kept) + ["whole"] * plan.whole)
        kinds.update("cut" if len(pieces) == 1 else "joined" for pieces in plan.anew)
        return plan

    monkeypatch.setattr(fold, "plan_group", plan_and_tell)

    async def work(chain: Chain) -> None:
        await go_on(chain, BASE, long_chain(seed), seed)
        assert kinds == {"kept", "cut", "joined", "whole"}
        # Cutting makes two of a row at most; for the rest see test_a_bound_on_the_tiers_costs_a_root_at_most.
        assert 0 < chain.folded <= 2 * chain.named * (1 + math.log2(chain.named))

    with_chain(work)


def test_in_small_parts_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests of several parts, row groups of few rows, batches of few rows: parts count as one tier."""
    monkeypatch.setattr(fold, "BATCH_ROWS", 5)
    monkeypatch.setattr(page_manifest, "PAGE_MANIFEST_TARGET_BYTES", 600)
    monkeypatch.setattr(page_manifest, "PAGE_ROWS_PER_GROUP", 3)
    monkeypatch.setattr(page_runs, "PAGE_ROWS_PER_GROUP", 3)
    parts = 0

    async def work(chain: Chain) -> None:
        nonlocal parts
        chance = random.Random(5)
        await go_on(chain, BASE, [], 5)
        for steps in long_chain(5)[:20]:
            chain.lsn = Lsn(chain.lsn + 10)
            for step in steps:
                chain.apply(step)
            await chain.snapshot(chance)
            await chain.fold()
            await chain.check()
            lsns = [ref.lsn for ref in chain.pages]
            parts = max(parts, *(lsns.count(lsn) for lsn in lsns[1:]), 0)

    with_chain(work, most=2)
    assert parts > 2


# --- single promises -----------------------------------------------------------------------------------------


def plain(path: str, size: int, born: int = 0) -> FileRow:
    return FileRow(path, "f", size, 0o600, None, None, Lsn(born))


def listing_of(*files: FileRow) -> FileListing:
    directories: set[str] = set()
    for file in files:
        above = split(file.path)[0]
        while above:
            directories.add(above)
            above = split(above)[0]
    rows = [FileRow(path, "d", 0, 0o700, None, None, Lsn(0)) for path in directories]
    return read_file_listing(*write_file_listing([*rows, *files]))


async def unread(file: FileRow, offset: int, length: int) -> bytes:
    raise AssertionError(f"{file.path} was read at {offset}")


class Deltas:
    """A full manifest without rows, and deltas of rows that name what no store holds."""

    def __init__(self, pool: ThreadPoolExecutor, *deltas: tuple[int, Sequence[PageRow]]) -> None:
        self.store = LoggedStore()
        self.pool = pool
        self.fetcher = Fetcher(
            self.store,
            DiskCache(None, 0, SystemClock()),
            SystemClock(),
            pool,
            Counters(),
            patience_seconds=0.1,
        )
        self._deltas = deltas

    async def fold(
        self, listing: FileListing, read: fold.ReadFile = unread, *, most: int = 1, base: int | None = 1
    ) -> tuple[ManifestRef, ...]:
        full = replace(await put_manifest(self.store, []), lsn=None if base is None else Lsn(base))
        refs = [replace(await put_manifest(self.store, rows), lsn=Lsn(lsn)) for lsn, rows in self._deltas]
        self.store.created.clear()
        self.store.calls.clear()
        return await fold_deltas(
            self.store, "id", self.pool, SystemClock(), self.fetcher, (full, *refs), listing, read, most=most
        )


def with_deltas(work: Callable[[Deltas], Awaitable[None]], *deltas: tuple[int, Sequence[PageRow]]) -> None:
    async def run() -> None:
        with ThreadPoolExecutor(2) as pool:
            await work(Deltas(pool, *deltas))

    asyncio.run(run())


@pytest.mark.parametrize("base", [None, 1])
def test_what_a_reader_would_ignore_is_left_out_without_reading_any_extent(base: int | None) -> None:
    kept = [
        PageRow("a", 0, extent(0, 1, 1)),
        PageRow("a", 0, extent(3, 2, 2)),
        PageRow("b", 7, extent(0, 4, 3)),
    ]
    older = [
        PageRow("a", 0, extent(0, 1, 4)),
        kept[1],
        PageRow("a", 0, extent(6, 1, 5)),
        PageRow("a", 1, extent(0, 1, 6)),
        PageRow("gone", 0, extent(0, 1, 7)),
        PageRow("inline", 0, extent(0, 1, 8)),
        PageRow("new", 0, extent(0, 1, 9)),
    ]
    newer = [kept[0], kept[2], PageRow("now", 0, extent(0, 1, 10))]
    files = [
        plain("a", 6 * BLOCK_BYTES),
        plain("b", 7 * GROUP_BYTES + 3 * BLOCK_BYTES + 1),
        replace(plain("inline", 3), content=b"abc"),
        plain("new", BLOCK_BYTES, born=11),
        plain("now", BLOCK_BYTES, born=20),
    ]

    async def work(deltas: Deltas) -> None:
        pages = await deltas.fold(listing_of(*files), base=base)
        assert [ref.lsn for ref in pages] == [None if base is None else Lsn(base), Lsn(20)]
        assert await rows_of(deltas.store, pages[1]) == [*kept, newer[2]]
        assert deltas.store.created == [keys.manifest(pages[1].digest)]
        assert deltas.fetcher.counters.requests == 0

    with_deltas(work, (10, older), (20, newer))


def test_nothing_left_is_no_manifest() -> None:
    async def work(deltas: Deltas) -> None:
        pages = await deltas.fold(listing_of(plain("other", 1)))
        assert [ref.lsn for ref in pages] == [Lsn(1)]

    with_deltas(work, (10, [PageRow("gone", 0, extent(0, 1))]), (20, [PageRow("gone", 0, extent(0, 1))]))


def test_nothing_due_is_nothing_done() -> None:
    rows = [PageRow("a", group, extent(0, 1)) for group in range(10)]

    async def work(deltas: Deltas) -> None:
        pages = await deltas.fold(listing_of(), most=2)
        assert [ref.rows for ref in pages] == [0, 10, 1]
        assert deltas.store.calls == []

    with_deltas(work, (10, rows), (20, rows[:1]))


@pytest.mark.parametrize("lsns", [(20, 10), (10, 20, 10)])
def test_deltas_out_of_order_are_refused(lsns: tuple[int, ...]) -> None:
    async def work(deltas: Deltas) -> None:
        with pytest.raises(ValueError, match="order"):
            await deltas.fold(listing_of())

    with_deltas(work, *((lsn, [PageRow("a", 0, extent(0, 1, lsn))]) for lsn in lsns))


def test_a_hot_group_is_stored_whole_as_far_as_the_file_goes() -> None:
    """Scattered blocks, of which the base must say what lies between."""
    size = GROUP_BYTES + 9 * BLOCK_BYTES + 77
    content = random.Random(1).randbytes(size)
    scattered = [PageRow("hot", 1, extent(block, 1, block)) for block in (0, 2, 4, 6, 8)]

    async def read(file: FileRow, offset: int, length: int) -> bytes:
        assert file.path == "hot"
        return content[offset : offset + length]

    async def work(deltas: Deltas) -> None:
        pages = await deltas.fold(listing_of(plain("hot", size)), read)
        (row,) = await rows_of(deltas.store, pages[1])
        assert (row.path, row.group, row.extent.first_block) == ("hot", 1, 0)
        assert row.extent.raw_bytes == size - GROUP_BYTES
        assert await deltas.fetcher.fetch(row.extent) == content[GROUP_BYTES:]

    with_deltas(work, (10, scattered[:3]), (20, scattered[3:]))


def test_a_reader_that_gives_too_little_is_not_believed() -> None:
    scattered = [PageRow("hot", 0, extent(block, 1, block)) for block in range(0, 10, 2)]

    async def read(file: FileRow, offset: int, length: int) -> bytes:
        return bytes(length - 1)

    async def work(deltas: Deltas) -> None:
        with pytest.raises(ValueError, match="hot: 131071 bytes at 0"):
            await deltas.fold(listing_of(plain("hot", GROUP_BYTES)), read)
        assert deltas.store.created == []

    with_deltas(work, (10, scattered[:3]), (20, scattered[3:]))


def test_reads_in_flight_are_bounded() -> None:
    """P9, and several at once they are."""
    groups = 3 * READS
    scattered = [
        PageRow("hot", group, extent(block, 1, block)) for group in range(groups) for block in range(0, 10, 2)
    ]
    now = most = 0

    async def read(file: FileRow, offset: int, length: int) -> bytes:
        nonlocal now, most
        now += 1
        most = max(most, now)
        for _ in range(5):
            await asyncio.sleep(0)
        now -= 1
        return bytes(length)

    async def work(deltas: Deltas) -> None:
        pages = await deltas.fold(listing_of(plain("hot", groups * GROUP_BYTES)), read)
        assert [row.group for row in await rows_of(deltas.store, pages[1])] == list(range(groups))

    with_deltas(work, (10, scattered), (20, scattered[:1]), (30, scattered))
    assert READS // 2 < most <= READS


def test_rows_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """P9: parts are written while most rows have not been read yet."""
    monkeypatch.setattr(fold, "BATCH_ROWS", 64)
    monkeypatch.setattr(page_manifest, "PAGE_MANIFEST_TARGET_BYTES", 20_000)
    monkeypatch.setattr(page_manifest, "PAGE_ROWS_PER_GROUP", 64)
    monkeypatch.setattr(page_runs, "PAGE_ROWS_PER_GROUP", 64)
    rows = [
        [PageRow("a", group, extent(tier, 1, group * 2 + tier)) for group in range(4000)] for tier in (0, 1)
    ]

    async def work(deltas: Deltas) -> None:
        pages = await deltas.fold(listing_of(plain("a", 4000 * GROUP_BYTES)))
        assert len(pages) > 5 and {ref.lsn for ref in pages[1:]} == {Lsn(20)}
        verbs = [verb for verb, _ in deltas.store.calls]
        assert verbs[: verbs.index("create")].count("get") < verbs.count("get") / 3
        found = [row for ref in pages[1:] for row in await rows_of(deltas.store, ref)]
        assert found == [row for pair in zip(*rows, strict=True) for row in pair]

    with_deltas(work, (10, rows[0]), (20, rows[1]))


def test_many_cold_deltas() -> None:
    """Rows that hide nothing: no pack is read or written, and each row is written O(log n) times."""
    count, each = 150, 8
    places = random.Random(4).sample(range(count * each * 2), count * each)

    async def run() -> None:
        with ThreadPoolExecutor(2) as pool:
            deltas = Deltas(pool)
            pages = await deltas.fold(listing_of())
            listing = listing_of(plain("cold", count * each * 2 * GROUP_BYTES))
            written = 0
            for number in range(count):
                groups = sorted(places[number * each : (number + 1) * each])
                rows = [PageRow("cold", group, extent(5, 1, group)) for group in groups]
                ref = replace(await put_manifest(deltas.store, rows), lsn=Lsn(10 + number))
                before = (*pages, ref)
                pages = await fold_deltas(
                    deltas.store, "id", pool, SystemClock(), deltas.fetcher, before, listing, unread
                )
                assert len(pages) <= 1 + MAX_DELTAS
                written += sum(one.rows for one in pages if one not in before)
            assert sum(ref.rows for ref in pages) == count * each
            # With so few tiers none is folded before it is due: the price is three of each.
            assert 0 < written <= 3 * count * each * (1 + math.log(count, 3))
            found = [row.group for ref in pages[1:] for row in await rows_of(deltas.store, ref)]
            assert sorted(found) == sorted(places)
            assert deltas.fetcher.counters.requests == 0

    asyncio.run(run())


def test_what_was_the_short_end_of_a_file_is_filled_up() -> None:
    """Blocks that become one extent keep their places when one before them is short."""

    async def work(chain: Chain) -> None:
        await chain.snapshot(whole=True)
        chain.files[PATHS[0]] = file = ModelFile(Lsn(chain.lsn + 10), 5000, 5000)
        file.blocks[0] = b"x" * 5000 + bytes(BLOCK_BYTES - 5000)
        file.changed.add(0)
        for block in range(1, 6):
            chain.lsn = Lsn(chain.lsn + 10)
            await chain.snapshot()
            chain.write(file, block, 1)
        file.resize(5 * BLOCK_BYTES)
        await chain.fold()
        await chain.check()
        (row,) = await rows_of(chain.store, chain.pages[1])
        assert row.extent.raw_bytes == 5 * BLOCK_BYTES

    with_chain(work)


def test_a_cut_extent_ends_with_the_file() -> None:
    async def work(chain: Chain) -> None:
        await chain.snapshot(whole=True)
        chain.lsn = Lsn(chain.lsn + 10)
        chain.files[PATHS[0]] = file = ModelFile(chain.lsn)
        chain.write(file, 0, 6)
        await chain.snapshot()
        chain.lsn = Lsn(chain.lsn + 10)
        chain.write(file, 1, 1)
        file.resize(3 * BLOCK_BYTES + 77)
        await chain.snapshot()
        await chain.fold()
        await chain.check()
        extents = [row.extent for row in await rows_of(chain.store, chain.pages[1])]
        assert [(one.first_block, one.raw_bytes) for one in extents] == [
            (0, BLOCK_BYTES),
            (1, BLOCK_BYTES),
            (2, BLOCK_BYTES + 77),
        ]

    with_chain(work, most=1)


async def overlapping(chain: Chain) -> None:
    """A base of one file and two deltas, of which the second hides a part of the first's extent."""
    chain.apply(("create", 0, 0, 16))
    await chain.snapshot(whole=True)
    for first, count in ((2, 6), (4, 1)):
        chain.lsn = Lsn(chain.lsn + 10)
        chain.write(chain.files[PATHS[0]], first, count)
        await chain.snapshot()


def test_a_damaged_extent_ends_the_fold() -> None:
    """P5: what is cut was verified; P3: no manifest names what was not stored."""

    async def work(chain: Chain) -> None:
        await overlapping(chain)
        before = chain.pages
        rows = [row for ref in before[1:2] for row in await rows_of(chain.store, ref)]
        hidden = next(row.extent for row in rows if row.extent.blocks > 1)
        chain.store.damage(keys.pack(hidden.pack), hidden.offset + hidden.stored_bytes - 1)
        created = len(chain.store.created)
        with pytest.raises(DamagedStore):
            await chain.fold()
        assert chain.pages == before and len(chain.store.created) == created

    with_chain(work, most=1)


def test_no_manifest_without_its_packs() -> None:
    """P3: an upload that fails ends the fold; the next try succeeds."""

    async def work(chain: Chain) -> None:
        await overlapping(chain)
        created = len(chain.store.created)
        chain.store.refuse = keys.pack("0" * 64)[:6]
        with pytest.raises(Unavailable):
            await chain.fold()
        assert len(chain.store.created) == created
        chain.store.refuse = ""
        await chain.fold()
        await chain.check()
        assert len(chain.pages) == 2

    with_chain(work, most=1)
