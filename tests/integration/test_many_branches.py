"""Many callers at once on one host: none of them fails, none gets another's branch, nothing is left."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from restore import mount_table
from tests.support.many_branches import delete_many, make_many
from tests.support.postgres import PostgresServer, scratch
from tests.support.tl_host import Host, make_host

pytestmark = pytest.mark.fuse


@pytest.fixture(scope="module")
def host(make_postgres_session: Callable[..., PostgresServer]) -> Iterator[Host]:
    server = make_postgres_session(15)
    place = scratch("tl-many-")
    host = make_host(place, f"file://{place}/store", source=server.conninfo)
    host.tl("init", host.store, "--source", server.conninfo)
    server.sql("create table t as select generate_series(1, 1000) n")
    host.tl("archive", "--once")
    yield host
    host.end_agent()
    host.tl("detach", "--yes")
    shutil.rmtree(place, ignore_errors=True)


def proof(host: Host, count: int, callers: int) -> None:
    host.end_agent()
    made = make_many(host, count, callers, "--ttl", "1h")
    try:
        assert [one.failure for one in made if one.failure is not None] == []
        results = [one.result for one in made if one.result is not None]
        assert (
            len({result["id"] for result in results}) == len({result["dsn"] for result in results}) == count
        )
        assert {each["name"] for each in host.branches()} == {one.name for one in made}
        for one in made:
            assert one.result is not None
            with psycopg.connect(one.result["dsn"]) as connection:
                connection.execute(f"create table own_{one.name.replace('-', '_')} ()")
                listed = connection.execute(
                    "select (select count(*) from t), (select count(*) from pg_class where relname like 'own%')"
                ).fetchone()
            assert listed == (1000, 1)
    finally:
        failed = delete_many(host, made, callers)
    assert failed == []
    state = Path(host.environment["TL_STATE"])
    assert [m.mountpoint for m in mount_table.mounted() if m.mountpoint.startswith(str(state))] == []
    for place in ("branches", "names", "s"):
        assert list((state / place).iterdir()) == []


@pytest.mark.slow
def test_a_crowd(host: Host) -> None:
    """The first callers find no agent, and start one between them."""
    proof(host, 16, 8)


@pytest.mark.slow
def test_a_large_crowd(host: Host) -> None:
    proof(host, 100, 16)


def test_one_name_has_one_winner(host: Host) -> None:
    """EDGE 54: the others are told that it is taken, or being made; never anything else."""
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda _: host.run("branch", "wanted", timeout=300), range(6)))
    assert [one.returncode for one in done].count(0) == 1, [one.stderr for one in done]
    assert {one.returncode for one in done} == {0, 2}
    assert all("already exists" in one.stderr for one in done if one.returncode == 2)
    host.tl("delete", "wanted", "--yes")
