"""Verifying: every kind of damage is found, with its object, its place and what it endangers."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.golden.damage import CHANGES
from tests.golden.reading import GoldenReader
from tests.golden.store import STORES, V1, V1B, GoldenStore, choose
from tests.support.archived_wal import FIRST, NOON, SECOND, Archive, Server
from tests.support.manual_clock import ManualClock
from tests.unit.pg.test_page import make_page
from timeline.catalog.tail import find_tail
from timeline.clock import SystemClock
from timeline.errors import Unavailable, UsageError
from timeline.format import keys, zstd_frame
from timeline.format.branch_state import Gap, Snapshot
from timeline.format.chunk import decode_layout
from timeline.format.digest import digest_of
from timeline.format.extent import ExtentRef
from timeline.format.log import LogEntry, encode_entry
from timeline.format.log_change import AddSnapshot, Cover, RecordGap
from timeline.format.manifest import ManifestRef, PageRow
from timeline.format.pack import EXTENTS, PackBuilder
from timeline.format.page_manifest import write_page_manifest
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn
from timeline.maintain import verify_data
from timeline.maintain.lost_ranges import merged, without
from timeline.maintain.pack_check import ROW, Rows, check_pack
from timeline.maintain.pack_set import list_packs
from timeline.maintain.verify import verify
from timeline.maintain.verify_ledger import Ledger
from timeline.maintain.verify_pages import PageSource, check_pages
from timeline.maintain.verify_report import Fault, LsnRange, VerifyReport
from timeline.maintain.verify_wal import UNDER_WAY
from timeline.pg.relation_file import parse_relation_file
from timeline.store.base import Store
from timeline.store.memory import MemoryStore

OBJECTS = V1.objects
CLOCK = SystemClock()
ALL_OF_IT = (
    LsnRange(1, Lsn(0x900000), Lsn(0x938728)),
    LsnRange(2, Lsn(0x938728), Lsn(0x957ED0)),
)
"""What the first golden store can restore."""
RESTORABLE = {
    "v1": ALL_OF_IT,
    "v1b": (LsnRange(1, Lsn(0x900060), Lsn(0x939AE8)), LsnRange(2, Lsn(0x939AE8), Lsn(0x959310))),
}
NOT_OF_THE_BRANCH = ("mark", "pin", "evidence")
"""Kinds of objects that nothing is recovered from."""
INSIDE_ONLY = ("first-byte", "middle-byte", "last-byte")
"""Changes to packs that leave their size as it is: only reading finds them."""


async def filled(objects: Mapping[str, bytes]) -> MemoryStore:
    store = MemoryStore()
    for key, data in objects.items():
        await store.create(key, data)
    return store


def verified(objects: Mapping[str, bytes], *, data: bool = True) -> VerifyReport:
    async def work() -> VerifyReport:
        return await verify(await filled(objects), CLOCK, data=data)

    return asyncio.run(work())


# --- the golden store ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", STORES, ids=lambda golden: golden.name)
def test_an_intact_store(golden: GoldenStore) -> None:
    found = verified(golden.objects)
    assert not found.damaged and found.problems == () and found.unrestorable == ()
    assert found.restorable == RESTORABLE[golden.name]
    (gap,) = GoldenReader(golden.objects).read_log()[0].gaps
    assert found.gaps == (LsnRange(gap.tli, gap.start, gap.end),)
    named = GoldenReader(golden.objects).reachable(pinned=False)
    packs = [key for key in named if key.startswith(keys.PACKS)]
    assert found.data is not None and found.data.complete and found.data.never == 0
    assert found.data.packs == found.checked.packs == len(packs)
    assert found.data.bytes_total == sum(len(golden.objects[key]) for key in packs)
    assert found.checked.manifests == len(named) - len(packs)


@pytest.mark.parametrize(
    ("golden", "case"),
    [
        pytest.param(golden, case, id=f"{golden.name}-{case}")
        for golden in STORES
        for case in golden.cases
        if case != "log entry/deleted" and not case.startswith(NOT_OF_THE_BRANCH)
    ],
)
def test_every_way_to_damage_it_is_found(golden: GoldenStore, case: str) -> None:
    """[GEN-6]: with its key; without ``--data`` too, unless only the bytes inside a pack or chunk differ."""
    kind, change = case.split("/")
    objects, restorable = golden.objects, RESTORABLE[golden.name]
    key = choose(objects)[kind]
    damaged = CHANGES[change](key, objects[key]).apply(objects)
    found = verified(damaged)
    assert found.damaged and [problem.key for problem in found.problems] == [key]
    (problem,) = found.problems
    assert (problem.fault is Fault.MISSING) == (change == "deleted")
    quick = verified(damaged, data=False)
    unseen = ("pack" in kind and change in INSIDE_ONLY) or (
        kind == "chunk" and change in INSIDE_ONLY and is_behind_header(objects[key], damaged[key], key)
    )
    assert quick.damaged != unseen
    if kind in ("file listing", "page manifest"):
        assert problem.snapshots_unusable and "base-1" in problem.snapshots and found.unrestorable
    if kind in ("built file listing", "delta manifest"):
        assert problem.snapshots_unusable and problem.snapshots == ("built-3",)
        assert found.unrestorable == (), "a branch can still start from the base backup"
    if kind == "WAL manifest":
        state, _ = GoldenReader(objects).read_log()
        sealed = state.sealed[-1]
        assert problem.holes == (LsnRange(2, sealed.start, sealed.end),)
        built = state.snapshots[-1]
        # A snapshot behind the hole is a new beginning.
        again = built.lsn if built.lsn > sealed.end else restorable[1].end
        assert found.unrestorable == (LsnRange(2, restorable[1].start, again),)
        left = (LsnRange(2, again, restorable[1].end),) if again < restorable[1].end else ()
        assert found.restorable == (restorable[0], *left)


def is_behind_header(intact: bytes, damaged: bytes, key: str) -> bool:
    """Whether two chunks of the same length differ in frames only."""
    header_bytes = decode_layout(intact, key).header_bytes
    return intact[:header_bytes] == damaged[:header_bytes]


@pytest.mark.parametrize("kind", NOT_OF_THE_BRANCH)
def test_what_nothing_is_recovered_from_is_not_looked_at(kind: str) -> None:
    key = choose(V1B.objects)[kind]
    assert not verified(CHANGES["emptied"](key, V1B.objects[key]).apply(V1B.objects)).damaged


def test_a_hole_between_sealed_ranges_is_damage_only_where_a_snapshot_needs_it() -> None:
    """[LOG-8], [LOG-9]: what was forgotten is missed by nobody."""
    state, entries = GoldenReader(OBJECTS).read_log()
    first, rest = state.sealed[0], state.sealed[1:]
    number = len(entries)
    key = keys.log_entry("main", number)

    def holes(snapshots: tuple[Snapshot, ...]) -> list[tuple[LsnRange, ...]]:
        left = replace(state, sealed=rest, snapshots=snapshots)
        entry = LogEntry(number, "main", "w", "n", 0, NOON, Cover(Coverage(2, FIRST, 0)), left)
        found = verified({**OBJECTS, key: encode_entry(entry)}, data=False)
        return [problem.holes for problem in found.problems if problem.key != key]

    assert holes(state.snapshots) == [(LsnRange(1, first.start, first.end),)]
    assert holes(()) == []


def test_the_newest_log_entry_can_be_gone_unseen() -> None:
    """Without it the store is what it was a moment before: only who remembers could tell."""
    key = choose(OBJECTS)["log entry"]
    assert not verified(CHANGES["deleted"](key, OBJECTS[key]).apply(OBJECTS)).damaged


def test_an_earlier_log_entry_that_is_gone_is_named_and_endangers_nothing() -> None:
    """Later entries hold the state."""

    async def work() -> None:
        archive = Archive()
        await chunks(archive, 3)
        for second in range(4):
            await archive.log.append(Cover(Coverage(1, FIRST, NOON + second * SECOND)))
        gone = keys.log_entry("main", 2)
        await archive.store.delete([gone])
        found = await structure(archive)
        assert [(one.key, one.fault) for one in found.problems] == [(gone, Fault.MISSING)]
        assert found.unrestorable == () and found.checked.log_entries == 4

    asyncio.run(work())


def test_a_log_entry_that_is_needed_and_gone_leaves_nothing_to_look_at() -> None:
    newest = max(named[1] for key in OBJECTS if (named := keys.parse_log_entry(key)))
    key = keys.log_entry("main", newest - 1)
    found = verified({name: data for name, data in OBJECTS.items() if name != key}, data=False)
    assert [(one.key, one.fault) for one in found.problems] == [(key, Fault.MISSING)]
    assert found.log_number is None and "nothing of this branch can be read" in found.remarks[0]


def test_blocks_of_a_damaged_extent_are_named() -> None:
    key = choose(OBJECTS)["extent pack"]
    found = verified(CHANGES["middle-byte"](key, OBJECTS[key]).apply(OBJECTS))
    (problem,) = found.problems
    assert problem.snapshots == ("base-1", "built-1") and not problem.snapshots_unusable
    assert problem.file_runs == len(problem.files) == 1
    assert problem.holes == () and found.restorable == ALL_OF_IT
    whole = verified(CHANGES["deleted"](key, OBJECTS[key]).apply(OBJECTS), data=False)
    assert whole.problems[0].file_runs == 9
    assert problem.files[0] in whole.problems[0].files


def test_no_store_and_nothing_archived() -> None:
    with pytest.raises(UsageError, match="no store"):
        verified({})
    with pytest.raises(UsageError, match="nothing was ever archived"):
        verified({keys.META: OBJECTS[keys.META]})


# --- the tail ------------------------------------------------------------------------------------------------


async def chunks(archive: Archive, count: int) -> list[str]:
    """So many chunks; their keys."""
    server = Server(1, FIRST)
    await archive.begin(server)
    for number in range(count):
        server.commit(NOON + number * SECOND, 100 + number)
        await archive.archive(server)
    return [item.key for item in await archive.store.list("wal/")]


async def structure(archive: Archive) -> VerifyReport:
    return await verify(archive.store, archive.clock)


def test_a_chunk_missing_far_behind_the_end_is_damage() -> None:
    """An archiver has only so many uploads under way: what has more behind it was once there (EDGE 60, 63)."""

    async def work() -> None:
        archive = Archive()
        names = await chunks(archive, UNDER_WAY + 3)
        gone, following = names[2], names[3]
        await archive.store.delete([gone])
        found = await structure(archive)
        (problem,) = found.problems
        start, end = (named.start for key in (gone, following) if (named := keys.parse_chunk(key)))
        assert (problem.key, problem.fault) == (gone, Fault.MISSING)
        assert problem.holes == (LsnRange(1, start, end),)
        assert found.checked.chunks == UNDER_WAY + 2, "what lies beyond the hole is looked at as well"

    asyncio.run(work())


def test_a_break_near_the_end_may_be_an_upload_under_way() -> None:
    async def work() -> None:
        archive = Archive()
        names = await chunks(archive, 5)
        await archive.store.delete([names[2]])
        found = await structure(archive)
        assert not found.damaged
        assert len(found.remarks) == 1 and "uploads under way or broken off" in found.remarks[0]

    asyncio.run(work())


def test_what_the_log_says_was_there_must_be_there() -> None:
    """Coverage proves that the chain reached so far, however few chunks lie beyond the break."""

    async def work() -> None:
        archive = Archive()
        names = await chunks(archive, 5)
        tail = await find_tail(archive.store, await archive.state(), 1)
        await archive.log.append(Cover(Coverage(1, tail.end, NOON)))
        await archive.store.delete(names[-1:])
        (problem,) = (await structure(archive)).problems
        named = keys.parse_chunk(names[-1])
        assert named is not None
        assert problem.key == names[-1] and problem.holes == (LsnRange(1, named.start, tail.end),)

    asyncio.run(work())


def test_a_gap_is_no_damage_and_is_said() -> None:
    async def work() -> None:
        archive = Archive()
        await chunks(archive, 3)
        end = (await find_tail(archive.store, await archive.state(), 1)).end
        await archive.log.append(RecordGap(Gap(1, end, Lsn(end + 4096), "slot lost")))
        found = await structure(archive)
        assert not found.damaged and found.gaps == (LsnRange(1, end, Lsn(end + 4096)),)

    asyncio.run(work())


def test_sealed_and_collected_behind_its_back() -> None:
    """[GEN-6]: what a fresh log no longer names is no damage (EDGE 42)."""

    class Collected(MemoryStore):
        """Seals and collects all chunks when one is first read after they were listed."""

        archive: Archive | None = None

        async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            if key.startswith("wal/") and self.archive is not None:
                archive, self.archive = self.archive, None
                await archive.seal()
                await self.delete([item.key for item in await self.list("wal/")])
            return await super().get(key, start, length)

    async def work() -> None:
        archive = Archive()
        store = Collected()
        await chunks(archive, 5)
        for item in await archive.store.list(""):
            await store.create(item.key, await archive.store.get(item.key))
        archive.store = store
        archive.log = type(archive.log)(store, "main", archive.clock, "w")
        store.archive = archive
        found = await verify(store, archive.clock, data=True)
        assert not found.damaged
        assert (found.checked.chunks, found.checked.sealed_ranges) == (0, 1)
        assert store.archive is None

    asyncio.run(work())


def test_a_pack_that_vanishes_while_it_is_read() -> None:
    """Named by a fresh log all the same: damage, said once; with what is in it."""

    class Losing(MemoryStore):
        lost = choose(OBJECTS)["WAL pack"]

        async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            if key == self.lost:
                await self.delete([key])
            return await super().get(key, start, length)

    async def work() -> None:
        store = Losing()
        for key, data in OBJECTS.items():
            await store.create(key, data)
        (problem,) = (await verify(store, CLOCK, data=True)).problems
        assert (problem.key, problem.fault) == (store.lost, Fault.MISSING) and problem.holes

    asyncio.run(work())


def test_a_store_that_does_not_answer_is_not_damaged() -> None:
    class Silent(MemoryStore):
        async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list:  # type: ignore[type-arg]
            if prefix.startswith("packs/"):
                raise Unavailable("no answer")
            return await super().list(prefix, after=after, limit=limit)

    async def work() -> None:
        store = Silent()
        for key, data in OBJECTS.items():
            await store.create(key, data)
        with pytest.raises(Unavailable):
            await verify(store, CLOCK)

    asyncio.run(work())


# --- budget and memory ---------------------------------------------------------------------------------------


def test_a_budget_goes_round_the_store(tmp_path: Path) -> None:
    """Each run reads what was not read for longest; after enough of them everything was."""

    async def work() -> None:
        store = await filled(OBJECTS)
        clock = ManualClock()
        never = []
        for _ in range(5):
            clock.advance(60)
            found = await verify(store, clock, data=True, budget=1, ledger_directory=tmp_path)
            assert found.data is not None and found.data.packs == 1
            assert found.data.complete == (found.data.packs_total == 1)
            never.append(found.data.never)
            oldest = found.data.oldest
        assert never == [4, 3, 2, 1, 0]
        assert oldest is not None and (clock.now() - oldest) / 1e6 == pytest.approx(4 * 60)
        clock.advance(60)
        found = await verify(store, clock, data=True, budget=1, ledger_directory=tmp_path)
        assert found.data is not None and found.data.oldest is not None
        assert (clock.now() - found.data.oldest) / 1e6 == pytest.approx(4 * 60), "the oldest one was read"
        whole = await verify(store, clock, data=True, ledger_directory=tmp_path)
        assert whole.data is not None and whole.data.packs == 5 and whole.data.oldest == clock.now()

    asyncio.run(work())


def test_a_damaged_pack_comes_first_again(tmp_path: Path) -> None:
    """A scheduled run must not call a store intact because it read another part of it."""

    async def work() -> None:
        key = choose(OBJECTS)["WAL pack"]
        store = await filled(CHANGES["last-byte"](key, OBJECTS[key]).apply(OBJECTS))
        await verify(store, CLOCK, data=True, ledger_directory=tmp_path)
        for _ in range(3):
            found = await verify(store, CLOCK, data=True, budget=1, ledger_directory=tmp_path)
            assert [problem.key for problem in found.problems] == [key]

    asyncio.run(work())


def test_a_ledger_cut_short_is_progress_lost_and_no_more(tmp_path: Path) -> None:
    async def work() -> None:
        packs = await list_packs(await filled(OBJECTS))
        path = tmp_path / "x.packs"
        ledger = Ledger(path, packs)
        for number in range(len(packs)):
            ledger.mark(number, 7)
        ledger.save()
        path.write_bytes(path.read_bytes()[:-3])
        assert sorted(Ledger(path, packs).at.tolist()) == [0] + [7] * (len(packs) - 1)

    asyncio.run(work())


def test_few_rows_at_once_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_data, "ROWS_AT_ONCE", 1)
    found = verified(OBJECTS)
    assert not found.damaged and found.data is not None and found.data.packs == 5


def test_memory_does_not_grow_with_a_manifest() -> None:
    """P9: 150,000 extents of one file, 8 MiB of manifest, in less than 40 MiB."""

    async def work() -> None:
        names = [digest_of(str(number).encode()).hex() for number in range(50)]
        rows = (
            PageRow(
                "base/5/16384",
                group,
                ExtentRef(0, 131072, names[group // 3000], 300 + group % 3000, 10, b"%032d" % group),
            )
            for group in range(150_000)
        )
        data, ref = write_page_manifest(rows)
        store: Store = await filled(
            {keys.manifest(ref.digest): data, **{keys.pack(name): bytes(4000) for name in names}}
        )
        packs = await list_packs(store)
        source = PageSource(ref, ("s",), True, 0, 1 << 30)
        tracemalloc.start()
        found = await check_pages(store, [source], packs, {ref.digest: len(data)}, lambda _: None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found.problems == [] and found.rows == 150_000
        assert packs.rows.sum() == 150_000 and packs.needed.max() == 3309
        assert len(packs.short) == 0
        assert peak < 40 << 20

    asyncio.run(work())


# --- page checksums ------------------------------------------------------------------------------------------


def pack_of(raws: list[tuple[bytes, int, int]]) -> tuple[str, bytes, Rows]:
    """A pack of extents (raw, block, before), and its rows."""
    builder = PackBuilder("5" * 32, EXTENTS)
    rows = np.zeros(len(raws), ROW)
    for number, (raw, block, before) in enumerate(raws):
        stored = zstd_frame.compress(raw)
        rows[number] = (0, builder.add(stored), len(stored), len(raw), block, before, digest_of(raw))
    return *builder.finish(), rows


def test_page_checksums_below_the_backups_start() -> None:
    """EDGE 30: a page that the backup may have torn is not judged, an older one is."""
    rng = random.Random(5)
    block = (1 << 30) // 8192 + 3
    good, old, torn = (
        bytearray(make_page(rng, block + number, lsn)) for number, lsn in ((0, 90), (1, 99), (2, 100))
    )
    old[5000] ^= 1
    torn[5000] ^= 1
    raw = bytes(good + old + torn)
    name, data, rows = pack_of([(raw, block, 100), (raw + bytes(10), 0, 0)])
    result = check_pack(data, name, keys.pack(name), rows)
    assert result.pages == 3
    (fault,) = result.faults
    assert (fault.fault, fault.offset) == (Fault.PAGE_CHECKSUM, rows[0]["offset"])
    assert f"block {block + 1} of the fork" in fault.expected


def test_a_bad_page_is_told_apart_from_a_damaged_object() -> None:
    """End to end: with file, block and snapshot."""

    async def work() -> None:
        archive = Archive()
        server = Server(1, FIRST)
        await archive.begin(server)
        server.commit(NOON, 100)
        await archive.archive(server)
        page = bytearray(make_page(random.Random(1), 3, 50))
        page[6000] ^= 1
        builder = PackBuilder(archive.store_id, EXTENTS)
        stored = zstd_frame.compress(bytes(page))
        offset = builder.add(stored)
        name, data = builder.finish()
        row = PageRow(
            "base/5/16384", 0, ExtentRef(3, 8192, name, offset, len(stored), digest_of(bytes(page)))
        )
        manifest, ref = write_page_manifest([row])
        empty, files = _listing()
        for key, body in (
            (keys.pack(name), data),
            (keys.manifest(ref.digest), manifest),
            (keys.manifest(files.digest), empty),
        ):
            await archive.store.create(key, body)
        await archive.log.append(AddSnapshot(_base(files, ref)))
        found = await verify(archive.store, archive.clock, data=True)
        (problem,) = found.problems
        assert (problem.fault, problem.key, problem.offset) == (Fault.PAGE_CHECKSUM, keys.pack(name), offset)
        assert problem.snapshots == ("base",)
        assert [(run.path, run.first_block, run.blocks) for run in problem.files] == [("base/5/16384", 3, 1)]

    asyncio.run(work())


def _listing() -> tuple[bytes, ManifestRef]:
    from timeline.format.file_listing import write_file_listing
    from timeline.format.manifest import FileRow

    rows = [FileRow(path, "d", 0, 0o700, None, None, Lsn(0)) for path in ("base", "base/5")]
    return write_file_listing([*rows, FileRow("base/5/16384", "f", 32768, 0o600, None, None, Lsn(0))])


def _base(files: ManifestRef, pages: ManifestRef) -> Snapshot:
    return Snapshot(
        id="base",
        kind="base",
        tli=1,
        lsn=FIRST,
        checkpoint=FIRST,
        end=FIRST,
        time=NOON,
        files=files,
        pages=(pages,),
        boot=None,
        backup_label="label",
        tablespaces=(),
        settings=(),
        parent=None,
        bytes=0,
    )


def test_a_directory_without_a_row_is_said() -> None:
    """[FIL-1]."""
    from timeline.format.file_listing import write_file_listing
    from timeline.format.manifest import FileRow

    async def work() -> None:
        archive = Archive()
        server = Server(1, FIRST)
        await archive.begin(server)
        data, files = write_file_listing([FileRow("base/1", "f", 3, 0o600, b"abc", None, Lsn(0))])
        manifest, pages = write_page_manifest([])
        await archive.store.create(keys.manifest(files.digest), data)
        await archive.store.create(keys.manifest(pages.digest), manifest)
        await archive.log.append(AddSnapshot(_base(files, pages)))
        (problem,) = (await verify(archive.store, archive.clock)).problems
        assert problem.key == keys.manifest(files.digest) and "directory base" in problem.expected

    asyncio.run(work())


# --- small things --------------------------------------------------------------------------------------------


def test_relation_files() -> None:
    segments = {
        "base/5/1259": 0,
        "base/5/1259.2": 2,
        "base/5/1259_vm": 0,
        "base/5/1259_fsm.1": 1,
        "global/1262": 0,
        "pg_tblspc/16390/PG_15_202209061/5/16400.12": 12,
        "base/5/16400_init": 0,
    }
    for path, segment in segments.items():
        found = parse_relation_file(path)
        assert found is not None and found.segment == segment, path
    second = parse_relation_file("base/5/1259.2")
    assert second is not None and second.first_block(1 << 30) == 2 * 131072
    for path in (
        "global/pg_control",
        "base/5/PG_VERSION",
        "base/5/pg_filenode.map",
        "pg_xact/0000",
        "base/5/t3_16400",
        "base/5/1.01",
    ):
        assert parse_relation_file(path) is None, path


def test_intervals() -> None:
    assert merged([(5, 7), (1, 3), (3, 4), (6, 9), (2, 2)]) == [(1, 4), (5, 9)]
    assert without([(0, 10), (20, 30)], [(2, 4), (8, 22), (40, 50)]) == [(0, 2), (4, 8), (22, 30)]
    assert without([(0, 10)], [(0, 10)]) == []
