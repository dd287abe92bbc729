"""P6: a lazy branch at T is what the source was, and page for page what stock recovery gives."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from restore.branch import HostBranches
from restore.branch_request import BranchRequest, BranchResult, StoreAddress
from tests.fix_postgres import MAJORS
from tests.support.first_checkpoint import wait_for_first_checkpoint
from tests.support.postgres import PostgresServer, scratch, server_user
from tests.support.tl_host import Host, make_host
from tests.support.workload import Moment, prepare, record_moments, sequence_values, server_digest
from timeline.catalog.when import AtLsn
from timeline.clock import SystemClock
from timeline.lsn import Lsn

COMPARED = ("base", "global", "pg_xact", "pg_multixact", "pg_commit_ts", "pg_twophase", "pg_tblspc")
PAGES_PER_MAJOR = 4
pytestmark = pytest.mark.majors
"""Moments compared page by page; every one is compared logically."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A source whose workload is over, archived by us and, independently, by itself."""

    server: PostgresServer
    host: Host
    moments: list[Moment]
    backup: Path
    """Stock pg_basebackup, taken before the workload."""
    archive: Path
    """The server's own archived segments."""


@pytest.fixture(scope="module", params=MAJORS, ids=lambda major: f"pg{major}")
def recorded(
    request: pytest.FixtureRequest, make_postgres_session: Callable[..., PostgresServer]
) -> Iterator[Recorded]:
    """Record the mixed workload once per major version."""
    place = scratch("tl-fid-")
    user = server_user()
    archive = place / "archive"
    archive.mkdir()
    if os.geteuid() == 0:
        os.chown(archive, user.pw_uid, user.pw_gid)
    server = make_postgres_session(
        request.param,
        settings={
            "archive_mode": "on",
            "archive_command": f"'cp %p {archive}/%f'",
            "track_commit_timestamp": "on",
            "autovacuum": "off",
        },
    )
    try:
        prepare(server)
        host = make_host(place / "host", f"file://{place}/store", source=server.conninfo)
        host.tl("init", host.store, "--source", server.conninfo)
        archiver = host.start_archiver("--fast-checkpoint")
        try:
            _wait_for(lambda: "base backup done" in (host.directory / "archive.log").read_text())
            backup = place / "backup"
            server.tool("pg_basebackup", "-D", str(backup), "-c", "fast", "-X", "none", "--no-manifest", "-h",
                        str(server.sockets), "-p", str(server.port), "-U", "postgres")  # fmt: skip
            moments = record_moments(server, server.make_directory(server.directory / "elsewhere"))
        finally:
            archiver.terminate()
            assert archiver.wait(60) == 0
        server.sql("select pg_switch_wal()")
        last = server.value("select pg_walfile_name(pg_current_wal_lsn())")
        _wait_for(lambda: any(name.name >= last for name in archive.iterdir()) or _switched(server))
        yield Recorded(server, host, moments, backup, archive)
        host.end_agent()
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _switched(server: PostgresServer) -> bool:
    return server.value("select last_archived_wal >= pg_walfile_name('" + server.value(
        "select pg_switch_wal()") + "'::pg_lsn - 1) from pg_stat_archiver") == "True"  # fmt: skip


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.mark.parametrize(
    "share", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_every_moment_has_the_source_s_digest(recorded: Recorded, share: int) -> None:
    """Logical state at every quiesced moment: tablespaces, 2PC, both CREATE DATABASE strategies (EDGE 27, EDGE 28)."""
    for number, moment in list(enumerate(recorded.moments))[share::3]:
        name = f"at-{number}"
        result = recorded.host.tl("branch", name, "--at", moment.lsn)
        try:
            assert result["mode"] == "lazy"

            def connect(dbname: str, dsn: str = result["dsn"]) -> psycopg.Connection[tuple[object, ...]]:
                return psycopg.connect(dsn, dbname=dbname, autocommit=True)

            assert server_digest(connect) == moment.digest, moment.step
            with connect("postgres") as conn:
                ahead = {
                    name: value - moment.sequences[name] for name, value in sequence_values(conn).items()
                }
            assert ahead.keys() == moment.sequences.keys()
            assert all(0 <= each <= 33 for each in ahead.values()), (moment.step, ahead)
            if number % 5 == 0:
                _amcheck(recorded.server, result["dsn"])
        finally:
            recorded.host.tl("delete", name, "--yes")


def _amcheck(server: PostgresServer, dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("create extension if not exists amcheck")
    checked = subprocess.run(
        [str(server.bin / "pg_amcheck"), "--maintenance-db", dsn, "-d", dsn.split("?")[0].rsplit("/", 1)[1] or "postgres",
         "--heapallindexed"],
        env=server.environment() | _connection(dsn),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr


def _connection(dsn: str) -> dict[str, str]:
    said = psycopg.conninfo.conninfo_to_dict(dsn)
    return {"PGHOST": str(said["host"]), "PGPORT": str(said.get("port", 5432)), "PGUSER": str(said["user"])}


@pytest.mark.parametrize("position", range(PAGES_PER_MAJOR))
def test_pages_equal_stock_recovery(recorded: Recorded, position: int) -> None:
    """Every page equals the oracle's: stock pg_basebackup and the server's own segments, recovered by stock Postgres.

    Compared before anybody has connected to either side.
    """
    moment = recorded.moments[(len(recorded.moments) - 1) * (position + 1) // PAGES_PER_MAJOR]
    oracle = _oracle(recorded, moment, f"oracle-{position}")
    result = _untouched(recorded.host, f"pages-{position}", moment)
    try:
        wait_for_first_checkpoint(Path(result.data_directory), parent_tli=1)
        differing, compared = _differences(oracle, Path(result.data_directory))
        assert differing == [], f"{moment.step}: {len(differing)} of {compared} pages: {differing[:20]}"
        assert compared > 3000
    finally:
        recorded.host.tl("delete", f"pages-{position}", "--yes")
        shutil.rmtree(oracle, ignore_errors=True)


def _untouched(host: Host, name: str, moment: Moment) -> BranchResult:
    """A branch that not even its maker connects to: looking at a row sets hint bits in its page."""
    branches = HostBranches.of(host.environment, SystemClock())
    when = AtLsn(Lsn.parse(moment.lsn))
    return asyncio.run(
        branches.create(BranchRequest(StoreAddress(host.store), name=name, when=when, untouched=True))
    )


def _oracle(recorded: Recorded, moment: Moment, name: str) -> Path:
    """Stock recovery to just before the record at the moment's LSN, then shut down without a connection."""
    server = recorded.server
    data = recorded.backup.parent / name
    subprocess.run(["cp", "-a", str(recorded.backup), str(data)], check=True)
    (data / "recovery.signal").touch()
    sockets = server.make_directory(recorded.backup.parent / f"{name}-sock")
    with (data / "postgresql.conf").open("a") as conf:
        conf.write(
            f"restore_command = 'cp {recorded.archive}/%f %p'\nrecovery_target_lsn = '{moment.lsn}'\n"
            "recovery_target_inclusive = off\nrecovery_target_timeline = '1'\nrecovery_target_action = 'promote'\n"
            f"archive_mode = off\nlisten_addresses = ''\nunix_socket_directories = '{sockets}'\nautovacuum = off\n"
            "hot_standby = off\nallow_in_place_tablespaces = on\nmax_logical_replication_workers = 0\n"
        )
    # The source's tablespace is in use on this very host: the oracle must not touch it.
    elsewhere = server.directory / "elsewhere"
    hidden = server.directory / "elsewhere-hidden"
    replacement = server.make_directory(server.directory / f"{name}-space")
    server.stop()
    elsewhere.rename(hidden)
    elsewhere.symlink_to(replacement)
    try:
        server.tool("pg_ctl", "-D", str(data), "-l", str(data / "log"), "-w", "-t", "120", "start")
        # pg_ctl returns too early with hot_standby off: the last line of postmaster.pid is what tells.
        _wait_for(lambda: (data / "postmaster.pid").read_text().rstrip().endswith("ready"))
        server.tool("pg_ctl", "-D", str(data), "-m", "fast", "-w", "stop")
        spaces = data / "pg_tblspc"
        for link in list(spaces.iterdir()):
            if link.is_symlink():
                target = link.resolve()
                link.unlink()
                shutil.copytree(target, link)
    finally:
        elsewhere.unlink()
        hidden.rename(elsewhere)
        server.start()
    return data


def _differences(oracle: Path, branch: Path) -> tuple[list[str], int]:
    theirs, ours = _files(oracle), _files(branch)
    differing = [f"only in the oracle: {path}" for path in sorted(theirs - ours)]
    differing += [f"only in the branch: {path}" for path in sorted(ours - theirs)]
    compared = 0
    for path in sorted(theirs & ours):
        left, right = (oracle / path).read_bytes(), (branch / path).read_bytes()
        if len(left) != len(right):
            differing.append(f"{path}: {len(left)} bytes against {len(right)}")
        for block in range(0, max(len(left), len(right)), 8192):
            compared += 1
            if left[block : block + 8192] != right[block : block + 8192]:
                differing.append(f"{path} block {block // 8192}")
    return differing, compared


def _files(root: Path) -> set[str]:
    found = set()
    for top in COMPARED:
        for path in (root / top).rglob("*"):
            if (
                path.is_file()
                and path.name not in ("pg_control", "pg_internal.init")
                and "pgsql_tmp" not in path.parts
            ):
                found.add(str(path.relative_to(root)))
    return found
