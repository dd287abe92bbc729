"""A restored and promoted server goes on in the store of the one it replaces: ``main`` is a tree of tlis."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support.postgres import PostgresServer, scratch
from tests.support.restored import started
from tests.support.tl_host import Host, make_host
from timeline.lsn import Lsn

MakePostgres = Callable[..., PostgresServer]
both_majors = pytest.mark.parametrize("major", [15, 18], ids=lambda major: f"pg{major}")


@pytest.fixture
def place() -> Iterator[Path]:
    """A scratch directory that the server's user may enter."""
    path = scratch("tl-rst-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def archived(server: PostgresServer, place: Path) -> Iterator[Host]:
    """A store with the base backup of ``server``, which has the empty table ``t``."""
    host = make_host(place / "host", f"file://{place}/store")
    server.sql("create table t (step text primary key)")
    host.tl("init", host.store, "--source", server.conninfo)
    archive(host, server)
    try:
        yield host
    finally:
        host.end_agent()


def archive(host: Host, server: PostgresServer) -> dict[str, Any]:
    """Everything the server has written is in the store."""
    return host.tl("archive", "--once", "--source", server.conninfo)


def write(server: PostgresServer, step: str) -> str:
    """Commit one row; the position after it."""
    server.sql(f"insert into t values ('{step}')")
    return server.value("select pg_current_wal_insert_lsn()")


def steps(server: PostgresServer) -> str:
    """The rows, in one word."""
    return server.value("select coalesce(string_agg(step, ' ' order by step), '') from t")


def tli_of(server: PostgresServer) -> int:
    """The tli that the server writes."""
    return int(
        server.value("select ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int")
    )


def branched(host: Host, at: str, *options: str) -> str:
    """The rows of a branch at that moment."""
    result = host.tl("branch", "look", "--at", at, *options)
    try:
        with psycopg.connect(result["dsn"], autocommit=True) as conn:
            row = conn.execute("select coalesce(string_agg(step, ' ' order by step), '') from t").fetchone()
            assert row is not None
            return str(row[0])
    finally:
        host.tl("delete", "look", "--yes")


@contextlib.contextmanager
def restored(
    host: Host, server: PostgresServer, home: Path, at: str, *options: str
) -> Iterator[PostgresServer]:
    """``tl restore`` and a stock server that has recovered from it."""
    server.make_directory(home)
    host.tl("restore", str(home / "data"), "--at", at, *options)
    with started(server, home) as copy:
        assert copy.value("select pg_is_in_recovery()") == "False"
        yield copy


@both_majors
def test_a_restored_server_goes_on_in_the_same_store(
    make_postgres: MakePostgres, place: Path, major: int
) -> None:
    """P6, P7, EDGE 15, 18, 40: before the fork, on the abandoned line and after the fork, twice in a row."""
    first = make_postgres(major)
    with archived(first, place) as host:
        a1 = write(first, "a1")
        a2 = write(first, "a2")
        archive(host, first)
        # What the first server wrote past the fork is in the store before the second one is.
        a3 = write(first, "a3")
        after_a3 = first.value("select clock_timestamp()")
        archive(host, first)
        with restored(host, first, place / "second", a2) as second:
            assert steps(second) == "a1 a2"
            assert tli_of(second) == 2
            b1 = write(second, "b1")
            b2 = write(second, "b2")
            assert archive(host, second)["snapshot"] is None, "no new base backup"

            assert branched(host, a1) == "a1"
            assert branched(host, a2, "--tli", "1") == "a1 a2"
            assert branched(host, a3, "--tli", "1") == "a1 a2 a3"
            assert branched(host, "latest", "--tli", "1") == "a1 a2 a3"
            assert branched(host, b1) == "a1 a2 b1"
            assert branched(host, "latest") == "a1 a2 b1 b2"
            # The abandoned commit is never spliced: by time, too, only the present line counts.
            assert branched(host, after_a3) == "a1 a2"
            status = host.tl("status")
            assert len(status["snapshots"]) == 1
            ranges = {(each["tli"], each["abandoned"]): each for each in status["ranges"]}
            assert Lsn.parse(ranges[2, False]["last"]) >= Lsn.parse(b2)
            assert Lsn.parse(ranges[1, True]["last"]) >= Lsn.parse(a3)

            with restored(host, first, place / "third", b1) as third:
                assert steps(third) == "a1 a2 b1"
                assert tli_of(third) == 3
                c1 = write(third, "c1")
                assert archive(host, third)["snapshot"] is None
        assert branched(host, c1) == "a1 a2 b1 c1"
        assert branched(host, a3, "--tli", "1") == "a1 a2 a3"
        assert branched(host, b2, "--tli", "2") == "a1 a2 b1 b2"
        assert branched(host, "latest") == "a1 a2 b1 c1"
        status = host.tl("status")
        assert len(status["snapshots"]) == 1
        assert {each["tli"] for each in status["ranges"]} == {1, 2, 3}
        assert [each["tli"] for each in status["ranges"] if not each["abandoned"]][-1] == 3


@pytest.mark.slow
def test_a_second_restore_from_the_first_line(make_postgres: MakePostgres, place: Path) -> None:
    """EDGE 16, 19: the first try went back too far; the second one, from the old line, gets a tli of its own."""
    first = make_postgres(15)
    with archived(first, place) as host:
        a1 = write(first, "a1")
        a2 = write(first, "a2")
        archive(host, first)
        with restored(host, first, place / "second", a1) as second:
            write(second, "b1")
            archive(host, second)
        with restored(host, first, place / "third", a2, "--tli", "1") as third:
            assert steps(third) == "a1 a2"
            assert tli_of(third) == 3
            write(third, "c1")
            assert archive(host, third)["snapshot"] is None
            assert branched(host, "latest") == "a1 a2 c1"
        assert branched(host, "latest", "--tli", "2") == "a1 b1"
        assert branched(host, a2, "--tli", "1") == "a1 a2"


def test_the_replaced_server_is_archived_again(make_postgres: MakePostgres, place: Path) -> None:
    """P4, EDGE 11, 18: its archiver is refused, and the present line goes on."""
    first = make_postgres(15)
    with archived(first, place) as host:
        a1 = write(first, "a1")
        archive(host, first)
        with restored(host, first, place / "second", a1) as second:
            b1 = write(second, "b1")
            archive(host, second)
            write(first, "a2")
            again = host.run("archive", "--once", "--source", first.conninfo)
            assert again.returncode == 5, again.stderr
            assert "left behind" in again.stderr
            assert branched(host, "latest") == "a1 b1"
            b2 = write(second, "b2")
            archive(host, second)
            assert branched(host, b1) == "a1 b1"
            assert branched(host, b2) == "a1 b1 b2"


@pytest.mark.slow
def test_two_restores_with_one_tli(make_postgres: MakePostgres, place: Path) -> None:
    """EDGE 19: both made before either was archived; the second one is refused and changes nothing."""
    first = make_postgres(15)
    with archived(first, place) as host:
        a1 = write(first, "a1")
        archive(host, first)
        with (
            restored(host, first, place / "second", a1) as second,
            restored(host, first, place / "third", a1) as third,
        ):
            assert tli_of(second) == tli_of(third) == 2
            write(third, "c0")
            write(second, "b1")
            archive(host, second)
            write(third, "c1")
            refused = host.run("archive", "--once", "--source", third.conninfo)
            assert refused.returncode == 5, refused.stderr
            assert "two histories" in refused.stderr
            assert "Traceback" not in refused.stderr
            write(second, "b2")
            archive(host, second)
        assert branched(host, "latest") == "a1 b1 b2"


def test_the_source_is_lost_under_load(make_postgres: MakePostgres, place: Path) -> None:
    """EDGE 18, 31: killed in the middle of records, restored to the last one stored, and on from there."""
    first = make_postgres(15, initdb=["--wal-segsize=1"])
    with archived(first, place) as host:
        first.sql("create table load (n int primary key, filler text)")
        archiver = host.start_archiver("--source", first.conninfo, "--max-delay", "0.1")
        acknowledged = 0
        try:
            wait_for(lambda: first.value("select count(*) from pg_stat_replication") == "1")
            # A synchronous standby: what the server has acknowledged is in the store.
            first.sql("alter system set synchronous_standby_names = 'tl'", "select pg_reload_conf()")
            wait_for(lambda: first.value("show synchronous_standby_names") == "tl")
            with contextlib.closing(first.connect()) as conn:
                for number in range(40):
                    conn.execute(
                        "insert into load values (%s, repeat(md5(%s::text), 3000))", (number, number)
                    )
                    acknowledged += 1
                # One more is under way, and the archiver has not stored all its records yet.
                conn.execute("begin")
                conn.execute(
                    "insert into load select i, repeat(md5(i::text), 300) from generate_series(100, 4000) i"
                )
                first.kill9()
        finally:
            archiver.kill()
            archiver.wait()
        with restored(host, first, place / "second", "latest") as second:
            assert second.value("select count(*) from load") == str(acknowledged)
            second.sql("alter system reset synchronous_standby_names", "select pg_reload_conf()")
            b1 = write(second, "b1")
            assert archive(host, second)["snapshot"] is None
            assert branched(host, b1) == "b1"
            assert branched(host, "latest", "--tli", "1") == ""
            second.sql("insert into load values (-1)")
            archive(host, second)
        assert len(host.tl("status")["snapshots"]) == 1
        assert branched(host, "latest") == "b1"


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds, for a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
