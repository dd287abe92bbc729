"""The pytest plugin in pytest runs of its own, against a real store."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.support.postgres import PostgresServer, scratch
from tests.support.tl_host import Host, make_host

pytest_plugins = ("pytester",)
pytestmark = pytest.mark.fuse

_TESTS = """
import psycopg

def rows(branch):
    with psycopg.connect(branch.dsn) as connection:
        return connection.execute("select count(*) from t").fetchone()[0]
"""


@pytest.fixture(scope="module")
def archived(make_postgres_session: Callable[..., PostgresServer]) -> Iterator[tuple[Host, PostgresServer]]:
    server = make_postgres_session(15)
    place = scratch("tl-plug-")
    host = make_host(place, f"file://{place}/store", source=server.conninfo)
    host.tl("init", host.store, "--source", server.conninfo)
    server.sql("create table t (i int)", "insert into t values (1), (2)", "create database app")
    host.tl("archive", "--once")
    yield host, server
    host.end_agent()
    host.tl("detach", "--yes")
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def host(archived: tuple[Host, PostgresServer], monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """The environment is that host's; after the test there is no branch on it."""
    host, _ = archived
    for name, value in host.environment.items():
        monkeypatch.setenv(name, value)
    yield host
    assert host.branches() == []


def run(pytester: pytest.Pytester, code: str, *arguments: str) -> pytest.RunResult:
    pytester.makepyfile(_TESTS + code)
    return pytester.runpytest_subprocess("-p", "no:randomly", "-q", *arguments, timeout=300)


def test_every_test_has_its_own_and_sessions_share_one(pytester: pytest.Pytester, host: Host) -> None:
    result = run(
        pytester,
        """
names = []

def test_write(tl_branch, tl_branch_session):
    with psycopg.connect(tl_branch.dsn) as connection:
        connection.execute("delete from t")
    with psycopg.connect(tl_branch_session.dsn) as connection:
        connection.execute("insert into t values (3)")
    assert rows(tl_branch) == 0
    names.extend([tl_branch, tl_branch_session])

def test_read(tl_branch, tl_branch_session):
    assert rows(tl_branch) == 2
    assert rows(tl_branch_session) == 3
    assert names[0].name != tl_branch.name and names[1] == tl_branch_session
    assert names[0].lsn == tl_branch.lsn == tl_branch_session.lsn
    assert tl_branch.time.endswith("Z")
    with psycopg.connect(tl_branch.dsn_of("app")) as connection:
        assert connection.execute("select current_database()").fetchone() == ("app",)
""",
    )
    result.assert_outcomes(passed=2)


def test_failing_tests_leave_no_branch(pytester: pytest.Pytester, host: Host) -> None:
    result = run(
        pytester,
        """
import pytest

def test_fails(tl_branch):
    assert rows(tl_branch) == -1

@pytest.fixture
def broken(tl_branch):
    raise RuntimeError("after the branch")

def test_error(broken):
    pass
""",
    )
    result.assert_outcomes(failed=1, errors=1)


@pytest.mark.slow
def test_workers_do_not_meet(pytester: pytest.Pytester, host: Host) -> None:
    """Two workers at a time, each with branches of its own."""
    result = run(
        pytester,
        """
import pytest

@pytest.mark.parametrize("n", range(4))
def test_own(n, tl_branch, tl_branch_session, record_property):
    for branch in (tl_branch, tl_branch_session):
        with psycopg.connect(branch.dsn) as connection:
            connection.execute(f"create table own_{branch.name.replace('-', '_')}_{n} ()")
    assert rows(tl_branch) == 2
""",
        "-n",
        "2",
    )
    result.assert_outcomes(passed=4)


@pytest.mark.slow
def test_what_branches_are_made_with(pytester: pytest.Pytester, host: Host) -> None:
    """Scripts and moment from the ini file; options on the command line win."""
    store = host.store
    pytester.makeini(f"[pytest]\ntl_store = {store}\ntl_run = seed.sql\ntl_ttl = 7m\n")
    (pytester.path / "seed.sql").write_text("insert into t select generate_series(1, 100);\n")
    (pytester.path / "other.sql").write_text("truncate t;\n")
    code = """
import json, subprocess, os, sys
from datetime import datetime

def test_made(tl_branch, pytestconfig):
    assert rows(tl_branch) == int(os.environ["EXPECTED_ROWS"])
    tl = os.path.join(os.path.dirname(sys.executable), "tl")
    (listed,) = json.loads(subprocess.run([tl, "branches", "--json"], capture_output=True).stdout)
    life = datetime.fromisoformat(listed["expires"]) - datetime.fromisoformat(listed["created"])
    assert 410 < life.total_seconds() <= 420 and listed["name"] == tl_branch.name
"""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TL_STORE")
        patch.setenv("EXPECTED_ROWS", "102")
        run(pytester, code).assert_outcomes(passed=1)
        patch.setenv("EXPECTED_ROWS", "0")
        run(pytester, code, "--tl-run", "other.sql").assert_outcomes(passed=1)


def test_no_branch_is_one_clear_line(pytester: pytest.Pytester, host: Host) -> None:
    """Fails by default, skips where that is wanted."""
    code = "def test_a(tl_branch): pass\ndef test_b(tl_branch): pass\n"
    result = run(pytester, code, "--tl-at", "FFFF/0")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["tl makes no branch: *FFFF/0*"])
    pytester.makeini("[pytest]\ntl_otherwise = skip\n")
    result = run(pytester, code, "--tl-store", "file:///no/such/store", "-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["*tl makes no branch: *no/such/store*"])


def test_it_costs_nothing_where_it_is_not_used() -> None:
    """Loaded in every pytest run of an environment that has tl: of ours it imports nothing but itself."""
    code = "import sys, pytest; before = set(sys.modules); import cli.pytest_plugin; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {
        "cli",
        "cli.pytest_plugin",
        "secrets",
        "hmac",
        "_hmac",
        "_sha2",
        "base64",
    }
