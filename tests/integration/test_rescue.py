"""restore/rescue.py on stores that the archiver, the base backup and the sealer wrote (P12)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.support.archived_server import archived_server
from tests.support.handmade_store import promote_in_place
from tests.support.postgres import PostgresServer, scratch
from tests.support.rescued import recovered, rescue
from tests.support.workload import prepare, record_moments, server_digest


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that Postgres may enter."""
    directory = scratch("tl-rescue-")
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def test_stock_postgres_recovers_what_was_archived(each_postgres: PostgresServer, place: Path) -> None:
    """P12, EDGE 49, 52: the mixed workload over sealed and unsealed WAL, tablespaces and all, is there to the
    last row; the source, on the same host, is untouched by it."""
    server = each_postgres
    _configure(server)
    prepare(server)
    with archived_server(server, place / "store") as archived:
        record_moments(server, server.make_directory(place / "space"))
        archived.position()
        archived.seal()
        server.sql(
            "create table after_the_seal as select 1 as n",
            "update account set note = 'late' where id % 5 = 0",
            # Sequences are logged ahead of their use, but for setval.
            "select setval('ticket', 500), setval('doc_id_seq', 9000)",
        )
        archived.position()
    expected = server_digest(lambda dbname: server.connect(dbname))
    result = rescue(place / "store", place / "data", blake3=False)
    assert result.returncode == 0, result.stderr
    assert not any(path.is_symlink() for path in (place / "data").rglob("*"))
    assert _digest(server, place / "data") == expected
    assert server_digest(lambda dbname: server.connect(dbname)) == expected


def test_over_a_switch_of_tli(make_postgres: Callable[..., PostgresServer], place: Path) -> None:
    """P12, EDGE 15: the source moved to another tli while archived; both ends can be had."""
    server = make_postgres(15, initdb=["--wal-segsize=1"])
    _configure(server)
    server.sql("create table t as select generate_series(1, 1000) as a")
    with archived_server(server, place / "store") as archived:
        server.sql("insert into t select generate_series(1, 5000)")
        archived.position()
        promote_in_place(server)
        server.sql("delete from t where a % 2 = 0")
        archived.position()
    for options, rows in (((), "3000"), (("--tli", "1"), "6000")):
        data = place / f"data{len(options)}"
        result = rescue(place / "store", data, *options)
        assert result.returncode == 0, result.stderr
        with recovered(server, data) as connection:
            assert connection.execute("select count(*) from t").fetchall() == [(int(rows),)]


def _configure(server: PostgresServer) -> None:
    """As the workload wants it; the server is running."""
    server.stop()
    server.configure({"autovacuum": "off", "track_commit_timestamp": "on", "wal_keep_size": "'256MB'"})
    server.start()


def _digest(server: PostgresServer, data: Path) -> dict[str, str]:
    with recovered(server, data):
        return server_digest(
            lambda dbname: psycopg.connect(host=str(data), user="postgres", dbname=dbname, autocommit=True)
        )
