"""The ledger: one writer that remembers which commits were acknowledged, and where in the WAL.

COMMIT waits for the archiver (it is the synchronous standby), so what was acknowledged is in the store, whatever
becomes of the servers (P1).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psycopg

from timeline.lsn import Lsn

PAUSE_SECONDS = 0.05
TABLE = "ledger"


@dataclass(frozen=True, slots=True)
class Entry:
    """A commit whose acknowledgement came."""

    number: int
    xid: int
    tli: int
    lsn: Lsn
    """An end of the WAL after it: everything before it was written before."""
    at: float
    """Monotonic, when it was acknowledged."""


class Ledger:
    """``start``, ``stop``; the rest may be asked at any time from any thread."""

    def __init__(self, conninfo: str) -> None:
        """``conninfo`` names both servers and wants the one that can be written to."""
        self._conninfo = conninfo
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._entries: list[Entry] = []
        self._unknown: set[int] = set()
        self._next = 1
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.reconnects = 0

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self) -> None:
        """End after the present commit; raises what made the writer fail."""
        self._stop.set()
        self._thread.join(60)
        if self._failure is not None:
            raise RuntimeError("the ledger's writer failed") from self._failure
        if self._thread.is_alive():
            raise RuntimeError("the last COMMIT of the ledger does not return")

    def entries(self) -> tuple[Entry, ...]:
        """Everything acknowledged so far, in order."""
        with self._lock:
            return tuple(self._entries)

    def unknown(self) -> frozenset[int]:
        """Numbers whose COMMIT was sent, perhaps, and not answered."""
        with self._lock:
            return frozenset(self._unknown)

    def wait_for_more(self, seconds: float = 120.0) -> None:
        """Until another commit is acknowledged: the source takes commits, and the store their WAL."""
        known = len(self.entries())
        deadline = time.monotonic() + seconds
        while len(self.entries()) <= known + 1:
            if time.monotonic() > deadline or not self._thread.is_alive():
                raise RuntimeError(f"no commit was acknowledged for {seconds:.0f} s")
            time.sleep(0.1)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with psycopg.connect(
                    self._conninfo, autocommit=True, connect_timeout=5, options="-c synchronous_commit=on"
                ) as connection:
                    self._write(connection)
            except psycopg.Error:
                self.reconnects += 1
                self._stop.wait(0.2)
            except BaseException as error:  # noqa: BLE001 - shown by stop()
                self._failure = error
                return

    def _write(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        cancelled: list[str] = []
        connection.add_notice_handler(lambda notice: cancelled.append(str(notice.message_primary)))
        while not self._stop.is_set():
            number, self._next = self._next, self._next + 1
            with self._lock:
                self._unknown.add(number)
            row = connection.execute(
                f"insert into {TABLE} values (%s) returning pg_current_xact_id()::text::bigint", (number,)
            ).fetchone()
            if cancelled:
                # It is committed on the server and did not wait: nobody promised anything.
                cancelled.clear()
                continue
            where = connection.execute(
                "select lsn::text, pg_walfile_name(lsn) from (select pg_current_wal_insert_lsn() lsn) a"
            ).fetchone()
            assert row is not None and where is not None
            entry = Entry(
                number,
                int(str(row[0])),
                int(str(where[1])[:8], 16),
                Lsn.parse(str(where[0])),
                time.monotonic(),
            )
            with self._lock:
                self._unknown.discard(number)
                self._entries.append(entry)
            self._stop.wait(PAUSE_SECONDS)


class Line:
    """Which entries are of the line that the source is on; the others went with servers that were left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forks: dict[int, Lsn] = {}

    def left(self, tli: int, fork: Lsn) -> None:
        """The source left this tli there."""
        with self._lock:
            self._forks[tli] = fork

    @property
    def forks(self) -> dict[int, Lsn]:
        """By the tli that was left."""
        with self._lock:
            return dict(self._forks)

    def holds(self) -> Callable[[Entry], bool]:
        """Whether an entry is on the line as it is now.

        An entry's LSN is read after its commit, so one on the line may seem to be just beyond the fork: such a one
        counts as unknown.
        """
        forks = self.forks
        return lambda entry: entry.tli not in forks or entry.lsn <= forks[entry.tli]
