"""A first query by primary key fetches a few megabytes of a large database, counted outside of ``tl``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.fix_stores import BUCKET, fresh_prefix
from tests.support.postgres import PostgresServer, scratch
from tests.support.s3_proxy import S3Proxy
from tests.support.seaweed import Seaweed
from tests.support.tl_host import make_host

ROWS = 850_000
DATABASE_BYTES = 256 << 20
FETCHED_BYTES = 8_000_000
"""Everything that crosses the wire until the row is there: log, manifests, boot set, pages, what little WAL there is."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A scratch directory."""
    path = scratch("tl-lazy-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_a_row_by_primary_key_costs_little(
    make_postgres: Callable[..., PostgresServer], seaweed: Seaweed, s3_proxy: S3Proxy, place: Path
) -> None:
    server = make_postgres(15, settings={"max_wal_size": "2GB", "wal_compression": "off"})
    server.sql(
        # Content that zstd cannot make smaller: the figure is about laziness, not about compression.
        "create table untouched as select i as id, sha512(t) || sha512(t || 'b') || sha512(t || 'c') || sha512(t || 'd')"
        f" as value from generate_series(1, {ROWS}) i, convert_to(i::text, 'UTF8') t",
        "alter table untouched add primary key (id)",
        "vacuum analyze untouched",
    )
    size = int(server.value("select pg_database_size('postgres')"))
    assert size >= DATABASE_BYTES
    wanted = server.sql("select value from untouched where id = 345678")
    url = f"s3://{BUCKET}/{fresh_prefix()}"
    archiving = make_host(place / "a", url, source=server.conninfo, endpoint_url=seaweed.endpoint_url)
    archiving.tl("init", url, "--source", server.conninfo)
    archiving.tl("archive", "--once")
    server.sql("create table touched (n int)", "insert into touched values (1)")
    archiving.tl("archive", "--once")

    branching = make_host(place / "b", url, endpoint_url=s3_proxy.endpoint_url)
    s3_proxy.reset()
    result = branching.tl("branch", "lazy")
    try:
        with psycopg.connect(result["dsn"], autocommit=True) as conn:
            row = conn.execute("select value from untouched where id = 345678").fetchone()
            fetched = s3_proxy.stats()
            assert [row] == wanted
            assert conn.execute("select count(*) from touched").fetchone() == (1,)
        print(f"{fetched.bytes_down:,} of {size:,} bytes in {fetched.requests}")
        assert result["mode"] == "lazy"
        assert 100_000 < fetched.bytes_down <= FETCHED_BYTES
        assert fetched.bytes_up == 0
        assert set(fetched.requests) <= {"GET", "HEAD", "LIST"}
        # Told by `tl` itself, within what the first query added after it was told.
        assert result["fetched_bytes"] <= fetched.bytes_down
    finally:
        branching.tl("delete", "lazy", "--yes")
        branching.end_agent()


GROUPS = 512
"""Groups of the table below, of which replay reads a page each."""


def test_a_replay_from_far_away_makes_few_requests(
    make_postgres: Callable[..., PostgresServer], seaweed: Seaweed, s3_proxy: S3Proxy, place: Path
) -> None:
    """After a built snapshot WAL brings no images of pages that were touched before it: replay reads them."""
    server = make_postgres(
        15, settings={"max_wal_size": "4GB", "checkpoint_timeout": "1h", "autovacuum": "off"}
    )
    server.sql(
        # A row of a page that has room for another version of it.
        "create table wide (id int, n int, pad text) with (fillfactor = 50)",
        "alter table wide alter pad set storage plain",
        f"insert into wide select i, 0, repeat(md5(i::text), 100) from generate_series(0, {GROUPS * 16 - 1}) i",
        "create index on wide (id)",
    )
    url = f"s3://{BUCKET}/{fresh_prefix()}"
    archiving = make_host(place / "a", url, source=server.conninfo, endpoint_url=seaweed.endpoint_url)
    archiving.tl("init", url, "--source", server.conninfo)
    archiving.tl("archive", "--once")
    one_of_each_group = "update wide set n = n + 1 where id % 16 = 5"
    server.sql(one_of_each_group)
    archiving.tl("archive", "--once")
    assert archiving.tl("snapshot")
    server.sql(one_of_each_group)
    archiving.tl("archive", "--once")

    branching = make_host(place / "b", url, endpoint_url=s3_proxy.endpoint_url)
    s3_proxy.reset()
    made = branching.tl("branch", "far")
    requests = s3_proxy.stats().requests
    try:
        log = (Path(made["data_directory"]).parent / "mount.log").read_text()
        assert "WARNING" not in log and "ERROR" not in log, log
        with psycopg.connect(made["dsn"], autocommit=True) as conn:
            counts = conn.execute("select n, count(*) from wide group by n order by n").fetchall()
        assert counts == [(0, GROUPS * 15), (2, GROUPS)]
        print(f"{requests} for {made['replayed_bytes']:,} bytes of WAL")
        assert made["replayed_bytes"] < 32 << 20
        # Alone, each group is a request; so are those that replay wants before the prefetcher has begun, on a busy host.
        assert requests["GET"] < GROUPS * 3 // 4
    finally:
        branching.tl("delete", "far", "--yes")
        branching.end_agent()
        archiving.end_agent()
