"""The GitHub action for pull requests: its steps, run as a runner runs them, against a real store."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.support.composite_action import ActionRun, run_action
from tests.support.postgres import PostgresServer, scratch
from tests.support.tl_host import TL, Host, make_host

pytestmark = pytest.mark.fuse
ACTION = Path(__file__).parents[2] / ".github/actions/tl-branch"


@pytest.fixture(scope="module")
def host(make_postgres_session: Callable[..., PostgresServer]) -> Iterator[Host]:
    server = make_postgres_session(15)
    place = scratch("tl-gha-")
    host = make_host(place, f"file://{place}/store", source=server.conninfo)
    host.tl("init", host.store, "--source", server.conninfo)
    server.sql("create table t (i int)", "insert into t values (1)")
    host.tl("archive", "--once")
    yield host
    host.end_agent()
    host.tl("detach", "--yes")
    shutil.rmtree(place, ignore_errors=True)


Act = Callable[..., ActionRun]


@pytest.fixture
def act(host: Host, tmp_path: Path) -> Act:
    """Runs the action on a runner that has nothing but PATH and what `tl` needs; the store is an input."""
    environment = {
        **{name: value for name, value in host.environment.items() if name != "TL_STORE"},
        "PATH": f"{Path(TL).parent}:{os.environ['PATH']}",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
    }

    def run(*, pull_request: int | None = 7, **inputs: str) -> ActionRun:
        given = {name.replace("_", "-"): value for name, value in inputs.items()}
        return run_action(
            ACTION, tmp_path, {"store": host.store, **given}, environment, pull_request=pull_request
        )

    return run


def rows(dsn: str) -> int:
    with psycopg.connect(dsn) as connection:
        found = connection.execute("select count(*) from t").fetchone()
    assert found is not None
    return int(found[0])


def test_the_life_of_a_pull_request(host: Host, act: Act, tmp_path: Path) -> None:
    """Opened, pushed to, reset by hand, merged; and merged once more, which harms nothing."""
    (tmp_path / "seed data.sql").write_text("insert into t values (2);\n")
    opened = act(run="\n  seed data.sql\n", ttl="2h")
    assert opened.returncode == 0, opened.log
    assert opened.outputs["name"] == "pr-7"
    assert rows(opened.outputs["dsn"]) == 2
    assert 0 <= int(opened.outputs["age-seconds"]) < 3600
    (listed,) = host.branches()
    assert (listed["name"], listed["dsn"]) == ("pr-7", opened.outputs["dsn"]) and listed["expires"]
    assert f"psql '{opened.outputs['dsn']}'" in opened.summary and " s old)" in opened.summary
    assert "::add-mask::very-secret" in opened.log.splitlines()
    with psycopg.connect(opened.outputs["dsn"]) as connection:
        connection.execute("insert into t values (3)")
    pushed = act(run="seed data.sql")
    assert pushed.outputs["dsn"] == opened.outputs["dsn"]
    assert rows(pushed.outputs["dsn"]) == 3
    again = act(command="reset", run="seed data.sql")
    assert again.returncode == 0, again.log
    assert rows(again.outputs["dsn"]) == 2
    merged = act(command="delete")
    assert (merged.returncode, merged.outputs) == (0, {"name": "pr-7"})
    assert host.branches() == []
    assert "no branch `pr-7` any more" in act(command="delete").summary


def test_what_goes_wrong_fails_the_step_in_one_line(host: Host, act: Act, tmp_path: Path) -> None:
    (tmp_path / "bad.sql").write_text("select 1;\nselect 100 % 0;\n")
    failed = act(run="bad.sql")
    assert failed.returncode == 6 and "dsn" not in failed.outputs
    (line,) = [line for line in failed.log.splitlines() if line.startswith("::error")]
    assert "bad.sql, line 2: ERROR:  division by zero%0A" in line
    assert act(command="destroy").returncode == 2
    nameless = act(pull_request=None)
    assert nameless.returncode == 2 and "give the input 'name'" in nameless.log
    sly = act(name='x"; touch owned; "$(touch owned)')
    assert sly.returncode == 2 and "invalid branch name" in sly.log
    assert not (tmp_path / "owned").exists()
    assert host.branches() == []


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="there is no shellcheck")
def test_shellcheck_is_content() -> None:
    scripts = sorted(map(str, ACTION.glob("*.sh")))
    assert len(scripts) == 2
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
