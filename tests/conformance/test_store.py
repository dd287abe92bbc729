"""The promises of timeline/store/base.py, on every store and every wrapper."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

import pytest

from tests.fix_stores import StoreFactory
from timeline.clock import SystemClock
from timeline.errors import DamagedStore, NotFound, UsageError
from timeline.store.base import Store
from timeline.store.probe import check_conditional_create

DATA = bytes(range(256)) * 5


def on(factory: StoreFactory, scenario: Callable[[Store], Awaitable[None]]) -> None:
    """Run a scenario on a store of its own."""

    async def run() -> None:
        async with factory() as store:
            await scenario(store)

    asyncio.run(run())


def test_what_was_created_is_read_back(each_store: StoreFactory) -> None:
    async def scenario(store: Store) -> None:
        for key, data in {
            "tl.json": DATA,
            "wal/main/1/0000": b"",
            "packs/ab/ff_-.x": b"\0" * 300_000,
        }.items():
            assert await store.create(key, data) is True
            assert await store.get(key) == data
        assert await store.create("view", memoryview(DATA)[3:700]) is True
        assert await store.get("view") == DATA[3:700]

    on(each_store, scenario)


def test_objects_are_never_overwritten(each_store: StoreFactory) -> None:
    """P2."""

    async def scenario(store: Store) -> None:
        assert await store.create("log/1", b"first") is True
        for other in (b"other", b"longer than the first", b""):
            assert await store.create("log/1", other) is False
        assert await store.create("log/1", b"first") is True, "equal bytes count as created"
        assert await store.get("log/1") == b"first"

    on(each_store, scenario)


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, None, DATA),
        (0, 1, DATA[:1]),
        (0, len(DATA), DATA),
        (7, 100, DATA[7:107]),
        (1000, None, DATA[1000:]),
        (len(DATA) - 1, 1, DATA[-1:]),
        (len(DATA), None, b""),
        (len(DATA), 0, b""),
        (5, 0, b""),
        (-1, None, DATA[-1:]),
        (-300, None, DATA[-300:]),
        (-len(DATA), None, DATA),
        (-len(DATA) - 9999, None, DATA),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value),
)
def test_ranges(each_store: StoreFactory, start: int, length: int | None, expected: bytes) -> None:
    async def scenario(store: Store) -> None:
        await store.create("a/b", DATA)
        assert await store.get("a/b", start, length) == expected

    on(each_store, scenario)


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, len(DATA) + 1), (len(DATA) - 1, 2), (len(DATA), 1), (len(DATA) + 1, None), (9999, 0)],
)
def test_fewer_bytes_than_asked_for_is_damage(
    each_store: StoreFactory, start: int, length: int | None
) -> None:
    async def scenario(store: Store) -> None:
        await store.create("a/b", DATA)
        with pytest.raises(DamagedStore) as raised:
            await store.get("a/b", start, length)
        assert raised.value.key == "a/b"
        assert raised.value.offset == len(DATA)

    on(each_store, scenario)


def test_ranges_of_an_empty_object(each_store: StoreFactory) -> None:
    async def scenario(store: Store) -> None:
        await store.create("empty", b"")
        assert await store.get("empty") == b""
        assert await store.get("empty", -5) == b""
        assert await store.get("empty", 0, 0) == b""
        with pytest.raises(DamagedStore):
            await store.get("empty", 0, 1)

    on(each_store, scenario)


@pytest.mark.parametrize(("start", "length"), [(0, None), (0, 0), (3, 4), (-2, None)])
def test_a_missing_key_is_not_found(each_store: StoreFactory, start: int, length: int | None) -> None:
    async def scenario(store: Store) -> None:
        await store.create("dir/there", DATA)
        for missing in ("nothing", "dir/nothing", "dir/there/below", "other/dir/key"):
            with pytest.raises(NotFound) as raised:
                await store.get(missing, start, length)
            assert raised.value.key == missing

    on(each_store, scenario)


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".tmp/x", "a/.hidden", "a b", "ä", "a\n", "k" * 1000]
)
def test_malformed_keys_are_refused(each_store: StoreFactory, key: str) -> None:
    async def scenario(store: Store) -> None:
        with pytest.raises(UsageError):
            await store.create(key, b"x")
        with pytest.raises(UsageError):
            await store.get(key)
        with pytest.raises(UsageError):
            await store.delete([key])

    on(each_store, scenario)


def test_impossible_ranges_are_refused(each_store: StoreFactory) -> None:
    async def scenario(store: Store) -> None:
        await store.create("key", DATA)
        for start, length in ((-1, 1), (0, -1)):
            with pytest.raises(UsageError):
                await store.get("key", start, length)

    on(each_store, scenario)


def test_listing_an_empty_store(each_store: StoreFactory) -> None:
    async def scenario(store: Store) -> None:
        assert await store.list("") == []
        assert await store.list("branches/main/log/", after="branches/main/log/5", limit=1) == []
        with pytest.raises(UsageError):
            await store.list("", limit=-1)

    on(each_store, scenario)


def test_listings(each_store: StoreFactory) -> None:
    async def scenario(store: Store) -> None:
        log = [f"branches/main/log/{10**20 - 1 - n:020}.json" for n in range(12)]
        others = [
            "branches/main-2/log/1",
            "branches/mai/log/1",
            "branches/main/lo",
            "a",
            "a-b",
            "a.b",
            "a1/b",
            "z/y/x/w",
        ]
        for size, key in enumerate(log + others):
            await store.create(key, b"x" * size)
        ordered = sorted(log)

        async def keys(prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
            return [item.key for item in await store.list(prefix, after=after, limit=limit)]

        assert await keys("") == sorted(log + others)
        sizes = {item.key: item.size for item in await store.list("")}
        assert sizes == {key: size for size, key in enumerate(log + others)}
        assert await keys("branches/main/log/") == ordered
        assert await keys("branches/main/log/", limit=1) == [log[-1]], (
            "the newest entry is one LIST of one key"
        )
        assert await keys("branches/main/log/", limit=5) == ordered[:5]
        assert await keys("branches/main/log/", limit=100) == ordered
        assert await keys("branches/main/log/", limit=0) == []
        assert await keys("branches/main/log/", after=ordered[3]) == ordered[4:]
        assert await keys("branches/main/log/", after=ordered[3], limit=2) == ordered[4:6]
        assert await keys("branches/main/log/", after=ordered[3][:-5] + ".json0") == ordered[4:]
        assert await keys("branches/main/log/", after=ordered[-1]) == []
        assert await keys("branches/main/log/99999999999999999999") == [log[0]]
        assert await keys("branches/main") == sorted(k for k in log + others if k.startswith("branches/main"))
        assert await keys("branches/", after="branches/main-2/log/1") == ["branches/main/lo", *ordered]
        assert await keys("", after="branches/main/log/zzz") == ["z/y/x/w"]
        assert await keys("z/y/x/w") == ["z/y/x/w"]
        assert await keys("nothing/") == []

    on(each_store, scenario)


def test_listing_many_keys_takes_pages(each_store: StoreFactory) -> None:
    """More keys than one page of S3 (1,000)."""

    async def scenario(store: Store) -> None:
        expected = sorted(f"packs/{n:05}" for n in range(1_203))
        for at in range(0, len(expected), 32):
            await asyncio.gather(*(store.create(key, b"x") for key in expected[at : at + 32]))
        assert [item.key for item in await store.list("packs/")] == expected
        assert [item.key for item in await store.list("packs/", limit=1_100)] == expected[:1_100]
        assert [item.key for item in await store.list("packs/", after=expected[99])] == expected[100:]
        await store.delete(expected[1:])
        assert [item.key for item in await store.list("packs/")] == expected[:1]

    on(each_store, scenario)


def test_deletion(each_store: StoreFactory) -> None:
    async def scenario(store: Store) -> None:
        for key in ("a/1", "a/2", "b/3"):
            await store.create(key, DATA)
        await store.delete(["a/1", "b/3", "b/never", "c/never"])
        assert [item.key for item in await store.list("")] == ["a/2"]
        with pytest.raises(NotFound):
            await store.get("a/1")
        await store.delete([])
        assert await store.create("a/1", b"anew") is True
        assert await store.get("a/1") == b"anew"

    on(each_store, scenario)


def test_what_one_client_creates_another_sees_at_once(each_store: StoreFactory) -> None:
    async def run() -> None:
        async with each_store() as writer, each_store() as reader:
            for number in range(10):
                await writer.create(f"log/{number}", DATA)
                assert await reader.get(f"log/{number}") == DATA
                assert len(await reader.list("log/")) == number + 1

    asyncio.run(run())


@pytest.mark.parametrize("round_", range(3))
def test_concurrent_creates_have_one_winner(each_store: StoreFactory, round_: int) -> None:
    """P2, P4: the log commit rests on this. Few contenders: SeaweedFS takes seconds with many."""

    async def run() -> None:
        async with each_store() as one, each_store() as two:
            contents = [f"contender {n}".encode() for n in range(4)]
            stores = [one, two, one, two]
            won = await asyncio.gather(
                *(store.create("log/7", data) for store, data in zip(stores, contents, strict=True))
            )
            assert won.count(True) == 1
            assert await one.get("log/7") == contents[won.index(True)]

    asyncio.run(run())


def test_concurrent_creates_of_equal_bytes_all_count(each_store: StoreFactory) -> None:
    async def scenario(store: Store) -> None:
        assert await asyncio.gather(*(store.create("packs/x", DATA) for _ in range(4))) == [True] * 4

    on(each_store, scenario)


def test_a_large_object(each_store: StoreFactory) -> None:
    """A pack is about 32 MiB."""

    async def scenario(store: Store) -> None:
        data = os.urandom(1 << 20) * 32
        assert await store.create("packs/large", data) is True
        assert await store.get("packs/large") == data
        assert await store.create("packs/large", data) is True
        assert await store.create("packs/large", data[:-1] + b"\0") is (data[-1] == 0)
        assert await store.get("packs/large", 20 << 20, 3 << 20) == data[20 << 20 : 23 << 20]

    on(each_store, scenario)


def test_the_probe_passes_and_leaves_nothing(each_store: StoreFactory) -> None:
    async def scenario(store: Store) -> None:
        assert await check_conditional_create(store, SystemClock()) is None
        assert await store.list("") == []

    on(each_store, scenario)


def test_the_url_holds_no_secret(each_store: StoreFactory) -> None:
    async def scenario(store: Store) -> None:
        assert store.url.split("://")[0] in ("memory", "file", "s3")
        assert "test" + "secret" not in store.url

    on(each_store, scenario)
