"""The verbs of a branch's life, as people type them."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from restore import agent
from tests.support.postgres import PostgresServer, scratch
from tests.support.tl_host import Host, make_host


@pytest.fixture(scope="module")
def host(make_postgres_session: Callable[..., PostgresServer]) -> Iterator[Host]:
    """A host with an archived store of a small server."""
    server = make_postgres_session(15)
    place = scratch("tl-cli-")
    host = make_host(place, f"file://{place}/store", source=server.conninfo)
    host.tl("init", host.store, "--source", server.conninfo)
    server.sql("create table t (i int)", "insert into t values (1)")
    host.tl("archive", "--once")
    yield host
    host.end_agent()
    host.tl("detach", "--yes")
    shutil.rmtree(place, ignore_errors=True)


def rows(dsn: str) -> int:
    with psycopg.connect(dsn) as conn:
        found = conn.execute("select count(*) from t").fetchone()
    assert found is not None
    return int(found[0])


def test_a_life(host: Host) -> None:
    """Made, written to, stopped, started, reset, renamed, protected, deleted."""
    made = host.tl("branch", "life")
    with psycopg.connect(made["dsn"]) as conn:
        conn.execute("insert into t values (2)")
    assert rows(made["dsn"]) == 2
    host.tl("stop", "life")
    assert [each["state"] for each in host.branches()] == ["stopped"]
    started = host.tl("start", "life")
    assert rows(started["dsn"]) == 2
    refused = host.run("reset", "life")
    assert refused.returncode == 2
    assert rows(started["dsn"]) == 2
    again = host.tl("reset", "life", "--yes")
    assert again["lsn"] == made["lsn"]
    assert rows(again["dsn"]) == 1
    host.tl("rename", "life", "other-life")
    host.tl("protect", "other-life")
    refused = host.run("delete", "other-life", "--yes")
    assert refused.returncode == 2
    assert "protected" in refused.stderr
    host.tl("protect", "other-life", "--off")
    printed = host.run("psql", "other-life", "--", "-XAtc", "select count(*) from t")
    assert printed.stdout.strip() == "1", printed.stderr
    assert "ready to accept connections" in host.run("logs", "other-life").stdout
    host.tl("delete", "other-life", "--yes")
    assert host.branches() == []


def test_the_agent_has_left_its_caller_behind(host: Host) -> None:
    """Forked from `tl branch`, and yet outside its session, directory and descriptors; fit to fork again."""
    host.end_agent()
    made = host.tl("branch", "left")
    pid = agent.ping(Path(host.environment["TL_STATE"]))
    mount = host.mount_pid(made["data_directory"])
    assert pid is not None and mount is not None
    proc = Path(f"/proc/{pid}")
    assert (proc / "cmdline").read_bytes().rstrip(b"\0 ") == b"tl agent"
    assert Path(f"/proc/{mount}/cmdline").read_bytes().startswith(b"tl mount ")
    assert os.getsid(pid) not in (os.getsid(0), pid)
    assert (proc / "cwd").readlink() == Path("/")
    opened = []
    for number in os.listdir(proc / "fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            opened.append(os.readlink(proc / "fd" / number))
    assert [
        target for target in opened if "lock" in target or target.startswith(("/dev/pts", "/tmp/pytest"))
    ] == []
    assert len(os.listdir(proc / "task")) == 1
    host.tl("delete", "left", "--yes")


def test_start_all(host: Host) -> None:
    for name in ("one", "two"):
        host.tl("branch", name)
        host.tl("stop", name)
    assert host.run("start", "--all").returncode == 0
    assert {each["state"] for each in host.branches()} == {"running"}
    assert host.run("delete", "one", "two", "--yes").returncode == 0


def test_json_of_a_branch_has_what_is_promised(host: Host) -> None:
    made = host.tl("branch", "--ttl", "1h")
    promised = (
        "name id parent lsn time last_commit_time next_commit_time dsn port pid data_directory mode elapsed_seconds"
        " replayed_bytes fetched_bytes requests warnings"
    )
    assert set(promised.split()) <= made.keys()
    assert "password" not in made["dsn"]
    host.tl("delete", made["name"], "--yes")


def test_a_branch_expires_by_itself(host: Host) -> None:
    """Nobody calls anything: the agent does it."""
    host.tl("branch", "short", "--ttl", "3s")
    deadline = time.monotonic() + 60
    while host.branches():
        assert time.monotonic() < deadline
        time.sleep(1)
