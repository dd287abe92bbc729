"""What `tl snapshot` takes from tl.toml, and what the archiver asks it for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.config import resolve
from cli.snapshot import snapshot_command
from cli.snapshot_schedule import RETRY_SECONDS, SnapshotSchedule
from restore import agent_fork, snapshot_build
from restore.overlay_snapshot import Build
from tests.support.manual_clock import ManualClock
from timeline.lsn import Lsn
from timeline.maintain.thin import RULES, Rule, rules_of_ages

DAY = 86400.0


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TL_STORE", "TL_CLUSTER", "TL_ENDPOINT_URL", "TL_REGION", "TL_SOURCE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "tl.toml"
    path.write_text(
        '[cluster.a]\nstore = "file:///a"\n[cluster.a.retention]\nkeep_all = "14d"\nhourly = "30d"\ndaily = "90d"\n'
        '[cluster.b]\nstore = "file:///b"\n'
    )
    monkeypatch.setenv("TL_CONFIG", str(path))
    return path


def test_older_snapshots_stay_as_the_cluster_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[Rule, ...]] = []

    async def build(*_: object, rules: Sequence[Rule], **__: object) -> AsyncGenerator[Build, None]:
        found.append(tuple(rules))
        yield Build(None, "nothing new")

    monkeypatch.setattr(snapshot_build, "build_snapshots", build)
    monkeypatch.setattr(agent_fork, "prepare_libraries", lambda: None)
    monkeypatch.setattr("cli.snapshot.NICENESS", 0)
    for cluster in ("a", "b"):
        assert CliRunner().invoke(snapshot_command, ["--cluster", cluster]).exit_code == 0
    assert found == [rules_of_ages(14 * DAY, 30 * DAY, 90 * DAY), RULES]


def schedule(clock: ManualClock, *, cluster: str | None, store: str | None = None) -> SnapshotSchedule:
    settings = resolve(
        store=store, cluster=cluster, endpoint_url=None, region=None, source=None, as_json=False
    )
    notes: list[str] = []
    return SnapshotSchedule(settings, clock, every_mib=64, after_seconds=300, note=notes.append)


def test_the_archivers_child_knows_its_cluster() -> None:
    """Its rules for older snapshots are there, and its store is still the one that is archived into."""
    clock = ManualClock()
    assert schedule(clock, cluster="a").command() == (
        *("snapshot", "--json", "--store", "file:///a", "--cluster", "a"),
        *("--at-least", "4.0", "--spacing", "64.0"),
    )
    by_url = schedule(clock, cluster=None, store="file:///a/").command()
    assert by_url[2:6] == ("--store", "file:///a/", "--cluster", "a")
    taken = resolve(
        store="file:///a/", cluster="a", endpoint_url=None, region=None, source=None, as_json=True
    )
    assert taken.operations.retention.keep_all_seconds == 14 * DAY
    assert "--cluster" not in schedule(clock, cluster=None, store="file:///c").command()


def test_a_host_that_cannot_build_may_learn_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Binaries of the source's version come with the next package, say."""
    clock = ManualClock()
    began: list[float] = []
    done = asyncio.Event()

    async def run() -> None:
        made = schedule(clock, cluster="a")

        async def build() -> tuple[int, str]:
            began.append(clock.monotonic())
            if len(began) == 3:
                done.set()
                await asyncio.Event().wait()
            return 2, "no binaries"

        monkeypatch.setattr(made, "_build", build)
        based = asyncio.Event()
        based.set()
        running = asyncio.create_task(made.run(lambda: Lsn(1 << 40), based))
        async with asyncio.timeout(20):
            await done.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())
    assert all(two - one >= RETRY_SECONDS for one, two in pairwise(began))
