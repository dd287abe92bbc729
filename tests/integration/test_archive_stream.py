"""Streaming a real server into a store: bytes, acknowledgement, stalls, kills."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
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
from tests.support.postgres import PostgresServer
from timeline.archive.status import BUFFER_BYTES
from timeline.catalog.branch_log import BranchLog
from timeline.catalog.tail import Tail, read_index
from timeline.clock import SystemClock
from timeline.format.wal_index import WalIndex
from timeline.lsn import Lsn
from timeline.maintain.seal import seal
from timeline.pg.wal import WalScanner
from timeline.store.open import open_store

MakePostgres = Callable[..., PostgresServer]
KEEP = {"wal_keep_size": "1GB"}
"""The server keeps its own segments, to compare with."""


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A new store."""
    return make_store(tmp_path / "store")


def indexes(url: str, tail: Tail) -> list[WalIndex]:
    """The indexes of a chain's chunks."""

    async def read() -> list[WalIndex]:
        opened = await open_store(url)
        try:
            return [await read_index(opened, chunk) for chunk in tail.chunks]
        finally:
            await opened.aclose()

    return asyncio.run(read())


def assert_archived(server: PostgresServer, url: str, *, tli: int = 1, end: int | None = None) -> Tail:
    """The chain holds the server's own bytes, and its indexes say what one scan of them all says."""
    tail = tail_of(url, tli)
    start, wal = stored_wal(url, tli)
    assert end is None or tail.end >= end
    assert wal == server_wal(server, tli, start, start + len(wal))
    segment_bytes = int(server.value("select setting from pg_settings where name = 'wal_segment_size'"))
    whole = WalScanner(segment_bytes, tli, start).feed(wal)
    parts = indexes(url, tail)
    assert sum(part.records for part in parts) == whole.records
    assert b"".join(part.commits.tobytes() for part in parts) == whole.commits.tobytes()
    assert [event.start for part in parts for event in part.events] == [event.start for event in whole.events]
    assert parts[-1].pending == whole.pending
    return tail


@pytest.mark.parametrize(
    ("major", "segment_mebibytes"), [(15, 16), (18, 16), (15, 1), (18, 64)], ids=lambda value: str(value)
)
def test_the_store_holds_the_servers_own_bytes(
    make_postgres: MakePostgres, store: str, major: int, segment_mebibytes: int
) -> None:
    """P1, EDGE 1, 13, 23, 24, 26: also across restarts in the middle of records and pages."""
    server = make_postgres(major, initdb=[f"--wal-segsize={segment_mebibytes}"], settings=KEEP)
    server.sql("create table before_archiving as select generate_series(1, 10000)")
    for round_number in range(2):
        with ArchiverProcess(
            store, server.conninfo, max_delay_seconds=0, requests_per_second=1000
        ) as archiver:
            archiver.wait_until(lambda status: status["phase"] == "streaming")
            with server.connect() as connection:
                for number in range(20):
                    connection.execute(
                        f"create table t_{round_number}_{number} as select g, repeat('x', 500) from "
                        "generate_series(1, 400) g"
                    )
                if round_number == 0:
                    connection.execute("select pg_switch_wal()")
                connection.execute(f"create table s_{round_number} as select 1")
            end = flushed(server)
            archiver.wait_durable(end)
            assert archiver.stop() == 0
        tail = assert_archived(server, store, end=end)
    assert len(tail.chunks) > 10
    (held,) = server.sql("select restart_lsn::text, slot_type, active from pg_replication_slots")
    assert (Lsn.parse(str(held[0])), *held[1:]) == (tail.end, "physical", False)


def test_padding_of_switched_segments_costs_next_to_nothing(make_postgres: MakePostgres, store: str) -> None:
    """EDGE 26."""
    server = make_postgres(15)
    with ArchiverProcess(store, server.conninfo) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        archiver.wait_durable(flushed(server))
        before = archiver.status["wal_bytes"], archiver.status["stored_bytes"]
        for _ in range(5):
            server.sql("select pg_logical_emit_message(true, 'tl', 'x')", "select pg_switch_wal()")
        archiver.wait_durable(flushed(server))
        status = archiver.wait_until(lambda now: now["wal_bytes"] - before[0] >= 64 << 20)
        assert status["stored_bytes"] - before[1] < 100_000


def test_a_commit_returns_when_the_store_has_it(make_postgres: MakePostgres, store: str) -> None:
    """P1, EDGE 5: no data loss, and ``max_delay`` drops to 0 by itself."""
    server = make_postgres(15)
    server.sql("create table t (v int)")
    with ArchiverProcess(store, server.conninfo, faults=True, max_delay_seconds=30) as archiver:
        archiver.wait_until(lambda status: status["phase"] != "connecting")
        server.sql("alter system set synchronous_standby_names = 'tl'", "select pg_reload_conf()")
        status = archiver.wait_until(lambda now: bool(now["synchronous"]))
        archiver.wait_until(lambda now: any("only synchronous" in line for line in now["warnings"]))
        assert status["error"] is None
        times = []
        with server.connect() as connection:
            for number in range(20):
                began = time.monotonic()
                connection.execute("begin")
                connection.execute("insert into t values (%s)", (number,))
                row = connection.execute("select pg_current_wal_insert_lsn()::text").fetchone()
                connection.execute("commit")
                times.append(time.monotonic() - began)
                assert row is not None
                assert tail_of(store, 1).end > Lsn.parse(str(row[0]))
        assert max(times) < 2.0
        assert sorted(times)[len(times) // 2] < 0.3
        archiver.command("freeze")
        committed = threading.Event()

        def commit() -> None:
            server.sql("insert into t values (100)")
            committed.set()

        thread = threading.Thread(target=commit)
        thread.start()
        try:
            assert not committed.wait(1.0), "COMMIT returned while the store was frozen"
        finally:
            archiver.command("thaw")
            thread.join(20)
        assert committed.is_set()


def test_a_store_that_stalls_does_not_cost_the_connection(make_postgres: MakePostgres, store: str) -> None:
    """EDGE 4, 9: replies go on, also when the socket is no longer read; memory stays bounded."""
    server = make_postgres(15, settings={"wal_sender_timeout": "2s"})
    server.sql("create table t (v text)")
    limit = 6 << 20
    with ArchiverProcess(store, server.conninfo, faults=True, buffer_bytes=limit) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        pid = server.value("select pid from pg_stat_replication where application_name = 'tl'")
        archiver.command("freeze")
        began = time.monotonic()
        held = archiver.durable
        while time.monotonic() - began < 9.0:
            server.sql("insert into t select repeat(md5(g::text), 50) from generate_series(1, 2000) g")
            time.sleep(0.3)
        assert flushed(server) - held > 2 * limit
        assert archiver.durable == held
        assert archiver.status["buffered_bytes"] <= limit + (5 << 20)
        restart = server.value("select restart_lsn from pg_replication_slots")
        assert Lsn.parse(restart) <= held, "something was acknowledged that is not in the store"
        archiver.command("thaw")
        archiver.wait_durable(flushed(server))
        assert server.value("select pid from pg_stat_replication where application_name = 'tl'") == pid
        assert all(status["error"] is None for status in archiver.history)
    assert not re.search(r"terminating walsender", server.log.read_text())


@pytest.mark.slow
def test_an_unavailable_store_is_tried_again_and_said_so(make_postgres: MakePostgres, store: str) -> None:
    """EDGE 41."""
    server = make_postgres(15)
    with ArchiverProcess(store, server.conninfo, faults=True, store_patience_seconds=1.5) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        archiver.command("fail")
        server.sql("create table t as select 1")
        archiver.wait_until(lambda status: any("has not taken" in line for line in status["warnings"]))
        archiver.wait_until(lambda status: status["phase"] == "waiting")
        archiver.command("thaw")
        archiver.wait_durable(flushed(server))
        assert archiver.stop() == 0
    assert_archived(server, store)


def test_kills_lose_nothing_that_was_acknowledged(make_postgres: MakePostgres, store: str) -> None:
    """P1, EDGE 3, 60: with several uploads in flight, some of them landed."""
    server = make_postgres(15, settings=KEEP)
    server.sql("create table t (v text)")
    archiver = ArchiverProcess(
        store, server.conninfo, faults=True, max_delay_seconds=0, requests_per_second=500
    )
    for delay in (0.05, 0.0, 0.3):
        with archiver:
            archiver.command(f"slow {delay}")
            archiver.wait_until(lambda status: status["epoch"] > 0)
            for _ in range(3):
                server.sql("insert into t select repeat(md5(g::text), 60) from generate_series(1, 3000) g")
            archiver.kill9()
        acknowledged = Lsn.parse(server.value("select restart_lsn from pg_replication_slots"))
        if log_head(store).state.epoch:
            assert tail_of(store, 1).end >= acknowledged
    with archiver:
        archiver.wait_durable(flushed(server))
        assert archiver.stop() == 0
    assert_archived(server, store, end=flushed(server))


def test_crashes_of_the_source_are_streamed_through(make_postgres: MakePostgres, store: str) -> None:
    """EDGE 24: records cut off by a crash are overwritten, and what follows reads on."""
    server = make_postgres(15, settings=KEEP)
    server.sql("create table t (v text)")
    with ArchiverProcess(store, server.conninfo) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        for _ in range(3):
            with contextlib.suppress(psycopg.OperationalError), server.connect() as connection:
                # A record of many pages, written out and not committed when the server dies.
                connection.execute(
                    "insert into t select repeat(md5(g::text), 50) from generate_series(1, 3000) g"
                )
                connection.execute("select pg_logical_emit_message(false, 'tl', repeat('x', 3000000))")
                server.kill9()
            server.start()
            server.sql("insert into t values ('x')")
        archiver.wait_durable(flushed(server), seconds=60)
        assert archiver.stop() == 0
    assert_archived(server, store, end=flushed(server))


def test_an_archiver_goes_on_behind_what_is_sealed(make_postgres: MakePostgres, store: str) -> None:
    """The record that began in the sealed WAL is indexed by the first chunk after it."""
    server = make_postgres(15, settings=KEEP)
    server.sql("create table t (v text)")
    sealed: list[Lsn] = []
    for _ in range(2):
        with ArchiverProcess(
            store, server.conninfo, max_delay_seconds=0, requests_per_second=1000
        ) as archiver:
            archiver.wait_until(lambda status: status["phase"] == "streaming")
            before = archiver.durable
            while archiver.durable == before:  # seen within a second; the last rows come too late for that
                server.sql("insert into t select repeat(md5(g::text), 50) from generate_series(1, 300) g")
            archiver.kill9()
        sealed.append(seal_all(store))
    assert sealed[1] > sealed[0]
    with ArchiverProcess(store, server.conninfo) as archiver:
        server.sql("insert into t values ('last')")
        archiver.wait_durable(flushed(server))
        assert archiver.stop() == 0
    tail = tail_of(store, 1)
    assert tail.start == sealed[1]
    start = log_head(store).state.tlis[0].start
    whole = WalScanner(16 << 20, 1, start).feed(server_wal(server, 1, start, tail.end))
    parts = indexes(store, tail)
    after = whole.commits[whole.commits["end"] > sealed[1]]
    assert b"".join(part.commits.tobytes() for part in parts) == after.tobytes()
    assert len(after)


def seal_all(url: str) -> Lsn:
    """Move all chunks to packs; the sealed LSN."""

    async def run() -> Lsn:
        store, clock = await open_store(url), SystemClock()
        try:
            log = BranchLog(store, "main", clock, "test")
            await seal(store, log, clock, force=True)
            head = await log.load()
            assert head is not None
            return head.state.tlis[0].sealed
        finally:
            await store.aclose()

    return asyncio.run(run())


def test_an_idle_source_is_covered_by_heartbeats(make_postgres: MakePostgres, store: str) -> None:
    """Coverage: a time after the last commit of a quiet server is known to be complete."""
    server = make_postgres(18)
    with ArchiverProcess(store, server.conninfo, heartbeat_seconds=0.5) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming" and status["coverage"])
        now = int(server.value("select (extract(epoch from clock_timestamp()) * 1000000)::int8"))
        end = flushed(server)
        archiver.wait_until(lambda status: status["coverage"][2] >= now)
        coverage = log_head(store).state.coverage
        assert coverage is not None
        assert coverage.time >= now
        assert coverage.lsn <= tail_of(store, 1).end
        assert end <= tail_of(store, 1).end
        time.sleep(1.0)
        assert archiver.stop() == 0
    last = log_head(store).state.coverage
    assert last is not None
    assert last.time > coverage.time


def test_coverage_never_hides_a_commit(make_postgres: MakePostgres, store: str) -> None:
    """What a chunk says is covered contains every commit that was visible by then."""
    server = make_postgres(15)
    server.sql("create table t (v int)")
    seen: list[tuple[int, int]] = []
    with ArchiverProcess(store, server.conninfo, max_delay_seconds=0, requests_per_second=1000) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        with server.connect() as connection:
            for number in range(150):
                connection.execute("insert into t values (%s)", (number,))
                row = connection.execute(
                    "select pg_current_wal_flush_lsn() - '0/0'::pg_lsn, "
                    "(extract(epoch from clock_timestamp()) * 1000000)::int8"
                ).fetchone()
                assert row is not None
                seen.append((int(str(row[0])), int(str(row[1]))))
        archiver.wait_durable(flushed(server))
        archiver.stop()
    covered = [chunk.header.coverage for chunk in tail_of(store, 1).chunks]
    claims = [(one.time, one.lsn) for one in covered if one is not None]
    assert claims
    for (time_claimed, lsn), (position, visible_at) in itertools.product(claims, seen):
        assert position <= lsn or visible_at > time_claimed


@pytest.fixture
def two_archivers(make_postgres: MakePostgres, store: str) -> Iterator[tuple[PostgresServer, str]]:
    """A server whose broken connections are noticed soon."""
    yield make_postgres(15, settings={"wal_sender_timeout": "2s", **KEEP}), store


def test_a_suspended_archiver_is_fenced_when_it_wakes(two_archivers: tuple[PostgresServer, str]) -> None:
    """P4, EDGE 11."""
    server, store = two_archivers
    second = ArchiverProcess(store, server.conninfo)
    with (
        ArchiverProcess(store, server.conninfo, fence_check_seconds=3600) as first,
        contextlib.ExitStack() as stack,
    ):
        first.wait_until(lambda status: status["phase"] == "streaming")
        stack.enter_context(second)
        first.signal(signal.SIGSTOP)
        server.sql("create table t as select generate_series(1, 1000)")
        second.wait_until(lambda status: status["epoch"] == 2, seconds=60)
        second.wait_durable(flushed(server))
        first.signal(signal.SIGCONT)
        server.sql("create table u as select generate_series(1, 1000)")
        assert first.wait() == 5
        assert any("another archiver" in line for line in first.errors)
        second.wait_durable(flushed(server))
        assert second.stop() == 0
    assert_archived(server, store)


def test_an_archiver_started_beside_a_healthy_one_does_not_fence_it(
    two_archivers: tuple[PostgresServer, str],
) -> None:
    """EDGE 7, 11: it waits for the slot, says so, and gives up."""
    server, store = two_archivers
    with ArchiverProcess(store, server.conninfo) as first:
        first.wait_until(lambda status: status["epoch"] == 1)
        with ArchiverProcess(store, server.conninfo, slot_patience_seconds=1) as second:
            second.wait_until(lambda status: "is in use" in (status["error"] or ""))
            assert second.wait() == 7
        server.sql("create table t as select 1")
        first.wait_durable(flushed(server))
        assert first.status["epoch"] == 1
        assert log_head(store).state.epoch == 1


def test_memory_is_bounded_whatever_the_burst(make_postgres: MakePostgres, store: str) -> None:
    """P9: at most 300 MB resident, behind a slow store."""
    server = make_postgres(15)
    with ArchiverProcess(store, server.conninfo, faults=True) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        archiver.command("freeze")
        server.sql(
            "create table t as select g, md5(g::text) || repeat(md5((g + 1)::text), 20) as v "
            "from generate_series(1, 250000) g"
        )
        archiver.wait_until(lambda status: status["buffered_bytes"] >= BUFFER_BYTES)
        time.sleep(1)
        archiver.command("thaw")
        archiver.wait_durable(flushed(server), seconds=60)
        assert archiver.status["wal_bytes"] > 150 << 20
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{archiver.pid}/status").read_text())
        assert peak is not None
        assert int(peak[1]) < 300 * 1024
