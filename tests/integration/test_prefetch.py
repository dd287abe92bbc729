"""The prefetcher of a mount: it reads what the replay will, keeps nobody, and outlives nobody (EDGE 51)."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from restore import agent
from restore.branch_request import BranchResult
from restore.compute import Instance, Launch, launch
from restore.plan import BranchPlan, SegmentFile
from restore.process import children, start_time
from restore.replay_task import announce, read_task, replay_file
from tests.support.archived_server import ArchivedServer
from tests.support.branch_bench import Bench, running_bench, source_of_branches, value, wait_until
from tests.support.postgres import PostgresServer
from timeline.format.value_json import to_json
from timeline.lsn import Lsn

pytestmark = pytest.mark.fuse


@pytest.fixture(scope="module")
def source(make_postgres_session: Callable[..., PostgresServer]) -> Iterator[ArchivedServer]:
    """With some rows, and small segments."""
    server = make_postgres_session(15, initdb=["--wal-segsize=4"])
    with source_of_branches(server) as archived:
        yield archived


@pytest.fixture
def bench(source: ArchivedServer) -> Iterator[Bench]:
    """The branches of a test."""
    with running_bench(source) as made:
        yield made


def test_long_replays_are_fed_and_prefetched(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments come while Postgres replays; the prefetcher looks at them, too, and reads what the replay will."""
    server = bench.archived.server
    server.sql("create table wide (n int primary key, pad text)")
    server.sql("insert into wide select g, repeat('x', 300) from generate_series(1, 30000) g")
    bench.archived.position()
    monkeypatch.setattr("restore.recovery.WHOLE_BYTES", 0)
    # Postgres is not over before the prefetcher has begun.
    monkeypatch.setattr("restore.branch_make.launch", after(bench, "prefetched", launch))
    made = bench.create(name="long")
    assert value(made, "select count(*) from wide where pad like 'x%'") == 30000
    directory = bench.state / "branches" / made.id
    log = (directory / "mount.log").read_text()
    found = re.search(r"prefetched (\d+) ranges", log)
    assert found is not None and int(found[1]) > 5, log
    assert "WARNING" not in log and "ERROR" not in log, log
    assert not (directory / "feed").exists() and not replay_file(directory).exists()
    wait_until(lambda: not children(mount_pid(bench, made)))
    server.sql("drop table wide")


def after(bench: Bench, logged: str, begin: Callable[..., Launch]) -> Callable[..., Launch]:
    """``begin``, once the only mount that is being made has logged that."""

    def wait(instance: Instance, **options: Any) -> Launch:
        log = instance.data.parent / "mount.log"
        wait_until(lambda: logged in log.read_text())
        return begin(instance, **options)

    return wait


def mount_pid(bench: Bench, made: BranchResult) -> int:
    """Of the process that serves the branch's data directory."""
    return next(each.pid for each in agent.mounts(bench.state) if str(each.mountpoint) == made.data_directory)


def test_a_prefetcher_keeps_nobody(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has files of the mount open, and waits for WAL that never comes, ends with its mount."""
    server = bench.archived.server
    server.sql("create table waited (n int)", "insert into waited select generate_series(1, 20000)")
    bench.archived.position()

    def and_more(plan: BranchPlan, directory: Path, *, near: bool) -> None:
        announce(plan, directory, near=near)
        task = read_task(replay_file(directory))
        last = task.segments[-1]
        never = SegmentFile(
            "never", Lsn(last.start + task.segment_bytes), Lsn(last.start + 2 * task.segment_bytes)
        )
        replay_file(directory).write_text(
            json.dumps(to_json(dataclasses.replace(task, segments=(*task.segments, never))))
        )

    monkeypatch.setattr("restore.branch_make.announce", and_more)
    # It would end of its own accord when the replay is over.
    monkeypatch.setattr("restore.branch_make.withdraw", lambda _: None)
    made = bench.create(name="waiting")
    ((prefetcher, began),) = children(mount_pid(bench, made))

    def holds_files() -> bool:
        descriptors = Path(f"/proc/{prefetcher}/fd").iterdir()
        return any(os.readlink(each).startswith(made.data_directory) for each in descriptors)

    wait_until(holds_files)
    asyncio.run(bench.branches.stop("waiting"))
    assert start_time(prefetcher) != began
    assert "was in use" not in (bench.state / "branches" / made.id / "mount.log").read_text()
    server.sql("drop table waited")


def test_a_prefetcher_dies_with_its_mount(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """EDGE 51: killed, the mount leaves nobody who would open the files of the next one."""
    bench.archived.server.sql("create table dying (n int)")
    bench.archived.position()
    monkeypatch.setattr("restore.replay_task.FEED", "elsewhere")
    monkeypatch.setattr("restore.replay_task.WAL", "elsewhere")
    monkeypatch.setattr("restore.branch_make.withdraw", lambda _: None)
    made = bench.create(name="dying")
    mount = mount_pid(bench, made)
    ((prefetcher, began),) = children(mount)
    os.kill(mount, signal.SIGKILL)
    wait_until(lambda: start_time(prefetcher) != began)
    bench.archived.server.sql("drop table dying")
