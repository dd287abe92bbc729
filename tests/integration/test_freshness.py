"""How soon a commit on the source can be seen in a new branch."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable

import psycopg

from tests.support.postgres import PostgresServer, scratch
from tests.support.tl_host import Host, make_host

FRESH_SECONDS = 2.0
"""From COMMIT to visible, besides what a branch takes anyway."""
NOISE = 1.5
"""By so much one branch may take longer than the one before it, on a machine that others use."""
ROUNDS = 3


def test_a_commit_is_visible_in_a_new_branch_within_two_seconds(
    make_postgres: Callable[..., PostgresServer],
) -> None:
    """P6: with nothing but the defaults, an archiver at work and a source that is otherwise idle."""
    place = scratch("tl-fresh-")
    server = make_postgres(15)
    server.sql("create table t (round int)")
    host = make_host(place, f"file://{place}/store", source=server.conninfo)
    try:
        host.tl("init", host.store)
        host.tl("archive", "--once")
        archiver = host.start_archiver()
        try:
            wait_for_archiver(server)
            seen_seconds(host, "now")
            lags = []
            for number in range(ROUNDS):
                alone, _ = seen_seconds(host, "latest")
                began = time.monotonic()
                server.sql(f"insert into t values ({number})")
                committed = time.monotonic()
                _, rows = seen_seconds(host, "now")
                visible = time.monotonic() - committed
                assert rows == number + 1, "the branch holds the commit that came before it"
                lags.append(visible - alone * NOISE)
                print(
                    f"COMMIT took {committed - began:.3f} s; visible after {visible:.2f} s, a branch takes {alone:.2f} s"
                )
            # The middle one: a single slow moment of the machine is not the lag of the product.
            assert statistics.median(lags) <= FRESH_SECONDS, lags
        finally:
            archiver.terminate()
            assert archiver.wait(60) == 0
    finally:
        host.end_agent()
        shutil.rmtree(place, ignore_errors=True)


def seen_seconds(host: Host, at: str) -> tuple[float, int]:
    """Make a branch and count its rows: seconds until they are counted, and the rows."""
    began = time.monotonic()
    result = host.tl("branch", "look", "--at", at)
    with psycopg.connect(result["dsn"], autocommit=True) as conn:
        row = conn.execute("select count(*) from t").fetchone()
    seconds = time.monotonic() - began
    host.tl("delete", "look", "--yes")
    assert row is not None
    return seconds, int(str(row[0]))


def wait_for_archiver(server: PostgresServer) -> None:
    """Until it streams."""
    deadline = time.monotonic() + 60
    while server.value("select count(*) from pg_stat_replication where state = 'streaming'") != "1":
        assert time.monotonic() < deadline
        time.sleep(0.1)
