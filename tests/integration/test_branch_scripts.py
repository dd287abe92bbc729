"""Scripts that run before a branch is offered: together or not at all, and the same again at a reset."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from restore import mount_table
from tests.support.postgres import PostgresServer, scratch
from tests.support.tl_host import Host, make_host

pytestmark = pytest.mark.fuse
MASK = "update person set email = 'user' || id || '@example.org';\n"


@pytest.fixture(scope="module")
def host(make_postgres_session: Callable[..., PostgresServer]) -> Iterator[Host]:
    """A host with an archived store of a server with people in it."""
    server = make_postgres_session(15)
    place = scratch("tl-run-")
    # The archiver is not what is tested: on a busy machine a millisecond is too short even for its first word.
    unbound = f"{server.conninfo} options='-c statement_timeout=0'"
    host = make_host(place, f"file://{place}/store", source=unbound)
    host.tl("init", host.store, "--source", unbound)
    # Wrong settings for whoever masks; a session must not be bound by them.
    server.sql(
        "create table person (id int primary key, email text)",
        "insert into person select n, 'real' || n || '@example.com' from generate_series(1, 100) n",
        "create database app",
        "alter role postgres set statement_timeout = '1ms'",
        "alter role postgres set default_transaction_read_only = on",
    )
    host.tl("archive", "--once")
    yield host
    host.end_agent()
    server.sql("set default_transaction_read_only = off", "alter role postgres reset all")
    host.tl("detach", "--yes")
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def script(host: Host) -> Iterator[Callable[..., str]]:
    """Writes a script and says where; no branch, mount or process is left of the test that used it."""
    place = host.directory / "scripts"
    place.mkdir()

    def write(name: str, text: str) -> str:
        (place / name).write_text(text)
        return str(place / name)

    yield write
    shutil.rmtree(place)
    (host.directory / "tl.toml").unlink(missing_ok=True)
    names = [each["name"] for each in host.branches()]
    if names:
        host.tl("delete", *names, "--yes")
    assert_nothing_left(host)


def assert_nothing_left(host: Host) -> None:
    state = Path(host.environment["TL_STATE"])
    assert host.branches() == []
    assert [m.mountpoint for m in mount_table.mounted() if m.mountpoint.startswith(str(state))] == []
    for place in ("branches", "names", "s"):
        assert list((state / place).iterdir()) == []
    listed = subprocess.run(["pgrep", "-af", str(state / "branches")], capture_output=True, text=True)
    assert listed.stdout == ""


def column(made: dict[str, Any], query: str) -> list[Any]:
    with psycopg.connect(made["dsn"], options="-c statement_timeout=0") as connection:
        return [row[0] for row in connection.execute(query)]


def refused(host: Host, *arguments: str, code: int = 6) -> dict[str, Any]:
    """The error of a `tl branch` that must fail, and of which nothing may be left."""
    done = host.run("branch", *arguments, "--json")
    assert done.returncode == code, done.stdout + done.stderr
    assert_nothing_left(host)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("mode", ["lazy", "copy"])
def test_scripts_run_before_anybody_comes_in(host: Host, script: Callable[..., str], mode: str) -> None:
    """Several files, one session and transaction: psql's variables and commands work, neighbours are found."""
    script("seed.csv", "7,seven\n8,eight\n")
    first = script("mask.sql", "\\set domain 'example.org'\ncreate temp table seen (who text);\n" + MASK)
    script("more.sql", "insert into seed values (9, 'nine');\n")
    second = script(
        "seed it's.sql",
        "create table seed (n int, t text);\n\\copy seed from 'seed.csv' with (format csv)\n\\i more.sql\n"
        "insert into seen values (:'domain');\nselect current_user, 'said by a script';\n"
        "create table proof as select who, pg_current_xact_id()::text as unit from seen;\n",
    )
    made = host.tl("branch", "masked", "--mode", mode, "--run", first, "--run", second)
    assert made["mode"] == mode
    assert [each["path"] for each in made["scripts"]] == [first, second]
    assert all(len(each["digest"]) == 64 for each in made["scripts"])
    assert column(made, "select count(*) from person where email like 'real%'") == [0]
    assert column(made, "select t from seed order by n") == ["seven", "eight", "nine"]
    assert column(made, "select who from proof") == ["example.org"]
    same = (
        "select count(distinct xmin::text) from (select xmin from person union all select xmin from seed) r"
    )
    assert column(made, same) == [1]
    assert "said by a script" in host.run("logs", "masked", "-n", "100000").stdout


def test_a_failing_script_leaves_nothing_and_names_file_and_line(
    host: Host, script: Callable[..., str]
) -> None:
    good = script("good.sql", MASK)
    bad = script("bad.sql", "select 1;\n\nalter table person add unique (nothing);\nselect 2;\n")
    for mode in ("lazy", "copy"):
        told = refused(host, "never", "--mode", mode, "--run", good, "--run", bad)
        assert told["error"].startswith(f'{bad}, line 3: ERROR:  column "nothing"'), told
        assert told["kind"] == "CheckFailed" and "not offered" in told["hint"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\\set ON_ERROR_STOP off\nselect 1 / 0;\n", "line 2: ERROR:  division by zero"),
        (MASK + "rollback;\n", "a script has rolled back the transaction of all scripts"),
        (MASK + "\\connect app\n", "a script has rolled back the transaction of all scripts"),
        (
            "create table d (n int unique deferrable initially deferred); insert into d values (1), (1);\n",
            "duplicate key",
        ),
        ("\\i not-there.sql\n", "not-there.sql: No such file or directory"),
        ("\\! exit 0\nselec\n", "syntax error at or near"),
    ],
    ids=["ignored", "rolled back", "reconnected", "at commit", "no file", "unfinished"],
)
def test_it_fails_closed(host: Host, script: Callable[..., str], text: str, message: str) -> None:
    """What psql alone would let pass with exit code 0, or tell too late."""
    told = refused(host, "never", "--run", script("sly.sql", text))
    assert message in told["error"], told["error"]


@pytest.mark.slow
def test_a_script_may_commit_by_itself(host: Host, script: Callable[..., str]) -> None:
    """Then it may say what no transaction may hold; the branch is all or nothing all the same."""
    vacuum = script(
        "vacuum.sql", MASK + "commit;\nvacuum person;\ncreate index concurrently on person (email);\n"
    )
    made = host.tl("branch", "own", "--run", vacuum)
    assert column(made, "select count(*) from pg_indexes where tablename = 'person'") == [2]
    host.tl("delete", "own", "--yes")
    broken = script("broken.sql", MASK + "commit;\nvacuum person;\nvacuum nothing;\n")
    assert "broken.sql, line 4: " in refused(host, "never", "--run", broken)["error"]


def test_words_and_bounds(host: Host, script: Callable[..., str]) -> None:
    slow = script("slow.sql", "select pg_sleep(600);\n")
    told = refused(host, "never", "--run", slow, "--run-timeout", "1s")
    assert "did not end within 1 s" in told["error"]
    fast = script("fast.sql", "create table here as select current_database() as name;\n")
    told = refused(host, "never", "--run", fast, "--run-database", "nowhere", code=2)
    assert "--run-database" in told["hint"]
    told = refused(host, "never", "--run", fast + ".not", code=2)
    assert "cannot read the script" in told["error"]
    made = host.tl("branch", "elsewhere", "--run", fast, "--run-database", "app")
    app = {"dsn": made["dsn"].replace("/postgres?", "/app?")}
    assert column(app, "select name from here") == ["app"]


@pytest.mark.slow
def test_a_reset_runs_the_same_again(host: Host, script: Callable[..., str]) -> None:
    """Whatever has become of the file, or of its directory."""
    mask = script("mask.sql", MASK)
    made = host.tl("branch", "again", "--run", mask)
    with psycopg.connect(made["dsn"], options="-c statement_timeout=0", autocommit=True) as connection:
        connection.execute("set default_transaction_read_only = off")
        connection.execute("delete from person")
    shutil.rmtree(Path(mask).parent)
    reset = host.tl("reset", "again", "--yes")
    assert reset["scripts"] == made["scripts"]
    assert column(reset, "select count(*) from person where email like 'user%'") == [100]
    Path(mask).parent.mkdir()
    (kept,) = Path(host.environment["TL_STATE"]).glob("branches/*/scripts/001.sql")
    kept.write_text("select 'not masked';\n")
    spoilt = host.run("reset", "again", "--yes")
    assert spoilt.returncode == 1 and "not the script that the branch was made with" in spoilt.stderr
    assert column(reset, "select count(*) from person where email like 'user%'") == [100]


@pytest.mark.slow
def test_a_branch_is_used_again_only_with_its_scripts(host: Host, script: Callable[..., str]) -> None:
    mask, other = script("mask.sql", MASK), script("other.sql", MASK + "select 1;\n")
    plain = host.tl("branch", "one")
    assert plain["scripts"] == []
    done = host.run("branch", "one", "--if-exists", "reuse", "--run", mask)
    assert done.returncode == 2 and "not made with these scripts" in done.stderr
    made = host.tl("branch", "one", "--if-exists", "reset", "--run", mask)
    again = host.tl("branch", "one", "--if-exists", "reuse", "--run", mask)
    assert (again["id"], again["scripts"]) == (made["id"], made["scripts"])
    done = host.run("branch", "one", "--if-exists", "reuse", "--run", other)
    assert done.returncode == 2


def test_tl_toml_remembers_to_mask(host: Host, script: Callable[..., str]) -> None:
    """Its scripts come first, by paths from it; --no-run leaves them out; two clusters with one store are not guessed."""
    mask, other = script("mask.sql", MASK), script("other.sql", "create table after_mask ();\n")
    table = f'[cluster.{{}}]\nstore = "{host.store}/"\n[cluster.{{}}.branch]\nrun = ["scripts/mask.sql"]\n'
    config = host.directory / "tl.toml"
    config.write_text(table.format("a", "a"))
    made = host.tl("branch", "both", "--run", other)
    assert [each["path"] for each in made["scripts"]] == [mask, other]
    bare = host.tl("branch", "bare", "--no-run")
    assert bare["scripts"] == []
    assert column(bare, "select count(*) from person where email like 'real%'") == [100]
    config.write_text(table.format("a", "a") + table.format("b", "b"))
    done = host.run("branch", "unsure")
    assert done.returncode == 2 and "choose with --cluster: a, b" in done.stderr
    assert [each["path"] for each in host.tl("branch", "sure", "--cluster", "b")["scripts"]] == [mask]
