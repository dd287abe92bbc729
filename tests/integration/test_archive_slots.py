"""Replication slots that are missing, taken, lost; sources that are not what they were; detaching."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from tests.support.archiver import (
    ArchiverProcess,
    flushed,
    log_head,
    make_store,
    server_wal,
    stored_wal,
    tail_of,
)
from tests.support.clones import copy_data
from tests.support.postgres import PostgresServer, bin_dir, scratch
from timeline.archive.runner import detach
from timeline.archive.slot import SlotBusy
from timeline.catalog.meta import read_meta
from timeline.lsn import Lsn
from timeline.store.open import open_store

MakePostgres = Callable[..., PostgresServer]
MAJORS = [major for major in (14, 15, 16, 17, 18) if bin_dir(major) is not None]
TIGHT = {"max_slot_wal_keep_size": "16MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A new store."""
    return make_store(tmp_path / "store")


def store_id(url: str) -> str:
    """Id of a store."""

    async def read() -> str:
        opened = await open_store(url)
        try:
            return (await read_meta(opened)).store_id
        finally:
            await opened.aclose()

    return asyncio.run(read())


def lose_slot(server: PostgresServer) -> None:
    """Write and checkpoint until the server gives the slot up."""
    for _ in range(8):
        server.sql(
            "select pg_logical_emit_message(true, 'tl', repeat('x', 1000000))",
            "select pg_switch_wal()",
            "checkpoint",
        )
        if server.sql("select 1 from pg_replication_slots where wal_status = 'lost'"):
            return
    raise RuntimeError("the slot is not lost")


@pytest.mark.parametrize("major", MAJORS)
def test_a_lost_slot_is_named_with_its_cure_and_a_gap_is_recorded_only_when_asked(
    make_postgres: MakePostgres, store: str, major: int
) -> None:
    """EDGE 7, 8, P7."""
    server = make_postgres(major, settings=TIGHT)
    with ArchiverProcess(store, server.conninfo) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        archiver.wait_durable(flushed(server))
        assert archiver.stop() == 0
    end = tail_of(store, 1).end
    lose_slot(server)
    with ArchiverProcess(store, server.conninfo) as archiver:
        assert archiver.wait() == 1
        assert any("has removed the WAL" in line for line in archiver.errors)
        assert "tl archive --allow-gap" in archiver.status["hint"]
    assert log_head(store).state.gaps == ()
    with ArchiverProcess(store, server.conninfo, allow_gap=True) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        server.sql("create table after_the_gap as select generate_series(1, 1000)")
        archiver.wait_durable(flushed(server))
        assert archiver.status["needs_base"]
        assert archiver.stop() == 0
    (gap,) = log_head(store).state.gaps
    assert (gap.tli, gap.start) == (1, end)
    assert gap.end % (16 << 20) == 0
    tail = tail_of(store, 1)
    beyond = [chunk for chunk in tail.chunks if chunk.start >= gap.end]
    assert beyond[0].start == gap.end
    assert tail.end == flushed(server)
    _, wal = stored_wal(store, 1)
    assert wal.endswith(server_wal(server, 1, gap.end, tail.end))


def test_an_endangered_slot_is_warned_of_before_it_is_lost(make_postgres: MakePostgres, store: str) -> None:
    """EDGE 8, 10: the bytes left, then the warning, while the stream still runs."""
    server = make_postgres(15, settings={**TIGHT, "max_slot_wal_keep_size": "128MB"})
    with ArchiverProcess(store, server.conninfo, faults=True, buffer_bytes=1 << 20) as archiver:
        archiver.wait_until(
            lambda status: status["phase"] == "streaming" and status["wal_status"] == "reserved"
        )
        archiver.command("freeze")
        for _ in range(4):
            server.sql(
                "select pg_logical_emit_message(true, 'tl', repeat('x', 1000000))", "select pg_switch_wal()"
            )
        server.sql("checkpoint")
        archiver.wait_until(lambda status: status["wal_status"] == "extended")
        archiver.wait_until(lambda status: any("until it is lost" in line for line in status["warnings"]))
        archiver.command("thaw")
        archiver.wait_durable(flushed(server))
        assert archiver.status["error"] is None


def drop_under_its_user(server: PostgresServer, name: str) -> None:
    """Drop a slot in use: the walsender ends a moment after it is told to, and the archiver comes back at once."""
    for _ in range(100):
        server.sql("select pg_terminate_backend(pid) from pg_stat_replication")
        with contextlib.suppress(psycopg.errors.ObjectInUse):
            server.sql(f"select pg_drop_replication_slot('{name}')")
            return
        time.sleep(0.02)
    raise AssertionError(f"slot {name} stays in use")


def test_a_slot_dropped_under_a_running_archiver_is_not_made_again(
    make_postgres: MakePostgres, store: str
) -> None:
    """P11, EDGE 7: but a new run makes one, and goes on while the WAL is there."""
    server = make_postgres(15, settings={"wal_keep_size": "1GB"})
    with ArchiverProcess(store, server.conninfo) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        name = archiver.status["slot_name"]
        drop_under_its_user(server, str(name))
        assert archiver.wait() == 1
        assert any("somebody dropped it" in line for line in archiver.errors)
        assert server.sql("select * from pg_replication_slots") == []
    server.sql("create table t as select 1")
    with ArchiverProcess(store, server.conninfo) as archiver:
        archiver.wait_durable(flushed(server))
        archiver.stop()
    start, wal = stored_wal(store, 1)
    assert wal == server_wal(server, 1, start, start + len(wal))
    assert log_head(store).state.gaps == ()


def test_an_unlimited_slot_is_refused_unless_allowed(make_postgres: MakePostgres, store: str) -> None:
    """P11."""
    server = make_postgres(15, settings={"max_slot_wal_keep_size": "-1"})
    with ArchiverProcess(store, server.conninfo) as archiver:
        assert archiver.wait() == 2
        assert any("max_slot_wal_keep_size" in line for line in archiver.errors)
    assert server.sql("select * from pg_replication_slots") == []
    with ArchiverProcess(store, server.conninfo, allow_unbounded_slot=True) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")


def test_detaching_removes_the_slot_but_not_under_a_running_archiver(
    make_postgres: MakePostgres, store: str
) -> None:
    """P11."""
    server = make_postgres(18)
    server.sql("select pg_create_physical_replication_slot('tl_of_somebody_else')")
    identity = store_id(store)
    with ArchiverProcess(store, server.conninfo) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        with pytest.raises(SlotBusy):
            asyncio.run(detach(server.conninfo, identity))
        assert archiver.stop() == 0
    dropped = asyncio.run(detach(server.conninfo, identity)).dropped
    assert dropped == (archiver.status["slot_name"],)
    assert server.sql("select slot_name from pg_replication_slots") == [("tl_of_somebody_else",)]
    assert asyncio.run(detach(server.conninfo, identity)).dropped == ()


def test_without_a_slot_nothing_is_made_on_the_source(make_postgres: MakePostgres, store: str) -> None:
    """P11, EDGE 10."""
    server = make_postgres(15, settings={"wal_keep_size": "1GB"})
    with ArchiverProcess(store, server.conninfo, slotless=True) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        server.sql("create table t as select 1")
        archiver.wait_durable(flushed(server))
        assert archiver.stop() == 0
    with ArchiverProcess(store, server.conninfo, slotless=True) as archiver:
        server.sql("create table u as select 1")
        archiver.wait_durable(flushed(server))
        assert server.sql("select * from pg_replication_slots") == []
    start, wal = stored_wal(store, 1)
    assert wal == server_wal(server, 1, start, start + len(wal))


@pytest.mark.parametrize("major", [15, 18])
def test_wal_removed_without_a_slot_is_lost(make_postgres: MakePostgres, store: str, major: int) -> None:
    """EDGE 7, 10: here the server says it only after the stream has begun."""
    server = make_postgres(major, settings={"max_wal_size": "32MB", "min_wal_size": "32MB"})
    with ArchiverProcess(store, server.conninfo, slotless=True) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        archiver.stop()
    for _ in range(6):
        server.sql(
            "select pg_logical_emit_message(true, 'tl', repeat('x', 1000000))",
            "select pg_switch_wal()",
            "checkpoint",
        )
    with ArchiverProcess(store, server.conninfo, slotless=True) as archiver:
        assert archiver.wait() == 1
        assert any("has removed the WAL" in line for line in archiver.errors)


def test_another_cluster_behind_the_same_address_is_refused(make_postgres: MakePostgres, store: str) -> None:
    """EDGE 12."""
    server = make_postgres(15)
    with ArchiverProcess(store, server.conninfo) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        # The address stays, the cluster behind it is a new one.
        server.stop("immediate")
        server.data = server.directory / "other"
        server.initdb()
        server.start()
        assert archiver.wait(seconds=60) == 2
        assert any("another cluster" in line for line in archiver.errors)
    assert server.sql("select * from pg_replication_slots") == []


def test_a_source_set_back_is_a_split_brain(make_postgres: MakePostgres, store: str) -> None:
    """EDGE 14, 19: an older copy of the data directory goes on with the same tli and other bytes."""
    server = make_postgres(15, settings={"wal_keep_size": "1GB"})
    copy = scratch("tl-copy-")
    try:
        server.stop()
        copy_data(server, copy / "data")
        server.start()
        with ArchiverProcess(store, server.conninfo) as archiver:
            archiver.wait_until(lambda status: status["phase"] == "streaming")
            server.sql("create table t as select generate_series(1, 1000)")
            archiver.wait_durable(flushed(server))
            assert archiver.stop() == 0
        end = tail_of(store, 1).end
        server.stop("immediate")
        server.data = copy / "data"
        server.start()
        with ArchiverProcess(store, server.conninfo) as archiver:
            assert archiver.wait() == 5
            assert any("set back" in line for line in archiver.errors)
        while flushed(server) <= end:
            server.sql("create table if not exists u (v text)", "insert into u select repeat('y', 100000)")
            server.sql("select pg_switch_wal()")
        with ArchiverProcess(store, server.conninfo) as archiver:
            assert archiver.wait() == 5
            assert any("two histories" in line for line in archiver.errors)
        held = server.value("select restart_lsn from pg_replication_slots")
        assert Lsn.parse(held) < end, "something was acknowledged"
        assert tail_of(store, 1).end == end
    finally:
        server.stop("immediate")
        shutil.rmtree(copy, ignore_errors=True)
