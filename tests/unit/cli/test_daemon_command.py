"""``tl daemon`` without running one: what it checks, prints and refuses."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.request
from pathlib import Path

import pytest

from cli.daemon import planned_runs
from cli.daemon_config import read_configuration, wants_json
from cli.daemon_metrics import start_metrics
from cli.daemon_run import only_daemon
from cli.observed import ClusterState, DaemonState, JobState
from cli.observed_json import state_file, write_state
from tests.support.tl_host import make_host
from timeline.errors import UsageError

GOOD = '[cluster.a]\nstore = "file:///a"\nsource = "host=x"\n[cluster.a.verify]\nstructure = "every 1d"\ndata = "off"\n'


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TL_STATE", str(tmp_path / "state"))
    path = tmp_path / "tl.toml"
    path.write_text(GOOD)
    return path


def test_the_schedule_is_what_a_daemon_would_follow(config: Path, tmp_path: Path) -> None:
    """Soonest first; a run that is overdue by what the last daemon left comes at once."""
    assert [job.job for job in planned_runs(config, ()).jobs] == ["expire", "verify"]
    path = state_file(tmp_path / "state")
    path.parent.mkdir(parents=True)
    job = JobState("verify", 1, 0, None, 5, 1.0, 0, 6, "", 7_000_000)
    write_state(path, DaemonState(1, 2, 3, (ClusterState("a", "file:///a", None, (job,)),)))
    found = planned_runs(config, ())
    assert (found.jobs[0].job, found.jobs[0].next_run) == ("verify", "1970-01-01T00:00:07Z")
    assert [each.command.split()[:4] for each in found.archivers] == [["tl", "archive", "--cluster", "a"]]
    path.write_text("{")
    assert [each.job for each in planned_runs(config, ()).jobs] == ["expire", "verify"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no cluster to work for"),
        ('[cluster.a]\nsource = "host=x"\n', "cluster.a.store is missing"),
        ('[cluster.a]\nstore = "file:///a"\n', "cluster.a.source is missing"),
    ],
)
def test_what_a_daemon_cannot_work_by(config: Path, text: str, message: str) -> None:
    config.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_configuration(config, ())


def test_clusters_can_be_chosen(config: Path) -> None:
    config.write_text(GOOD + '[cluster.b]\nstore = "file:///b"\n[cluster.b.archive]\nenabled = false\n')
    assert [each.name for each in read_configuration(config, ("b",)).clusters] == ["b"]
    with pytest.raises(UsageError, match="no cluster 'c'"):
        read_configuration(config, ("c",))


def test_the_command(config: Path, tmp_path: Path) -> None:
    host = make_host(tmp_path / "host", "file:///unused")
    found = host.tl("daemon", "--check", "--config", str(config))
    assert found["clusters"] == ["a"]
    assert "ExecStart=" in host.tl("daemon", "--print-unit")["unit"]
    assert "verify" in host.run("daemon", "--check", "--config", str(config)).stdout
    missing = host.run("daemon", "--json")
    assert missing.returncode == 2
    assert json.loads(missing.stdout)["error"] == "no tl.toml to work by"
    config.write_text(GOOD + '[daemon]\nlogg = "json"\n')
    wrong = host.run("daemon", "--check", "--config", str(config))
    assert wrong.returncode == 2
    assert "did you mean 'log'?" in wrong.stderr


def test_one_daemon_per_state_directory(tmp_path: Path) -> None:
    with (
        only_daemon(tmp_path / "state"),
        pytest.raises(UsageError, match="another daemon"),
        only_daemon(tmp_path / "state"),
    ):
        raise AssertionError("two at once")
    with only_daemon(tmp_path / "state"):
        pass


def test_what_the_daemon_knows_is_served() -> None:
    async def run() -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = await start_metrics(f"127.0.0.1:{port}", lambda: DaemonState(1, 2, 3, ()), {})
        try:
            return await asyncio.to_thread(fetch, f"http://127.0.0.1:{port}/metrics")
        finally:
            await server.aclose()

    assert "tl_daemon_" in asyncio.run(run())


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        page: bytes = answer.read()
        return page.decode()


def test_log_formats() -> None:
    assert wants_json("json", terminal=True)
    assert wants_json("auto", terminal=False)
    assert not wants_json("auto", terminal=True)
    assert not wants_json("human", terminal=False)
