"""A source, its store and a host that builds snapshots of it; and what a snapshot is judged by."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import psycopg

from restore.branch_make import control_content
from restore.branch_request import StoreAddress
from restore.eager import read_listing, write_files
from restore.host import find_host
from restore.snapshot_build import build_snapshots
from tests.support.postgres import PostgresServer
from tests.support.redo_points import differing_pages
from tests.support.restored import stock_recovery
from tests.support.tl_host import Host, make_host
from timeline.catalog.branch_log import read_head
from timeline.clock import SystemClock
from timeline.format.branch_state import BUILT, BranchState, Snapshot
from timeline.maintain.thin import RULES, Rule
from timeline.pg.control import ControlFile, parse_control
from timeline.store.open import open_store


def state_of(url: str) -> BranchState:
    """What the log says."""

    async def read() -> BranchState:
        store = await open_store(url)
        try:
            head = await read_head(store, "main")
        finally:
            await store.aclose()
        assert head is not None
        return head.state

    return asyncio.run(read())


def control_of(url: str, snapshot: Snapshot) -> ControlFile:
    """A snapshot's pg_control."""

    async def read() -> ControlFile:
        store = await open_store(url)
        try:
            return parse_control(control_content(await read_listing(store, snapshot)))
        finally:
            await store.aclose()

    return asyncio.run(read())


def write_out(url: str, snapshot: Snapshot, directory: Path) -> Path:
    """The files of a snapshot, as its manifests name them."""

    async def write() -> None:
        store = await open_store(url)
        try:
            listing = await read_listing(store, snapshot)
            await write_files(store, snapshot, listing, directory, None)
        finally:
            await store.aclose()

    directory.mkdir()
    asyncio.run(write())
    return directory


class Place:
    """A source, its store, and a host that makes snapshots and branches."""

    def __init__(self, server: PostgresServer, root: Path, *, source: str | None = None) -> None:
        """``source``: a conninfo that leads to the server and to whoever takes over from it."""
        self.server = server
        self.root = root
        source = source or server.conninfo
        self.host: Host = make_host(root / "host", f"file://{root}/store", source=source)
        self.host.tl("init", self.host.store, "--source", source)

    def follow(self, server: PostgresServer) -> None:
        """Archive that server from now on."""
        self.server = server
        self.host.environment["TL_SOURCE"] = server.conninfo

    def archive(self) -> None:
        self.host.tl("archive", "--once")

    def snapshot(self) -> list[str]:
        """LSNs of what was built."""
        built: list[str] = [each["lsn"] for each in self.host.tl("snapshot")["snapshots"]]
        return built

    def build(self, rules: Sequence[Rule] = RULES) -> list[Snapshot]:
        """As ``tl snapshot``, in this process."""
        environ = self.host.environment

        async def run() -> list[Snapshot]:
            address = StoreAddress(self.host.store)
            builds = build_snapshots(address, find_host(environ), SystemClock(), environ, rules=rules)
            async with aclosing(builds):
                return [build.snapshot async for build in builds if build.snapshot is not None]

        return asyncio.run(run())

    def value(self, dsn: str, query: str) -> str:
        with psycopg.connect(dsn) as conn:
            found = conn.execute(query.encode()).fetchone()
        assert found is not None
        return str(found[0])

    def built(self) -> list[Snapshot]:
        """All that were built from WAL, oldest first."""
        return [snapshot for snapshot in state_of(self.host.store).snapshots if snapshot.kind == BUILT]

    def image(self, snapshot: Snapshot) -> Path:
        """The files of a snapshot."""
        return write_out(self.host.store, snapshot, self.root / f"image-{snapshot.id}")

    def recovered(self, snapshot: Snapshot) -> Path:
        """What stock recovery from the base backup makes of the same moment."""
        host = find_host({**os.environ, "TL_STATE": self.host.environment["TL_STATE"]})
        home = self.root / f"stock-{snapshot.id}"
        return stock_recovery(self.host.store, snapshot.lsn, home, self.server.major, host, tli=snapshot.tli)

    def close(self) -> None:
        """Delete its branches, end its agent, remove everything."""
        for branch in self.host.branches():
            self.host.tl("delete", branch["name"], "--yes")
        self.host.end_agent()
        shutil.rmtree(self.root, ignore_errors=True)


def unexpected_pages(expected: Path, found: Path, *, hints: bool) -> tuple[list[str], int]:
    """How a snapshot's image differs from a stopped data directory, and how many pages were compared.

    Left out is what no snapshot holds, and free space where ``hints`` are logged: replay may then leave such
    advice unsaved (timeline/pg/redo_point.py).
    """
    differing, compared = differing_pages(expected, found)
    # Unlogged tables are made from their init forks by whoever starts (EDGE 29).
    reset = {
        f"only expected: {path.relative_to(expected)}"[: -len("_init")] for path in expected.rglob("*_init")
    }
    unexpected = [line for line in differing if line not in reset]
    return [line for line in unexpected if not (hints and "_fsm page" in line)], compared
