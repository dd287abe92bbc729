"""A real server with a real archiver beside it: a store that fills while a test works."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.support.postgres import PostgresServer
from timeline.archive.basebackup import BackupOptions, BackupReport, take_base_backup
from timeline.archive.runner import Archiver
from timeline.archive.status import ArchiverConfig
from timeline.catalog.branch_log import BranchLog
from timeline.catalog.history import wait_for
from timeline.catalog.meta import create_store
from timeline.clock import SystemClock
from timeline.lsn import Lsn
from timeline.maintain.seal import seal
from timeline.store.base import Store
from timeline.store.open import open_store

CLOCK = SystemClock()
_SECONDS = 60.0


class ArchivedServer:
    """One server and the store it is archived into."""

    def __init__(self, server: PostgresServer, url: str, *, endpoint_url: str | None = None) -> None:
        self.server = server
        self.url = url
        self.endpoint_url = endpoint_url
        self._failure: BaseException | None = None

    async def open(self) -> Store:
        """A client of the store; the caller closes it."""
        return await open_store(self.url, endpoint_url=self.endpoint_url)

    def position(self) -> Lsn:
        """The end of the server's WAL, once the store holds it; no transaction may be under way."""
        lsn = Lsn.parse(self.server.position())
        asyncio.run(self._wait(lsn))
        return lsn

    def back_up(self) -> BackupReport:
        """A base backup."""

        async def run() -> BackupReport:
            store = await self.open()
            log = BranchLog(store, "main", CLOCK, CLOCK.token(8))
            try:
                return await take_base_backup(
                    self.server.conninfo, store, log, CLOCK, options=BackupOptions(fast_checkpoint=True)
                )
            finally:
                await store.aclose()

        return asyncio.run(run())

    def seal(self) -> None:
        """Move what can be moved from chunks to packs."""

        async def run() -> None:
            store = await self.open()
            try:
                await seal(store, BranchLog(store, "main", CLOCK, CLOCK.token(8)), CLOCK, force=True)
            finally:
                await store.aclose()

        asyncio.run(run())

    async def _wait(self, lsn: Lsn) -> None:
        store = await self.open()
        try:
            await wait_for(store, CLOCK, lsn, timeout_seconds=_SECONDS)
        finally:
            await store.aclose()

    @contextlib.contextmanager
    def archiving(self) -> Iterator[None]:
        """Run the archiver in a thread of its own."""
        begun = threading.Event()
        loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

        async def run() -> None:
            stop = asyncio.Event()
            store = await self.open()
            config = ArchiverConfig(
                conninfo=self.server.conninfo,
                allow_unbounded_slot=True,
                max_delay_seconds=0.05,
                requests_per_second=1000.0,
                probe_seconds=0.2,
            )
            archiver = Archiver(store, config, CLOCK)
            loops.append((asyncio.get_running_loop(), stop))
            running = asyncio.create_task(archiver.run(stop))
            waiting = asyncio.create_task(archiver.begun.wait())
            await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
            begun.set()
            try:
                await running
            finally:
                waiting.cancel()
                await store.aclose()

        def thread() -> None:
            try:
                asyncio.run(run())
            except BaseException as error:  # noqa: BLE001 - shown to the test, below
                self._failure = error
                begun.set()

        runner = threading.Thread(target=thread, name="archiver")
        runner.start()
        try:
            if not begun.wait(_SECONDS):
                raise RuntimeError("the archiver did not begin")
            yield
        finally:
            for loop, stop in loops:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(stop.set)
            runner.join(_SECONDS)
            if self._failure is not None:
                raise self._failure


@contextlib.contextmanager
def archived_server(
    server: PostgresServer, url: str | Path, *, endpoint_url: str | None = None
) -> Iterator[ArchivedServer]:
    """A new store at ``url`` with a base backup of the server and its WAL so far, and an archiver at work."""
    archived = ArchivedServer(server, str(url), endpoint_url=endpoint_url)

    async def create() -> None:
        store = await archived.open()
        try:
            await create_store(store, CLOCK)
        finally:
            await store.aclose()

    asyncio.run(create())
    with archived.archiving():
        archived.back_up()
        archived.position()
        yield archived
