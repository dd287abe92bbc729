"""What must hold when a soak is over: looked at from outside, one check each."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import psycopg

from tests.soak.ledger import TABLE, Ledger
from tests.soak.load import Scraper, Visitor
from tests.soak.memory import MemoryLine, relatives_of
from tests.soak.place import CLUSTER, URL, Place
from tests.soak.watch import JobLine, store_size
from tests.support.daemon_process import DaemonProcess
from timeline.catalog.history import History
from timeline.catalog.line import Span
from timeline.format.wal_index import CommitKind
from timeline.lsn import Lsn
from timeline.pg.wal import WalScanner
from timeline.store.s3 import S3Store

FINE_CODES = {0, 7}
"""Of jobs: done, and for now impossible, as while the store stalls. Everything else is a finding."""
PATIENCE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that had to hold."""

    name: str
    passed: bool
    detail: str


def check(name: str, ask: Callable[[], str]) -> Check:
    """``ask`` gives the detail, or raises with what is wrong."""
    try:
        return Check(name, True, ask())
    except (AssertionError, RuntimeError, psycopg.Error, TimeoutError, subprocess.TimeoutExpired) as error:
        return Check(name, False, f"{type(error).__name__}: {str(error)[-1500:]}")


def checks_at_the_end(place: Place, daemon: DaemonProcess) -> list[Check]:
    """The load is over, the daemon is still there; afterwards it has ended."""
    return [
        check("everything is stored", lambda: _all_stored(place, daemon)),
        check("the slot is there and has its WAL", lambda: _slot(place)),
        check("the daemon ends in order", lambda: _ended(daemon)),
    ]


def checks_afterwards(
    place: Place,
    daemon: DaemonProcess,
    ledger: Ledger,
    visitor: Visitor,
    scraper: Scraper,
    jobs: Sequence[JobLine],
    memory: Sequence[MemoryLine],
) -> list[Check]:
    """What is left when the daemon has ended."""
    return [
        check("branches held what was acknowledged", lambda: _visits(visitor)),
        check("jobs did what they had to", lambda: _jobs(jobs)),
        check("metrics were served", lambda: _scrapes(scraper)),
        check("memory", lambda: _memory(memory)),
        check("no process is left", lambda: _processes(place, daemon)),
        check("nothing mounted, nothing temporary is left", lambda: _leavings(place)),
        check("tl verify --data", lambda: _verify(place)),
        check("the head holds every acknowledged commit", lambda: _head(place, ledger)),
        check("garbage goes", lambda: _garbage(place)),
    ]


def _all_stored(place: Place, daemon: DaemonProcess) -> str:
    goal = Lsn.parse(place.primary.position())
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        state = daemon.archiver(CLUSTER)
        if state is not None and state.durable is not None and state.durable >= goal:
            return f"up to {state.durable}, tli {state.tli}"
        assert time.monotonic() < deadline, f"not up to {goal}: {state}"
        time.sleep(0.2)


def _slot(place: Place) -> str:
    rows = place.primary.sql(
        "select slot_name, active, wal_status from pg_replication_slots where slot_type = 'physical' "
        "and slot_name like 'tl%'"
    )
    assert len(rows) == 1, f"slots: {rows}"
    assert rows[0][1] and rows[0][2] in ("reserved", "extended"), f"slot: {rows[0]}"
    return f"{rows[0][0]}, {rows[0][2]}"


def _ended(daemon: DaemonProcess) -> str:
    began = time.monotonic()
    code = daemon.end()
    assert code == 0, f"exit code {code}: {daemon.said()[-1000:]}"
    return f"in {time.monotonic() - began:.1f} s"


def _visits(visitor: Visitor) -> str:
    wrong = [visit for visit in visitor.visits if visit.problem]
    assert not wrong, f"{len(wrong)} of {len(visitor.visits)}: {wrong[0]}"
    assert len(visitor.visits) >= 3, f"only {len(visitor.visits)} branches were made"
    return f"{len(visitor.visits)}, and {visitor.unavailable} refused while the store stalled"


def _jobs(jobs: Sequence[JobLine]) -> str:
    for job in jobs:
        strange = set(job.codes) - FINE_CODES
        assert not strange, f"{job.name}: exit codes {job.codes}: {job.messages}"
        assert job.codes.get(0), f"{job.name} never succeeded: {job.codes}: {job.messages}"
    missing = {"gc", "verify", "verify-data", "drill", "backup", "expire"} - {job.name for job in jobs}
    assert not missing, f"never ran: {sorted(missing)}"
    return ", ".join(f"{job.name} {job.runs}" for job in jobs)


def _scrapes(scraper: Scraper) -> str:
    assert scraper.scrapes and not scraper.failures, f"{scraper.failures} of {scraper.scrapes} failed"
    return f"{scraper.scrapes} times"


def _memory(memory: Sequence[MemoryLine]) -> str:
    wrong = [line for line in memory if not line.passed]
    assert not wrong, f"{wrong}"
    assert {"daemon", "archive"} <= {line.name for line in memory}, f"not seen: {memory}"
    return ", ".join(f"{line.name} {line.peak_mb:.0f}" for line in memory)


def _processes(place: Place, daemon: DaemonProcess) -> str:
    place.desk.end_agent()
    place.host.end_agent()
    deadline = time.monotonic() + 20
    while left := [*daemon.relatives(), *relatives_of(place.desk.environment["TL_STATE"])]:
        told = [
            Path(f"/proc/{pid}/cmdline").read_bytes()[:200] for pid in left if Path(f"/proc/{pid}").exists()
        ]
        assert time.monotonic() < deadline, f"{told}"
        time.sleep(0.2)
    return ""


def _leavings(place: Place) -> str:
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(place.directory) in line]
    assert not mounts, f"mounts: {mounts}"
    for host in (place.host, place.desk):
        left = sorted(str(path) for path in (host.directory / "tmp").iterdir())
        assert not left, f"temporary files: {left}"
    branches = place.desk.branches() + place.host.branches()
    assert not branches, f"branches: {branches}"
    return ""


def _verify(place: Place) -> str:
    done = place.desk.run("verify", "--data", "--json", timeout=600)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-1000:]} {done.stderr[-500:]}"
    return ""


def _head(place: Place, ledger: Ledger) -> str:
    made = place.desk.tl("branch", "head")
    try:
        with psycopg.connect(made["dsn"]) as connection:
            found = {int(str(row[0])) for row in connection.execute(f"select id from {TABLE}").fetchall()}
    finally:
        place.desk.run("delete", "head", "--yes")
        place.desk.end_agent()
    on_line = place.line.holds()
    entries = ledger.entries()
    lacking = sorted({entry.number for entry in entries if on_line(entry)} - found)
    assert not lacking, f"{len(lacking)} are missing, the first of them {lacking[0]}"
    return f"{len(entries):,} acknowledged, {len(found):,} rows, {ledger.reconnects} times connected anew"


def orphans_kept(place: Place, ledger: Ledger) -> str:
    """What was acknowledged on a line that the source has just left is in the store as that line (EDGE 18).

    Asked before retention may forget it. Raises AssertionError.
    """
    on_line = place.line.holds()
    newest = max(place.line.forks)
    left = [entry for entry in ledger.entries() if entry.tli == newest and not on_line(entry)]
    assert left, "the standby was to lack some commits"
    kept, committed = asyncio.run(_committed(place, {newest}))
    assert newest in kept, f"nothing of tli {newest} is in the store"
    missing = [entry for entry in left if entry.xid not in committed[newest]]
    assert not missing, f"{len(missing)} of {len(left)} are nowhere, the first of them {missing[0]}"
    return f"{len(left)} commits beyond {place.line.forks[newest]} of tli {newest}"


async def _committed(place: Place, tlis: set[int]) -> tuple[dict[int, Lsn], dict[int, set[int]]]:
    """Where the kept WAL of these tlis begins, and the xids that committed in it."""
    store = S3Store(URL.split("/")[2], URL.split("/")[3], endpoint_url=place.seaweed.endpoint_url)
    try:
        history = await History.load(store)
        starts: dict[int, Lsn] = {}
        xids: dict[int, set[int]] = {}
        for tli in sorted(tlis):
            sealed = [one for one in history.state.sealed if one.tli == tli]
            tail = await history.tail(tli)
            if not sealed and not tail.chunks:
                continue
            begin = sealed[0].start if sealed else tail.start
            # The last stretch without a hole.
            for before, after in itertools.pairwise(sealed):
                begin = after.start if before.end != after.start else begin
            scanner = WalScanner(16 << 20, tli, begin)
            starts[tli], xids[tli] = begin, set()
            async with aclosing(history.wal([Span(tli, begin, tail.end)])) as pieces:
                async for piece in pieces:
                    commits = scanner.feed(bytes(piece.data)).commits
                    xids[tli].update(int(xid) for xid in commits["xid"][commits["kind"] == CommitKind.COMMIT])
        return starts, xids
    finally:
        await store.aclose()


def _garbage(place: Place) -> str:
    """Two runs of gc with no grace take all there is; and the daemon's own runs have taken some before."""
    client = place.seaweed.client()
    before = store_size(client, 0)
    deleted = 0
    for _ in range(4):
        time.sleep(1.5)
        told = place.desk.tl("gc", "--yes", "--grace", "1s")
        deleted += told["deleted"]["objects"] if told["deleted"] is not None else 0
    after = store_size(client, 0)
    last = json.loads(place.desk.run("gc", "--json").stdout.strip().splitlines()[-1])
    left = last["garbage"]["kinds"]
    objects = sum(kind["objects"] for kind in left.values())
    assert objects <= 4, f"still garbage: {left}"
    named = last["stored"]["objects"]
    log_and_rest = after.objects - after.chunks - named
    assert log_and_rest <= 250, f"{log_and_rest} objects beside chunks, packs and manifests"
    assert after.megabytes <= before.megabytes
    return f"{deleted} objects in the end, {before.megabytes:.1f} MB became {after.megabytes:.1f} MB in {after.objects}"
