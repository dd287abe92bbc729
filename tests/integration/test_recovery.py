"""A plain backup and the server's WAL become a branch: recovery stops exactly at T, nothing reaches out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg
import pytest

from restore.binaries import Binaries
from restore.compute import Instance, Postmaster, kill, launch, promoted_at, stop
from restore.data_files import PlainDirectory, lay_out
from restore.host import Host, find_host
from restore.host_support import host_support
from restore.icu_memory import IcuMemory
from restore.isolation import Endpoint, isolate
from restore.plan import RECOVERY_SIGNAL, STANDBY_SIGNAL, BranchPlan, bounds_as_of
from restore.recovery import recovery_from_feed, recovery_in_place, signal_file
from restore.settings import branch_settings
from restore.wal_files import Feed, feed_wal, write_histories, write_wal
from tests.support.plain_backup import PlainBackup, take_backup
from tests.support.postgres import PostgresServer, scratch
from timeline.clock import SystemClock
from timeline.errors import TimelineError
from timeline.format.branch_state import Setting
from timeline.format.wal_index import EventKind
from timeline.lsn import Lsn
from timeline.pg.control import CONTROL_FILE, parse_control

CLOCK = SystemClock()
SOURCE_SETTINGS = {"wal_keep_size": "1GB", "wal_level": "logical", "max_prepared_transactions": "7"}


@dataclasses.dataclass
class PlainBranch:
    """A branch in an ordinary directory."""

    root: Path
    host: Host
    instance: Instance
    plan: BranchPlan
    postmaster: Postmaster | None = None

    @property
    def wal(self) -> Path:
        return self.root / "wal"

    def connect(self, dbname: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(host=str(self.root / "s"), user="postgres", dbname=dbname, autocommit=True)

    def value(self, query: str, dbname: str = "postgres") -> object:
        with self.connect(dbname) as connection:
            row = connection.execute(query).fetchone()
            assert row is not None
            return row[0]


def prepare(backup: PlainBackup, lsn: Lsn, *, preload: Sequence[str] = ()) -> PlainBranch:
    """Everything but the WAL and the start."""
    host = find_host(os.environ)
    root = scratch("tl-br-")
    plan = backup.plan(lsn)
    shutil.copytree(backup.directory, root / "data", symlinks=True)
    for path in [root / "data", *(root / "data").rglob("*")]:
        host.own(path)
    (root / "data").chmod(0o700)
    host.make_private(root / "wal")
    host.make_private(root / "s")
    binaries = Binaries(backup.server.major, backup.server.bin)
    settings = branch_settings(
        backup.server.major,
        backup.snapshot.settings,
        bounds_as_of(parse_control((root / "data" / CONTROL_FILE).read_bytes()), plan.events),
        host_support(binaries),
        name="test",
        sockets=str(root / "s"),
        port=5432,
        preload=preload,
    )
    lay_out(PlainDirectory(root / "data", host), plan, settings, root / "wal", signal=signal_file(plan))
    write_histories(plan, root / "wal", host)
    return PlainBranch(root, host, Instance(host, binaries, root / "data", root / "postgres.log"), plan)


async def recover(branch: PlainBranch, backup: PlainBackup, *, feeding: bool = False) -> None:
    """Bring the WAL in, one way or the other, and start."""
    creates = [event.start for event in backup.scan(branch.plan.lsn).events
               if event.kind is EventKind.TABLESPACE_CREATE]  # fmt: skip
    feeder = None
    recovery = recovery_in_place(branch.plan)
    if feeding:
        feed = Feed(branch.root / "feed")
        feed.create(branch.host)
        recovery = recovery_from_feed(branch.plan, feed.restore_command)
        (branch.instance.data / STANDBY_SIGNAL).rename(branch.instance.data / RECOVERY_SIGNAL)
        feeder = asyncio.create_task(
            feed_wal(branch.plan, backup.read, feed, branch.host, CLOCK, creates=creates)
        )
    else:
        await write_wal(branch.plan, backup.read, branch.wal, branch.host, creates=creates)
    starting = launch(branch.instance, options=recovery.options, promotes=recovery.promotes)
    branch.postmaster = await starting.wait(CLOCK, ready_seconds=60)
    if feeder is not None:
        await feeder


def started_again(branch: PlainBranch) -> Postmaster:
    """Its server, once more."""
    return asyncio.run(launch(branch.instance).wait(CLOCK, ready_seconds=30))


@contextlib.contextmanager
def branch_at(
    backup: PlainBackup, lsn: Lsn, *, feeding: bool = False, preload: Sequence[str] = ()
) -> Iterator[PlainBranch]:
    """A running branch, removed at the end."""
    branch = prepare(backup, lsn, preload=preload)
    try:
        asyncio.run(recover(branch, backup, feeding=feeding))
        yield branch
    finally:
        if branch.postmaster is not None:
            asyncio.run(kill(branch.postmaster, CLOCK))
        shutil.rmtree(branch.root)


def position(server: PostgresServer) -> Lsn:
    """The end of the server's WAL, flushed."""
    return Lsn.parse(server.position())


def isolated(branch: PlainBranch, endpoint: Endpoint, backup: PlainBackup) -> tuple[str, ...]:
    """The isolation step's warnings."""
    instance = branch.instance
    memory = IcuMemory(branch.root)
    return asyncio.run(isolate(instance.data, endpoint, instance.binaries, backup.incarnation, memory))


@pytest.fixture(scope="module")
def source(
    make_postgres_session: Callable[..., PostgresServer], request: pytest.FixtureRequest
) -> Iterator[tuple[PostgresServer, PlainBackup]]:
    """A server and a backup of it; what a test makes there it also removes."""
    server = make_postgres_session(
        getattr(request, "param", 15), settings=SOURCE_SETTINGS, initdb=["--wal-segsize=1"]
    )
    server.sql("create table t (n int)", "insert into t select generate_series(1, 1000)", "checkpoint")
    directory = scratch("tl-bb-")
    yield server, take_backup(server, directory / "base")
    server.stop("immediate")
    shutil.rmtree(directory)


both_majors = pytest.mark.parametrize("source", [15, 18], indirect=True)


@both_majors
@pytest.mark.parametrize("feeding", [False, True], ids=["whole", "feed"])
def test_stops_exactly_at_t(source: tuple[PostgresServer, PlainBackup], feeding: bool) -> None:
    """P6, P8, EDGE 17, 25: T is where the new tli begins, what came later is not there."""
    server, backup = source
    server.sql("create table later as select generate_series(1, 60000) n")
    at = position(server)
    server.sql("insert into later values (-1)")
    with branch_at(backup, at, feeding=feeding) as branch:
        assert branch.value("select count(*) from later") == 60000
        assert branch.value("select pg_is_in_recovery()") is False
        tli, left = promoted_at(branch.instance.data, branch.wal)
        assert (tli, left) == (2, at)
        branch.value("with i as (insert into later values (-2) returning 1) select * from i")
    assert server.value("select count(*) from later where n < 0") == "1"
    server.sql("drop table later")


def test_nothing_to_replay_but_the_end_of_the_backup(source: tuple[PostgresServer, PlainBackup]) -> None:
    """EDGE 58: T is the very end of the backup."""
    _, backup = source
    with branch_at(backup, backup.snapshot.end) as branch:
        assert branch.value("select count(*) from t") == 1000


def test_isolated_from_everything_the_source_is_set_to(make_postgres: Callable[..., PostgresServer]) -> None:
    """P8, EDGE 22, 45, 46: archiver, walreceiver, synchronous standbys, ALTER SYSTEM and libraries stay
    behind."""
    marker = scratch("tl-marker-")
    server = make_postgres(
        15,
        settings={
            **SOURCE_SETTINGS,
            "archive_mode": "on",
            "archive_command": f"'touch {marker}/%f'",
            "shared_preload_libraries": "pg_stat_statements",
            "primary_conninfo": "'host=127.0.0.1 port=1'",
            "track_commit_timestamp": "on",
            "timezone": "'Europe/Berlin'",
        },
    )
    directory = scratch("tl-bb-")
    try:
        server.sql(
            "alter system set archive_timeout = '1s'",
            "alter system set work_mem = '7MB'",
            "select pg_reload_conf()",
            "select pg_create_physical_replication_slot('standby', true)",
            "create table t (n int)",
        )
        backup = take_backup(server, directory / "base")
        server.sql("begin; insert into t values (1); prepare transaction 'open'")
        # On the branch a commit would wait for ever, were the setting to survive.
        server.sql("alter system set synchronous_standby_names = 'nobody'")
        at = position(server)
        server.sql("select pg_switch_wal()")
        server.stop()
        before = sorted(path.name for path in marker.iterdir())
        with branch_at(backup, at) as branch:
            shown = {
                str(name): str(branch.value(f"show {name}"))
                for name in (
                    "archive_mode", "archive_command", "primary_conninfo", "synchronous_standby_names",
                    "shared_preload_libraries", "max_logical_replication_workers", "listen_addresses",
                    "track_commit_timestamp", "max_prepared_transactions", "fsync", "synchronous_commit",
                )
            }  # fmt: skip
            assert shown == {
                "archive_mode": "off",
                "archive_command": "(disabled)",
                "primary_conninfo": "",
                "synchronous_standby_names": "",
                "shared_preload_libraries": "",
                "max_logical_replication_workers": "0",
                "listen_addresses": "",
                "track_commit_timestamp": "on",
                "max_prepared_transactions": "7",
                "fsync": "on",
                "synchronous_commit": "off",
            }
            assert branch.value("show timezone") == "Europe/Berlin"
            assert branch.value("show work_mem") == "7MB"
            branch.value("select 1 from pg_switch_wal()")
            with branch.connect() as connection:
                connection.execute("commit prepared 'open'")
            assert branch.value("select count(*) from t") == 1
            assert branch.value("select count(*) from pg_replication_slots") == 0
            backends = branch.value("select string_agg(distinct backend_type, ',') from pg_stat_activity")
            assert "archiver" not in str(backends) and "logical" not in str(backends)
            assert (branch.instance.data / "postgresql.auto.conf").read_bytes() == b""
        assert sorted(path.name for path in marker.iterdir()) == before
    finally:
        shutil.rmtree(directory)
        shutil.rmtree(marker)


@both_majors
def test_tablespace_made_after_the_snapshot(source: tuple[PostgresServer, PlainBackup]) -> None:
    """EDGE 49, on the source's own host: the branch drops table and tablespace, production keeps both."""
    server, backup = source
    spot = server.make_directory(scratch("tl-ts-") / "space")
    try:
        server.sql("create table pad as select repeat('x', 500) from generate_series(1, 3000)")
        server.sql(f"create tablespace ts location '{spot}'")
        server.sql("create table kept tablespace ts as select generate_series(1, 5000) n", "checkpoint")
        files = sorted(str(path) for path in spot.rglob("*"))
        for feeding in (False, True):
            with branch_at(backup, position(server), feeding=feeding) as branch:
                assert branch.value("select count(*) from kept") == 5000
                spot_on_branch = branch.value(
                    "select pg_tablespace_location(oid) from pg_tablespace where spcname = 'ts'"
                )
                assert str(spot) not in str(spot_on_branch)
                with branch.connect() as connection:
                    connection.execute("drop table kept")
                    connection.execute("checkpoint")
                    connection.execute("drop tablespace ts")
                assert not any(path.is_symlink() for path in (branch.instance.data / "pg_tblspc").iterdir())
        assert sorted(str(path) for path in spot.rglob("*")) == files
        assert server.value("select count(*) from kept") == "5000"
    finally:
        server.sql("drop table if exists kept, pad", "drop tablespace if exists ts")
        shutil.rmtree(spot.parent)


@both_majors
def test_subscriptions_cannot_touch_the_publisher(source: tuple[PostgresServer, PlainBackup]) -> None:
    """EDGE 62, P8: DROP SUBSCRIPTION on the branch leaves production's slot alone."""
    server, backup = source
    server.sql("create database other", "create publication p for all tables")
    server.sql("select pg_create_logical_replication_slot('sub', 'pgoutput')")
    server.sql(
        "create extension postgres_fdw",
        "create server far foreign data wrapper postgres_fdw",
        "create user mapping for postgres server far options (password 'secret')",
        "create table t (n int)",
        dbname="other",
    )
    server.sql(
        f"create subscription sub connection '{server.conninfo}' publication p "
        "with (create_slot = false, copy_data = false)",
        dbname="other",
    )
    with branch_at(backup, position(server)) as branch:
        endpoint = Endpoint(str(branch.root / "s"), 5432, "postgres")
        warnings = isolated(branch, endpoint, backup)
        assert any("subscription 'sub'" in text for text in warnings)
        assert any("'far'" in text and "postgres_fdw" in text for text in warnings)
        assert not any("secret" in text for text in warnings)
        assert branch.value("select count(*) from pg_subscription where subenabled") == 0
        with branch.connect("other") as connection:
            connection.execute("drop subscription sub")
    assert server.value("select count(*) from pg_replication_slots where slot_name = 'sub'") == "1"
    server.sql("alter subscription sub disable", "drop subscription sub", dbname="other")
    server.sql("drop database other", "drop publication p")


def test_no_connection_where_nothing_leads_out(source: tuple[PostgresServer, PlainBackup]) -> None:
    """A branch without subscriptions and foreign servers is not connected to."""
    _, backup = source
    with branch_at(backup, backup.snapshot.end) as branch:
        nobody = Endpoint("/nonexistent", 1, "nobody")
        assert isolated(branch, nobody, backup) == ()


def test_other_collation_versions_are_told_per_database(source: tuple[PostgresServer, PlainBackup]) -> None:
    """EDGE 47: a source with another libc, of whose databases one was made under a version that is not here."""
    server, backup = source
    icu = "template template0 encoding 'UTF8' locale 'C' locale_provider icu icu_locale 'en-US'"
    server.sql(f"create database sorted {icu}", f"create database unsorted {icu}")
    server.sql("update pg_database set datcollversion = '1.0' where datname = 'sorted'")
    try:
        with branch_at(backup, position(server)) as branch:
            endpoint = Endpoint(str(branch.root / "s"), 5432, "postgres")
            elsewhere = dataclasses.replace(backup.incarnation, libc_version="1.0")
            warnings = isolated(branch, endpoint, dataclasses.replace(backup, incarnation=elsewhere))
    finally:
        server.sql("drop database sorted", "drop database unsorted")
    [told] = [text for text in warnings if "collation version" in text]
    assert "'sorted'" in told
    assert "on the source 1.0" in told


def test_failure_says_why_and_leaves_no_process(source: tuple[PostgresServer, PlainBackup]) -> None:
    """A target that is never reached is Postgres's own FATAL, in one line (P7)."""
    _, backup = source
    branch = prepare(backup, backup.snapshot.end)
    try:
        beyond = Setting("recovery_target_lsn", "F/0")
        branch.plan = dataclasses.replace(branch.plan, recovery=(*branch.plan.recovery, beyond))
        with pytest.raises(TimelineError, match="recovery ended before configured recovery target"):
            asyncio.run(recover(branch, backup, feeding=True))
        assert not (branch.instance.data / "postmaster.pid").exists()
    finally:
        shutil.rmtree(branch.root)


def test_stop_and_start_again(source: tuple[PostgresServer, PlainBackup]) -> None:
    """EDGE 51: an orderly stop and a crash both come back with what was committed and checkpointed."""
    _, backup = source
    with branch_at(backup, backup.snapshot.end) as branch:
        assert branch.postmaster is not None
        branch.value("with i as (insert into t values (-2) returning 1) select * from i")
        asyncio.run(stop(branch.postmaster, CLOCK, seconds=30))
        branch.postmaster = started_again(branch)
        assert branch.value("select count(*) from t") == 1001
        asyncio.run(kill(branch.postmaster, CLOCK))
        branch.postmaster = started_again(branch)
        assert branch.value("select count(*) from t") == 1001
