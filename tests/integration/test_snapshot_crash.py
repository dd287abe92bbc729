"""Builders that die, or lose their server, at any moment (P3, EDGE 57)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from restore import snapshot_build
from restore.process import children
from tests.support.snapshot_place import Place, state_of, unexpected_pages
from tests.support.tl_host import TL
from tests.support.workload import prepare
from timeline.clock import SystemClock
from timeline.format.branch_state import BUILT
from timeline.maintain.garbage import find_garbage
from timeline.store.base import Store
from timeline.store.faulty import Crashed, FaultyStore
from timeline.store.open import open_store


@pytest.mark.fuse
def test_what_a_killed_build_left_is_removed_by_the_next(make_place: Callable[[int], Place]) -> None:
    """EDGE 57: nothing of it is used, either."""
    place = make_place(15)
    place.server.sql("create table t (i int)")
    place.archive()
    place.server.sql("insert into t select generate_series(1, 300000) i")
    place.archive()
    build = Path(place.host.environment["TL_STATE"]) / "build"
    child = subprocess.Popen(
        [TL, "snapshot", "--json"], env=place.host.environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(build.glob("branches/*/data/postmaster.pid")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.kill()
    child.communicate()
    assert all(snapshot.kind != BUILT for snapshot in state_of(place.host.store).snapshots)
    assert len(place.snapshot()) == 1
    assert os.listdir(build / "branches") == []
    branch = place.host.tl("branch", "x")
    assert place.value(branch["dsn"], "select count(*) from t") == "300000"


@pytest.mark.fuse
@pytest.mark.parametrize(
    ("verb", "why"),
    [
        pytest.param(("snapshot",), "was terminated by signal 9", marks=pytest.mark.slow),
        (("branch", "victim"), "half written"),
    ],
)
def test_recovery_is_never_begun_anew(
    make_place: Callable[[int], Place], verb: tuple[str, ...], why: str
) -> None:
    """EDGE 57: Postgres that lost a process would replay once more, from a redo point whose WAL has no images of pages, onto
    pages that the process may have half written."""
    place = make_place(15)
    server = place.server
    server.sql("create table t (i int)")
    place.archive()
    server.sql("insert into t select generate_series(1, 1000) i", "checkpoint")
    place.archive()
    assert len(place.snapshot()) == 1
    server.sql("insert into t select generate_series(1, 400000) i")
    place.archive()
    before = state_of(place.host.store)
    child = subprocess.Popen(
        [TL, *verb, "--json"], env=place.host.environment, stdout=subprocess.PIPE, text=True
    )
    _kill_a_checkpointer(Path(place.host.environment["TL_STATE"]), child)
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 1, out
    assert why in out
    # The error names a log that is still there, though the branch is not.
    [log] = re.findall(r"log is (\S+?)[;\"]", out)
    assert "was terminated by signal 9" in Path(log).read_text()
    assert state_of(place.host.store) == before
    assert place.host.branches() == []
    place.host.tl(*verb)


def _kill_a_checkpointer(state: Path, child: subprocess.Popen[str]) -> None:
    """Kill the first one that a server below ``state`` has while it recovers, which waits for that."""
    deadline = time.monotonic() + 60
    while True:
        assert child.poll() is None and time.monotonic() < deadline
        files = "branches/*/data/postmaster.pid"
        for path in [*state.glob(files), *state.glob(f"build/{files}")]:
            with contextlib.suppress(OSError, ValueError):
                family = [pid for pid, _ in children(int(path.read_text().split("\n")[0]))]
                roles = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in family}
                checkpointer = [pid for pid, role in roles.items() if "checkpointer" in role]
                for startup in (pid for pid, role in roles.items() if "startup" in role and checkpointer):
                    os.kill(startup, signal.SIGSTOP)
                    os.kill(checkpointer[0], signal.SIGKILL)
                    os.kill(startup, signal.SIGCONT)
                    return
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.fuse
def test_a_builder_that_dies_at_any_write(
    make_place: Callable[[int], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3: just before and just after every write to the store; what is left is a whole snapshot or none, and garbage."""
    place = make_place(15)
    server = place.server
    prepare(server)
    place.archive()
    server.sql("create table t as select g, md5(g::text) v from generate_series(1, 20000) g")
    place.archive()
    known = _objects(place)
    before = state_of(place.host.store).snapshots
    wrapped: list[FaultyStore] = []

    async def open_faulty(url: str, **options: Any) -> Store:
        wrapped.append(FaultyStore(await open_store(url, **options), crash_at=len(wrapped)))
        return wrapped[-1]

    monkeypatch.setattr(snapshot_build, "open_store", open_faulty)
    deaths = 0
    while state_of(place.host.store).snapshots == before:
        try:
            place.build()
        except Crashed:
            deaths += 1
        assert deaths == len(wrapped) or not wrapped[-1].crashed
        place.host.tl("verify")
    # Packs, boot set, manifest, listing and log entry: before and after each.
    assert deaths >= 9
    [*_, built] = state_of(place.host.store).snapshots
    assert built.kind == BUILT
    assert len(state_of(place.host.store).snapshots) == len(before) + 1
    unexpected, _ = unexpected_pages(place.recovered(built), place.image(built), hints=False)
    assert unexpected == []
    garbage = _garbage(place)
    assert garbage
    assert garbage.isdisjoint(known)
    asyncio.run(_delete(place, garbage))
    place.host.tl("verify", "--data")
    assert _garbage(place) == set()


def _objects(place: Place) -> set[str]:
    async def read() -> set[str]:
        store = await open_store(place.host.store)
        try:
            return {one.key for one in await store.list("")}
        finally:
            await store.aclose()

    return asyncio.run(read())


def _garbage(place: Place) -> set[str]:
    """What nothing refers to, by the collector's own look."""

    async def look() -> set[str]:
        store = await open_store(place.host.store)
        try:
            found = await find_garbage(store, "main", SystemClock(), lambda *_: None)
        finally:
            await store.aclose()
        return {one.key for one in found.garbage}

    return asyncio.run(look())


async def _delete(place: Place, objects: set[str]) -> None:
    store = await open_store(place.host.store)
    try:
        await store.delete(sorted(objects))
    finally:
        await store.aclose()


@pytest.mark.slow
@pytest.mark.fuse
def test_builders_and_their_servers_killed_at_random(make_place: Callable[[int], Place]) -> None:
    """P3, EDGE 57: the store never shows half a snapshot, the next build succeeds, and is right."""
    place = make_place(15)
    server = place.server
    prepare(server)
    place.archive()
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    build = Path(place.host.environment["TL_STATE"]) / "build"
    interrupted = {"builder": 0, "server": 0}
    for number in range(16):
        server.sql(
            f"create table k{number} as select g, md5(g::text) v from generate_series(1, 20000) g",
            f"update k{number} set v = v || 'x' where g % 7 = 0",
        )
        place.archive()
        before = state_of(place.host.store).snapshots
        child = subprocess.Popen(
            [TL, "snapshot", "--json"], env=place.host.environment, stdout=subprocess.PIPE, text=True
        )
        victim = "server" if number % 2 else "builder"
        pid = child.pid
        if victim == "server":
            pid = _server_of(build, child)
            time.sleep(chance.uniform(0.0, 0.3))
        else:
            time.sleep(chance.uniform(0.3, 2.0))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        child.communicate(timeout=120)
        if child.returncode != 0:
            interrupted[victim] += 1
            left = state_of(place.host.store).snapshots
            # A builder may also die with its work committed.
            assert left[: len(before)] == before
            assert len(place.snapshot()) == 1 - (len(left) - len(before))
        place.host.tl("verify", "--data")
        assert os.listdir(build / "branches") == []
        last = state_of(place.host.store).snapshots[-1]
        assert last.kind == BUILT and len(last.pages) <= 8
    print(interrupted)
    assert min(interrupted.values()) >= 2
    unexpected, _ = unexpected_pages(place.recovered(last), place.image(last), hints=False)
    assert unexpected == []


def _server_of(build: Path, child: subprocess.Popen[str]) -> int:
    """The builder's Postgres, as soon as it is there."""
    deadline = time.monotonic() + 60
    while True:
        assert child.poll() is None and time.monotonic() < deadline
        for path in build.glob("branches/*/data/postmaster.pid"):
            with contextlib.suppress(OSError, ValueError):
                return int(path.read_text().split("\n")[0])
        time.sleep(0.002)
