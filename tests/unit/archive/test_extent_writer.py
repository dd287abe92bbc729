"""Groups on their way into packs: order, reuse, bounds, failures."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.support.manual_clock import ManualClock
from timeline.archive.extent_writer import (
    MAX_UPLOADS,
    UNKNOWN,
    Encoded,
    ExtentWriter,
    Group,
    KnownGroup,
    encode_group,
)
from timeline.errors import Unavailable
from timeline.format import keys
from timeline.format.digest import digest_of
from timeline.format.extent import BLOCK_BYTES, GROUP_BYTES, ExtentRef, decode_extent
from timeline.format.manifest import PageRow
from timeline.lsn import Lsn
from timeline.store.memory import MemoryStore

PACK_BYTES = 1 << 20


def group(number: int, raw: bytes, known: KnownGroup = UNKNOWN) -> Group:
    return Group("base/5/16400", number, raw, known, None, None)


def known_extent(raw: bytes, first_block: int = 0) -> ExtentRef:
    return ExtentRef(first_block, len(raw), "ab" * 32, 77, 10, digest_of(raw))


async def write(store: MemoryStore, groups: list[Group]) -> tuple[list[PageRow], ExtentWriter, list[Encoded]]:
    seen: list[Encoded] = []
    with ThreadPoolExecutor(2) as threads:
        writer = ExtentWriter(
            store,
            "id",
            threads,
            ManualClock(),
            pack_bytes=PACK_BYTES,
            divert=lambda _: False,
            finished=seen.append,
        )
        try:
            for one in groups:
                await writer.put(one)
            return await writer.finish(), writer, seen
        finally:
            await writer.abort()


def test_every_group_can_be_read_back_in_order() -> None:
    contents = [os.urandom(GROUP_BYTES) for _ in range(40)] + [os.urandom(5000)]
    store = MemoryStore()

    async def run() -> None:
        rows, writer, seen = await write(store, [group(n, raw) for n, raw in enumerate(contents)])
        assert [one.group.number for one in seen] == list(range(41))
        assert writer.packs == len({row.extent.pack for row in rows}) >= 5
        for row in rows:
            extent = row.extent
            key = keys.pack(extent.pack)
            stored = await store.get(key, extent.offset, extent.stored_bytes)
            assert decode_extent(stored, extent, key) == contents[row.group]
        packs = [row.extent.pack for row in sorted(rows, key=lambda row: row.group)]
        assert len(list(dict.fromkeys(packs))) == sum(
            1 for a, b in zip(packs, [*packs[1:], ""], strict=True) if a != b
        )

    asyncio.run(run())


def test_runs_of_blocks_keep_their_place() -> None:
    """Also where equal bytes at another place of another group were stored just before, in this pack or an
    earlier one."""
    raw, filler = os.urandom(BLOCK_BYTES), os.urandom(GROUP_BYTES)
    store = MemoryStore()
    groups = [replace(group(0, raw), first_block=3), replace(group(1, raw), first_block=7)]
    groups += [group(2 + n, bytes([n]) + filler[1:]) for n in range(2 * PACK_BYTES // GROUP_BYTES)]
    groups.append(replace(group(99, raw), first_block=15))

    async def run() -> None:
        rows, writer, _ = await write(store, groups)
        assert writer.packs > 1
        extents = {row.group: row.extent for row in rows}
        assert [extents[number].first_block for number in (0, 1, 2, 99)] == [3, 7, 0, 15]
        assert {replace(extents[number], first_block=0) for number in (1, 99)} == {
            replace(extents[0], first_block=0)
        }

    asyncio.run(run())


def test_equal_bytes_are_stored_once() -> None:
    raw = os.urandom(GROUP_BYTES)
    store = MemoryStore()
    groups = [
        group(0, raw),
        group(1, raw),
        *(group(n, os.urandom(GROUP_BYTES)) for n in range(2, 20)),
        group(20, raw),
    ]

    async def run() -> None:
        rows, writer, _ = await write(store, groups)
        same = [row.extent for row in rows if row.group in (0, 1, 20)]
        assert len(rows) == 21 and same[0] == same[1] == same[2]
        assert writer.uploaded_bytes < 20 * GROUP_BYTES

    asyncio.run(run())


def test_known_groups_are_not_uploaded() -> None:
    raw = os.urandom(GROUP_BYTES)
    other = os.urandom(GROUP_BYTES)
    halves = (known_extent(raw[:16384]), known_extent(raw[16384:], 2))
    cases = [
        group(0, raw, KnownGroup(uploaded=(known_extent(raw),))),
        group(1, raw, KnownGroup(snapshot=halves, in_snapshot=True)),
        group(2, other, KnownGroup(snapshot=halves, in_snapshot=True)),
        group(3, other, KnownGroup(uploaded=(known_extent(raw),))),
        group(4, raw[:-8192], KnownGroup(snapshot=halves, in_snapshot=True)),
    ]

    async def run() -> None:
        rows, _, seen = await write(MemoryStore(), cases)
        assert [(one.equal, one.resumed, bool(one.reuse)) for one in seen] == [
            (None, True, True),
            (True, False, True),
            (False, False, False),
            (None, False, False),
            (False, False, False),
        ]
        assert [row.extent for row in rows if row.group == 1] == list(halves)

    asyncio.run(run())


def test_differences_are_explained_by_page_lsns() -> None:
    page = bytearray(os.urandom(8192))
    page[:8] = (2).to_bytes(4, "little") + (100).to_bytes(4, "little")
    older = known_extent(os.urandom(8192))
    one = replace(
        group(0, bytes(page), KnownGroup(snapshot=(older,), in_snapshot=True)), since=Lsn.parse("2/63")
    )
    assert encode_group(one).explained
    assert not encode_group(replace(one, since=Lsn.parse("2/64"))).explained
    assert not encode_group(replace(one, path="pg_xact/0000")).explained


class SlowStore(MemoryStore):
    """Counts how many creates run at once, and fails from the n-th on."""

    def __init__(self, fail_from: int = 1 << 30) -> None:
        super().__init__()
        self.running = self.most = self.calls = 0
        self._fail_from = fail_from

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        self.calls += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.02)
            if self.calls > self._fail_from:
                raise Unavailable("the store is away")
            return await super().create(key, data)
        finally:
            self.running -= 1


def test_uploads_are_bounded_and_failures_surface() -> None:
    groups = [group(n, os.urandom(GROUP_BYTES)) for n in range(60)]
    slow = SlowStore()
    asyncio.run(write(slow, groups))
    assert slow.most == MAX_UPLOADS
    failing = SlowStore(fail_from=2)
    with pytest.raises(Unavailable, match="away"):
        asyncio.run(write(failing, groups))
    assert failing.running == 0 and failing.calls <= 2 + MAX_UPLOADS
