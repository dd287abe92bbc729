"""The lazy mount under a real Postgres: real FUSE, real stores, real failures."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from restore import agent, mount_table
from restore.mount_control import BlockRange, prefetch
from restore.mount_spec import encode_spec
from restore.overlay import Overlay
from restore.sparse import OverlayUnusable, probe_file_system
from tests.fix_stores import BUCKET, fresh_prefix
from tests.support.lazy_branch import (
    LazyBranch,
    StoredCluster,
    agent_state,
    lazy_branch,
    store_cluster,
    wait_until,
)
from tests.support.postgres import PostgresServer, scratch
from tests.support.s3_proxy import S3Proxy
from tests.support.s3_proxy_state import Fault
from tests.support.seaweed import Seaweed

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse"),
]
SCALE = 6
ROWS = SCALE * 100_000


@pytest.fixture(scope="module")
def stopped(make_postgres_session: Callable[..., PostgresServer]) -> PostgresServer:
    """A cluster of 100 MB with pgbench's tables, shut down."""
    server = make_postgres_session(15)
    server.tool("pgbench", "-i", "-s", str(SCALE), *connection(server))
    server.sql("create extension amcheck", "checkpoint")
    server.stop()
    return server


@pytest.fixture(scope="module")
def cluster(stopped: PostgresServer) -> Iterator[StoredCluster]:
    """The same in a directory store."""
    directory = scratch("tl-store-")
    yield store_cluster(stopped, f"file://{directory}")
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def s3_cluster(stopped: PostgresServer, seaweed: Seaweed) -> StoredCluster:
    """The same in S3."""
    return store_cluster(stopped, f"s3://{BUCKET}/{fresh_prefix()}", endpoint_url=seaweed.endpoint_url)


@pytest.fixture(scope="module")
def state() -> Iterator[Path]:
    """One agent for this module."""
    with agent_state() as directory:
        yield directory


@pytest.fixture
def cache() -> Iterator[Path]:
    """An empty cache."""
    directory = scratch("tl-cache-")
    yield directory
    shutil.rmtree(directory)


def connection(server: PostgresServer) -> tuple[str, ...]:
    return ("-h", str(server.sockets), "-p", str(server.port), "-U", "postgres", "postgres")


def check_consistent(server: PostgresServer) -> int:
    """pgbench's invariant: all balances move by the same amounts; how many transactions it shows."""
    totals = server.sql(
        "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches),"
        " (select sum(tbalance) from pgbench_tellers), coalesce((select sum(delta) from pgbench_history), 0)"
    )[0]
    assert len(set(totals)) == 1, totals
    return int(server.value("select count(*) from pgbench_history"))


def test_postgres_runs_on_it_and_fetches_little(cluster: StoredCluster, state: Path, cache: Path) -> None:
    with lazy_branch(cluster, state, cache) as branch:
        branch.server.start()
        assert branch.server.value("select abalance from pgbench_accounts where aid = 4711") == "0"
        time.sleep(1.2)
        assert branch.stats().fetched_bytes < 2_500_000 < cluster.snapshot.bytes // 20
        branch.server.tool("pgbench", "-n", "-c", "4", "-T", "2", *connection(branch.server))
        done = check_consistent(branch.server)
        assert done > 100
        branch.server.sql(
            "create table more as select g, repeat('x', 500) t from generate_series(1, 10000) g"
        )
        branch.server.sql("truncate pgbench_history", "vacuum full pgbench_tellers", "drop table more")
        branch.server.tool("pg_amcheck", "--heapallindexed", *connection(branch.server))
        branch.server.stop()
        branch.unmount()
        assert not branch.stats().mounted
        assert branch.stats().errors == 0
        assert os.listdir(branch.server.data) == []

        branch.mount()
        branch.server.start()
        assert branch.server.value("select count(*) from pgbench_history") == "0"
        assert branch.server.value("select count(*) from pgbench_accounts") == str(ROWS)
        branch.server.tool("pg_amcheck", "--heapallindexed", *connection(branch.server))
        branch.server.stop()


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "short-lived"])
def test_killed_mount_costs_nothing_committed(
    cluster: StoredCluster, state: Path, cache: Path, durable: bool
) -> None:
    """EDGE 51: the mount is killed under load; Postgres recovers on the next one, by its own WAL."""
    with lazy_branch(cluster, state, cache, durable=durable) as branch:
        server = branch.server
        server.start()
        load = subprocess.Popen(
            [server.bin / "pgbench", "-n", "-c", "4", "-T", "30", *connection(server)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(1.5)
        server.sql("checkpoint")
        with server.connect() as conn:
            conn.execute("set synchronous_commit = on")
            conn.execute("create table kept as select 1 as one")
        time.sleep(0.5)
        postmaster = server.postmaster_pid()
        assert postmaster is not None
        children = children_of(postmaster)
        branch.kill_mount()
        load.kill()
        load.wait()
        with pytest.raises(OSError, match="not connected") as dead:
            os.listdir(server.data)
        assert dead.value.errno == errno.ENOTCONN
        kill_postgres(postmaster, children)

        branch.mount()
        (server.data / "postmaster.pid").unlink(missing_ok=True)
        server.start()
        assert server.value("select one from kept") == "1"
        assert check_consistent(server) > 100
        server.tool("pg_amcheck", "--heapallindexed", *connection(server))
        server.stop()


def kill_postgres(postmaster: int, children: list[int]) -> None:
    """End it and all its processes; its data directory cannot be read any more."""
    for pid in (postmaster, *children):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in (postmaster, *children)))


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


def test_postgres_killed(cluster: StoredCluster, state: Path, cache: Path) -> None:
    """EDGE 51: the mount goes on when Postgres is killed."""
    with lazy_branch(cluster, state, cache) as branch:
        branch.server.start()
        branch.server.tool("pgbench", "-n", "-c", "4", "-T", "2", *connection(branch.server))
        postmaster = branch.server.postmaster_pid()
        assert postmaster is not None
        kill_postgres(postmaster, children_of(postmaster))
        branch.server.start()
        assert check_consistent(branch.server) > 0
        branch.server.stop()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_disk_full_under_the_overlay(cluster: StoredCluster, state: Path, cache: Path) -> None:
    """EDGE 51: errors, then a recovery that finds what is really on the disk."""
    with lazy_branch(cluster, state, cache) as branch:
        branch.unmount()
        small = branch.directory / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", small], check=True)
        try:
            overlay = small / "overlay"
            subprocess.run(["cp", "-a", branch.spec.overlay, overlay], check=True)
            branch.spec_path.write_bytes(encode_spec(replace(branch.spec, overlay=str(overlay))))
            branch.mount()
            branch.server.start()
            postmaster = branch.server.postmaster_pid()
            assert postmaster is not None
            with pytest.raises(psycopg.Error):
                for _ in range(20):
                    branch.server.sql(
                        "update pgbench_accounts set abalance = abalance + 1 where aid <= 50000",
                        "update pgbench_branches set bbalance = bbalance + 50000 where bid = 1",
                        "checkpoint",
                    )
            kill_postgres(postmaster, children_of(postmaster))
            assert "No space left on device" in branch.log()
            subprocess.run(["mount", "-o", "remount,size=400m", small], check=True)
            branch.server.start()
            accounts, branches = (
                int(branch.server.value(f"select sum({prefix}balance) from pgbench_{table}"))
                for prefix, table in (("a", "accounts"), ("b", "branches"))
            )
            assert accounts - branches in (0, 50000)
            branch.server.tool("pg_amcheck", "--heapallindexed", *connection(branch.server))
            branch.server.stop()
        finally:
            branch.server.kill9()
            branch.unmount()
            subprocess.run(["umount", "-l", small], check=True)


def test_a_second_branch_costs_no_requests_for_data(
    s3_cluster: StoredCluster, state: Path, cache: Path
) -> None:
    query = "select count(*), sum(abalance) from pgbench_accounts"
    with lazy_branch(s3_cluster, state, cache) as first:
        first.server.start()
        first.server.sql(query)
        first.server.stop()
        first.unmount()
        assert first.stats().fetched_bytes > 1_000_000
    with lazy_branch(s3_cluster, state, cache) as second:
        second.server.start()
        second.server.sql(query)
        second.server.stop()
        second.unmount()
        assert second.stats().requests == 0


def test_branches_do_not_see_each_other(cluster: StoredCluster, state: Path, cache: Path) -> None:
    with lazy_branch(cluster, state, cache) as one, lazy_branch(cluster, state, cache) as two:
        for branch, balance in ((one, 1), (two, 2)):
            branch.server.start()
            branch.server.sql(f"update pgbench_accounts set abalance = {balance} where aid % 20 = 0")
        for branch, balance in ((one, 1), (two, 2)):
            assert branch.server.value("select sum(abalance) from pgbench_accounts") == str(
                balance * ROWS // 20
            )
            branch.server.stop()


def warm_connection(branch: LazyBranch) -> psycopg.Connection[tuple[object, ...]]:
    """One that has everything from the catalogs for a count over pgbench_accounts."""
    conn = branch.server.connect()
    conn.execute("set max_parallel_workers_per_gather = 0")
    conn.execute("select count(*) from pgbench_accounts where aid < 0")
    conn.execute("set enable_indexscan = off")
    conn.execute("set enable_indexonlyscan = off")
    conn.execute("set enable_bitmapscan = off")
    conn.execute("explain select count(*) from pgbench_accounts")
    return conn


def test_damaged_pack_gives_an_error_never_wrong_rows(stopped: PostgresServer, state: Path) -> None:
    """P5."""
    directory = scratch("tl-store-")
    try:
        damaged = store_cluster(stopped, f"file://{directory}")
        with lazy_branch(damaged, state, None) as branch:
            branch.server.start()
            with warm_connection(branch) as conn:
                for pack in directory.glob("packs/*/*"):
                    data = bytearray(pack.read_bytes())
                    for at in range(1000, len(data), 1000):
                        data[at] ^= 1
                    pack.write_bytes(data)
                with pytest.raises(psycopg.errors.IoError, match="could not read block"):
                    conn.execute("select count(*) from pgbench_accounts")
            assert "ERROR" in branch.log()
            assert "packs/" in branch.log()
    finally:
        shutil.rmtree(directory)


def test_missing_object_is_named(stopped: PostgresServer, state: Path) -> None:
    directory = scratch("tl-store-")
    try:
        damaged = store_cluster(stopped, f"file://{directory}")
        with lazy_branch(damaged, state, None) as branch:
            branch.server.start()
            with warm_connection(branch) as conn:
                shutil.rmtree(directory / "packs")
                with pytest.raises(psycopg.errors.IoError):
                    conn.execute("select count(*) from pgbench_accounts")
            assert "object is missing" in branch.log()
    finally:
        shutil.rmtree(directory)


def test_query_waits_for_a_store_that_comes_back(
    s3_cluster: StoredCluster, state: Path, s3_proxy: S3Proxy
) -> None:
    """EDGE 51: the store answers nothing for a while."""
    through = replace(s3_cluster, endpoint_url=s3_proxy.endpoint_url)
    with lazy_branch(through, state, None, patience_seconds=60) as branch:
        branch.server.start()
        s3_proxy.set_faults(Fault("status", verb="GET", contains="packs/", times=12))
        assert branch.server.value("select count(*) from pgbench_accounts") == str(ROWS)
        assert s3_proxy.stats().faults_injected > 0
        branch.server.stop()


def test_query_fails_when_the_store_stays_away(
    s3_cluster: StoredCluster, state: Path, s3_proxy: S3Proxy
) -> None:
    """EDGE 51: after its patience the mount gives an error; what is local still works, and later everything."""
    through = replace(s3_cluster, endpoint_url=s3_proxy.endpoint_url)
    with lazy_branch(through, state, None, patience_seconds=2) as branch:
        branch.server.start()
        branch.server.sql("create table mine as select generate_series(1, 1000) as n")
        with warm_connection(branch) as conn:
            conn.execute("select count(*) from mine")
            s3_proxy.set_faults(Fault("status", verb="GET", contains="packs/"))
            began = time.monotonic()
            with pytest.raises(psycopg.errors.IoError):
                conn.execute("select count(*) from pgbench_accounts")
            assert time.monotonic() - began < 60
            assert conn.execute("select count(*) from mine").fetchone() == (1000,)
            s3_proxy.set_faults()
        assert branch.server.value("select count(*) from pgbench_accounts") == str(ROWS)
        branch.server.stop()


def test_sequential_scan_is_not_a_chain_of_round_trips(
    s3_cluster: StoredCluster, state: Path, s3_proxy: S3Proxy
) -> None:
    """20 ms to the store: 80 MB read one extent after the other would take 13 s."""
    s3_proxy.configure(latency_ms=20)
    through = replace(s3_cluster, endpoint_url=s3_proxy.endpoint_url)
    with lazy_branch(through, state, None) as branch:
        branch.server.start()
        branch.server.sql("select 1 from pgbench_tellers")
        s3_proxy.reset()
        began = time.monotonic()
        with branch.server.connect() as conn:
            conn.execute("set max_parallel_workers_per_gather = 0")
            conn.execute("select sum(abalance) from pgbench_accounts")
        elapsed = time.monotonic() - began
        requests = s3_proxy.stats().requests["GET"]
        branch.server.stop()
    assert elapsed < 5, elapsed
    assert requests < ROWS // 6000


def test_prefetch_on_request(s3_cluster: StoredCluster, state: Path, s3_proxy: S3Proxy) -> None:
    through = replace(s3_cluster, endpoint_url=s3_proxy.endpoint_url)
    with lazy_branch(through, state, None) as branch:
        branch.server.start()
        path = branch.server.value("select pg_relation_filepath('pgbench_accounts')")
        s3_proxy.reset()
        prefetch(branch.server.data, [BlockRange(path, block, 1) for block in range(0, 1600, 16)])
        with open(branch.server.data / path, "rb", buffering=0) as file:
            for block in reversed(range(0, 1600, 16)):
                file.seek(block * 8192)
                assert any(file.read(8192))
        assert s3_proxy.stats().requests["GET"] <= 12
        branch.server.stop()


def test_what_the_mount_shows(cluster: StoredCluster, state: Path) -> None:
    with lazy_branch(cluster, state, None) as branch:
        data = branch.server.data
        user = branch.server.user
        info = data.stat()
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (user.pw_uid, user.pw_gid, 0o700)
        for found in cluster.server.data.rglob("*"):
            path = found.relative_to(cluster.server.data)
            if str(path).startswith("pg_wal") or str(path) in ("postgresql.conf", "postmaster.opts"):
                continue
            assert found.is_dir() == (data / path).is_dir(), path
            if found.is_file():
                assert found.read_bytes() == (data / path).read_bytes(), path
        assert (data / "pg_wal").is_symlink()
        refused = subprocess.run(
            ["setpriv", "--reuid=nobody", "--clear-groups", "ls", data], capture_output=True, check=False
        )
        assert b"Permission denied" in refused.stderr


def test_no_symlink_in_pg_tblspc(cluster: StoredCluster, state: Path) -> None:
    """EDGE 49."""
    with lazy_branch(cluster, state, None) as branch:
        data = branch.server.data
        with pytest.raises(PermissionError):
            (data / "pg_tblspc" / "16400").symlink_to("/tmp")
        (data / "elsewhere").symlink_to("/tmp")
        with pytest.raises(PermissionError):
            (data / "elsewhere").rename(data / "pg_tblspc" / "16400")
        (data / "pg_tblspc" / "16400").mkdir()
        with pytest.raises(PermissionError):
            Overlay.open(branch.spec.overlay).symlink("pg_tblspc/16401", "/tmp")


def test_space_is_never_promised(cluster: StoredCluster, state: Path) -> None:
    """An allocated range would be a hole: fallocate is refused, and Postgres writes zeros."""
    with lazy_branch(cluster, state, None) as branch:
        path = branch.server.data / "file"
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 100_000)
            os.fsync(file.fileno())
        assert path.read_bytes() == bytes(100_000)
        local = Path(branch.spec.overlay) / "tree" / "file"
        assert local.stat().st_blocks * 512 >= 100_000


def test_overlay_refuses_a_file_system_without_attributes(cluster: StoredCluster, state: Path) -> None:
    """Our own mount is one."""
    with lazy_branch(cluster, state, None) as branch:
        place = branch.server.data / "place"
        place.mkdir()
        with pytest.raises(OverlayUnusable, match="extended attributes") as refused:
            probe_file_system(place)
        assert refused.value.hint is not None
        assert list(place.iterdir()) == []


def test_one_overlay_has_one_mount(cluster: StoredCluster, state: Path) -> None:
    with lazy_branch(cluster, state, None) as branch, agent_state() as other_state:
        with pytest.raises(agent.AgentError, match="in use by another mount"):
            agent.mount(other_state, branch.spec_path)
        assert mount_table.find(branch.server.data) is not None
        assert os.listdir(branch.server.data)


def test_unmount_takes_open_files_along(cluster: StoredCluster, state: Path) -> None:
    with lazy_branch(cluster, state, None) as branch:
        held = os.open(branch.server.data / "PG_VERSION", os.O_RDONLY)
        began = time.monotonic()
        branch.unmount()
        assert time.monotonic() - began < 30
        assert mount_table.find(branch.server.data) is None
        assert all(m.mountpoint != branch.spec.mountpoint for m in agent.mounts(state))
        with pytest.raises(OSError, match="not connected"):
            os.close(held)
        assert "in use" in branch.log()


def test_overlay_written_without_fsync_does_not_survive_a_reboot(cluster: StoredCluster, state: Path) -> None:
    with lazy_branch(cluster, state, None) as branch:
        branch.unmount()
        marker = Path(branch.spec.overlay) / "overlay.json"
        marker.write_text(marker.read_text().replace('"boot_id": "', '"boot_id": "before'))
        with pytest.raises(agent.AgentError, match="restarted since"):
            branch.mount()


def test_every_extent_is_fetched_once(cluster: StoredCluster, state: Path) -> None:
    """Eight backends read the whole table at once, with no disk cache."""
    with lazy_branch(cluster, state, None) as branch:
        branch.server.start()
        load = [
            subprocess.Popen(
                [
                    branch.server.bin / "psql",
                    *connection(branch.server),
                    "-Atc",
                    "select count(*) from pgbench_accounts",
                ],
                stdout=subprocess.PIPE,
            )
            for _ in range(8)
        ]
        assert {int(p.communicate(timeout=60)[0]) for p in load} == {ROWS}
        time.sleep(1.2)
        stats = branch.stats()
        assert stats.extents < cluster.snapshot.pages[0].rows + 10
        branch.server.stop()
