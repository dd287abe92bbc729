"""What goes on all the time: pgbench on whichever server takes writes, and branches that come and go."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psycopg

from tests.soak.ledger import TABLE, Entry, Ledger
from tests.soak.place import Place

BENCH_SECONDS = 5
BENCH_RATE = 60
"""Transactions a second."""
YOUNGEST_SECONDS = 2.0
"""A branch is of a moment at least so old, for the archiver to have stored it."""
_UNAVAILABLE = 7


@dataclass(frozen=True, slots=True)
class Visit:
    """A branch that was made, asked and deleted."""

    lsn: str
    seconds: float
    """Until it took its first query."""
    rows: int
    problem: str
    """Empty: it held what it had to."""


def judge(
    found: set[int],
    moment: Entry,
    entries: tuple[Entry, ...],
    unknown: frozenset[int],
    on_line: Callable[[Entry], bool],
) -> str:
    """What is wrong with a branch at a moment's LSN (P6); empty: nothing. Pure."""
    expected = {entry.number for entry in entries if on_line(entry) and entry.lsn <= moment.lsn}
    doubtful = unknown | {entry.number for entry in entries if not on_line(entry)}
    later = {entry.number for entry in entries if on_line(entry) and entry.lsn > moment.lsn}
    missing = expected - found
    if missing:
        return f"lacks {len(missing)} acknowledged commits, the first of them {min(missing)}"
    if found & later:
        return f"holds {len(found & later)} later commits, the first of them {min(found & later)}"
    if strange := found - expected - doubtful:
        return f"holds {len(strange)} rows that nobody wrote by then, the first of them {min(strange)}"
    return ""


class Bench:
    """pgbench, again and again; what breaks it is part of the soak."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.runs = 0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End with the present run."""
        self._stop.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._stop.is_set():
            server = self._place.primary
            done = server.tool(
                "pgbench", "-n", "-c", "2", "-T", str(BENCH_SECONDS), "-R", str(BENCH_RATE),
                "-h", str(server.sockets), "-p", str(server.port), "-U", "postgres", "postgres", check=False,
            )  # fmt: skip
            self.runs += done.returncode == 0
            if done.returncode != 0:
                self._stop.wait(0.5)


class Visitor:
    """Makes branches at random moments of the ledger, asks them, and deletes them."""

    def __init__(self, place: Place, ledger: Ledger, seed: int) -> None:
        self._place = place
        self._ledger = ledger
        self._draw = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._failure: BaseException | None = None
        self.stalled = threading.Event()
        """While it is set, a branch may fail with exit code 7."""
        self.visits: list[Visit] = []
        self.unavailable = 0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End with the present branch; raises what made it fail."""
        self._stop.set()
        self._thread.join(180)
        if self._thread.is_alive():
            raise RuntimeError("a branch does not come to an end")
        if self._failure is not None:
            raise RuntimeError("branches could not be made") from self._failure

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(0.5):
            number += 1
            try:
                self._visit(f"b{number}")
            except BaseException as error:  # noqa: BLE001 - shown by stop()
                self._failure = error
                return

    def _visit(self, name: str) -> None:
        now = time.monotonic()
        youngest, oldest = now - YOUNGEST_SECONDS, now - self._place.plan.window_seconds / 2
        on_line = self._place.line.holds()
        known = [entry for entry in self._ledger.entries() if oldest < entry.at < youngest and on_line(entry)]
        if not known:
            return
        moment = self._draw.choice(known)
        stalled = self.stalled.is_set()
        host = self._place.desk
        made = host.run("branch", name, "--at", str(moment.lsn), "--json", timeout=240)
        told = json.loads(made.stdout.strip().splitlines()[-1]) if made.stdout.strip() else {}
        if made.returncode != 0:
            if made.returncode == _UNAVAILABLE and (stalled or self.stalled.is_set()):
                self.unavailable += 1
                return
            if not self._place.line.holds()(moment):
                # A failover came between: the moment is on the line that was left.
                return
            age = time.monotonic() - moment.at
            problem = f"exit code {made.returncode} for a moment {age:.0f} s old: {made.stdout[-600:]} {made.stderr[-600:]}"
            self.visits.append(Visit(str(moment.lsn), 0.0, 0, problem))
            return
        try:
            with psycopg.connect(told["dsn"]) as connection:
                found = {int(str(row[0])) for row in connection.execute(f"select id from {TABLE}").fetchall()}
        finally:
            deleted = host.run("delete", name, "--yes", "--json", timeout=120)
        problem = judge(
            found, moment, self._ledger.entries(), self._ledger.unknown(), self._place.line.holds()
        )
        if deleted.returncode != 0:
            problem += f" delete: exit code {deleted.returncode}: {deleted.stdout[-300:]}"
        self.visits.append(Visit(str(moment.lsn), float(told["elapsed_seconds"]), len(found), problem))


class Scraper:
    """A Prometheus: asks for the metrics every few seconds."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.scrapes = 0
        self.failures = 0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        import urllib.request

        while not self._stop.wait(5):
            self.scrapes += 1
            with contextlib.suppress(OSError), urllib.request.urlopen(self._url, timeout=10) as answer:
                if b"tl_" in answer.read():
                    continue
            self.failures += 1
