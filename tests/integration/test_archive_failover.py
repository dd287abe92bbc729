"""Servers that are promoted, one after another or behind each other's back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

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
from tests.support.clones import Clones, clones, next_tli, promote, wait_for
from tests.support.postgres import PostgresServer
from tests.support.tl_host import make_host
from timeline.format.branch_state import Tli
from timeline.lsn import Lsn

MakePostgres = Callable[..., PostgresServer]
KEEP = {"wal_keep_size": "1GB"}


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A new store."""
    return make_store(tmp_path / "store")


@pytest.fixture
def cloning() -> Iterator[Clones]:
    """Copies that vanish with the test."""
    with clones() as made:
        yield made


def tli(url: str, number: int) -> Tli:
    """A tli of the branch."""
    found = log_head(url).state.find_tli(number)
    assert found is not None
    return found


def assert_same_wal(server: PostgresServer, url: str, number: int, *, until: int | None = None) -> None:
    """The store's WAL of a tli is the server's, up to ``until``."""
    start, wal = stored_wal(url, number)
    end = min(start + len(wal), until or start + len(wal))
    assert end > start
    assert wal[: end - start] == server_wal(server, number, start, end)


def fork_of(server: PostgresServer, number: int) -> Lsn:
    """Where the parent of a tli was left, out of the server's history file."""
    text = (server.data / "pg_wal" / f"{number:08X}.history").read_text()
    return Lsn.parse(text.strip().splitlines()[-1].split("\t")[1])


@pytest.mark.parametrize("major", [15, 18])
def test_a_failover_under_load_is_followed(
    make_postgres: MakePostgres, cloning: Clones, store: str, major: int
) -> None:
    """EDGE 15, 17: the old tli to its very end, its successor from there, and the history file."""
    primary = make_postgres(major, settings=KEEP)
    primary.sql("create table t (v text)")
    primary.stop()
    standby = cloning.make(primary, standby=True)
    primary.start()
    standby.start()
    both = (
        f"host={primary.sockets},{standby.sockets} port={primary.port},{standby.port} user=postgres "
        "dbname=postgres target_session_attrs=read-write"
    )
    with ArchiverProcess(store, both) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        primary.sql("insert into t select repeat('x', 500) from generate_series(1, 20000)")
        primary.kill9()
        promote(standby)
        standby.sql("insert into t select repeat('y', 500) from generate_series(1, 20000)")
        archiver.wait_until(lambda status: status["tli"] == 2, seconds=60)
        archiver.wait_durable(flushed(standby))
        assert archiver.stop() == 0
    fork = fork_of(standby, 2)
    assert (tli(store, 1).end, tli(store, 2).start, tli(store, 2).parent) == (fork, fork, 1)
    assert tli(store, 2).history == (standby.data / "pg_wal" / "00000002.history").read_text()
    assert_same_wal(standby, store, 2)
    assert_same_wal(standby, store, 1, until=fork)
    assert log_head(store).state.current_tli == 2


def test_a_standby_that_is_promoted_while_we_stream_from_it(
    make_postgres: MakePostgres, cloning: Clones, store: str
) -> None:
    """EDGE 15, 21: on the same connection; coverage is the primary's, as the standby heard it."""
    primary = make_postgres(15, settings={**KEEP, "wal_sender_timeout": "2s"})
    primary.stop()
    standby = cloning.make(primary, standby=True)
    primary.start()
    standby.start()
    with ArchiverProcess(store, standby.conninfo, heartbeat_seconds=0.5) as archiver:
        archiver.wait_until(lambda status: status["epoch"] == 1)
        primary.sql("create table t as select generate_series(1, 1000)")
        written = flushed(primary)
        archiver.wait_durable(written)
        archiver.wait_until(
            lambda status: status["coverage"] and status["coverage"][1] >= written, seconds=60
        )
        promote(standby)
        standby.sql("create table u as select generate_series(1, 1000)")
        archiver.wait_until(lambda status: status["tli"] == 2)
        archiver.wait_durable(flushed(standby))
        assert all(status["error"] is None for status in archiver.history), "no new connection was needed"
        assert archiver.stop() == 0
    assert_same_wal(standby, store, 1)
    assert_same_wal(standby, store, 2)


def test_hops_made_while_the_archiver_was_down_are_followed(make_postgres: MakePostgres, store: str) -> None:
    """EDGE 20: 1 → 2 → 3 → 4, restarted from any of them."""
    server = make_postgres(15, settings=KEEP)
    with ArchiverProcess(store, server.conninfo) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        archiver.stop()
    for number in (2, 3):
        server.sql(f"create table t_{number} as select generate_series(1, 5000)")
        next_tli(server)
    with ArchiverProcess(store, server.conninfo) as archiver:
        archiver.wait_until(lambda status: status["tli"] == 3)
        archiver.wait_durable(flushed(server))
        archiver.stop()
    next_tli(server)
    server.sql("create table last as select 1")
    with ArchiverProcess(store, server.conninfo) as archiver:
        archiver.wait_until(lambda status: status["tli"] == 4)
        archiver.wait_durable(flushed(server))
        archiver.stop()
    state = log_head(store).state
    assert [(one.tli, one.parent) for one in state.tlis] == [(1, None), (2, 1), (3, 2), (4, 3)]
    for number in (2, 3, 4):
        assert tli(store, number).start == fork_of(server, number) == tli(store, number - 1).end
        assert tli(store, number).history == (server.data / "pg_wal" / f"{number:08X}.history").read_text()
    assert state.epoch == 3
    for number in (2, 3, 4):
        assert_same_wal(server, store, number)


def test_the_first_run_on_a_promoted_server_begins_with_its_history(
    make_postgres: MakePostgres, store: str
) -> None:
    """EDGE 17: the archive may begin below the fork, on the parent."""
    server = make_postgres(15, settings=KEEP)
    next_tli(server)
    with ArchiverProcess(store, server.conninfo) as archiver:
        archiver.wait_until(lambda status: status["tli"] == 2)
        server.sql("create table t as select 1")
        archiver.wait_durable(flushed(server))
        archiver.stop()
    state = log_head(store).state
    assert state.current_tli == 2
    assert tli(store, 2).history == (server.data / "pg_wal" / "00000002.history").read_text()
    assert_same_wal(server, store, 2)
    assert state.tlis[0].start % (16 << 20) == 0


def test_the_first_base_backup_waits_until_the_archiver_has_followed(
    make_postgres: MakePostgres, tmp_path: Path
) -> None:
    """EDGE 2, 17: a server restored and promoted, into a new store; the slot begins before the fork."""
    server = make_postgres(15, settings=KEEP)
    # Longer ago than a segment: what lies before the fork takes a while to archive.
    server.sql("create table t as select g, repeat('x', 500) from generate_series(1, 40000) g")
    next_tli(server)
    host = make_host(tmp_path / "host", f"file://{tmp_path}/store", source=server.conninfo)
    host.tl("init", f"file://{tmp_path}/store", "--source", server.conninfo)
    host.tl("archive", "--once")
    [base] = host.tl("status")["snapshots"]
    assert base["kind"] == "base" and log_head(f"file://{tmp_path}/store").state.current_tli == 2


def test_a_lagging_standby_leaves_an_orphan_tail(
    make_postgres: MakePostgres, cloning: Clones, store: str
) -> None:
    """EDGE 16, 18: what it never had stays in the store, off its line; its tli is not the next one."""
    primary = make_postgres(15, settings=KEEP)
    primary.stop()
    lagging = cloning.make(primary)
    primary.start()
    with ArchiverProcess(store, primary.conninfo) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        primary.sql("create table never_seen_there as select generate_series(1, 20000)")
        archiver.wait_durable(flushed(primary))
        archiver.stop()
    archived = tail_of(store, 1).end
    # A tli that somebody else has taken is passed over.
    taken = lagging.data / "pg_wal" / "00000002.history"
    taken.write_text("1\t0/1000000\tsomebody else\n")
    lagging.configure({"recovery_target_timeline": "current"})
    next_tli(lagging)
    lagging.sql("create table t as select generate_series(1, 1000)")
    with ArchiverProcess(store, lagging.conninfo) as archiver:
        archiver.wait_until(lambda status: status["tli"] == 3)
        archiver.wait_durable(flushed(lagging))
        archiver.stop()
    fork = fork_of(lagging, 3)
    assert fork < archived
    assert (tli(store, 1).end, tli(store, 3).start, tli(store, 3).parent) == (fork, fork, 1)
    assert tail_of(store, 1).end == archived
    assert_same_wal(primary, store, 1)
    assert_same_wal(lagging, store, 3)
    # The server that was left behind comes back: it is refused, and nothing of it is taken.
    with ArchiverProcess(store, primary.conninfo) as archiver:
        assert archiver.wait() == 5
        assert any("left" in line for line in archiver.errors)
    assert tail_of(store, 1).end == archived


def test_two_servers_promoted_to_one_tli_are_a_split_brain(
    make_postgres: MakePostgres, cloning: Clones, store: str
) -> None:
    """EDGE 19: with the same history file, and with another one."""
    first = make_postgres(15, settings=KEEP)
    first.stop()
    twin = cloning.make(first)
    other = cloning.make(first)
    first.start()
    next_tli(first)
    with ArchiverProcess(store, first.conninfo) as archiver:
        archiver.wait_until(lambda status: status["tli"] == 2)
        first.sql("create table t as select generate_series(1, 1000)")
        archiver.wait_durable(flushed(first))
        archiver.stop()
    end = tail_of(store, 2).end
    twin.start()
    next_tli(twin)
    other.start()
    other.sql("create table more as select generate_series(1, 1000)")
    next_tli(other)
    for server in (twin, other):
        while flushed(server) <= end:
            server.sql("create table if not exists u (v text)", "insert into u select repeat('y', 100000)")
        with ArchiverProcess(store, server.conninfo) as archiver:
            assert archiver.wait() == 5
            assert any("two histories" in line for line in archiver.errors)
        assert tail_of(store, 2).end == end


def test_slots_on_standbys_are_made_and_advanced(
    make_postgres: MakePostgres, cloning: Clones, store: str
) -> None:
    """Slots do not follow a failover: the standby must have the WAL itself."""
    primary = make_postgres(15)
    primary.stop()
    standby = cloning.make(primary, standby=True)
    primary.start()
    standby.start()
    with ArchiverProcess(store, primary.conninfo, standbys=[standby.conninfo]) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        query = (
            f"select restart_lsn from pg_replication_slots where slot_name = '{archiver.status['slot_name']}'"
        )
        wait_for(lambda: bool(standby.sql(query)))
        primary.sql("create table t as select generate_series(1, 1000)")
        end = flushed(primary)
        archiver.wait_durable(end)
        wait_for(lambda: Lsn.parse(standby.value(query)) >= end)
        assert not [line for line in archiver.status["warnings"] if "standby 1" in line]
