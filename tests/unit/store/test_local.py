"""LocalStore: what only a directory has: syncs, litter, permissions, foreign files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.manual_clock import ManualClock
from tests.support.postgres import server_user
from timeline.errors import TimelineError, Unavailable, UsageError
from timeline.store import local
from timeline.store.local import LocalStore
from timeline.store.open import open_store

DATA = b"some bytes" * 100


@contextlib.contextmanager
def nobody_special() -> Iterator[None]:
    """As a user whom permissions bind: root is bound by none."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(server_user().pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)


def test_opening_and_reading_create_nothing(store_directory: Path) -> None:
    """P10."""
    absent = store_directory / "absent"

    async def run() -> None:
        store = await open_store(f"file://{absent}")
        assert await store.list("") == []
        with pytest.raises(TimelineError):
            await store.get("tl.json")
        await store.delete(["a/b"])
        await store.aclose()

    asyncio.run(run())
    assert not absent.exists()


def test_a_store_without_write_permission_is_readable(store_directory: Path) -> None:
    """P10."""
    root = store_directory / "store"

    async def run() -> None:
        store = LocalStore(root)
        await store.create("a/b", DATA)
        for path in (root / "a" / "b", root / "a", root):
            path.chmod(0o555 if path.is_dir() else 0o444)
        with nobody_special():
            reader = LocalStore(root)
            assert await reader.get("a/b", 3, 4) == DATA[3:7]
            assert [item.key for item in await reader.list("")] == ["a/b"]
            for key in ("a/c", "c/d"):
                with pytest.raises(UsageError, match=r"cannot write .*: permission denied"):
                    await reader.create(key, DATA)
            await reader.aclose()
        await store.aclose()

    asyncio.run(run())


def test_an_unwritable_parent_is_one_clear_line(store_directory: Path) -> None:
    store_directory.chmod(0o555)
    with nobody_special(), pytest.raises(UsageError) as raised:
        asyncio.run(LocalStore(store_directory / "store").create("tl.json", b"x"))
    assert raised.value.message.endswith("permission denied")
    assert "\n" not in raised.value.message
    assert raised.value.hint


def test_a_file_in_the_way_is_one_clear_line(store_directory: Path) -> None:
    (store_directory / "file").write_text("")
    with pytest.raises(UsageError, match="is not a directory"):
        asyncio.run(open_store(str(store_directory / "file")))
    with pytest.raises(UsageError, match="not a directory"):
        asyncio.run(LocalStore(store_directory / "file" / "store").create("tl.json", b"x"))


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (errno.ENOSPC, Unavailable, "the disk is full"),
        (errno.EIO, Unavailable, "input/output error"),
        (errno.EROFS, UsageError, "read-only"),
    ],
)
def test_failures_of_the_disk(
    store_directory: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception], text: str
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(local, "_sync", fail)
    with pytest.raises(kind, match=text):
        asyncio.run(LocalStore(store_directory).create("key", b"x"))
    monkeypatch.undo()
    assert list((store_directory / ".tmp").iterdir()) == [], "what failed leaves no litter"
    assert asyncio.run(LocalStore(store_directory).list("")) == []


def test_a_file_system_without_hard_links_is_named(
    store_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UsageError, match="no hard links"):
        asyncio.run(LocalStore(store_directory).create("key", b"x"))


def test_names_are_synced_up_to_the_root(store_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P1: a file whose directory was never synced is gone after a power cut."""
    events: list[str] = []
    real_sync, real_link = local._sync, os.link

    def sync(descriptor: int) -> None:
        events.append("sync " + os.readlink(f"/proc/self/fd/{descriptor}"))
        real_sync(descriptor)

    def link(source: str, target: str) -> None:
        events.append(f"link {target}")
        real_link(source, target)

    monkeypatch.setattr(local, "_sync", sync)
    monkeypatch.setattr(os, "link", link)
    root = store_directory / "new" / "store"

    async def run() -> None:
        store = LocalStore(root)
        await store.create("a/b/c", b"x")
        first = list(events)
        events.clear()
        await store.create("a/b/d", b"x")
        await store.aclose()
        linked = first.index(f"link {root}/a/b/c")
        assert ".tmp/" in first[linked - 1], "the bytes are synced before they get a name"
        assert f"sync {root}/a/b" in first[linked:]
        for directory in (root / "a", root, root.parent, root.parent.parent):
            assert f"sync {directory}" in first
        assert [event.split("/")[-1] for event in events if event != f"sync {root}/a/b"][1:] == ["d"]
        assert events[-1] == f"sync {root}/a/b"

    asyncio.run(run())


def test_who_finds_equal_bytes_syncs_the_name_too(
    store_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The creator may have died between link and sync; our caller acknowledges on our word."""
    asyncio.run(LocalStore(store_directory).create("a/b", DATA))
    synced: list[str] = []
    monkeypatch.setattr(local, "_sync", lambda d: synced.append(os.readlink(f"/proc/self/fd/{d}")))
    assert asyncio.run(LocalStore(store_directory).create("a/b", DATA)) is True
    assert {str(store_directory / "a"), str(store_directory)} <= set(synced)


def test_litter_of_a_crash_is_no_object_and_goes_with_the_next_collection(store_directory: Path) -> None:
    async def run() -> None:
        clock = ManualClock()
        store = LocalStore(store_directory, clock=clock)
        await store.create("a", b"1")
        litter = store_directory / ".tmp"
        for name, age_seconds in (("young", 3600), ("old", 90_000)):
            (litter / name).write_bytes(b"half")
            then = clock.now() / 1e6 - age_seconds
            os.utime(litter / name, (then, then))
        (store_directory / ".DS_Store").write_bytes(b"")
        (store_directory / ".hidden").mkdir()
        (store_directory / ".hidden" / "file").write_bytes(b"")
        assert [item.key for item in await store.list("")] == ["a"]
        await store.delete(["b"])
        assert [path.name for path in litter.iterdir()] == ["young"]
        await store.aclose()

    asyncio.run(run())


def test_objects_are_not_for_everybody(store_directory: Path) -> None:
    """A store holds the whole database, password hashes included."""
    asyncio.run(LocalStore(store_directory / "store").create("a/b", DATA))
    for path in (store_directory / "store").rglob("*"):
        assert path.stat().st_mode & 0o007 == 0


def test_a_directory_with_awkward_characters_survives_its_url(store_directory: Path) -> None:
    awkward = store_directory / "a b%20ü#?"

    async def run() -> None:
        store = LocalStore(awkward)
        await store.create("key", DATA)
        again = await open_store(store.url)
        assert again.url == store.url
        assert await again.get("key") == DATA
        await store.aclose()

    asyncio.run(run())


def test_ranges_come_out_of_the_page_cache_and_off_the_disk(
    store_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, whether the kernel can answer at once or a thread must wait."""

    async def run() -> None:
        store = LocalStore(store_directory)
        data = os.urandom(3 << 20)
        await store.create("key", data)

        async def check() -> None:
            for start, length in ((0, None), (5, 70_000), (-9, None), (1 << 20, 1 << 20), (0, 2 << 20)):
                end = len(data) if length is None else start + length
                expected = data[start:] if start < 0 else data[start:end]
                assert await store.get("key", start, length) == expected

        await check()
        monkeypatch.setattr(local, "_read_cached", lambda file, first, end: None)
        await check()
        monkeypatch.setattr(os, "pread", lambda file, size, at: b"", raising=True)
        with pytest.raises(TimelineError, match="object ends here"):
            await store.get("key", 5, 10)
        await store.aclose()

    asyncio.run(run())


def test_many_creators_in_many_processes_have_one_winner(store_directory: Path) -> None:
    """P2, across processes: the kernel decides."""
    program = (
        "import asyncio, sys\n"
        "from timeline.store.local import LocalStore\n"
        "async def run():\n"
        "    store = LocalStore(sys.argv[1])\n"
        "    print(sum([await store.create(f'log/{n}', sys.argv[2].encode()) for n in range(100)]))\n"
        "    await store.aclose()\n"
        "asyncio.run(run())\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(store_directory), f"writer {number}"],
            stdout=subprocess.PIPE,
            cwd=pathlib.Path(__file__).parents[3],
        )
        for number in range(3)
    ]
    won = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert sum(won) == 100


def test_importing_a_directory_store_stays_cheap() -> None:
    """`tl branch` counts tenths of seconds: nothing of S3, no Arrow, no numpy on this path."""
    program = (
        "import sys, timeline.store.open\n"
        "heavy = {'aiobotocore', 'botocore', 'aiohttp', 'numpy', 'pyarrow', 'numba', 'boto3'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[3],
    ).stdout
    assert output.strip() == "[]"
