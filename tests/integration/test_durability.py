"""P1: what a synchronous COMMIT has acknowledged is in the store, whenever the archiver is killed."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from tests.fix_stores import BUCKET, fresh_prefix
from tests.support.acknowledged import StoredWal, Writers
from tests.support.postgres import PostgresServer, scratch
from tests.support.run_sealer import SealerProcess
from tests.support.s3_proxy import S3Proxy
from tests.support.tl_host import Host, make_host

MakePostgres = Callable[..., PostgresServer]
PATIENCE_SECONDS = 120.0
BIG_BYTES = 256 << 10
MOMENTS = ("starting", "uploading", "uploading", "busy", "busy", "busy")
"""When a kill comes: at any time after the start; at the first upload, with a backlog of several chunks; at any
time after the first acknowledgement."""


@pytest.fixture
def seed() -> int:
    """Of all kill moments; TL_TEST_SEED repeats a run (as far as the machine does)."""
    chosen = int(os.environ.get("TL_TEST_SEED") or secrets.randbits(32))
    print(f"TL_TEST_SEED={chosen}")
    return chosen


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that the server's user may enter."""
    directory = scratch("tl-du-")
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@dataclass(slots=True)
class Tally:
    """What the kills hit."""

    starting: int = 0
    """Kills before the archiver acknowledged anything."""
    holes: int = 0
    """Kills that left chunks behind a hole: uploads in flight, a later one landed."""
    unfinished: int = 0
    """Kills in the middle of writing an object (directory stores only)."""


class Killed:
    """The archiver: started, killed at a seeded random moment, started again."""

    def __init__(
        self, host: Host, writers: Writers, chance: random.Random, written: Callable[[], object]
    ) -> None:
        """``written``: whatever changes when an upload begins."""
        self._host = host
        self._written = written
        self._writers = writers
        self._chance = chance
        self._start_seconds = 2.0
        """From start to the first acknowledged COMMIT, as last seen."""
        self._process: subprocess.Popen[bytes] | None = None
        self.tally = Tally()

    def live_and_die(self) -> None:
        """One life: from the start, or from the first acknowledgement on, a random time."""
        before = len(self._writers.acknowledged())
        self._writers.burst()
        began = time.monotonic()
        self._process = self._host.start_archiver("--max-delay", "0")
        moment = self._chance.choice(MOMENTS)
        if moment == "starting":
            time.sleep(self._chance.uniform(0, 1.3 * self._start_seconds))
        elif moment == "uploading":
            known = self._written()
            self._wait_for(lambda: self._written() != known)
            time.sleep(self._chance.uniform(0, 0.06))
        else:
            self._wait_for(lambda: len(self._writers.acknowledged()) > before)
            self._start_seconds = min(5.0, time.monotonic() - began)
            if self._chance.random() < 0.6:
                self._writers.burst()
            time.sleep(self._chance.uniform(0, 0.5))
        assert self._process.poll() is None, f"tl archive ended by itself:\n{self.log()}"
        self.kill()
        self.tally.starting += len(self._writers.acknowledged()) == before

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self._process is not None and self._process.poll() is None, (
                f"tl archive ended by itself:\n{self.log()}"
            )
            assert time.monotonic() < deadline, f"nothing reaches the store:\n{self.log()}"
            time.sleep(0.004)

    def kill(self) -> None:
        """``kill -9``."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)

    def log(self) -> str:
        """End of what it said."""
        return (self._host.directory / "archive.log").read_text()[-4000:]


def chunk_writes(store: Path) -> set[str]:
    """The chunks of a directory store, and what is being written and is too big for a log entry."""
    names = {path.name for path in (store / "wal" / "main" / "1").glob("*")}
    with contextlib.suppress(FileNotFoundError), os.scandir(store / ".tmp") as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.stat().st_size > BIG_BYTES:
                    names.add(entry.name)
    return names


def litter(store: Path) -> int:
    """Objects whose writing was cut short: files without a name yet in a directory store."""
    with contextlib.suppress(FileNotFoundError):
        return len(list((store / ".tmp").iterdir()))
    return 0


@pytest.mark.fuse
@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        pytest.param("local", 12, id="directory-12"),
        pytest.param("local", 100, id="directory-100", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param("seaweed", 20, id="s3-20", marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_no_acknowledged_commit_is_lost_to_kills(
    make_postgres: MakePostgres,
    make_s3_proxy: Callable[..., S3Proxy],
    place: Path,
    seed: int,
    kind: str,
    kills: int,
    request: pytest.FixtureRequest,
) -> None:
    """P1, EDGE 3, 5, 14, 60: archiver and sealers are killed under load, and at the end never started again.

    After every kill, before the next archiver could mend anything: the store holds the server's own bytes, at
    least as many as were acknowledged, with the commit record of every COMMIT that returned.
    """
    archive = place / "archive"
    server = make_postgres(
        15,
        initdb=["--wal-segsize=4"],
        settings={
            "archive_mode": "on",
            "archive_command": f"'cp %p {archive}/%f.part && mv {archive}/%f.part {archive}/%f'",
            "max_wal_size": "256MB",
        },
    )
    server.make_directory(archive)
    endpoint_url, url = None, f"file://{place}/store"
    proxy: S3Proxy | None = None
    if kind == "seaweed":
        # At a distance, so that uploads take long enough to be interrupted.
        proxy = make_s3_proxy(request.getfixturevalue("seaweed").endpoint_url, latency_ms=20, bandwidth_mb=10)
        endpoint_url, url = proxy.endpoint_url, f"s3://{BUCKET}/{fresh_prefix()}"

    def uploads() -> object:
        return proxy.stats().bytes_up // BIG_BYTES if proxy else chunk_writes(place / "store")

    host = make_host(place / "host", url, source=server.conninfo, endpoint_url=endpoint_url)
    host.tl("init", url, "--source", server.conninfo)
    host.tl("archive", "--once")
    writers = Writers(server)
    chance = random.Random(seed)
    archiver = Killed(host, writers, chance, uploads)
    server.sql("alter system set synchronous_standby_names = 'tl'", "select pg_reload_conf()")
    stored = StoredWal(server, archive, url, endpoint_url=endpoint_url)

    def check() -> None:
        end = stored.follow()
        # Asked after the store: what is acknowledged now was so when the archiver died.
        acknowledged = writers.acknowledged()
        flushed = server.value("select restart_lsn - '0/0'::pg_lsn from pg_replication_slots")
        assert int(flushed) <= end
        xids = writers.attempted
        lost = {number for number in acknowledged if xids[number] not in stored.committed}
        assert not lost, f"acknowledged and not in the store, which ends at {end}: {sorted(lost)[:20]}"

    began = time.monotonic()
    try:
        with SealerProcess(url, seed, host.environment, endpoint_url=endpoint_url) as sealer:
            writers.start()
            found = 0
            for _ in range(kills):
                archiver.live_and_die()
                check()
                archiver.tally.holes += stored.detached > 0
                now = litter(place / "store")
                archiver.tally.unfinished += now > found
                found = now
            sealed = sealer.stop()
        elapsed = time.monotonic() - began
    finally:
        archiver.kill()
        writers.stop()
    # From here on the store is all there is.
    check()
    whole = StoredWal(server, archive, url, endpoint_url=endpoint_url)
    assert whole.follow() == stored.end
    assert whole.committed == stored.committed
    acknowledged, attempted = writers.acknowledged(), writers.attempted
    server.stop("immediate")
    try:
        branch = host.tl("branch", "after")
        with psycopg.connect(branch["dsn"]) as connection:
            there = {int(str(row[0])) for row in connection.execute("select id from written").fetchall()}
        host.tl("delete", "after", "--yes")
    finally:
        host.end_agent()
    print(
        f"{kills} kills in {elapsed:.0f} s ({archiver.tally}), {sealed}, {len(acknowledged)} commits acknowledged, "
        f"{len(attempted) - len(acknowledged)} unknown, {(whole.end - whole.start) / 1e6:.0f} MB of WAL, "
        f"sealed up to {whole.sealed}, branch at {branch['lsn']}"
    )
    assert acknowledged <= there <= set(attempted)
    assert there == {number for number, xid in attempted.items() if xid in whole.committed}
    # The load and the kills were what they are meant to be.
    assert len(acknowledged) > kills
    assert whole.end - whole.start > kills * (1 << 20)
    assert sealed.seals > 0 and sealed.kills_in_seal > 0
    if kills >= 100:
        assert archiver.tally.starting > 0
        assert archiver.tally.holes + archiver.tally.unfinished > 0
