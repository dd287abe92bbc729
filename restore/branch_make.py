"""From a request to a running, isolated Postgres at T: the stages, and what runs beside what.

Crash and cancellation: everything made is in the branch's directory (and its socket directory), whose
``branch.json`` says ``making`` until the very end, and names mount and process before they matter;
whoever finds it without its maker removes it all. A failed or cancelled make leaves its process and mount
to the caller's clean-up, which is the same.

Order that matters: nothing connects before the isolation step is done (EDGE 56, P8); a branch that has no
checkpoint of its own yet is never resumed (EDGE 57), and Postgres begins that checkpoint when it is ready.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import platform
import shutil
import socket
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path

from restore.binaries import Binaries, find_binaries, library_directory
from restore.branch_request import AUTO, COPY_LIMIT_BYTES, BranchRequest, Listen
from restore.branch_scripts import run_scripts
from restore.branches import Branches
from restore.compute import Instance, Launch, Postmaster, launch, promoted_at, stop
from restore.data_files import PlainDirectory, configure, lay_out
from restore.eager import read_listing, write_control, write_files
from restore.host import Host
from restore.host_support import host_support
from restore.icu_memory import IcuMemory
from restore.isolation import Endpoint, isolate
from restore.lazy_data import make_overlay, mount_data
from restore.lazy_host import lazy_obstacle
from restore.local_branch import COPY, LAZY, LocalBranch, Origin, Server
from restore.metered_store import MeteredStore
from restore.plan import BranchPlan, WalSpan, bounds_as_of, make_plan
from restore.recovery import Recovery, is_whole, recovery_from_feed, recovery_in_place, signal_file
from restore.replay_task import FEED, WAL, announce, withdraw
from restore.settings import branch_settings
from restore.threads import to_the_end
from restore.wal_files import Feed, WalReader, feed_wal, write_histories, write_wal
from timeline.catalog.history import History
from timeline.catalog.line import incarnation_at
from timeline.catalog.parallel import in_parallel
from timeline.catalog.target import Target
from timeline.catalog.when import When, parse_when
from timeline.clock import Clock
from timeline.errors import CheckFailed, UsageError
from timeline.format.branch_state import Incarnation
from timeline.format.file_listing import FileListing
from timeline.format.wal_index import EventKind
from timeline.lsn import Lsn
from timeline.pg.control import CONTROL_FILE, parse_control
from timeline.pg.segment import segment_start
from timeline.store.base import NearStore, Store
from timeline.store.open import open_store

PORT = 5432
"""Every branch has a socket directory of its own, so all can have the usual port."""
_READY_SECONDS = 300.0
_REPLAY_BYTES_PER_SECOND = 2_000_000
"""Slower replay than this, with a store far away, is taken for a hang."""
_STOP_SECONDS = 60.0
_FREE_BYTES = 1 << 30
"""A copy leaves at least this much of the disk."""


class BranchMaker:
    """Makes one branch whose name and directory are reserved."""

    def __init__(
        self,
        request: BranchRequest,
        branch: LocalBranch,
        branches: Branches,
        clock: Clock,
        environ: Mapping[str, str],
    ) -> None:
        self.request = request
        self.branch = branch
        self.store: MeteredStore | None = None
        """Counts the requests of this process; the mount counts its own."""
        self._branches = branches
        self._host: Host = branches.host
        self._directory = branches.directory(branch.id)
        self._clock = clock
        self._environ = environ
        self._warnings: list[str] = []
        self._near = False
        self._first_start: Launch | None = None

    @property
    def data(self) -> Path:
        """The branch's data directory."""
        return self._directory / "data"

    async def make(self) -> LocalBranch:
        """All of it; the branch, running and isolated, in a phase that the caller changes to ready.

        Raises what names the cause: UsageError, TargetUnreachable, DamagedStore, Unavailable, TimelineError.
        """
        if self.request.listen is not None:
            check_free(self.request.listen)
        address = self.request.store
        opened = await open_store(
            address.url, endpoint_url=address.endpoint_url, region=address.region, clock=self._clock
        )
        self._near = isinstance(opened, NearStore)
        self.store = MeteredStore(opened)
        try:
            return await self._make(self.store)
        finally:
            await self.store.aclose()

    async def _make(self, store: Store) -> LocalBranch:
        history = await History.load(store, self.request.parent)
        target = await history.resolve(
            await self._when(history),
            tli=self.request.tli,
            stock=self.request.stock,
            without=self.request.without,
        )
        incarnation = incarnation_at(history.state, target.lsn)
        check_architecture(incarnation)
        binaries = find_binaries(incarnation.major, self._environ)
        check_preload(self.request.preload, binaries)
        plan = plan_branch(history, target, incarnation)
        self._warnings += [*await history.remarks(target.tli), *_remarks(target)]
        self._record(store, plan, target, binaries)
        wal = self._host.make_private(self._directory / WAL)
        write_histories(plan, wal, self._host)
        instance = Instance(self._host, binaries, self.data, self._directory / "postgres.log")
        control: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def show() -> None:
            await (self._show if self.branch.mode == LAZY else self._copy)(store, plan, binaries, wal)
            control.set_result(await to_the_end((self.data / CONTROL_FILE).read_bytes))

        showing = show()
        read = wal_reader(history)
        creates = tablespace_creates(target)
        if is_whole(plan):
            writing = write_wal(
                plan, read, wal, self._host, creates=creates, control=lambda: asyncio.shield(control)
            )
            await together(showing, writing)
            postmaster = await self._recover(instance, plan, recovery_in_place(plan))
        else:
            feed = Feed(self._directory / FEED)
            feed.create(self._host)
            feeding = asyncio.create_task(
                feed_wal(
                    plan,
                    read,
                    feed,
                    self._host,
                    self._clock,
                    creates=creates,
                    control=lambda: asyncio.shield(control),
                )
            )
            try:
                await showing
                recovery = recovery_from_feed(plan, feed.restore_command)
                postmaster = await _unless(feeding, self._recover(instance, plan, recovery))
            finally:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
        check_promotion(self.data, wal, plan)
        server = self._server
        endpoint = Endpoint(server.sockets, server.port, server.superuser)
        if not self.request.untouched:
            self._warnings += await isolate(
                self.data, endpoint, binaries, incarnation, IcuMemory(self._host.state)
            )
            await run_scripts(self.request.scripts, self._directory, endpoint, binaries, instance.log)
        if self._first_start is not None:
            self._first_start.check_once()
        if self.request.listen is not None:
            postmaster = await self._listen(instance, postmaster)
        self._note(postmaster)
        shutil.rmtree(self._directory / FEED, ignore_errors=True)
        return self.branch

    async def _when(self, history: History) -> When:
        when = self.request.when
        if not isinstance(when, str):
            return when
        relative = when.strip().lower().endswith("ago")
        return parse_when(when, self.request.zone, await history.source_clock() if relative else None)

    def _lay_out(self, plan: BranchPlan, binaries: Binaries, wal: Path, control: bytes) -> None:
        """Make the snapshot's files the branch's, in a directory that Postgres has not seen yet."""
        settings = branch_settings(
            plan.incarnation.major,
            plan.snapshot.settings,
            bounds_as_of(parse_control(control), plan.events),
            host_support(binaries),
            name=self.branch.name,
            sockets=str(self._branches.sockets(self.branch.id)),
            port=PORT,
            preload=self.request.preload,
        )
        if self.request.untouched:
            # Replay from a redo point of ours that begins anew finds pages half written, and images of none (EDGE 57).
            settings = settings.replacing(autovacuum="off", restart_after_crash="off")
        self._warnings += settings.warnings
        self._settings = settings
        self._files = live_directory(self.data, self._host, self.branch)
        lay_out(self._files, plan, settings, wal, signal=signal_file(plan))

    def _record(self, store: Store, plan: BranchPlan, target: Target, binaries: Binaries) -> None:
        """Write down what the branch will be, before anything is mounted or started for it."""
        sockets = self._host.make_private(self._branches.sockets(self.branch.id))
        self.branch = dataclasses.replace(
            self.branch,
            origin=Origin(
                store_url=store.url,
                endpoint_url=self.request.store.endpoint_url,
                region=self.request.store.region,
                parent=self.request.parent,
                tli=target.tli,
                lsn=target.lsn,
                last_record=target.last_record,
                time=target.time,
                last_commit_time=target.last_commit.time if target.last_commit else None,
                next_commit_time=target.next_commit.time if target.next_commit else None,
                snapshot_id=target.snapshot.id,
                snapshot_lsn=target.snapshot.lsn,
            ),
            server=Server(
                major=binaries.major,
                bin_directory=str(binaries.directory),
                superuser=plan.incarnation.superuser,
                sockets=str(sockets),
                port=PORT,
                listen=None,
            ),
            replayed_bytes=plan.replayed_bytes,
            preload=self.request.preload,
            run=self.request.scripts.run,
        )
        self._branches.save(self.branch)

    async def _show(self, store: Store, plan: BranchPlan, binaries: Binaries, wal: Path) -> None:
        """Lazy: mount, and change what shows through the mount."""
        await to_the_end(lambda: make_overlay(self._directory))
        announce(plan, self._directory, near=self._near)
        await mount_data(
            self._directory, self.branch, plan.snapshot, self._host, cache_bytes=self.request.cache_bytes
        )

        def change() -> None:
            self._lay_out(plan, binaries, wal, (self.data / CONTROL_FILE).read_bytes())

        await to_the_end(change)

    async def _copy(self, store: Store, plan: BranchPlan, binaries: Binaries, wal: Path) -> None:
        """Copy: write everything, pg_control last."""
        size = plan.snapshot.bytes
        if self.request.mode == AUTO:
            obstacle = lazy_obstacle(self._host)
            if size > COPY_LIMIT_BYTES:
                raise UsageError(
                    f"this host cannot show the database lazily ({obstacle}), and a copy takes {size >> 30} GiB",
                    hint="--mode copy makes it all the same",
                )
            self._warnings.append(f"a full copy, because {obstacle}")
        check_room(self._directory, size)
        listing = await read_listing(store, plan.snapshot)
        data = self._host.make_private(self.data)
        owner = self._host.account if self._host.switches_user else None
        await write_files(store, plan.snapshot, listing, data, owner)

        def finish() -> None:
            self._lay_out(plan, binaries, wal, control_content(listing))
            write_control(listing, data, owner)

        await to_the_end(finish)

    async def _recover(self, instance: Instance, plan: BranchPlan, recovery: Recovery) -> Postmaster:
        """The first start: recovery to T and promotion."""
        # WAL since a base backup has images of all pages; WAL since a redo point of ours has not.
        once = plan.redo_point is not None
        starting = launch(instance, options=recovery.options, promotes=recovery.promotes, once=once)
        self._first_start = starting
        self._note(starting.postmaster)
        syncing = asyncio.ensure_future(to_the_end(self._sync))
        try:
            postmaster = await starting.wait(self._clock, ready_seconds=ready_seconds(plan.replayed_bytes))
        finally:
            withdraw(self._directory)
            await asyncio.gather(syncing, return_exceptions=True)
        syncing.result()
        return postmaster

    def _sync(self) -> None:
        """What we wrote must not be lost with the host once the branch counts as born."""
        if self.branch.durable:
            self._files.sync()

    async def _listen(self, instance: Instance, postmaster: Postmaster) -> Postmaster:
        """Open TCP, now that the branch is isolated: a restart, for nobody may have come in before."""
        listen = self.request.listen
        if listen is None:
            return postmaster
        await stop(postmaster, self._clock, seconds=_STOP_SECONDS)
        settings = self._settings.replacing(listen_addresses=listen.address, port=str(listen.port))
        configure(self._files, settings, listens=True)
        await to_the_end(self._sync)
        self.branch = dataclasses.replace(
            self.branch,
            server=dataclasses.replace(self._server, port=listen.port, listen=listen.address),
        )
        starting = launch(instance)
        self._note(starting.postmaster)
        return await starting.wait(self._clock, ready_seconds=_READY_SECONDS)

    @property
    def _server(self) -> Server:
        if self.branch.server is None:
            raise RuntimeError("the branch is not planned yet")
        return self.branch.server

    def _note(self, postmaster: Postmaster) -> None:
        """Write down the process, so that no crash of ours leaves it unknown."""
        self.branch = dataclasses.replace(
            self.branch,
            server=dataclasses.replace(self._server, pid=postmaster.pid, pid_started=postmaster.started),
            warnings=tuple(self._warnings),
        )
        self._branches.save(self.branch)


def control_content(listing: FileListing) -> bytes:
    """The snapshot's pg_control, which the listing itself holds; raises CheckFailed."""
    row = listing.get(CONTROL_FILE)
    if row is None or row.content is None:
        raise CheckFailed(f"the snapshot holds no {CONTROL_FILE}")
    return row.content


def plan_branch(history: History, target: Target, incarnation: Incarnation) -> BranchPlan:
    """The plan, from what the catalog resolved."""
    return make_plan(
        snapshot=target.snapshot,
        incarnation=incarnation,
        tlis=history.state.tlis,
        tli=target.tli,
        lsn=target.lsn,
        last_record=target.last_record,
        events=target.events,
    )


def wal_reader(history: History) -> WalReader:
    """The history's WAL as the pieces that segment files are made from."""

    async def read(spans: Sequence[WalSpan]) -> AsyncGenerator[tuple[Lsn, memoryview], None]:
        async with aclosing(history.wal(spans)) as pieces:
            async for found in pieces:
                yield found.piece.start, found.data

    return read


def tablespace_creates(target: Target) -> tuple[Lsn, ...]:
    """Where the index says that tablespaces are created."""
    return tuple(event.start for event in target.events if event.kind is EventKind.TABLESPACE_CREATE)


def check_promotion(data: Path, wal: Path, plan: BranchPlan) -> None:
    """Raise CheckFailed unless the branch left its parent's WAL exactly at T (P6, P7)."""
    _, left = promoted_at(data, wal)
    segment_bytes = plan.incarnation.segment_bytes
    # Postgres reads on after a page's header, and after a switch at the next segment: nothing lies between.
    skipped = plan.lsn - left
    next_segment = segment_start(plan.lsn + segment_bytes - 1, segment_bytes)
    if left == plan.lsn or (left % 8192 == 0 and 0 < skipped <= 40) or left == next_segment:
        return
    raise CheckFailed(f"recovery ended at {left}, not at {plan.lsn}")


def check_architecture(incarnation: Incarnation) -> None:
    """Raise UsageError when files of the source mean something else on this machine."""
    here = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())
    there = {"amd64": "x86_64", "arm64": "aarch64"}.get(incarnation.architecture, incarnation.architecture)
    if there and here != there:
        raise UsageError(f"the source runs on {there}, this host is {here}: its files cannot be used here")


def check_preload(preload: Sequence[str], binaries: Binaries) -> None:
    """Raise UsageError for a library that this host lacks (EDGE 45)."""
    if not preload:
        return
    directory = library_directory(binaries)
    if directory is None:
        raise UsageError(f"cannot tell where {binaries.directory} keeps its libraries")
    for library in preload:
        if os.path.basename(library) != library or not any(directory.glob(f"{library}.*")):
            raise UsageError(
                f"no library {library!r} in {directory}", hint="install it there, or leave it out"
            )


def check_free(listen: Listen) -> None:
    """Raise UsageError when the address cannot be listened on (EDGE 54)."""
    family = socket.AF_INET6 if ":" in listen.address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listen.address, listen.port))
        except OSError as error:
            raise UsageError(
                f"cannot listen on {listen.address}:{listen.port}: {error.strerror or error}",
                hint="choose another port",
            ) from None


def check_room(directory: Path, size_bytes: int) -> None:
    """Raise UsageError when a copy of that size does not fit on the disk."""
    free = shutil.disk_usage(directory).free
    if free < size_bytes + _FREE_BYTES:
        raise UsageError(
            f"a copy takes {size_bytes >> 20} MiB, and {directory} has {free >> 20} MiB free",
            hint="use --mode lazy, or set TL_STATE to a larger disk",
        )


def ready_seconds(replayed_bytes: int) -> float:
    """How long a start with so much WAL to replay may take."""
    return _READY_SECONDS + replayed_bytes / _REPLAY_BYTES_PER_SECOND


def live_directory(data: Path, host: Host, branch: LocalBranch) -> PlainDirectory:
    """The data directory of an existing branch, for changing its configuration."""
    # A mount shows everything as the server's own, and lets nobody change that.
    return PlainDirectory(
        data, host if branch.mode == COPY else dataclasses.replace(host, switches_user=False)
    )


def _remarks(target: Target) -> list[str]:
    copies = sum(event.kind is EventKind.DATABASE_CREATE_FILE_COPY for event in target.events)
    remarks = []
    if copies:
        remarks.append(
            f"{copies} databases were copied file by file shortly before: replay reads all of them"
        )
    if target.snapshot.checksum_failures:
        remarks.append(
            f"the base backup counted {target.snapshot.checksum_failures} pages with wrong checksums"
        )
    return remarks


async def together(*parts: Awaitable[None]) -> None:
    """All of them at once; the first failure cancels the rest and is raised."""

    async def run(part: Awaitable[None]) -> None:
        await part

    await in_parallel(parts, run, limit=len(parts))


async def _unless(feeding: asyncio.Task[None], starting: Awaitable[Postmaster]) -> Postmaster:
    """The started server; the feeder's failure, if that comes first."""
    start = asyncio.ensure_future(starting)
    await asyncio.wait({feeding, start}, return_when=asyncio.FIRST_COMPLETED)
    if not start.done() and feeding.exception() is not None:
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        feeding.result()
    return await start
