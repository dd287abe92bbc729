"""First query at random moments of a long history: what ``benchmarks.branch --replay`` measures.

A source with checkpoints more than 1 GiB apart writes WAL since its base backup while ``tl archive`` builds
snapshots: pgbench's own transactions on a database of several times that, so that most pages that WAL touches come
with it, as on servers whose checkpoints are far apart. Then branches are made at random LSNs, and right at
snapshots, each in a fresh process with an empty extent cache; and one full restore of the head is replayed by stock
Postgres, for the ratio.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fixture import Host, make_host, timed_branch
from benchmarks.report import Report
from tests.support.postgres import PostgresServer, bin_dir, running_server
from tests.support.restored import wait_until_promoted
from tests.support.seaweed import credentials
from timeline.catalog.parallel import in_parallel
from timeline.format.branch_state import BUILT
from timeline.format.value_json import from_json, to_json
from timeline.lsn import Lsn
from timeline.store.open import open_store

SETTINGS = {
    "max_wal_size": "2500MB",
    "checkpoint_timeout": "1h",
    "max_slot_wal_keep_size": "64GB",
    "shared_buffers": "512MB",
    "synchronous_commit": "off",
    "autovacuum": "off",
    "full_page_writes": "on",
}
MAJOR = 15
SCALE = 200
"""Of pgbench: a database of 3 GiB."""
_PATIENCE_SECONDS = 1800.0


def position(server: PostgresServer) -> Lsn:
    """Where the source's WAL ends."""
    return Lsn.parse(server.value("select pg_current_wal_flush_lsn()"))


def pgbench(server: PostgresServer, *args: str) -> None:
    """One run of pgbench."""
    server.tool(
        "pgbench", *args, "-h", str(server.sockets), "-p", str(server.port), "-U", "postgres", "postgres"
    )


def write_history(server: PostgresServer, host: Host, wal_bytes: int) -> tuple[Lsn, Lsn]:
    """A base backup, then so much WAL, archived with snapshots on the way; first and last moment to branch at."""
    pgbench(server, "-i", "-q", "-I", "dtgvp", "-s", str(SCALE))
    host.tl("archive", "--once")
    begin = position(server)
    archiver = host.start_archiver("--snapshot-every", "64")
    try:
        while position(server) - begin < wal_bytes:
            pgbench(server, "-n", "-c", "4", "-j", "2", "-T", "3")
            # As much as the archive's own builder keeps up with, as on a server sized for its load.
            _wait_for_snapshot(host)
        end = position(server)
    finally:
        archiver.terminate()
        archiver.wait(timeout=120)
    host.tl("archive", "--once")
    host.tl("snapshot")
    return begin, end


def _wait_for_snapshot(host: Host) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while host.tl("status")["replay_bytes"] > 64 << 20:
        if time.monotonic() > deadline:
            raise RuntimeError("no snapshot in time")
        time.sleep(1)


def measure(
    report: Report,
    host: Host,
    binaries: Path,
    kind: str,
    history: History,
    samples: int,
) -> None:
    """Branches at random moments and at snapshots."""
    chance = random.Random(20260120)
    begin, end = Lsn.parse(history.begin), Lsn.parse(history.end)
    for sample in range(samples):
        for label, when in (
            ("random_lsn", str(Lsn(chance.randrange(begin + (1 << 20), end)))),
            ("at_snapshot", chance.choice(history.snapshots)),
        ):
            host.forget_cache()
            host.end_agent()
            name = f"{label.replace('_', '-')}-{sample}"
            elapsed, made = timed_branch(host, binaries, name, "--at", when, expected=None)
            report.add(f"first_query_seconds/{kind}/{label}", elapsed, "s", "lower")
            report.add(f"replayed_mb/{kind}/{label}", made["replayed_bytes"] / 1e6, "MB", "lower")
            host.tl("delete", name, "--yes")


def eager_seconds(major: int, host: Host, directory: Path) -> float:
    """A full restore of the head, until stock Postgres has replayed it all."""
    # The server's own user writes its log there.
    directory.mkdir()
    directory.chmod(0o777)
    began = time.perf_counter()
    data = directory / "eager"
    host.tl("restore", str(data), timeout=3600)
    copy = PostgresServer(major, directory)
    copy.data = data
    copy.make_directory(copy.sockets)
    copy.configure({"port": str(copy.port), "unix_socket_directories": f"'{copy.sockets}'"})
    if os.geteuid() == 0:
        user = copy.user
        subprocess.run(["chown", "-R", f"{user.pw_uid}:{user.pw_gid}", str(data)], check=True)
    try:
        copy.start()
        wait_until_promoted(copy, seconds=_PATIENCE_SECONDS)
        return time.perf_counter() - began
    finally:
        copy.stop("immediate")


def copy_store(file_url: str, s3_url: str, endpoint_url: str) -> None:
    """Every object of a directory store into a bucket: no store names its own place."""

    async def copy() -> None:
        here, there = await open_store(file_url), await open_store(s3_url, endpoint_url=endpoint_url)

        async def one(key: str) -> None:
            await there.create(key, await here.get(key))

        try:
            listed = await here.list("")
            await in_parallel([each.key for each in listed], one, limit=8)
        finally:
            await here.aclose()
            await there.aclose()

    with credentials():
        asyncio.run(copy())


@dataclass(frozen=True, slots=True)
class History:
    """A store with a long history, and where to branch in it."""

    store: str
    begin: str
    end: str
    """First and last moment to branch at."""
    snapshots: tuple[str, ...]
    """LSNs of the built ones."""


def history_in(directory: Path, wal_bytes: int) -> History:
    """The history kept there, or else written there now."""
    kept = directory / "history.json"
    if kept.exists():
        return from_json(History, json.loads(kept.read_text()))
    directory.mkdir(parents=True, exist_ok=True)
    url = f"file://{directory}/store"
    with running_server(MAJOR, settings=SETTINGS) as server:
        host = make_host(directory / "archiving", url, source=server.conninfo)
        host.tl("init", url, "--source", server.conninfo)
        begin, end = write_history(server, host, wal_bytes)
        checkpoints = server.value("select checkpoints_timed + checkpoints_req from pg_stat_bgwriter")
        snapshots = [each["lsn"] for each in host.tl("status")["snapshots"] if each["kind"] == BUILT]
        print(
            f"{(end - begin) >> 20} MiB of WAL, {checkpoints} checkpoints, {len(snapshots)} snapshots",
            file=sys.stderr,
            flush=True,
        )
        host.tl("detach", "--source", server.conninfo, "--yes")
    history = History(url, str(begin), str(end), tuple(snapshots))
    kept.write_text(json.dumps(to_json(history)))
    return history


def replay(
    report: Report, directory: Path, history: History, s3: tuple[str, str] | None, samples: int
) -> None:
    """All of it, for a directory and, ``s3``: (end point of the server, of the proxy before it), for a bucket."""
    hosts = {"file": make_host(directory / "replay", history.store)}
    if s3 is not None:
        hosts["s3"] = make_host(directory / "replay-s3", "s3://bench/replay", endpoint_url=s3[1])
        copy_store(history.store, hosts["s3"].store, s3[0])
    binaries = bin_dir(MAJOR)
    if binaries is None:
        raise RuntimeError(f"no Postgres {MAJOR} on this machine")
    for kind, host in hosts.items():
        measure(report, host, binaries, kind, history, samples)
    eager = eager_seconds(MAJOR, hosts["file"], directory / "full")
    report.add("eager_seconds/file", eager, "s", "lower")
    lazy = report.median("first_query_seconds/file/random_lsn")
    report.add("ratio_eager_to_lazy/file", eager / lazy, "ratio", "higher")
