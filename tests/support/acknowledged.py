"""Transactions that a synchronous COMMIT has acknowledged, and whether a store holds them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import psycopg

from tests.support.postgres import PostgresServer
from timeline.catalog.history import History
from timeline.catalog.line import Span
from timeline.format.wal_index import CommitKind
from timeline.lsn import Lsn
from timeline.pg.segment import segment_name
from timeline.pg.wal import WalScanner
from timeline.store.open import open_store

APPLICATION = "tl test writer"
BURST_MESSAGES = 7
"""1 MiB each: more than one chunk (4 MiB), so several uploads are in flight."""


class Writers:
    """Two threads that commit a row at a time, and one that commits bursts when told to.

    COMMIT hangs while no archiver runs: then they wait, too. A commit that never returned is neither
    acknowledged nor known to be lost.
    """

    def __init__(self, server: PostgresServer) -> None:
        server.sql("create table written (id bigint primary key, v text)")
        self._server = server
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._bursts = threading.Semaphore(0)
        self._failures: list[BaseException] = []
        self._changed = threading.Condition(self._lock)
        self._acknowledged: set[int] = set()
        self._xids: dict[int, int] = {}
        self._threads = [
            threading.Thread(target=self._work, args=(burst,), daemon=True) for burst in (False, False, True)
        ]

    def start(self) -> None:
        """Begin to write."""
        for thread in self._threads:
            thread.start()

    @property
    def attempted(self) -> dict[int, int]:
        """Xid of every id whose COMMIT was sent."""
        with self._lock:
            return dict(self._xids)

    def acknowledged(self) -> set[int]:
        """Ids whose COMMIT has returned. Raises what made a writer fail."""
        with self._lock:
            if self._failures:
                raise RuntimeError("a writer failed") from self._failures[0]
            return set(self._acknowledged)

    def burst(self) -> None:
        """Let the third one commit several chunks of WAL."""
        self._bursts.release()

    def wait_for_another(self, known: int, *, seconds: float) -> bool:
        """Until more than ``known`` commits are acknowledged; whether that came to pass in time."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._acknowledged) > known, seconds)

    def stop(self) -> None:
        """End them; a COMMIT that hangs ends with its connection."""
        self._stop.set()
        while any(thread.is_alive() for thread in self._threads):
            self._server.sql(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                f"where application_name = '{APPLICATION}'"
            )
            for thread in self._threads:
                thread.join(0.2)

    def _work(self, burst: bool) -> None:
        try:
            with self._server.connect(application_name=APPLICATION) as connection:
                notices: list[str] = []
                connection.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))
                while not self._stop.is_set():
                    if not burst or self._bursts.acquire(timeout=0.2):
                        self._commit(connection, burst)
                        if notices:
                            raise RuntimeError(f"COMMIT returned without its standby: {notices}")
        except psycopg.OperationalError as error:
            if not self._stop.is_set():
                self._fail(error)
        except BaseException as error:  # noqa: BLE001 - shown to the test by acknowledged()
            self._fail(error)

    def _commit(self, connection: psycopg.Connection[tuple[object, ...]], burst: bool) -> None:
        with self._lock:
            number = next(self._numbers)
        connection.execute("begin")
        row = connection.execute(
            "insert into written values (%s, repeat(md5(%s::text), 10)) "
            "returning pg_current_xact_id()::text::bigint",
            (number, number),
        ).fetchone()
        assert row is not None
        if burst:
            for _ in range(BURST_MESSAGES):
                connection.execute(
                    "select length(pg_logical_emit_message(true, 'burst', string_agg(md5(random()::text), ''))::text) "
                    "from generate_series(1, 32768)"
                )
        with self._lock:
            self._xids[number] = int(str(row[0]))
        connection.execute("commit")
        with self._changed:
            self._acknowledged.add(number)
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failures.append(error)


class StoredWal:
    """Reads tli 1 out of a store, compares it with the server's own files and collects commits."""

    def __init__(
        self, server: PostgresServer, archive: Path, url: str, *, endpoint_url: str | None = None
    ) -> None:
        self._server = server
        self._archive = archive
        self._url = url
        self._endpoint_url = endpoint_url
        self._segment_bytes = int(
            server.value("select setting from pg_settings where name = 'wal_segment_size'")
        )
        self._scanner: WalScanner | None = None
        self.start = Lsn(0)
        self.end = Lsn(0)
        """Compared so far."""
        self.committed: set[int] = set()
        """Xids of all commit records before ``end``."""
        self.detached = 0
        """Chunks behind a hole, when last looked: uploads that landed while an earlier one did not."""
        self.sealed = Lsn(0)

    def follow(self) -> Lsn:
        """Read on from ``end`` to the durable end; that end. AssertionError where a byte differs."""
        return asyncio.run(self._follow())

    async def _follow(self) -> Lsn:
        store = await open_store(self._url, endpoint_url=self._endpoint_url)
        try:
            history = await History.load(store)
            (tli,) = history.state.tlis
            tail = await history.tail(tli.tli)
            self.detached = len(tail.detached)
            assert tli.sealed >= self.sealed, "the sealed LSN went back"
            self.sealed = tli.sealed
            if self._scanner is None:
                self.start = self.end = tli.start
                self._scanner = WalScanner(self._segment_bytes, tli.tli, tli.start)
            assert tail.end >= self.end, f"the store ended at {self.end}, and now ends at {tail.end}"
            async with aclosing(history.wal([Span(tli.tli, self.end, tail.end)])) as pieces:
                async for piece in pieces:
                    assert piece.piece.start == self.end
                    data = bytes(piece.data)
                    assert data == self._servers_own(tli.tli, self.end, len(data)), (
                        f"differs after {self.end}"
                    )
                    found = self._scanner.feed(data)
                    ended = found.commits
                    self.committed.update(
                        int(xid) for xid in ended["xid"][ended["kind"] == CommitKind.COMMIT]
                    )
                    self.end = Lsn(self.end + len(data))
            assert self.end == tail.end
            return self.end
        finally:
            await store.aclose()

    def _servers_own(self, tli: int, start: int, count: int) -> bytes:
        return b"".join(self._parts(tli, start, start + count))

    def _parts(self, tli: int, at: int, end: int) -> Iterator[bytes]:
        while at < end:
            offset = at % self._segment_bytes
            count = min(self._segment_bytes - offset, end - at)
            yield self._segment(segment_name(tli, Lsn(at), self._segment_bytes), offset, count)
            at += count

    def _segment(self, name: str, offset: int, count: int) -> bytes:
        # Once archived it may go from pg_wal, so the archive is looked at on both sides of that.
        for directory in (self._archive, self._server.data / "pg_wal", self._archive):
            with contextlib.suppress(FileNotFoundError), (directory / name).open("rb") as file:
                file.seek(offset)
                return file.read(count)
        raise AssertionError(f"the server has no segment {name} any more")
