"""The registry of host-local branches: names, locks, and what a crash leaves."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from restore.branches import Branches
from restore.host import SOCKET_DIRECTORY_BYTES, find_host
from restore.local_branch import DELETING, LAZY, READY, LocalBranch, Origin, Server
from timeline.clock import SystemClock
from timeline.errors import TimelineError, Unavailable, UsageError
from timeline.ids import branch_name
from timeline.lsn import Lsn

ORIGIN = Origin(
    store_url="file:///store", endpoint_url=None, region=None, parent="main", tli=1, lsn=Lsn(99),
    last_record=Lsn(9), time=5, last_commit_time=None, next_commit_time=None, snapshot_id="s",
    snapshot_lsn=Lsn(1),
)  # fmt: skip


@pytest.fixture
def branches(tmp_path: Path) -> Branches:
    return Branches(find_host({**os.environ, "TL_STATE": str(tmp_path / "state")}), SystemClock())


def make_ready(branches: Branches, name: str | None) -> LocalBranch:
    branch, lock = branches.reserve(name, mode=LAZY, expires=None, durable=True)
    server = Server(15, "/bin", "postgres", str(branches.sockets(branch.id)), 5432, None, 1234, "777")
    branch = dataclasses.replace(branch, phase=READY, origin=ORIGIN, server=server, warnings=("w",))
    branches.save(branch)
    lock.close()
    return branch


def test_what_is_saved_is_read_back(branches: Branches) -> None:
    branch = make_ready(branches, "demo")
    assert branches.get("demo") == branch
    assert branches.all() == (branch,)


def test_a_name_is_taken_once(branches: Branches) -> None:
    """EDGE 54."""
    branches.reserve("demo", mode=LAZY, expires=None, durable=True)[1].close()
    with pytest.raises(UsageError, match="already exists"):
        branches.reserve("demo", mode=LAZY, expires=None, durable=True)
    with pytest.raises(UsageError, match="no branch can take its name"):
        branches.reserve("main", mode=LAZY, expires=None, durable=True)
    with pytest.raises(UsageError, match="invalid branch name"):
        branches.reserve("../x", mode=LAZY, expires=None, durable=True)


def test_only_one_of_many_processes_gets_a_name(branches: Branches) -> None:
    script = (
        "import os,sys; from restore.branches import Branches; from restore.host import find_host\n"
        "from timeline.clock import SystemClock; from timeline.errors import UsageError\n"
        "branches = Branches(find_host(os.environ), SystemClock())\n"
        "try: branches.reserve('one', mode='lazy', expires=None, durable=True)\n"
        "except UsageError: sys.exit(9)\n"
        "sys.stdin.read()"
    )
    env = {**os.environ, "TL_STATE": str(branches.host.state)}
    runs = [
        subprocess.Popen([sys.executable, "-c", script], env=env, stdin=subprocess.PIPE) for _ in range(5)
    ]
    for run in runs:
        run.communicate(b"", timeout=60)
    assert sorted(run.returncode for run in runs) == [0, 9, 9, 9, 9]


def test_generated_names_are_valid_and_differ(branches: Branches) -> None:
    made = [branches.reserve(None, mode=LAZY, expires=None, durable=False)[0].name for _ in range(30)]
    assert len(set(made)) == 30
    assert all(branch_name(name) == name for name in made)


def test_half_made_branches_are_not_offered_and_become_debris(branches: Branches) -> None:
    """P8, EDGE 57: while its maker lives nobody takes it; afterwards it is handed over, locked."""
    half, lock = branches.reserve("half", mode=LAZY, expires=None, durable=True)
    assert branches.all() == () and branches.find("half") is None
    assert branches.debris() == []
    lock.close()
    ((found, held),) = branches.debris()
    assert found == half
    assert branches.debris() == [], "its lock is held now"
    branches.remove(found)
    held.close()
    assert not branches.directory(half.id).exists()
    branches.reserve("half", mode=LAZY, expires=None, durable=True)[1].close()


def test_half_deleted_branches_are_debris(branches: Branches) -> None:
    branch = make_ready(branches, "gone")
    branches.save(dataclasses.replace(branch, phase=DELETING))
    assert branches.find("gone") is None
    ((found, held),) = branches.debris()
    branches.remove(found)
    held.close()
    assert branches.debris() == []
    assert not list(branches.host.names.iterdir())


def test_a_directory_without_contents_and_a_name_without_branch_are_swept(branches: Branches) -> None:
    make_ready(branches, "stays")
    (branches.host.branches / "0123456789").mkdir()
    (branches.host.names / "stale").symlink_to("../branches/gone")
    assert branches.debris() == []
    assert [path.name for path in branches.host.names.iterdir()] == ["stays"]
    assert not (branches.host.branches / "0123456789").exists()


def test_a_locked_branch_is_busy(branches: Branches) -> None:
    branch = make_ready(branches, "busy")
    with branches.lock(branch), pytest.raises(Unavailable, match="being worked on"):
        branches.lock(branch)
    branches.lock(branch).close()


def test_rename(branches: Branches) -> None:
    branch = make_ready(branches, "before")
    make_ready(branches, "other")
    with pytest.raises(UsageError, match="already exists"):
        branches.rename(branch, "other")
    branches.rename(branch, "after")
    assert branches.find("before") is None
    assert branches.get("after").id == branch.id


def test_an_unreadable_branch_is_named(branches: Branches) -> None:
    branch = make_ready(branches, "odd")
    (branches.directory(branch.id) / "branch.json").write_text('{"format": 99}')
    with pytest.raises(TimelineError, match=r"branch\.json cannot be read"):
        branches.get("odd")


def test_time_to_live_and_reboot() -> None:
    branch = LocalBranch("i", "n", READY, LAZY, 0, 100, durable=False, boot_id="a")
    assert branch.has_expired(100) and not branch.has_expired(99)
    assert branch.is_void("b") and not branch.is_void("a")
    assert not dataclasses.replace(branch, durable=True).is_void("b")


def test_socket_directories_are_short_whatever_the_state_directory(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 200)
    host = find_host({**os.environ, "TL_STATE": str(deep)})
    assert len(str(host.sockets / "0123456789")) <= SOCKET_DIRECTORY_BYTES
    assert host.cache == deep / "cache"


def test_a_branch_offered_while_somebody_sweeps_is_no_debris(
    branches: Branches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its maker lets go of it between the sweeper's look and the sweeper's lock."""
    branch, lock = branches.reserve("late", mode=LAZY, expires=None, durable=True)
    take = branches._try_lock

    def offered_meanwhile(directory: Path) -> object:
        branches.save(dataclasses.replace(branch, phase=READY))
        lock.close()
        return take(directory)

    monkeypatch.setattr(branches, "_try_lock", offered_meanwhile)
    assert branches.debris() == []
    monkeypatch.undo()
    assert branches.get("late").phase == READY
    branches.lock(branch).close()


def test_what_tries_the_file_system_is_no_debris(branches: Branches) -> None:
    """Others do so in the same directory at the same time."""
    make_ready(branches, "one")
    (branches.host.branches / ".probe.1").touch()
    (branches.host.branches / ".probe2.1").mkdir()
    assert branches.debris() == []
    assert {path.name for path in branches.host.branches.glob(".*")} == {".probe.1", ".probe2.1"}
    assert [branch.name for branch in branches.all()] == ["one"]
