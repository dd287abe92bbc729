"""Many stores, several workers: each is done exactly once, whoever is killed (P2, P3; EDGE 57)."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cli import executor_dask
from cli.executor import STOPPED, Outcome, Task
from tests.support.archived_server import archived_server
from tests.support.dask_cluster import DaskCluster, dask_cluster
from tests.support.leftovers import children_of, mounts_below, open_files, wait_until_nothing
from tests.support.postgres import PostgresServer, free_port, scratch
from tests.support.snapshot_place import state_of
from tests.support.tl_host import TL, Host, make_host
from timeline.clock import SystemClock
from timeline.format.branch_state import BUILT, BranchState

STORES = 20
BUILD_SECONDS = 900.0


@pytest.fixture(scope="module")
def archived(make_postgres_session: Callable[..., PostgresServer]) -> Iterator[Path]:
    """A store whose newest snapshot is its base backup, with WAL beyond that, sealed and not."""
    server = make_postgres_session(15, initdb=["--data-checksums"])
    place = scratch("tl-executor-")
    with archived_server(server, place / "store") as source:
        server.sql("create table t as select n, md5(n::text) from generate_series(1, 20000) n")
        source.position()
        source.seal()
        server.sql("update t set n = n + 1 where n % 10 = 0")
        source.position()
    yield place / "store"
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def root() -> Iterator[Path]:
    path = scratch("tl-executor-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def stores(archived: Path, root: Path) -> list[Path]:
    """Independent copies."""
    paths = [root / "stores" / f"s{number:02}" for number in range(STORES)]
    for path in paths:
        shutil.copytree(archived, path)
    return paths


def host_of(root: Path, name: str, stores: Sequence[Path]) -> Host:
    """A host with a state of its own, whose tl.toml names the stores."""
    host = make_host(root / name, "")
    del host.environment["TL_STORE"]
    text = "".join(f'[cluster.{path.name}]\nstore = "file://{path}"\n' for path in stores)
    Path(host.environment["TL_CONFIG"]).write_text(text)
    return host


def each(host: Host, *args: str, code: int = 0) -> list[dict[str, Any]]:
    """The outcomes of ``tl each``; its exit code must be this."""
    result = host.run("each", *args, "--json", timeout=BUILD_SECONDS)
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    found: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])["clusters"]
    return found


def built_in(path: Path) -> list[str]:
    """Ids of its built snapshots."""
    state: BranchState = state_of(f"file://{path}")
    return [snapshot.id for snapshot in state.snapshots if snapshot.kind == BUILT]


def await_that(what: Callable[[], Any], seconds: float = 120.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.02)
    return found


def check_all(host: Host, stores: Sequence[Path]) -> None:
    """Each was built exactly once, is whole, and has nothing left to do."""
    assert [len(built_in(path)) for path in stores] == [1] * len(stores)
    verified = each(host, "verify", "--data", "--all")
    assert [one["result"]["problems"] for one in verified] == [[]] * len(stores)
    assert {one["result"]["store"] for one in verified} == {f"file://{path}" for path in stores}


@pytest.mark.fuse
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dask_worker_killed_in_the_middle_of_a_build(root: Path, stores: list[Path]) -> None:
    """EDGE 57: of two workers, each with a host of its own, one is killed with all it has begun."""
    asks, one, two = (host_of(root, name, stores) for name in ("asks", "one", "two"))
    with dask_cluster(root) as cluster:
        first = cluster.start_worker("one", one.environment)
        cluster.start_worker("two", two.environment)
        asking = subprocess.Popen(
            [TL, "each", "snapshot", "--all", "--executor", cluster.address, "--json"],
            env=asks.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        # In the middle: Postgres replays in the mount, nothing is committed.
        await_that(lambda: sum(map(len, map(built_in, stores))) >= 3)
        await_that(lambda: mounts_below(root / "one"))
        left = children_of(first)
        assert len(left) == 1
        cluster.kill("one")
        os.kill(left[0], signal.SIGKILL)
        assert mounts_below(root / "one"), "the mount and its server are orphans now"
        cluster.start_worker("one-again", one.environment)
        out, _ = asking.communicate(timeout=BUILD_SECONDS)
        assert asking.returncode == 0, out
        found = json.loads(out.splitlines()[-1])["clusters"]
        assert [len(item["result"]["snapshots"]) for item in found] == [1] * STORES
        assert sorted(item["attempts"] for item in found) == [1] * (STORES - 1) + [2]
        assert len({item["worker"] for item in found}) >= 2
        assert mounts_below(root / "one") == [], "the next build there cleared up"
        again = each(asks, "snapshot", "--all", "--executor", cluster.address)
        assert [item["result"]["snapshots"] for item in again] == [[]] * STORES
    check_all(asks, stores)
    wait_until_nothing(root)


@pytest.mark.fuse
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_local_process_killed_in_the_middle_of_a_build(root: Path, stores: list[Path]) -> None:
    """EDGE 57: two processes of one host take turns; the next build sweeps what the killed one left."""
    host = host_of(root, "host", stores)
    asking = subprocess.Popen(
        [TL, "each", "snapshot", "--all", "--executor", "local:2", "--json"],
        env=host.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    await_that(lambda: sum(map(len, map(built_in, stores))) >= 3)
    await_that(lambda: mounts_below(root / "host"))
    lock = (root / "host/state/build/build.lock").stat().st_ino
    (holder,) = [pid for pid in children_of(asking.pid) if pid in lock_holders(lock)]
    os.kill(holder, signal.SIGKILL)
    out, _ = asking.communicate(timeout=BUILD_SECONDS)
    assert asking.returncode == 0, out
    found = json.loads(out.splitlines()[-1])["clusters"]
    assert [len(item["result"]["snapshots"]) for item in found] == [1] * STORES
    assert sorted(item["attempts"] for item in found) == [1] * (STORES - 1) + [2]
    check_all(host, stores)
    wait_until_nothing(root)


def lock_holders(inode: int) -> set[int]:
    """Processes that hold an flock on the file."""
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return {int(line[4]) for line in lines if line[1] == "FLOCK" and line[5].endswith(f":{inode}")}


@pytest.mark.slow
@pytest.mark.fuse
def test_one_store_given_to_two_workers_has_one_winner(archived: Path, root: Path) -> None:
    """Two hosts build the same snapshot at once: one is committed, and nothing of the other does harm."""
    shutil.copytree(archived, root / "store")
    asks, one, two = (host_of(root, name, []) for name in ("asks", "one", "two"))
    Path(asks.environment["TL_CONFIG"]).write_text(
        "".join(f'[cluster.{name}]\nstore = "file://{root}/store"\n' for name in ("a", "b"))
    )
    with dask_cluster(root) as cluster:
        for name, host in (("one", one), ("two", two)):
            cluster.start_worker(name, host.environment)
        found = each(asks, "snapshot", "--all", "--executor", cluster.address)
        assert len({item["worker"] for item in found}) == 2
        assert sorted(len(item["result"]["snapshots"]) for item in found) == [0, 1]
        assert len(built_in(root / "store")) == 1
        # The same, of one store in parts.
        result = asks.run("verify", "--data", "--cluster", "a", "--executor", cluster.address, "--json")
        assert result.returncode == 0, result.stderr
        in_parts = json.loads(result.stdout)
        whole = asks.tl("verify", "--data", "--cluster", "a")
        for name in ("packs", "chunks", "bytes", "pages", "packs_total", "never", "complete"):
            assert in_parts["data"][name] == whole["data"][name], name
        assert in_parts["restorable"] == whole["restorable"]
        # SIGINT here ends what runs there.
        for path in [root / "later" / name for name in ("x", "y", "z")]:
            shutil.copytree(archived, path)
        later = host_of(root, "later-host", [root / "later" / name for name in ("x", "y", "z")])
        asking = subprocess.Popen(
            [TL, "each", "snapshot", "--all", "--executor", cluster.address, "--json"],
            env=later.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        await_that(lambda: mounts_below(root / "one") or mounts_below(root / "two"))
        asking.send_signal(signal.SIGINT)
        out, _ = asking.communicate(timeout=120)
        assert asking.returncode == 130
        assert {item["exit_code"] for item in json.loads(out.splitlines()[-1])["clusters"]} == {7}
        await_that(lambda: not mounts_below(root))
    wait_until_nothing(root)


@pytest.mark.slow
def test_a_scheduler_that_is_not_there(root: Path) -> None:
    host = host_of(root, "host", [root / "nothing"])
    result = host.run("each", "verify", "--all", "--executor", f"tcp://127.0.0.1:{free_port()}")
    assert result.returncode == 7 and "no Dask scheduler answers" in result.stderr


@pytest.mark.slow
def test_a_cluster_that_loses_all_its_workers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for another one has an end; what was not done is told."""
    monkeypatch.setattr(executor_dask, "NO_WORKER_SECONDS", 3.0)

    async def run(cluster: DaskCluster) -> list[Outcome]:
        executor = await executor_dask.connect(cluster.address, SystemClock())
        try:
            assert await executor.width() == 1
            task = Task("a", ("verify", "--store", f"file://{root}/none", "--json"), 60.0)
            first = [outcome async for outcome in executor.outcomes([task], asyncio.Event())]
            cluster.kill("only")
            rest = [outcome async for outcome in executor.outcomes([task], asyncio.Event())]
            return first + rest
        finally:
            await executor.aclose()

    with dask_cluster(root) as cluster:
        cluster.start_worker("only", os.environ)
        done, lost = asyncio.run(run(cluster))
    assert (done.exit_code, done.attempts) == (2, 1) and "no store" in done.message
    assert (lost.exit_code, lost.attempts) == (STOPPED, 0) and "no worker" in lost.message


def test_the_worst_of_all_is_the_exit_code(archived: Path, root: Path) -> None:
    """A damaged store and one that is not there keep nobody from verifying the others."""
    stores = [root / name for name in ("whole", "damaged", "nowhere")]
    for path in stores[:2]:
        shutil.copytree(archived, path)
    gone = next(path for path in sorted((stores[1] / "packs").rglob("*")) if path.is_file())
    gone.unlink()
    host = host_of(root, "host", stores)
    found = {item["cluster"]: item for item in each(host, "verify", "--data", "--all", code=4)}
    assert {name: item["exit_code"] for name, item in found.items()} == {
        "whole": 0,
        "damaged": 4,
        "nowhere": 2,
    }
    assert [one["key"] for one in found["damaged"]["result"]["problems"]] == [
        gone.relative_to(stores[1]).as_posix()
    ]
    assert found["whole"]["result"]["data"]["complete"] and "no store" in found["nowhere"]["message"]
    said = host.run("each", "verify", "--cluster", "whole", "--cluster", "nowhere")
    assert said.returncode == 2
    lines = said.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["CLUSTER", "EXIT"],
        ["whole", "0"],
        ["nowhere", "2"],
        ["1", "of"],
    ]
    assert host.run("each", "verify").returncode == 2, "no cluster was asked for"
    assert host.run("each", "verify", "--all", "--dat").returncode == 2, "no option of tl verify"
    assert host.run("each", "restore", "--all").returncode == 2, "not to be run for many"


@pytest.mark.slow
@pytest.mark.fuse
def test_a_task_that_the_scheduler_gave_up_is_begun_again(archived: Path, root: Path) -> None:
    """And the command of a killed worker ends with it: the snapshot that waits for its turn gives up its place."""
    shutil.copytree(archived, root / "store")
    asks, one = host_of(root, "asks", [root / "store"]), host_of(root, "one", [])
    build = root / "one/state/build"
    build.mkdir(parents=True)
    with dask_cluster(root, allowed_failures=0) as cluster, (build / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first = cluster.start_worker("one", one.environment)
        asking = subprocess.Popen(
            [TL, "each", "snapshot", "--all", "--executor", cluster.address, "--json"],
            env=asks.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        (waiting,) = await_that(lambda: children_of(first))
        # It is that far when it has opened the lock.
        await_that(lambda: str(build / "build.lock") in open_files(waiting))
        cluster.kill("one")
        await_that(lambda: not Path(f"/proc/{waiting}").exists())
        fcntl.flock(lock, fcntl.LOCK_UN)
        cluster.start_worker("one-again", one.environment)
        out, _ = asking.communicate(timeout=BUILD_SECONDS)
        assert asking.returncode == 0, out
        (found,) = json.loads(out.splitlines()[-1])["clusters"]
        assert found["attempts"] == 2 and len(found["result"]["snapshots"]) == 1
    assert len(built_in(root / "store")) == 1
    wait_until_nothing(root)
