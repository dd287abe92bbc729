"""Snapshots from WAL alone: a server of our own replays to S, and what it changed is stored.

The builder is a branch that nobody ever connects to: mounted lazily, recovered by vanilla Postgres to a record
boundary S, promoted and shut down. What its overlay then holds is made a snapshot (overlay_snapshot.py). The source is
never asked, and every build proves that its archive replays.

Interrupted at any point nothing is committed, and the next build begins anew from the newest snapshot there is; an
overlay whose recovery was interrupted is never used (EDGE 57). Any number of builders may work on one branch: each commits
what it built, unless a newer snapshot of the line was committed meanwhile. On one host they take turns.

Bounds: STEP_BYTES of WAL (snapshot_pace.py) in one build, and what is empty beyond; AROUND_BYTES around a snapshot that does
not fit; a longer way is taken in steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

from restore.branch import HostBranches
from restore.branch_request import BranchRequest, StoreAddress
from restore.cache import DiskCache
from restore.eager import read_listing
from restore.fetcher import Counters, Fetcher
from restore.host import Host, find_host
from restore.lazy_host import lazy_obstacle
from restore.local_branch import LAZY, LocalBranch
from restore.overlay import Overlay
from restore.overlay_snapshot import Build, OverlaySnapshot
from restore.snapshot_pace import SPACING_BYTES, STEP_BYTES, Stand, step_bytes
from restore.source import ExtentSource
from restore.wal_files import RedoPointMisfit
from timeline.catalog.branch_log import BranchLog
from timeline.catalog.history import History
from timeline.catalog.line import Span, incarnation_at
from timeline.catalog.meta import read_meta
from timeline.catalog.target import Target
from timeline.catalog.when import AtLsn, Latest
from timeline.clock import Clock
from timeline.errors import CheckFailed, Unavailable, UsageError
from timeline.format.extent import BLOCK_BYTES
from timeline.ids import MAIN
from timeline.lsn import Lsn
from timeline.maintain.thin import RULES, Rule
from timeline.pg.redo_point import find_redo_point
from timeline.store.base import Store
from timeline.store.open import open_store

AROUND_BYTES = 2 * STEP_BYTES
"""Where replay cannot begin at the newest snapshot, a build may begin at the one before, if no more than this is replayed."""
_BACKUP_HINT = "branches replay from a base backup instead; `tl backup` makes a new one to build on"
_LOOKS_BYTES = (64 << 10, 1 << 20, 16 << 20)
"""How much WAL is searched for a redo point, one after the other."""
_THREADS = 2
_LIFE_SECONDS = 3600.0
"""A builder that was killed is deleted by the next build on its host, or after so long, if it had come to be a branch."""
_TURN_SECONDS = 0.2
"""Between two looks whether it is our turn."""


async def build_snapshots(
    address: StoreAddress,
    host: Host,
    clock: Clock,
    environ: Mapping[str, str],
    *,
    parent: str = MAIN,
    at_least_bytes: int = 1,
    wait_seconds: float = 0.0,
    rules: Sequence[Rule] = RULES,
    spacing_bytes: int = SPACING_BYTES,
) -> AsyncGenerator[Build, None]:
    """Build until less than ``at_least_bytes`` of WAL lies beyond the newest snapshot; one result for each step.

    ``wait_seconds``: how long to wait for another builder on this host; ``rules``: which older snapshots stay;
    ``spacing_bytes``: how far apart new ones are to be (snapshot_pace.py).
    Raises UsageError (no FUSE, no binaries), CheckFailed (what was built cannot be trusted), Unavailable (another
    builder on this host), and what making a branch raises.
    """
    host.make()
    # A place of its own: nobody sees builders among the branches, and their agent expires those of a killed build.
    environ = {**environ, "TL_STATE": os.fspath(host.state / "build"), "TL_CACHE": os.fspath(host.cache)}
    workshop = find_host(environ)
    workshop.make()
    obstacle = lazy_obstacle(workshop)
    if obstacle is not None:
        raise UsageError(f"snapshots are built on a lazy mount: {obstacle}")
    async with _turn(workshop, clock, wait_seconds):
        branches = HostBranches(workshop, clock, environ)
        # Whatever a killed builder left goes now, also where there is nothing to build.
        await branches.sweep()
        for left in branches.list():
            # The agent may delete it at the same moment, for its time is over.
            with contextlib.suppress(UsageError):
                await branches.delete(left.branch.name)
        store = await open_store(
            address.url, endpoint_url=address.endpoint_url, region=address.region, clock=clock
        )
        try:
            builder = _Builder(address, store, branches, clock, parent, rules, spacing_bytes)
            while True:
                built = await builder.step(at_least_bytes)
                yield built
                if built.snapshot is None:
                    return
        finally:
            await store.aclose()


@contextlib.asynccontextmanager
async def _turn(host: Host, clock: Clock, wait_seconds: float) -> AsyncIterator[None]:
    """One builder on a host at a time; raises Unavailable when it is still another's turn after so long."""
    until = clock.monotonic() + wait_seconds
    fd = os.open(host.state / "build.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if clock.monotonic() >= until:
                    raise Unavailable(
                        "another snapshot is being built on this host", hint="wait for it, or say --wait 1h"
                    ) from None
            await clock.sleep(_TURN_SECONDS)
        yield
    finally:
        os.close(fd)


class _Builder:
    """Takes one step after the other."""

    def __init__(
        self,
        address: StoreAddress,
        store: Store,
        branches: HostBranches,
        clock: Clock,
        parent: str,
        rules: Sequence[Rule],
        spacing_bytes: int,
    ) -> None:
        self._spacing_bytes = spacing_bytes
        self._address = address
        self._store = store
        self._branches = branches
        self._clock = clock
        self._parent = parent
        self._rules = rules
        self._before: Stand | None = None

    async def step(self, at_least_bytes: int) -> Build:
        began = self._clock.monotonic()
        meta = await read_meta(self._store, writing=True)
        history = await History.load(self._store, self._parent)
        head = await history.resolve(Latest())
        if head.lsn - head.snapshot.lsn < at_least_bytes:
            return Build(None, f"{head.lsn - head.snapshot.lsn} bytes of WAL since the newest snapshot")
        lsn = await self._choose(history, head)
        if lsn is None:
            return Build(None, f"no place for a redo point between {head.snapshot.end} and {head.lsn}")
        target = await history.resolve(AtLsn(lsn))
        warnings: tuple[str, ...] = ()
        try:
            name = await self._replay(target)
        except RedoPointMisfit as misfit:
            useless = target.snapshot.id
            warnings = (f"replay cannot begin at snapshot {useless}: {misfit.message}",)
            target = await self._around(history, target, warnings[0])
            name = await self._replay(target, without=useless)
        async with self._branches.taken_over(name) as branch:
            build = await self._store_changes(history, meta.store_id, target, branch)
        elapsed = self._clock.monotonic() - began
        return dataclasses.replace(build, warnings=warnings, elapsed_seconds=elapsed)

    async def _replay(self, target: Target, *, without: str | None = None) -> str:
        """From the target's snapshot to its LSN; the builder's name. Raises RedoPointMisfit when replay cannot begin
        there, CheckFailed when that is so for a second time."""
        request = BranchRequest(
            store=self._address,
            name=f"snapshot-{target.lsn:x}",
            when=AtLsn(target.lsn),
            tli=target.tli,
            parent=self._parent,
            without=without,
            ttl_seconds=_LIFE_SECONDS,
            mode=LAZY,
            untouched=True,
        )
        try:
            return (await self._branches.create(request)).name
        except RedoPointMisfit as misfit:
            if without is None:
                raise
            raise CheckFailed(
                f"replay cannot begin at snapshot {without}, nor at {target.snapshot.id}: {misfit.message}",
                hint=_BACKUP_HINT,
            ) from misfit

    async def _around(self, history: History, target: Target, misfit: str) -> Target:
        """The same moment, reached from the snapshot before; raises CheckFailed where there is none that is near."""
        around = await history.resolve(AtLsn(target.lsn), tli=target.tli, without=target.snapshot.id)
        if around.lsn - around.snapshot.lsn > AROUND_BYTES:
            raise CheckFailed(
                f"{misfit}; the one before is at {around.snapshot.lsn}, too far away to go on from",
                hint=_BACKUP_HINT,
            )
        return around

    async def _choose(self, history: History, head: Target) -> Lsn | None:
        """The last place for a redo point within one step of the newest snapshot, and above it.

        Where such a step leads nowhere, within the next: it may end in a segment that was switched and is empty
        to its end, or right behind a fork. It would end there every time.
        """
        reach = head.snapshot.lsn
        stand = Stand(reach, head.lsn)
        step, self._before = step_bytes(stand, self._before, self._spacing_bytes), stand
        while reach < head.last_record:
            reach = Lsn(min(head.last_record, reach + step))
            lsn = await self._last_place(history, head, reach)
            if lsn is not None and lsn > head.snapshot.end:
                return lsn
        return None

    async def _last_place(self, history: History, head: Target, latest: Lsn) -> Lsn | None:
        """The last place for a redo point up to ``latest`` and not far below it."""
        line = history.lineage()
        span = next(part for part in reversed(line) if part.begin <= latest)
        incarnation = incarnation_at(history.state, latest)
        reach = head.lsn if span.end is None else Lsn(min(head.lsn, span.end))
        for look in _LOOKS_BYTES:
            start = Lsn(max((latest - look) // BLOCK_BYTES * BLOCK_BYTES, span.begin))
            end = Lsn(min(latest + look, reach))
            wal = bytearray()
            async with aclosing(history.wal([Span(span.tli, start, end)])) as pieces:
                async for found in pieces:
                    wal += found.data
            lsn = await asyncio.to_thread(
                find_redo_point,
                wal,
                start,
                latest,
                tli=span.tli,
                tli_start=Lsn(span.begin),
                segment_bytes=incarnation.segment_bytes,
                major=incarnation.major,
            )
            if lsn is not None:
                return lsn
        return None

    async def _store_changes(
        self, history: History, store_id: str, target: Target, branch: LocalBranch
    ) -> Build:
        """From a stopped builder to the log entry."""
        parent, began = target.snapshot, history.number
        if branch.origin is None or branch.origin.snapshot_id != parent.id:
            return Build(None, "another snapshot was committed meanwhile")
        listing = await read_listing(self._store, parent)
        directory = self._branches.registry.directory(branch.id)
        overlay = Overlay.open(directory / "overlay", durable=False, exclusive=True)
        counters = Counters()
        with ThreadPoolExecutor(_THREADS, "tl-build") as threads:
            cache = DiskCache.of(self._store, self._branches.host.cache, 20 << 30, self._clock)
            fetcher = Fetcher(self._store, cache, self._clock, threads, counters)
            try:
                source = ExtentSource(parent, fetcher)
                storing = OverlaySnapshot(
                    self._store, store_id, threads, overlay, source, listing, target, began, self._rules
                )
                log = BranchLog(self._store, self._parent, self._clock, self._clock.token(8))
                return await storing.run(log, self._clock)
            finally:
                await fetcher.aclose()
                overlay.close()
