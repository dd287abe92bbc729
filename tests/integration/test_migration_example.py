"""README's example: a migration that an empty database lets pass is caught on a branch of production's data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.support.postgres import PostgresServer, scratch
from tests.support.tl_host import Host, make_host

pytestmark = pytest.mark.fuse
PROJECT = Path(__file__).parents[1] / "alembic_project"
_SHAPE = "select attnotnull from pg_attribute where attrelid = 'customer'::regclass and attname = 'email'"
_DATA = "select md5(string_agg(id || coalesce(email, '-'), ',' order by id)) from customer"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout of the project, with its second migration still to be written."""
    return Path(shutil.copytree(PROJECT, tmp_path / "project"))


@pytest.fixture
def production(
    make_postgres: Callable[..., PostgresServer], project: Path
) -> Iterator[tuple[Host, PostgresServer]]:
    """Customers as they come in earnest: some without an address, some with one that another has, too."""
    server = make_postgres(15)
    dsn = f"postgresql://postgres@/postgres?host={server.sockets}&port={server.port}"
    assert alembic(project, dsn).returncode == 0
    server.sql(
        "insert into customer (email) select nullif(n % 97, 0) || '@example.org' from generate_series(1, 1000) n"
    )
    place = scratch("tl-mig-")
    host = make_host(place, f"file://{place}/store", source=server.conninfo)
    host.tl("init", host.store, "--source", server.conninfo)
    host.tl("archive", "--once")
    yield host, server
    host.end_agent()
    host.tl("detach", "--yes")
    shutil.rmtree(place, ignore_errors=True)


def alembic(project: Path, dsn: str) -> subprocess.CompletedProcess[str]:
    """`alembic upgrade head` as CI runs it."""
    return subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=project,
        env={**os.environ, "DATABASE_URL": dsn},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def value(dsn: str, query: str) -> object:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def test_a_migration_meets_real_rows_before_production_does(
    production: tuple[Host, PostgresServer], project: Path
) -> None:
    host, server = production
    before = (server.value(_SHAPE), server.value(_DATA))
    written = project / "migrations/versions/0002_unique_email.py"
    shutil.copy(project / "tries/first.py", written)
    made = host.tl("branch", "try-migration", "--ttl", "1h")
    with psycopg.connect(made["dsn"], autocommit=True) as connection:
        connection.execute("create database empty")
    # What most test suites do, and where all is well.
    assert alembic(project, made["dsn"].replace("/postgres?", "/empty?")).returncode == 0
    caught = alembic(project, made["dsn"])
    assert caught.returncode != 0
    assert 'column "email" of relation "customer" contains null values' in caught.stderr
    shutil.copy(project / "tries/second.py", written)
    fresh = host.tl("reset", "try-migration", "--yes")
    passed = alembic(project, fresh["dsn"])
    assert passed.returncode == 0, passed.stderr
    assert value(fresh["dsn"], _SHAPE) is True
    assert value(fresh["dsn"], "select count(distinct email) from customer") == 1000
    assert (server.value(_SHAPE), server.value(_DATA)) == before == ("False", before[1])
    assert server.value("select version_num from alembic_version") == "0001"
    host.tl("delete", "try-migration", "--yes")
