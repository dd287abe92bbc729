"""Retention with a real server: a history made shorter, and what is left of it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.support.archived_server import CLOCK, ArchivedServer, archived_server
from tests.support.postgres import PostgresServer, scratch
from tests.support.tl_host import make_host
from timeline.catalog.branch_log import BranchLog, read_head
from timeline.format.branch_state import BranchState
from timeline.maintain.retention import RetentionPlan, RetentionPolicy, apply_retention


@pytest.fixture
def place() -> Iterator[Path]:
    """A scratch directory that the server's user may enter."""
    path = scratch("tl-ret-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


def retain(archived: ArchivedServer, policy: RetentionPolicy) -> tuple[RetentionPlan, BranchState]:
    async def run() -> tuple[RetentionPlan, BranchState]:
        store = await archived.open()
        try:
            log = BranchLog(store, "main", CLOCK, CLOCK.token(8))
            plan = await apply_retention(store, log, CLOCK, policy)
            head = await read_head(store, "main")
            assert head is not None
            return plan, head.state
        finally:
            await store.aclose()

    return asyncio.run(run())


def test_a_shorter_history(make_postgres: Callable[..., PostgresServer], place: Path) -> None:
    """P7, EDGE 42: what lies in the window is branched from as before, what lies before is refused with what is left."""
    server = make_postgres(15)
    with archived_server(server, f"file://{place}/store") as archived:
        server.sql("create table t as select 1 n")
        early = archived.position()
        server.sql("select pg_switch_wal()", "insert into t values (2)")
        archived.position()
        archived.seal()
        server.sql("select pg_switch_wal()", "checkpoint")
        second = archived.back_up().snapshot
        server.sql("insert into t values (3)")
        late = archived.position()
        archived.seal()
        server.sql("insert into t values (4)")
        archived.position()
        archived.seal()

        kept, state = retain(archived, RetentionPolicy())
        assert (kept.snapshots, kept.forget) == ((), ())
        assert len(state.snapshots) == 2

        plan, state = retain(archived, RetentionPolicy(window_seconds=0))
        assert len(plan.snapshots) == 1 and plan.wal_bytes > 0
        assert [snapshot.id for snapshot in state.snapshots] == [second.id]
        assert state.sealed[0].start > early
        assert state.sealed[0].start > state.tlis[0].start
        assert second.id in plan.reasons[0]
        again, _ = retain(archived, RetentionPolicy(window_seconds=0))
        assert (again.snapshots, again.forget) == ((), ())

    host = make_host(place / "host", f"file://{place}/store")
    try:
        made = host.tl("branch", "late", "--at", str(late), "--mode", "copy")
        with psycopg.connect(made["dsn"]) as conn:
            assert conn.execute("select array_agg(n order by n) from t").fetchone() == ([1, 2, 3],)
        host.tl("delete", "late", "--yes")
        refused = host.run("branch", "early", "--at", str(early), "--mode", "copy", "--json")
        assert refused.returncode == 3
        told = json.loads(refused.stdout.strip().splitlines()[-1])["error"]
        assert str(second.end) in told
        assert host.tl("status")["recoverable"]
        server.make_directory(place / "restored")
        host.tl("restore", str(place / "restored" / "data"), "--at", str(late))
    finally:
        host.end_agent()
