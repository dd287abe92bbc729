"""Files out of page manifests and extents: the newest block wins, what is missing is told, few requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from restore.page_index import PageIndex
from restore.source import ExtentSource
from tests.support.fetcher_bench import NOISE, Bench, put_extents, raws, with_bench
from tests.support.plain_snapshot import store_directory
from timeline.clock import SystemClock
from timeline.errors import MissingObject, NotFound
from timeline.format import keys
from timeline.format.branch_state import Snapshot
from timeline.format.extent import GROUP_BYTES
from timeline.format.file_listing import read_file_listing
from timeline.format.manifest import FileRow, PageRow
from timeline.format.page_manifest import write_page_manifest
from timeline.lsn import Lsn
from timeline.store.base import Store
from timeline.store.memory import MemoryStore


async def add_delta(
    store: Store, snapshot: Snapshot, path: str, group: int, first_block: int, raw: bytes, lsn: int | None
) -> Snapshot:
    """Another page manifest on top, with one extent."""
    [ref] = await put_extents(store, [raw])
    data, manifest = write_page_manifest([PageRow(path, group, replace(ref, first_block=first_block))])
    await store.create(keys.manifest(manifest.digest), data)
    manifest = replace(manifest, lsn=None if lsn is None else Lsn(lsn))
    return replace(snapshot, pages=(*snapshot.pages, manifest))


async def row_of(store: Store, snapshot: Snapshot, path: str) -> FileRow:
    data = await store.get(keys.manifest(snapshot.files.digest))
    row = read_file_listing(data, snapshot.files).get(path)
    assert row is not None
    return row


def test_newer_manifests_override_older_ones_block_by_block(tmp_path: Path) -> None:
    """[PAG-4]"""
    content = bytearray(NOISE[: GROUP_BYTES + 50_000])
    (tmp_path / "file").write_bytes(content)

    async def work(bench: Bench) -> None:
        snapshot = await store_directory(bench.memory, tmp_path, SystemClock())
        for first_block, at, length in ((3, 500, 16384), (4, 900, 24576), (0, 77, 8192)):
            raw = NOISE[at : at + length]
            snapshot = await add_delta(bench.memory, snapshot, "file", 0, first_block, raw, None)
            content[first_block * 8192 : first_block * 8192 + length] = raw
        snapshot = await add_delta(bench.memory, snapshot, "other", 9, 0, b"x", None)
        source = ExtentSource(snapshot, bench.fetcher)
        file = source.content(await row_of(bench.memory, snapshot, "file"))
        assert file.read_now(0, 10) is None
        assert await file.read(0, len(content)) == bytes(content)
        for at in range(0, len(content), 4097):
            length = min(9000, len(content) - at)
            assert await file.read(at, length) == bytes(content[at : at + length])
            assert file.read_now(at, length) == bytes(content[at : at + length])

    with_bench(work)


def test_a_files_former_life_is_left_out(tmp_path: Path) -> None:
    """[PAG-7], [FIL-5]: what manifests older than the file say of its name is another file's content."""
    (tmp_path / "file").write_bytes(NOISE[:100_000])

    async def work(bench: Bench) -> None:
        snapshot = await store_directory(bench.memory, tmp_path, SystemClock(), born=500)
        snapshot = replace(snapshot, pages=(replace(snapshot.pages[0], lsn=Lsn(400)),))
        snapshot = await add_delta(bench.memory, snapshot, "file", 0, 2, NOISE[:8192], 500)
        file = ExtentSource(snapshot, bench.fetcher).content(await row_of(bench.memory, snapshot, "file"))
        assert await file.read(0, 100_000) == bytes(16384) + NOISE[:8192] + bytes(100_000 - 24576)

    with_bench(work)


def test_missing_object_is_asked_for_once_more_with_a_fresh_snapshot(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(NOISE[:100_000])

    async def work(bench: Bench) -> None:
        old = await store_directory(bench.memory, tmp_path, SystemClock())
        new = await add_delta(bench.memory, old, "file", 0, 0, NOISE[:100_000], None)
        [moved] = [r.key for r in await bench.memory.list("packs/", limit=1)]
        reloads = 0

        async def reload() -> Snapshot:
            nonlocal reloads
            reloads += 1
            return new

        row = await row_of(bench.memory, old, "file")
        packs = [listed.key for listed in await bench.memory.list("packs/")]
        assert moved in packs
        bench.gate.fail = lambda call: (
            NotFound(call.key) if call.key.startswith("packs/") and reloads == 0 else None
        )
        source = ExtentSource(old, bench.fetcher, reload=reload)
        assert await source.content(row).read(0, 100_000) == NOISE[:100_000]
        assert reloads == 1
        assert source.snapshot is new

    with_bench(work)


def test_missing_for_good_is_damage(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(NOISE[:100_000])

    async def work(bench: Bench) -> None:
        snapshot = await store_directory(bench.memory, tmp_path, SystemClock())
        row = await row_of(bench.memory, snapshot, "file")
        packs = [listed.key for listed in await bench.memory.list("packs/")]
        await bench.memory.delete(packs)

        async def reload() -> Snapshot:
            return snapshot

        with pytest.raises(MissingObject) as missing:
            await ExtentSource(snapshot, bench.fetcher, reload=reload).content(row).read(0, 10)
        assert missing.value.key in packs

    with_bench(work)


def test_warm_index_needs_no_request(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_bytes(NOISE[:300_000])
    memory = MemoryStore()

    async def work(bench: Bench) -> int:
        bench.store._store = memory
        snapshot = await store_directory(memory, tmp_path / "data", SystemClock())
        source = ExtentSource(snapshot, bench.fetcher)
        listing = await source.listing()
        row = listing.get("file")
        assert row is not None
        assert await source.content(row).read(0, 300_000) == NOISE[:300_000]
        return bench.gate.gets

    assert with_bench(work, cache=tmp_path / "cache") > 0
    assert with_bench(work, cache=tmp_path / "cache") == 0


def test_boot_set_comes_in_few_requests(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:03}").write_bytes(NOISE[number * 5000 : number * 5000 + 60_000])

    async def work(bench: Bench) -> None:
        snapshot = await store_directory(bench.memory, tmp_path, SystemClock(), boot=("00", "01", "03"))
        source = ExtentSource(snapshot, bench.fetcher)
        await source.open_index()
        before = bench.gate.gets
        assert await source.fetch_boot_set() == 30
        assert bench.gate.gets - before <= 3
        again = bench.gate.gets
        for number in (0, 15, 39):
            row = await row_of(bench.memory, snapshot, f"{number:03}")
            assert await source.content(row).read(0, 60_000) == NOISE[number * 5000 : number * 5000 + 60_000]
        assert bench.gate.gets - again == 1

    with_bench(work)


def test_an_index_that_is_not_needed_may_be_missing() -> None:
    """All manifests are asked at once; what a newer one tells does not depend on an older one."""

    async def work(bench: Bench) -> None:
        path, born = "base/5/16384", Lsn(0)
        refs = await put_extents(bench.memory, raws(2))
        pages = []
        for ref in refs:
            data, manifest = write_page_manifest([PageRow(path, 0, ref)])
            pages.append(manifest)
            await bench.memory.create(keys.manifest(manifest.digest), data)
        index = PageIndex(tuple(pages), bench.fetcher)
        await index.open()
        await bench.memory.delete([keys.manifest(pages[0].digest)])
        (piece,) = await index.pieces(path, 0, GROUP_BYTES // 8192, born)
        assert piece.ref == refs[1]
        await bench.memory.delete([keys.manifest(pages[1].digest)])
        index = PageIndex(tuple(pages), bench.fetcher)
        with pytest.raises(NotFound):
            await index.pieces(path, 0, GROUP_BYTES // 8192, born)

    with_bench(work)
