"""Branches from a real archive: the whole path from store to first row, its life, its failures, its
isolation."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from restore import agent, mount_table, recovery
from restore.branch import HostBranches
from restore.branch_request import Listen, StoreAddress
from restore.isolation import isolate
from restore.local_branch import MAKING, READY
from restore.process import start_time
from restore.recovery import Recovery
from tests.support.archived_server import ArchivedServer, archived_server
from tests.support.branch_bench import Bench, running_bench, source_of_branches, value, wait_until
from tests.support.first_checkpoint import wait_for_first_checkpoint
from tests.support.postgres import PostgresServer, free_port, scratch
from timeline.catalog.when import AtLsn, AtTime, Latest
from timeline.clock import SystemClock
from timeline.errors import DamagedStore, TargetUnreachable, TimelineError, UsageError
from timeline.format.branch_state import Setting
from timeline.lsn import Lsn

pytestmark = pytest.mark.fuse
CLOCK = SystemClock()


@pytest.fixture(scope="module")
def source(
    make_postgres_session: Callable[..., PostgresServer], request: pytest.FixtureRequest
) -> Iterator[ArchivedServer]:
    """With some rows, and small segments."""
    server = make_postgres_session(getattr(request, "param", 15), initdb=["--wal-segsize=4"])
    with source_of_branches(server) as archived:
        yield archived


both_majors = pytest.mark.parametrize("source", [15, 18], indirect=True)


@pytest.fixture
def bench(source: ArchivedServer) -> Iterator[Bench]:
    """The branches of a test."""
    with running_bench(source) as made:
        yield made


def run(dsn: str, *statements: str, dbname: str = "postgres") -> None:
    with psycopg.connect(dsn, dbname=dbname, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


@both_majors
@pytest.mark.parametrize("mode", ["lazy", "copy"])
def test_a_branch_holds_exactly_what_was_before_t(bench: Bench, mode: str) -> None:
    """P6, P8: rows up to T, none after; writable; the source sees nothing of it."""
    server = bench.archived.server
    server.sql("create table d (n int)", "insert into d select generate_series(1, 2000)")
    at = bench.archived.position()
    server.sql("insert into d values (-1)")
    bench.archived.position()
    made = bench.create(name="one", when=AtLsn(at), mode=mode)
    assert (made.name, made.mode, made.parent, made.lsn, made.port) == ("one", mode, "main", at, 5432)
    assert made.next_commit_time is not None and made.last_commit_time is not None
    assert made.last_commit_time < made.next_commit_time
    assert made.replayed_bytes > 0 and made.requests > 0 and made.fetched_bytes > 0
    assert made.pid is not None and start_time(made.pid) is not None
    assert made.warnings == ()
    assert "password" not in made.dsn
    assert value(made, "select count(*) from d") == 2000
    assert value(made, "select count(*) from t") == 50000
    run(made.dsn, "delete from d where n > 10", "create table own as select 1", "checkpoint")
    assert value(made, "select count(*) from d") == 10
    assert server.value("select count(*) from d") == "2001"
    assert server.value("select count(*) from pg_class where relname = 'own'") == "0"
    server.sql("drop table d")


def test_moments_named_by_time(bench: Bench) -> None:
    """EDGE 35, 38, 55: T is just before the first later commit, by the source's own clock."""
    server = bench.archived.server
    server.sql("create table e (n int)")
    times = []
    for number in range(3):
        server.sql(f"insert into e values ({number})")
        times.append(int(server.value("select (extract(epoch from clock_timestamp()) * 1000000)::bigint")))
        time.sleep(0.02)
    bench.archived.position()
    made = bench.create(when=AtTime(times[1]))
    assert value(made, "select max(n) from e") == 1
    assert made.time == times[1]
    assert made.last_commit_time is not None and made.last_commit_time <= times[1]
    assert made.next_commit_time is not None and made.next_commit_time > times[1]
    assert made.expires is not None, "no name: it expires"
    server.sql("drop table e")


def test_latest_of_a_quiet_server_sealed_or_not(bench: Bench) -> None:
    """EDGE 58: the last byte of the durable tail; the same from packs."""
    bench.archived.position()
    before = value(bench.create(name="tail", when=Latest()), "select count(*) from t")
    bench.archived.seal()
    assert value(bench.create(name="sealed", when=Latest()), "select count(*) from t") == before


def test_a_name_is_a_name(bench: Bench) -> None:
    """EDGE 54: taken, reused, reset, invalid."""
    first = bench.create(name="named")
    run(first.dsn, "create table mark as select 1")
    with pytest.raises(UsageError, match="already exists"):
        bench.create(name="named")
    again = bench.create(name="named", if_exists="reuse")
    assert (again.id, again.pid) == (first.id, first.pid)
    reset = bench.create(name="named", if_exists="reset")
    assert reset.id != first.id
    assert value(reset, "select count(*) from pg_class where relname = 'mark'") == 0
    run(reset.dsn, "drop table t")
    undone = asyncio.run(bench.branches.reset("named"))
    assert (undone.name, undone.lsn) == ("named", reset.lsn) and undone.id != reset.id
    assert value(undone, "select count(*) from t") == 50000
    with pytest.raises(UsageError, match="no branch can take"):
        bench.create(name="main")
    bench.branches.rename("named", "renamed")
    assert [status.branch.name for status in bench.branches.list()] == ["renamed"]


def test_stop_crash_and_dead_mount(bench: Bench) -> None:
    """EDGE 51: after each of them `start` brings back what was committed."""
    made = bench.create(name="life")
    run(made.dsn, "create table kept (n int)", "insert into kept values (1)", "checkpoint")
    asyncio.run(bench.branches.stop("life"))
    assert bench.branches.status("life").state == "stopped"
    assert mount_table.find(made.data_directory) is None
    again = asyncio.run(bench.branches.start("life"))
    assert value(again, "select count(*) from kept") == 1
    assert asyncio.run(bench.branches.start("life")).pid == again.pid, "running already"

    run(again.dsn, "set synchronous_commit = on", "insert into kept values (2)")
    assert again.pid is not None
    os.kill(again.pid, signal.SIGKILL)
    wait_until(lambda: bench.branches.status("life").state == "broken")
    again = asyncio.run(bench.branches.start("life"))
    assert value(again, "select count(*) from kept") == 2

    run(again.dsn, "set synchronous_commit = on", "insert into kept values (3)")
    (mount,) = agent.mounts(bench.state)
    os.kill(mount.pid, signal.SIGKILL)
    wait_until(lambda: bench.branches.status("life").state == "broken")
    again = asyncio.run(bench.branches.start("life"))
    assert value(again, "select count(*) from kept") == 3


def test_a_crash_before_the_first_checkpoint_is_the_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EDGE 57: pages that were half written then could not be mended. Refused, whoever died; made again, it lives."""
    server = bench.archived.server
    server.sql("create table many as select g as n, repeat('x', 500) as pad from generate_series(1, 5000) g")
    bench.archived.position()
    # Spread over hours.
    slow = (Setting("checkpoint_completion_target", "0.9"), Setting("checkpoint_timeout", "1d"))
    whole = recovery.recovery_in_place
    monkeypatch.setattr(
        "restore.branch_make.recovery_in_place",
        lambda plan: Recovery((*whole(plan).options, *slow), promotes=True),
    )
    for victim in ("server", "mount"):
        made = bench.create(name=f"young-{victim}")
        run(made.dsn, "create table mine (n int)")
        (mount,) = agent.mounts(bench.state)
        assert made.pid is not None
        os.kill(made.pid if victim == "server" else mount.pid, signal.SIGKILL)
        wait_until(lambda: bench.branches.status(made.name).state == "broken")  # noqa: B023
        with pytest.raises(UsageError, match="before its first checkpoint") as refused:
            asyncio.run(bench.branches.start(made.name))
        assert refused.value.hint == f"make it again: tl reset {made.name}"
        again = asyncio.run(bench.branches.reset(made.name))
        assert value(again, "select count(*) from many") == 5000
        bench.delete(made.name)
    server.sql("drop table many")


def test_the_first_checkpoint_comes_by_itself(bench: Bench) -> None:
    """Nobody waits for it, and it does not take its time; from then on a crash costs nothing."""
    made = bench.create(name="grown")
    run(made.dsn, "set synchronous_commit = on", "create table mine as select 1 as n")
    wait_for_first_checkpoint(Path(made.data_directory), parent_tli=1, seconds=20)
    (mount,) = agent.mounts(bench.state)
    os.kill(mount.pid, signal.SIGKILL)
    wait_until(lambda: bench.branches.status("grown").state == "broken")
    assert value(asyncio.run(bench.branches.start("grown")), "select count(*) from mine") == 1


def test_a_reboot_ends_short_lives_only(bench: Bench) -> None:
    """An overlay written without fsync is void after a reboot; a durable branch starts again."""
    made = bench.create(name="durable")
    short = bench.create(name="short", ttl_seconds=3600)
    for name in ("durable", "short"):
        asyncio.run(bench.branches.stop(name))
    branches = bench.branches
    rebooted = HostBranches(dataclasses.replace(branches.host, boot_id="another boot"), CLOCK, os.environ)
    assert {each.branch.name: each.state for each in rebooted.list()} == {
        "durable": "stopped",
        "short": "void",
    }
    with pytest.raises(UsageError, match="restarted since"):
        asyncio.run(rebooted.start("short"))
    assert value(asyncio.run(rebooted.start("durable")), "select 1") == 1
    assert made.id != short.id


def test_protected_branches_stay_and_expired_ones_go(bench: Bench) -> None:
    for name in ("short", "stays"):
        # The agent was told of an hour: it does not do what this test does.
        bench.create(name=name, ttl_seconds=3600)
        branch = bench.branches.registry.get(name)
        bench.branches.registry.save(dataclasses.replace(branch, expires=1))
    bench.branches.protect("stays", protected=True)
    with pytest.raises(UsageError, match="protected"):
        bench.delete("stays")
    assert asyncio.run(bench.branches.expire()) == ("short",)
    assert [status.branch.name for status in bench.branches.list()] == ["stays"]


def test_listening_is_by_password(bench: Bench) -> None:
    """P8, EDGE 54: TCP only when asked for, with scram; the socket stays."""
    port = free_port()
    bench.archived.server.sql("create role guest login password 'swordfish'")
    bench.archived.position()
    made = bench.create(name="tcp", listen=Listen.parse(f"127.0.0.1:{port}"))
    assert made.dsn == f"postgresql://postgres@127.0.0.1:{port}/postgres"
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(made.dsn)
    with psycopg.connect(made.dsn, user="guest", password="swordfish") as connection:
        row = connection.execute("select current_user, inet_server_port()").fetchone()
        assert row == ("guest", port)
    server = bench.branches.registry.get("tcp").server
    assert server is not None
    assert value(f"host={server.sockets} port={port} user=postgres", "select 1") == 1
    with pytest.raises(UsageError, match="cannot listen"):
        bench.create(name="taken", listen=Listen.parse(f"127.0.0.1:{port}"))
    bench.archived.server.sql("drop role guest")


def test_failures_leave_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """P7, EDGE 54: before anything is made, with the mount standing, and with Postgres started."""
    with pytest.raises(TargetUnreachable):
        bench.create(when=AtLsn(Lsn.parse("FFFF/0")))
    with pytest.raises(UsageError, match="no library"):
        bench.create(preload=("no_such_library",))
    with monkeypatch.context() as patch:
        patch.setattr("restore.branch_make._READY_SECONDS", 0.0)
        patch.setattr("restore.branch_make._REPLAY_BYTES_PER_SECOND", 10**12)
        with pytest.raises(TimelineError, match="not ready within"):
            bench.create()
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise TimelineError("no")

        patch.setattr("restore.branch_make.check_promotion", refuse)
        with pytest.raises(TimelineError, match="no"):
            bench.create(mode="copy")
    bench.assert_nothing_left()


def test_without_fuse_it_is_a_copy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command, the same result, and one line on why; a large database is not copied unasked."""
    monkeypatch.setattr("restore.lazy_host._DEVICE", bench.root / "fuse")
    made = bench.create(name="plain")
    assert made.mode == "copy" and any("no /dev/fuse" in warning for warning in made.warnings)
    assert value(made, "select count(*) from t") == 50000
    with pytest.raises(UsageError, match="no lazy branch on this host"):
        bench.create(mode="lazy")
    monkeypatch.setattr("restore.branch_make.COPY_LIMIT_BYTES", 1 << 20)
    with pytest.raises(UsageError, match="a copy takes"):
        bench.create()


def test_a_full_disk_is_one_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """EDGE 51, 54."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr("restore.wal_files._write_at", full)
    with pytest.raises(TimelineError, match="/somewhere: No space left on device"):
        bench.create()
    bench.assert_nothing_left()


def test_a_damaged_pack_is_told_and_leaves_nothing(bench: Bench) -> None:
    """P5."""
    bench.archived.position()
    hurt = bench.root / "hurt"
    shutil.copytree(bench.archived.url, hurt)
    for pack in (hurt / "packs").rglob("*"):
        if pack.is_file():
            pack.chmod(0o640)
            data = bytearray(pack.read_bytes())
            data[len(data) // 2 : len(data) // 2 + 4096] = bytes(4096)
            pack.write_bytes(data)
    request = dataclasses.replace(bench.request(mode="copy"), store=StoreAddress(str(hurt)))
    with pytest.raises(DamagedStore):
        asyncio.run(bench.branches.create(request))
    bench.assert_nothing_left()


def test_cancelled_in_the_middle_it_leaves_nothing(bench: Bench) -> None:
    """Ctrl-C, wherever it comes."""

    async def cancel_after(seconds: float) -> None:
        task = asyncio.create_task(bench.branches.create(bench.request()))
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    for seconds in (0.05, 0.4):
        asyncio.run(cancel_after(seconds))
        for branch in bench.branches.registry.all():
            bench.delete(branch.name)
        bench.assert_nothing_left()


@pytest.mark.parametrize("moment", ["mounted", "recovering"])
def test_a_killed_maker_leaves_debris_that_is_swept(bench: Bench, moment: str) -> None:
    """EDGE 57: the first recovery's overlay is thrown away with its server and mount, and the name is
    free."""
    script = (
        "import asyncio, os, sys\n"
        "from restore import branch_make\n"
        "from restore.branch import HostBranches\n"
        "from restore.branch_request import BranchRequest, StoreAddress\n"
        "from timeline.clock import SystemClock\n"
        "async def hang(*args):\n"
        "    print('here', flush=True)\n"
        "    await asyncio.sleep(600)\n"
        f"if {moment!r} == 'mounted': branch_make.BranchMaker._recover = hang\n"
        "else: branch_make.isolate = hang\n"
        "branches = HostBranches.of(os.environ, SystemClock())\n"
        "asyncio.run(branches.create(BranchRequest(StoreAddress(sys.argv[1]), name='half')))\n"
    )
    environment = {**os.environ, "TL_STATE": str(bench.state), "PYTHONPATH": os.getcwd()}
    maker = subprocess.Popen(
        [sys.executable, "-c", script, bench.archived.url],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert maker.stdout is not None
    assert maker.stdout.readline() == "here\n"
    with pytest.raises(UsageError, match="already exists"):
        bench.create(name="half")
    maker.kill()
    maker.wait()
    maker.stdout.close()
    assert bench.branches.list() == ()
    assert bench.create(name="half").name == "half"
    bench.delete("half")
    bench.assert_nothing_left()


def test_the_store_is_only_read(bench: Bench) -> None:
    """P10: branches from a store that cannot be written to."""
    bench.archived.position()
    frozen = bench.root / "frozen"
    frozen.mkdir()
    if subprocess.run(["mount", "--bind", bench.archived.url, frozen], check=False).returncode != 0:
        pytest.skip("may not mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", frozen], check=True)
        request = dataclasses.replace(bench.request(name="ro"), store=StoreAddress(str(frozen)))
        made = asyncio.run(bench.branches.create(request))
        assert value(made, "select count(*) from t") == 50000
        bench.delete("ro")
    finally:
        subprocess.run(["umount", frozen], check=True)


@both_majors
def test_tablespaces_of_the_source_on_its_own_host(bench: Bench) -> None:
    """EDGE 49: one in the base backup, one from WAL; dropped on the branch, production keeps both."""
    server = bench.archived.server
    spots = [server.make_directory(scratch("tl-ts-") / name) for name in ("old", "new")]
    try:
        server.sql(f"create tablespace old location '{spots[0]}'")
        server.sql("create table in_old tablespace old as select generate_series(1, 3000) n")
        bench.archived.back_up()
        server.sql(f"create tablespace new location '{spots[1]}'")
        server.sql("create table in_new tablespace new as select generate_series(1, 3000) n", "checkpoint")
        bench.archived.position()
        before = sorted(str(path) for spot in spots for path in spot.rglob("*"))
        for mode in ("lazy", "copy"):
            made = bench.create(mode=mode)
            assert value(made, "select (select count(*) from in_old) + (select count(*) from in_new)") == 6000
            run(
                made.dsn,
                "drop table in_old, in_new",
                "checkpoint",
                "drop tablespace old",
                "drop tablespace new",
            )
            bench.delete(made.name)
        assert sorted(str(path) for spot in spots for path in spot.rglob("*")) == before
        assert server.value("select (select count(*) from in_old) + (select count(*) from in_new)") == "6000"
    finally:
        server.sql("drop table if exists in_old, in_new")
        server.sql("drop tablespace if exists old", "drop tablespace if exists new")
        for spot in spots:
            shutil.rmtree(spot.parent)


def test_nothing_can_come_in_before_the_branch_is_isolated(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P8, EDGE 56, 62: until then it is in no list, and its socket is in a directory that only its server
    may enter."""
    seen: list[tuple[int, tuple[object, ...], str]] = []

    async def look(data: Path, endpoint: object, *rest: object) -> tuple[str, ...]:
        sockets = Path(endpoint.sockets)  # type: ignore[attr-defined]
        (half,) = [each for each in bench.branches.registry._read_all() if each.phase != READY]
        seen.append((sockets.stat().st_mode & 0o777, bench.branches.list(), half.phase))
        return await isolate(data, endpoint, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("restore.branch_make.isolate", look)
    bench.create(name="late")
    assert seen == [(0o700, (), MAKING)]


def test_the_branch_of_a_promoted_server(make_postgres: Callable[..., PostgresServer]) -> None:
    """EDGE 17, 20: a snapshot of tli 1, T on tli 2; and T on the line's first part."""
    root = scratch("tl-pr-")
    server = make_postgres(15, initdb=["--wal-segsize=1"])
    server.sql("create table t as select generate_series(1, 1000) n")
    archived = ArchivedServer(server, str(root / "store"))
    try:
        with archived_server(server, root / "store") as archived:
            first = archived.position()
            server.sql("insert into t values (-1)")
            archived.position()
            server.stop()
        (server.data / "standby.signal").touch()
        server.start()
        server.tool("pg_ctl", "-D", str(server.data), "-w", "promote")
        with archived.archiving():
            server.sql("insert into t values (-2)")
            second = archived.position()
            assert server.value("select timeline_id from pg_control_checkpoint()") in ("1", "2")
            bench = Bench(root, archived)
            made = bench.create(name="second", when=AtLsn(second))
            assert value(made, "select count(*) from t where n < 0") == 2
            history = bench.state / "branches" / made.id / "wal" / "00000003.history"
            assert re.search(r"^2\t", history.read_text(), re.MULTILINE)
            assert value(bench.create(name="first", when=AtLsn(first)), "select min(n) from t") == 1
            for name in ("first", "second"):
                bench.delete(name)
            bench.assert_nothing_left()
    finally:
        shutil.rmtree(root)


def test_a_branch_that_nobody_uses_is_stopped(bench: Bench) -> None:
    """Connected clients and short visits between two looks put it off; its data stays; a start begins anew."""
    clock = SkippingClock()
    branches = HostBranches.of({**os.environ, "TL_STATE": str(bench.root / "state")}, clock)
    made = asyncio.run(branches.create(bench.request(name="idle", stop_when_idle_seconds=600)))

    def later(seconds: int) -> tuple[str, ...]:
        clock.skipped += seconds * 1_000_000
        return asyncio.run(branches.stop_idle())

    assert later(100) == (), "too early to look"
    with psycopg.connect(made.dsn) as connection:
        assert later(200) == later(700) == ()
        connection.execute("create table mine ()")
    assert later(200) == (), "somebody has been there"
    assert later(500) == (), "from here on it is quiet"
    run(made.dsn, "select 1")
    assert later(500) == (), "a short visit"
    assert later(500) == ()
    assert later(200) == ("idle",)
    assert branches.status("idle").state == "stopped"
    assert later(5000) == ()
    again = asyncio.run(branches.start("idle"))
    assert value(again, "select count(*) from mine") == 0
    assert later(300) == ()
    assert asyncio.run(branches.reset("idle")).name == "idle"
    idle = branches.registry.get("idle").idle
    assert idle is not None and idle.after_seconds == 600
    with pytest.raises(UsageError, match="60 s"):
        bench.create(stop_when_idle_seconds=5)


class SkippingClock(SystemClock):
    """Whose wall clock can be put forward."""

    skipped = 0

    def now(self) -> int:
        return super().now() + self.skipped
