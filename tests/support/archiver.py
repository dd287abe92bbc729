"""An archiver process beside a server, and what a test asks the store afterwards."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.postgres import PostgresServer
from timeline.catalog.branch_log import BranchLog, LogHead
from timeline.catalog.meta import create_store
from timeline.catalog.tail import Tail, find_tail, read_chunk
from timeline.clock import SystemClock
from timeline.lsn import Lsn
from timeline.store.open import open_store

ROOT = Path(__file__).resolve().parents[2]


class ArchiverProcess:
    """``with ArchiverProcess(url, conninfo, max_delay_seconds=0.1) as archiver: …``; killed at the end.

    Keyword arguments are settings of ArchiverConfig. ``faults=True``: ``command`` controls the store.
    """

    def __init__(
        self,
        url: str,
        conninfo: str,
        *,
        endpoint_url: str | None = None,
        faults: bool = False,
        **settings: Any,
    ) -> None:
        settings = {"probe_seconds": 0.5, "max_delay_seconds": 0.1, **settings}
        self._command = [sys.executable, "-m", "tests.support.run_archiver", "--store", url]
        self._command += ["--conninfo", conninfo]
        if endpoint_url is not None:
            self._command += ["--endpoint-url", endpoint_url]
        if faults:
            self._command.append("--faults")
        for name, value in settings.items():
            self._command += ["--set", f"{name}={json.dumps(value)}"]
        self._process: subprocess.Popen[str] | None = None
        self._readers: list[threading.Thread] = []
        self._changed = threading.Condition()
        self.status: dict[str, Any] = {}
        """The last line it wrote."""
        self.history: collections.deque[dict[str, Any]] = collections.deque(maxlen=10_000)
        self.errors: collections.deque[str] = collections.deque(maxlen=1000)
        """Lines of its stderr."""

    def start(self) -> ArchiverProcess:
        """Start it (again)."""
        with self._changed:
            self.status = {}
        process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._process = process
        self._readers = [
            threading.Thread(target=self._read_status, args=(process,), daemon=True),
            threading.Thread(target=self._read_errors, args=(process,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        return self

    @property
    def pid(self) -> int:
        """Its process id."""
        if self._process is None:
            raise RuntimeError("the archiver was not started")
        return self._process.pid

    @property
    def durable(self) -> Lsn:
        """As it last said; 0 before that."""
        return Lsn(self.status.get("durable") or 0)

    def command(self, line: str) -> None:
        """Control its store (``faults=True``): ``freeze``, ``thaw``, ``fail``, ``slow SECONDS``."""
        if self._process is None or self._process.stdin is None:
            raise RuntimeError("the archiver was not started")
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def wait_until(
        self, condition: Callable[[dict[str, Any]], bool], *, seconds: float = 30.0
    ) -> dict[str, Any]:
        """The status for which ``condition`` holds; RuntimeError when it ends or takes too long."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not (self.status and condition(self.status)):
                left = deadline - time.monotonic()
                ended = self._process is None or self._process.poll() is not None
                if left <= 0 or ended:
                    what = "ended" if ended else "took too long"
                    raise RuntimeError(f"the archiver {what}: {self.status}, {list(self.errors)[-20:]}")
                self._changed.wait(min(left, 0.2))
            return self.status

    def wait_durable(self, lsn: int, *, seconds: float = 30.0) -> None:
        """Until it says that everything before ``lsn`` is durable."""
        self.wait_until(lambda status: (status["durable"] or 0) >= lsn, seconds=seconds)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill9(self) -> None:
        """End it the hard way."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self._reap()

    def stop(self, *, seconds: float = 30.0) -> int:
        """Ask it to stop; its exit code."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        return self.wait(seconds=seconds)

    def wait(self, *, seconds: float = 30.0) -> int:
        """Wait for its end; its exit code."""
        if self._process is None:
            raise RuntimeError("the archiver was not started")
        code = self._process.wait(seconds)
        self._reap()
        return code

    def __enter__(self) -> ArchiverProcess:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            # A suspended process takes no SIGTERM.
            self._process.send_signal(signal.SIGCONT)
        self.kill9()

    def _reap(self) -> None:
        if self._process is None:
            return
        self._process.wait(30)
        for reader in self._readers:
            reader.join(10)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def _read_status(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            with self._changed:
                self.status = json.loads(line)
                self.history.append(self.status)
                self._changed.notify_all()

    def _read_errors(self, process: subprocess.Popen[str]) -> None:
        for line in process.stderr or ():
            self.errors.append(line.rstrip())


def make_store(path: Path) -> str:
    """A new directory store; its URL."""

    async def make() -> None:
        store = await open_store(str(path))
        try:
            await create_store(store, SystemClock())
        finally:
            await store.aclose()

    asyncio.run(make())
    return str(path)


def log_head(url: str, *, endpoint_url: str | None = None) -> LogHead:
    """The head of ``main``'s log."""

    async def load() -> LogHead | None:
        store = await open_store(url, endpoint_url=endpoint_url)
        try:
            return await BranchLog(store, "main", SystemClock(), "test").load()
        finally:
            await store.aclose()

    head = asyncio.run(load())
    if head is None:
        raise RuntimeError("the log has not begun")
    return head


def tail_of(url: str, tli: int, *, endpoint_url: str | None = None) -> Tail:
    """The chain of chunks of a tli."""

    async def find() -> Tail:
        store = await open_store(url, endpoint_url=endpoint_url)
        try:
            head = await BranchLog(store, "main", SystemClock(), "test").load()
            if head is None:
                raise RuntimeError("the log has not begun")
            return await find_tail(store, head.state, tli)
        finally:
            await store.aclose()

    return asyncio.run(find())


def stored_wal(url: str, tli: int, *, endpoint_url: str | None = None) -> tuple[Lsn, bytes]:
    """(start, bytes) of the unsealed chain of a tli, every chunk verified."""

    async def read() -> tuple[Lsn, bytes]:
        store = await open_store(url, endpoint_url=endpoint_url)
        try:
            head = await BranchLog(store, "main", SystemClock(), "test").load()
            if head is None:
                raise RuntimeError("the log has not begun")
            tail = await find_tail(store, head.state, tli)
            return tail.start, b"".join([(await read_chunk(store, chunk)).wal for chunk in tail.chunks])
        finally:
            await store.aclose()

    return asyncio.run(read())


def server_wal(server: PostgresServer, tli: int, start: int, end: int) -> bytes:
    """The same bytes out of the server's own segment files."""
    segment_bytes = int(server.value("select setting from pg_settings where name = 'wal_segment_size'"))
    return b"".join(_segments(server.data / "pg_wal", tli, start, end, segment_bytes))


def _segments(directory: Path, tli: int, start: int, end: int, segment_bytes: int) -> Iterator[bytes]:
    at = start
    while at < end:
        per_id = (1 << 32) // segment_bytes
        number = at // segment_bytes
        with (directory / f"{tli:08X}{number // per_id:08X}{number % per_id:08X}").open("rb") as segment:
            segment.seek(at % segment_bytes)
            data = segment.read(min(segment_bytes - at % segment_bytes, end - at))
        yield data
        at += len(data)


def flushed(server: PostgresServer) -> Lsn:
    """End of the server's flushed WAL."""
    return Lsn.parse(server.value("select pg_current_wal_flush_lsn()"))
