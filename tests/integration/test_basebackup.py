"""Base backups of real servers: what is stored is what the server has, and Postgres starts from it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fix_stores import BUCKET, fresh_prefix
from tests.support.counting_store import CountingStore
from tests.support.postgres import PostgresServer, bin_dir, free_port, scratch
from tests.support.seaweed import Seaweed
from tests.support.snapshot_files import (
    begin_branch,
    read_files,
    read_listing,
    read_manifest,
    write_data_directory,
)
from timeline.archive.basebackup import BackupOptions, BackupReport, BackupStatus, take_base_backup
from timeline.archive.boot_set import BOOT_BYTES
from timeline.catalog.branch_log import BranchLog
from timeline.clock import SystemClock
from timeline.errors import CheckFailed, Unavailable, UsageError
from timeline.format import keys
from timeline.format.branch_state import BASE, BranchState, Snapshot
from timeline.format.log_change import RecordProgress
from timeline.lsn import Lsn
from timeline.pg.backup_label import parse_backup_label
from timeline.store.base import Store
from timeline.store.local import LocalStore
from timeline.store.memory import MemoryStore
from timeline.store.s3 import S3Store

CLOCK = SystemClock()
FAST = BackupOptions(fast_checkpoint=True)
EMPTIED = (
    "pg_wal/",
    "pg_replslot/",
    "pg_stat_tmp/",
    "pg_notify/",
    "pg_subtrans/",
    "pg_dynshmem/",
    "pg_serial/",
)
QUIET = {"autovacuum": "off", "checkpoint_timeout": "1h", "bgwriter_lru_maxpages": "0"}


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory the server user may enter."""
    path = scratch("tl-bb-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


async def begun(server: PostgresServer, store: Store) -> BranchLog:
    return await begin_branch(server, store, CLOCK)


async def state_of(log: BranchLog) -> BranchState:
    head = await log.load()
    assert head is not None
    return head.state


def back_up(server: PostgresServer, store: Store, options: BackupOptions = FAST) -> BackupReport:
    """A first base backup into a new store."""

    async def run() -> BackupReport:
        log = await begun(server, store)
        return await take_base_backup(server.conninfo, store, log, CLOCK, options=options)

    return asyncio.run(run())


def again(server: PostgresServer, store: Store, options: BackupOptions = FAST) -> BackupReport:
    """Another base backup into the same store."""

    async def run() -> BackupReport:
        log = BranchLog(store, "main", CLOCK, CLOCK.token(8))
        return await take_base_backup(server.conninfo, store, log, CLOCK, options=options)

    return asyncio.run(run())


@contextlib.contextmanager
def started_from(
    store: Store, snapshot: Snapshot, source: PostgresServer, directory: Path
) -> Iterator[PostgresServer]:
    """Stock Postgres, recovered from the snapshot and the source's own WAL files."""
    copy = PostgresServer(source.major, directory, port=free_port())
    copy.make_directory(directory)
    asyncio.run(write_data_directory(store, snapshot, copy.data, source.data / "pg_wal"))
    copy.configure({"port": str(copy.port), "unix_socket_directories": f"'{copy.sockets}'"})
    copy.configure({"allow_in_place_tablespaces": "on"})
    try:
        copy.start()
        yield copy
    finally:
        copy.stop("immediate")


def files_of(server: PostgresServer) -> dict[str, bytes]:
    """Path → content of what a backup of the server should hold, tablespaces in place."""
    found = {}
    for root, _, names in os.walk(server.data, followlinks=True):
        for name in names:
            path = Path(root) / name
            found[str(path.relative_to(server.data))] = path.read_bytes()
    return {
        path: content
        for path, content in found.items()
        if not path.startswith(EMPTIED)
        and not path.startswith("postmaster.")
        and "pg_internal.init" not in path
    }


def test_every_byte_arrives_and_postgres_starts_from_it(
    make_postgres: Callable[..., PostgresServer], directory: Path, major: int
) -> None:
    """Odd sizes, empty files, tablespaces, unlogged and temporary relations (EDGE 29), label and control
    file."""
    server = make_postgres(major, settings=QUIET)
    server.stop()
    shutil.move(server.data / "pg_wal", server.directory / "wal")
    (server.data / "pg_wal").symlink_to(server.directory / "wal")
    server.start()
    space = server.make_directory(server.directory / "space")
    server.sql(
        f"create tablespace elsewhere location '{space}'",
        "create table plain as select i, md5(i::text) as t from generate_series(1, 40000) i",
        "create table far tablespace elsewhere as select i from generate_series(1, 5000) i",
        "create table nothing (a int)",
        "create unlogged table unlogged as select i from generate_series(1, 1000) i",
        "create database other",
    )
    unlogged = server.value("select pg_relation_filepath('unlogged')")
    (server.data / "odd").write_bytes(os.urandom(3 * 131072 + 5000))
    (server.data / "one_group").write_bytes(os.urandom(131072))
    (server.data / "small").write_bytes(b"x" * 1024)
    (server.data / "zeros").write_bytes(bytes(1 << 20))
    (server.data / "standby.signal.d").mkdir()
    store = LocalStore(directory / "store")
    with server.connect() as session:
        session.execute("create temporary table temporary as select i from generate_series(1, 1000) i")
        temporary = session.execute("select pg_relation_filepath('temporary')").fetchone()
        session.execute("checkpoint")
        statuses: list[BackupStatus] = []

        async def run() -> BackupReport:
            log = await begun(server, store)
            return await take_base_backup(
                server.conninfo, store, log, CLOCK, options=FAST, on_status=statuses.append
            )

        report = asyncio.run(run())
        expected = files_of(server)
    snapshot = report.snapshot
    stored = asyncio.run(read_files(store, snapshot))

    assert temporary is not None and str(temporary[0]) in expected
    assert unlogged in expected and f"{unlogged}_init" in stored
    left_out = {path for path in expected if path not in stored}
    assert left_out == {path for path in expected if path == temporary[0] or path.startswith(unlogged)} - {
        f"{unlogged}_init"
    }
    assert not set(stored) - set(expected)
    differing = {path for path in stored if stored[path] != expected[path]}
    assert differing <= {"global/pg_control"}
    assert snapshot.bytes == sum(map(len, stored.values()))
    listing = asyncio.run(read_listing(store, snapshot))
    kinds = {row.path: row.kind for row in listing}
    assert all(
        kinds[path] == "d" for path in ("pg_wal", "pg_wal/archive_status", "pg_replslot", "pg_subtrans")
    )
    tablespace = snapshot.tablespaces[0]
    assert tablespace.source_path == str(space) and kinds[f"pg_tblspc/{tablespace.oid}"] == "d"
    small = listing.get("small")
    assert small is not None and small.content == b"x" * 1024

    assert snapshot.kind == BASE and snapshot.backup_label is not None
    label = parse_backup_label(snapshot.backup_label)
    assert (snapshot.lsn, snapshot.checkpoint, snapshot.tli) == (label.start, label.checkpoint, label.tli)
    assert snapshot.end > snapshot.lsn
    assert abs(snapshot.time - time.time_ns() // 1000) < 60_000_000
    settings = {setting.name: setting.value for setting in snapshot.settings}
    assert settings["max_prepared_transactions"] == "10" and settings["wal_level"] == "replica"
    assert settings["default_text_search_config"] == "pg_catalog.english"
    assert report.differences is None and report.checksum_failures == 0
    assert statuses[0].phase == "checkpoint"
    assert statuses[-1].phase == "finish" and statuses[-1].bytes_done == report.read_bytes
    total = statuses[-1].bytes_total
    assert total is not None and 0.9 < report.read_bytes / total <= 1.1

    server.sql("create table later (a int)")
    with started_from(store, snapshot, server, directory / "copy") as copy:
        assert copy.value("select count(*) || max(t) from plain") == server.value(
            "select count(*) || max(t) from plain"
        )
        assert copy.value("select sum(i) from far") == str(5000 * 5001 // 2)
        assert copy.value("select count(*) from unlogged") == "0"
        copy.sql("insert into unlogged values (1)", "insert into far values (1)")
        assert (copy.data / "pg_tblspc" / str(tablespace.oid)).is_dir()
        assert not (copy.data / "pg_tblspc" / str(tablespace.oid)).is_symlink()


def test_boot_set_is_one_small_pack(each_postgres: PostgresServer, directory: Path) -> None:
    each_postgres.sql("create database app", "create table bulk as select generate_series(1, 20000) i")
    store = LocalStore(directory / "store")
    snapshot = back_up(each_postgres, store).snapshot
    assert snapshot.boot is not None

    boot = asyncio.run(read_manifest(store, snapshot.boot))
    pages = {(row.path, row.group): row for row in asyncio.run(read_manifest(store, snapshot.pages[0]))}
    assert all(pages[row.path, row.group] == row for row in boot)
    assert len({row.extent.pack for row in boot}) == 1
    pack = asyncio.run(store.get(keys.pack(boot[0].extent.pack)))
    assert len(pack) < BOOT_BYTES
    assert {
        row.extent.pack for key, row in pages.items() if key not in {(b.path, b.group) for b in boot}
    }.isdisjoint({boot[0].extent.pack})
    app = each_postgres.value("select oid from pg_database where datname = 'app'")
    paths = {row.path for row in boot}
    assert {f"base/{app}/1249", f"base/{app}/1259", "global/1262", "pg_xact/0000"} <= paths
    bulk = each_postgres.value("select pg_relation_filepath('bulk')")
    assert bulk not in paths and (bulk, 0) in pages
    template = each_postgres.value("select oid from pg_database where datname = 'template0'")
    assert not any(path.startswith(f"base/{template}/") for path in paths)


def test_backup_during_writes_recovers(each_postgres: PostgresServer, directory: Path) -> None:
    """EDGE 30: pages copied while they are written are mended by the WAL up to the backup's end."""
    server = each_postgres
    bench = ("-h", str(server.sockets), "-p", str(server.port), "-U", "postgres", "postgres")
    server.tool("pgbench", "-i", "-q", "-s", "3", *bench)
    load = subprocess.Popen(
        [str(server.bin / "pgbench"), "-n", "-c", "2", "-T", "60", *bench],
        env=server.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    store = LocalStore(directory / "store")
    try:
        slow = BackupOptions(fast_checkpoint=True, rate_bytes_per_second=32 << 20)
        snapshot = back_up(server, store, slow).snapshot
    finally:
        load.kill()
        load.wait()
    server.sql("select pg_switch_wal()")
    with started_from(store, snapshot, server, directory / "copy") as copy:
        sums = "select sum(abalance) = (select sum(bbalance) from pgbench_branches) from pgbench_accounts"
        assert copy.value(sums) == "True"
        copy.sql("create extension amcheck")
        copy.sql(
            "select bt_index_check(c.oid, true)"
            " from pg_class c join pg_am a on a.oid = relam where amname = 'btree'"
        )


def test_killed_backup_goes_on_with_what_was_uploaded(postgres: PostgresServer, directory: Path) -> None:
    postgres.sql(
        "create table noise as"
        " select i, (select string_agg(md5((i * 64 + j)::text), '') from generate_series(1, 64) j) n"
        " from generate_series(1, 12000) i"
    )
    local = LocalStore(directory / "store")
    log = asyncio.run(begun(postgres, local))
    arguments = [str(directory / "store"), postgres.conninfo, str(8 << 20), str(1 << 20)]
    process = subprocess.Popen([sys.executable, "-m", "tests.support.backup_process", *arguments])
    pinned = 0
    deadline = time.monotonic() + 60
    while pinned < 6 << 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
        progress = asyncio.run(state_of(log)).progress
        pinned = progress.bytes if progress is not None else 0
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not asyncio.run(state_of(log)).snapshots

    counting = CountingStore(LocalStore(directory / "store"))
    report = again(postgres, counting)
    assert report.resumed and report.groups_resumed > 0
    uploaded = counting.created_bytes("packs/")
    state = asyncio.run(state_of(log))
    assert state.progress is None and state.snapshots == (report.snapshot,)
    with started_from(local, report.snapshot, postgres, directory / "copy") as copy:
        query = "select count(*) || md5(string_agg(n, '' order by i)) from noise"
        assert copy.value(query) == postgres.value(query)
    whole = back_up(postgres, MemoryStore()).uploaded_bytes
    assert uploaded == report.uploaded_bytes
    assert uploaded <= whole - pinned + (1 << 20)


def test_second_backup_uploads_and_reports_differences(
    make_postgres: Callable[..., PostgresServer], directory: Path, major: int
) -> None:
    server = make_postgres(major, settings=QUIET)
    server.sql(
        "create table stays as select i, md5(i::text) t from generate_series(1, 60000) i",
        "create table changes as select i, md5(i::text) t from generate_series(1, 60000) i",
        "create table goes as select i from generate_series(1, 10000) i",
        "vacuum",
        "checkpoint",
    )
    store = LocalStore(directory / "store")
    first = back_up(server, store)
    paths = {
        name: server.value(f"select pg_relation_filepath('{name}')") for name in ("stays", "changes", "goes")
    }

    counting = CountingStore(store)
    idle = again(server, counting)
    assert idle.groups_uploaded == 0 and counting.created_bytes("packs/") == 0
    assert idle.groups_reused == idle.groups
    assert idle.differences is not None
    assert idle.differences.snapshot == first.snapshot.id
    assert (idle.differences.files_changed, idle.differences.groups_changed, idle.differences.listed) == (
        0,
        0,
        (),
    )
    # The manifest is one of its own, its extents are those of the first.
    assert idle.snapshot.boot is not None and first.snapshot.boot is not None
    assert idle.snapshot.boot.rows == first.snapshot.boot.rows

    server.sql(
        "update changes set t = 'x' where i between 100 and 200",
        "drop table goes",
        "create table comes as select i from generate_series(1, 10000) i",
        "checkpoint",
    )
    paths["comes"] = server.value("select pg_relation_filepath('comes')")
    counting = CountingStore(store)
    second = again(server, counting)
    assert second.differences is not None
    listed = {difference.path: difference for difference in second.differences.listed}
    assert listed[paths["comes"]].kind == "added"
    assert listed[paths["goes"]].kind == "removed"
    changed = listed[paths["changes"]]
    assert changed.kind == "changed" and 0 < changed.changed < changed.groups
    assert changed.unexplained == 0
    assert paths["stays"] not in listed
    assert 0 < second.groups_uploaded < second.groups // 3
    assert counting.created_bytes("packs/") == second.uploaded_bytes < first.uploaded_bytes // 2
    assert asyncio.run(read_files(store, second.snapshot)).keys() >= {paths["comes"], paths["stays"]}
    with started_from(store, second.snapshot, server, directory / "copy") as copy:
        assert copy.value("select count(*) from changes where t = 'x'") == "101"
        assert copy.value("select count(*) from stays") == "60000"


def test_broken_pages_are_refused_unless_allowed(
    make_postgres: Callable[..., PostgresServer], directory: Path, major: int
) -> None:
    """EDGE 30: the server's verdict is ours."""
    server = make_postgres(major, initdb=["--data-checksums"], settings=QUIET)
    server.sql(
        "create table broken as select i, md5(i::text) t from generate_series(1, 20000) i", "checkpoint"
    )
    path = server.data / server.value("select pg_relation_filepath('broken')")
    store = LocalStore(directory / "store")
    server.stop()
    with path.open("r+b") as file:
        for block in (3, 20):
            file.seek(block * 8192 + 5000)
            file.write(b"\xde\xad\xbe\xef")
    server.start()

    with pytest.raises(CheckFailed, match=r"2 pages with wrong checksums.*block 3"):
        back_up(server, store)
    log = BranchLog(store, "main", CLOCK, CLOCK.token(8))
    state = asyncio.run(state_of(log))
    assert not state.snapshots and state.progress is not None

    counting = CountingStore(store)
    report = again(server, counting, BackupOptions(fast_checkpoint=True, allow_checksum_failures=True))
    assert report.checksum_failures == report.snapshot.checksum_failures == 2
    assert any("checksum" in warning for warning in report.warnings)
    # Everything but the boot set, which is made at the end of a backup that succeeds, was there already.
    assert len([key for key in counting.created if key.startswith("packs/")]) == 1
    with path.open("r+b") as file:
        file.seek(20 * 8192 + 5000)
        original = asyncio.run(read_files(store, report.snapshot))[str(path.relative_to(server.data))]
        assert original[20 * 8192 + 5000 :][:4] == b"\xde\xad\xbe\xef"


def test_one_broken_page_is_counted_as_one(
    make_postgres: Callable[..., PostgresServer], directory: Path
) -> None:
    """The server announces a total only from two failures on."""
    server = make_postgres(15, initdb=["--data-checksums"], settings=QUIET)
    server.sql(
        "create table broken as select i, md5(i::text) t from generate_series(1, 20000) i", "checkpoint"
    )
    path = server.data / server.value("select pg_relation_filepath('broken')")
    server.stop()
    with path.open("r+b") as file:
        file.seek(7 * 8192 + 5000)
        file.write(b"\xde\xad\xbe\xef")
    server.start()
    with pytest.raises(CheckFailed, match="1 pages with wrong checksums"):
        back_up(server, LocalStore(directory / "store"))


def test_rate_limit_is_kept(postgres: PostgresServer, directory: Path) -> None:
    began = time.monotonic()
    report = back_up(
        postgres, MemoryStore(), BackupOptions(fast_checkpoint=True, rate_bytes_per_second=16 << 20)
    )
    assert time.monotonic() - began > 0.8 * report.read_bytes / (16 << 20)
    with pytest.raises(UsageError, match="bytes a second"):
        back_up(postgres, MemoryStore(), BackupOptions(rate_bytes_per_second=100))


def test_lost_connection_leaves_no_snapshot(postgres: PostgresServer, directory: Path) -> None:
    store = LocalStore(directory / "store")

    async def run() -> None:
        log = await begun(postgres, store)
        killed = False

        def kill(status: BackupStatus) -> None:
            nonlocal killed
            if status.phase == "copy" and not killed:
                killed = True
                postgres.sql(
                    "select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'walsender'"
                )

        slow = BackupOptions(fast_checkpoint=True, rate_bytes_per_second=4 << 20)
        with pytest.raises(Unavailable):
            await take_base_backup(postgres.conninfo, store, log, CLOCK, options=slow, on_status=kill)
        assert killed
        assert not (await state_of(log)).snapshots

    asyncio.run(run())


def test_what_cannot_work_is_refused_before_data_flows(postgres: PostgresServer, directory: Path) -> None:
    """EDGE 2, EDGE 12, a store without a branch, a role without rights."""
    postgres.sql("create role reader login", "create role replicator login replication")

    async def run() -> None:
        store = MemoryStore()
        log = await begun(postgres, store)

        async def take(conninfo: str, options: BackupOptions = FAST) -> BackupReport:
            return await take_base_backup(conninfo, store, log, CLOCK, options=options)

        far = BackupOptions(fast_checkpoint=True, wal_held_from=Lsn.parse("FF/0"))
        with pytest.raises(CheckFailed, match="WAL is held only from FF/"):
            await take(postgres.conninfo, far)
        with pytest.raises(UsageError, match="may not stream WAL"):
            await take(postgres.conninfo.replace("user=postgres", "user=reader"))
        with pytest.raises(UsageError, match="never begun"):
            other = BranchLog(store, "other", CLOCK, "writer")
            await take_base_backup(postgres.conninfo, store, other, CLOCK, options=FAST)
        with pytest.raises(UsageError, match="no store"):
            empty = MemoryStore()
            nowhere = BranchLog(empty, "main", CLOCK, "writer")
            await take_base_backup(postgres.conninfo, empty, nowhere, CLOCK, options=FAST)
        assert not (await state_of(log)).snapshots
        limited = await take(postgres.conninfo.replace("user=postgres", "user=replicator"))
        assert limited.snapshot.settings

    asyncio.run(run())


def test_another_system_is_refused(make_postgres: Callable[..., PostgresServer]) -> None:
    """EDGE 12."""
    first, second = make_postgres(15), make_postgres(15)

    async def run() -> None:
        store = MemoryStore()
        log = await begun(first, store)
        with pytest.raises(CheckFailed, match="holds"):
            await take_base_backup(second.conninfo, store, log, CLOCK, options=FAST)

    asyncio.run(run())


def test_standby_as_source(postgres: PostgresServer, directory: Path) -> None:
    """EDGE 21; its standby.signal is no part of the data (P8)."""
    postgres.sql("create table t as select generate_series(1, 1000) i")
    standby = PostgresServer(15, directory)
    source = ("-h", str(postgres.sockets), "-p", str(postgres.port), "-U", "postgres")
    standby.tool("pg_basebackup", "-D", str(standby.data), *source, "-R", "-c", "fast")
    standby.configure({"port": str(standby.port), "unix_socket_directories": f"'{standby.sockets}'"})
    try:
        standby.start()
        postgres.sql("insert into t select generate_series(1001, 2000)", "checkpoint")
        end = postgres.position()
        deadline = time.monotonic() + 30
        while standby.value(f"select pg_last_wal_replay_lsn() >= '{end}'") != "True":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        store = LocalStore(directory / "store")
        snapshot = back_up(standby, store).snapshot
    finally:
        standby.stop("immediate")
    assert snapshot.backup_label is not None and "BACKUP FROM: standby" in snapshot.backup_label
    assert "standby.signal" not in asyncio.run(read_files(store, snapshot))
    with started_from(store, snapshot, postgres, directory / "copy") as copy:
        assert copy.value("select count(*) from t") == "2000"
        assert copy.value("select pg_is_in_recovery()") == "False"


def test_object_storage(postgres: PostgresServer, seaweed: Seaweed, directory: Path) -> None:
    """The same on a real S3 server, with several packs in flight."""
    postgres.sql("create table t as select i, md5(i::text) t from generate_series(1, 100000) i")

    async def run() -> tuple[BackupReport, dict[str, bytes]]:
        store = S3Store(BUCKET, fresh_prefix(), endpoint_url=seaweed.endpoint_url)
        try:
            log = await begun(postgres, store)
            options = BackupOptions(fast_checkpoint=True, pack_bytes=1 << 20, progress_packs=2)
            report = await take_base_backup(postgres.conninfo, store, log, CLOCK, options=options)
            assert (await state_of(log)).snapshots == (report.snapshot,)
            return report, await read_files(store, report.snapshot)
        finally:
            await store.aclose()

    report, stored = asyncio.run(run())
    assert report.packs > 3
    path = postgres.value("select pg_relation_filepath('t')")
    assert stored[path] == (postgres.data / path).read_bytes()


def test_progress_of_another_time_does_no_harm(postgres: PostgresServer, directory: Path) -> None:
    """An old progress entry whose manifests say other things than the source does now."""
    store = LocalStore(directory / "store")
    first = back_up(postgres, store)

    async def pin() -> None:
        log = BranchLog(store, "main", CLOCK, CLOCK.token(8))
        from timeline.format.branch_state import BackupProgress

        manifests = (*first.snapshot.pages, *first.snapshot.pages)
        await log.append(RecordProgress(BackupProgress("old", manifests, 1, CLOCK.now())))

    asyncio.run(pin())
    postgres.sql("create table t as select i, md5(i::text) t from generate_series(1, 50000) i", "checkpoint")
    report = again(postgres, store)
    stored = asyncio.run(read_files(store, report.snapshot))
    path = postgres.value("select pg_relation_filepath('t')")
    assert stored[path] == (postgres.data / path).read_bytes()


@pytest.mark.slow
def test_memory_is_bounded(postgres: PostgresServer, directory: Path) -> None:
    """P9: 300 MB with all imports, whatever the size of the source."""
    postgres.sql(
        "create table noise as"
        " select i, (select string_agg(md5((i * 64 + j)::text), '') from generate_series(1, 60) j) n"
        " from generate_series(1, 120000) i"
    )
    asyncio.run(begun(postgres, LocalStore(directory / "store")))
    arguments = [str(directory / "store"), postgres.conninfo, "0", str(32 << 20)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.backup_process", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    facts = json.loads(done.stdout)
    assert facts["read_bytes"] > 200 << 20
    assert facts["peak_rss_bytes"] < 300 << 20


@pytest.fixture(params=[14, 15, 16, 17, 18])
def major(request: pytest.FixtureRequest) -> int:
    """Every major of which this machine has binaries."""
    number: int = request.param
    if bin_dir(number) is None:
        pytest.skip(f"no Postgres {number} on this machine")
    return number
