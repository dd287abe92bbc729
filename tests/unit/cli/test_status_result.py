"""What ``tl status`` makes of the facts, and the daemon's state file."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cli.facts import Facts
from cli.observed_json import decode, encode, read_state, state_file, write_state
from cli.output import emit_json
from cli.status import _daemon_state, _is_alive
from cli.status_page import print_status
from cli.status_result import StatusResult, make_result, slot_alarm
from tests.support.observed_values import DAEMON, FACTS, NOW, SECOND, SOURCE, STORE


def result(facts: Facts = FACTS, *, cluster: str | None = "prod") -> StatusResult:
    return make_result(facts, DAEMON, running=True, cluster=cluster, now=NOW)


def test_the_page_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    print_status(result())
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("recoverable from ")
    assert lines[0].endswith("(3.0 s ago), about 22.5 s to the first query")
    text = "\n".join(lines)
    assert "slot       tl_0123456789ab_main: reserved, 50.0 MiB until it is lost (limit 64.0 MiB)" in lines
    assert "base       117 min old" in lines or "base       1.9 h old" in lines
    assert "packs 3.9 KiB in 4" in text
    assert "branches   fix: 8.0 KiB own, 683.6 KiB fetched" in lines
    assert "cache      1.0 MiB, 90% of what branches read was here" in lines
    assert "daemon     pid 1, archiver streaming" in lines
    assert "failed 1 times since, exit code 4: it went wrong" in text
    assert "abandoned" in text
    assert "1 gap(s)" in err


@pytest.mark.parametrize(
    ("status", "left", "limit", "alarm"),
    [
        ("reserved", 50 << 20, 64 << 20, None),
        ("extended", 20 << 20, 64 << 20, None),
        ("extended", 12 << 20, 64 << 20, "low"),
        ("unreserved", -5, 64 << 20, "unreserved"),
        ("lost", None, 64 << 20, "lost"),
        ("extended", None, None, None),
    ],
)
def test_the_word_of_alarm(
    status: str, left: int | None, limit: int | None, alarm: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """EDGE 8, 10: low comes before unreserved, and that before lost."""
    slot = SOURCE.slot
    assert slot is not None
    slot = replace(slot, wal_status=status, safe_bytes=left)
    assert slot_alarm(slot, limit) == alarm
    print_status(result(replace(FACTS, source=replace(SOURCE, slot=slot, keep_limit_bytes=limit))))
    out, err = capsys.readouterr()
    word = {"low": "LOW", "unreserved": "IN DANGER", "lost": "LOST", None: None}[alarm]
    (line,) = [line for line in out.splitlines() if line.startswith("slot")]
    assert word is None or line.endswith(word)
    assert ("are left until the slot is lost" in err) == (alarm == "low")


def test_nothing_is_recoverable_yet(capsys: pytest.CaptureFixture[str]) -> None:
    assert FACTS.store is not None
    empty = replace(FACTS.store, ranges=(), snapshots=(), gaps=(), backup_under_way=True)
    print_status(result(replace(FACTS, store=empty, source=None, source_error="no route", size=None)))
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "recoverable: nothing yet (a base backup is under way)"
    assert "warning: the source could not be asked: no route" in err


def test_a_far_store_takes_longer_to_branch_from() -> None:
    near, far = result(), result(replace(FACTS, store=replace(STORE, url="s3://bucket/prod")))
    assert (
        near.replay_bytes is not None
        and near.expected_seconds is not None
        and far.expected_seconds is not None
    )
    assert near.expected_seconds == pytest.approx(1.0 + near.replay_bytes / 50e6)
    assert far.expected_seconds == pytest.approx(1.9 + near.replay_bytes / 15e6)


def test_the_json_keeps_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json(result())
    told = json.loads(capsys.readouterr().out)
    assert {
        "store", "store_id", "recoverable", "ranges", "fresh_seconds", "snapshots", "newest_snapshot",
        "newest_snapshot_time", "database_bytes", "replay_bytes", "expected_seconds", "unsealed_bytes",
        "backup_under_way", "gaps", "slot", "remarks",
    } <= set(told)  # fmt: skip
    assert told["slot"]["safe_bytes"] == 50 << 20
    assert told["lag_bytes"] == 4096
    assert told["daemon"]["jobs"][1]["job"] == "drill"


def test_a_cluster_of_another_name_or_store_is_not_ours() -> None:
    assert result(cluster="other").daemon is None
    assert result(cluster=None).daemon is not None
    elsewhere = replace(DAEMON, clusters=(replace(DAEMON.clusters[0], store="file:///else"),))
    assert make_result(FACTS, elsewhere, running=True, cluster=None, now=NOW).daemon is None


def test_facts_survive_the_way_through_a_child() -> None:
    assert decode(Facts, encode(FACTS)) == FACTS


def test_the_daemons_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert read_state(path) is None
    write_state(path, DAEMON)
    assert read_state(path) == DAEMON
    write_state(path, replace(DAEMON, written=NOW + SECOND))
    assert os.listdir(tmp_path) == ["state.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": "one"}', "x"])
def test_a_file_that_is_no_daemons_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """What is recoverable does not depend on it."""
    monkeypatch.setenv("TL_STATE", str(tmp_path))
    path = state_file(tmp_path)
    path.parent.mkdir()
    path.write_text(content)
    state, problem = _daemon_state()
    assert state is None
    assert problem is not None and str(path) in problem


def test_a_daemon_that_has_gone_is_known_by_its_pid() -> None:
    assert _is_alive(os.getpid())
    gone = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(gone, 0)
    assert not _is_alive(gone)
