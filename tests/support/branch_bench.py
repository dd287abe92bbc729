"""Branches of an archived server on a host of a test's own, and proof that nothing is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg

from restore import agent, mount_table
from restore.branch import HostBranches
from restore.branch_request import BranchRequest, BranchResult, StoreAddress
from restore.process import start_time
from tests.support.archived_server import ArchivedServer, archived_server
from tests.support.postgres import PostgresServer, scratch
from timeline.clock import SystemClock

CLOCK = SystemClock()


@contextlib.contextmanager
def source_of_branches(server: PostgresServer) -> Iterator[ArchivedServer]:
    """The server with some rows, a base backup in a store and an archiver at work; stopped at the end."""
    server.sql("create table t (n int)", "insert into t select generate_series(1, 50000)", "checkpoint")
    directory = scratch("tl-st-")
    with archived_server(server, directory / "store") as archived:
        yield archived
    server.stop("immediate")
    shutil.rmtree(directory)


class Bench:
    """The branches of one test, and proof that nothing is left of them."""

    def __init__(self, root: Path, archived: ArchivedServer) -> None:
        self.root = root
        self.archived = archived
        self.branches = HostBranches.of({**os.environ, "TL_STATE": str(root / "state")}, CLOCK)

    def request(self, **options: object) -> BranchRequest:
        return BranchRequest(StoreAddress(self.archived.url), **options)  # type: ignore[arg-type]

    def create(self, **options: object) -> BranchResult:
        return asyncio.run(self.branches.create(self.request(**options)))

    def delete(self, name: str) -> None:
        asyncio.run(self.branches.delete(name))

    @property
    def state(self) -> Path:
        return self.branches.host.state

    def assert_nothing_left(self) -> None:
        """No process, mount, directory or name."""
        assert [m.mountpoint for m in mount_table.mounted() if m.mountpoint.startswith(str(self.root))] == []
        for place in ("branches", "names", "s"):
            assert list((self.state / place).iterdir()) == []
        listed = subprocess.run(
            ["pgrep", "-af", str(self.state / "branches")], capture_output=True, text=True
        )
        assert listed.stdout == ""


@contextlib.contextmanager
def running_bench(source: ArchivedServer) -> Iterator[Bench]:
    """One whose branches are deleted at the end, and its agent ended; fails when anything is left."""
    root = scratch("tl-bn-")
    made = Bench(root, source)
    yield made
    for branch in made.branches.registry.all():
        if branch.protected:
            made.branches.protect(branch.name, protected=False)
        made.delete(branch.name)
    asyncio.run(made.branches.sweep())
    made.assert_nothing_left()
    pid = agent.ping(made.state)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: start_time(pid) is None)
    shutil.rmtree(root)


def value(result: BranchResult | str, query: str, dbname: str = "postgres") -> object:
    """The first one of a query's first row, from a branch or a DSN."""
    dsn = result if isinstance(result, str) else result.dsn
    with psycopg.connect(dsn, dbname=dbname, autocommit=True) as connection:
        row = connection.execute(query).fetchone()
        assert row is not None
        return row[0]


def wait_until(condition: Callable[[], bool]) -> None:
    """Twenty seconds at most."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
