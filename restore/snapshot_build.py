"""Snapshots from WAL alone: a server of our own replays to S, and what it changed is stored.

The builder is a branch that nobody ever connects to: mounted lazily, recovered by vanilla Postgres to a record
boundary S, promoted and shut down. Its overlay then holds exactly the blocks that the WAL of (parent, S]
changed. They become extents of a delta manifest, and its pg_control one from which replay begins at S
(timeline/pg/redo_point.py). The source is never asked, and every build proves that its archive replays.

Order (P3): packs, manifests, listing, then the log entry. Interrupted at any point nothing is committed, and the
next build begins anew from the newest snapshot there is; an overlay whose recovery was interrupted is never used
(EDGE 57). Any number of builders may work on one branch: each commits what it built, unless a newer snapshot of
the line was committed meanwhile. On one host they take turns.

One check stands against every unknown: a page of a relation with an LSN above S is refused.

Bounds: STEP_BYTES of WAL (snapshot_pace.py) in one build, and what is empty beyond; AROUND_BYTES around a snapshot that does
not fit; a longer way is taken in steps. In memory rows of the blocks that one step changed (about 0.4 KB each), three batches
of groups (4 MiB each), and what extent_writer.py and fold.py state.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import TypeVar

import numpy as np

from restore.boot_places import boot_places
from restore.branch import HostBranches
from restore.branch_make import control_content
from restore.branch_request import BranchRequest, StoreAddress
from restore.cache import DiskCache
from restore.eager import read_listing
from restore.fetcher import Counters, Fetcher
from restore.fold import MAX_DELTAS, MAX_EXTENTS, fold_deltas
from restore.host import Host, find_host
from restore.lazy_host import lazy_obstacle
from restore.local_branch import LAZY, LocalBranch
from restore.open_file import OpenFile
from restore.overlay import Overlay
from restore.overlay_changes import ChangedFile, changed_runs, find_changes, is_relation
from restore.plan import parameters_as_of
from restore.snapshot_pace import SPACING_BYTES, STEP_BYTES, Stand, step_bytes
from restore.source import ExtentSource
from restore.wal_files import RedoPointMisfit
from timeline.archive.backup_files import treat
from timeline.archive.boot_pack import BootPack
from timeline.archive.extent_writer import UNKNOWN, ExtentWriter, Group, create_named
from timeline.archive.page_runs import sort_rows
from timeline.catalog.branch_log import BranchLog
from timeline.catalog.history import History
from timeline.catalog.line import Span, incarnation_at
from timeline.catalog.meta import read_meta
from timeline.catalog.parallel import in_order, in_parallel
from timeline.catalog.target import Target
from timeline.catalog.when import AtLsn, Latest
from timeline.clock import Clock
from timeline.errors import CheckFailed, LogConflict, Superseded, Unavailable, UsageError
from timeline.format import keys
from timeline.format.branch_state import BUILT, BranchState, Snapshot, Tablespace
from timeline.format.extent import BLOCK_BYTES, GROUP_BLOCKS
from timeline.format.file_listing import FileListing, read_file_listing, write_file_listing
from timeline.format.log_change import AddSnapshot, DropSnapshots
from timeline.format.manifest import FileRow, ManifestRef, PageRow
from timeline.format.pack import NONCE_BYTES
from timeline.format.page_manifest import read_page_rows, write_page_manifests
from timeline.format.wal_index import EventKind
from timeline.ids import MAIN
from timeline.lsn import Lsn
from timeline.maintain.thin import RULES, Rule, superfluous
from timeline.pg.control import CONTROL_FILE, parse_control
from timeline.pg.redo_point import checkpoint_place, find_redo_point, redo_point_control
from timeline.store.base import Store
from timeline.store.open import open_store

AROUND_BYTES = 2 * STEP_BYTES
"""Where replay cannot begin at the newest snapshot, a build may begin at the one before, if no more than this is replayed."""
_BACKUP_HINT = "branches replay from a base backup instead; `tl backup` makes a new one to build on"
_LOOKS_BYTES = (64 << 10, 1 << 20, 16 << 20)
"""How much WAL is searched for a redo point, one after the other."""
_T = TypeVar("_T")

_PACK_BYTES = 16 << 20
_THREADS = 2
_LIFE_SECONDS = 3600.0
"""A builder that was killed is deleted by the next build on its host, or after so long, if it had come to be a branch."""
_TURN_SECONDS = 0.2
"""Between two looks whether it is our turn."""
_READ_BYTES = 128 << 10
_BATCH_GROUPS = 32
_BATCHES = 2
"""So many groups of 128 KiB are read at once: where all of one is stored anew, most of it comes from the store."""


@dataclass(frozen=True, slots=True)
class Build:
    """What building came to."""

    snapshot: Snapshot | None
    """``None``: nothing was committed."""
    reason: str
    """Why not; empty when something was."""
    replayed_bytes: int = 0
    changed_blocks: int = 0
    uploaded_bytes: int = 0
    """In packs."""
    elapsed_seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    """What did not stop it, but should be known."""


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
                storing = _Storing(
                    self._store, store_id, threads, overlay, source, listing, target, began, self._rules
                )
                return await storing.run(self._log(), self._clock)
            finally:
                await fetcher.aclose()
                overlay.close()

    def _log(self) -> BranchLog:
        return BranchLog(self._store, self._parent, self._clock, self._clock.token(8))


class _Storing:
    """Turns one overlay into a snapshot."""

    def __init__(
        self,
        store: Store,
        store_id: str,
        threads: ThreadPoolExecutor,
        overlay: Overlay,
        source: ExtentSource,
        listing: FileListing,
        target: Target,
        began: int,
        rules: Sequence[Rule],
    ) -> None:
        """``began``: number of the log entry that the target was found in."""
        self._rules = rules
        self._store = store
        self._began = began
        self._store_id = store_id
        self._threads = threads
        self._overlay = overlay
        self._source = source
        self._listing = listing
        self._target = target
        self._parent = target.snapshot
        self._lsn = target.lsn
        self._rows: list[FileRow] = []
        self._blocks = 0

    async def run(self, log: BranchLog, clock: Clock) -> Build:
        previous = await self._boot_rows()
        boot = BootPack(self._store_id, clock, {(row.path, row.group): row.extent for row in previous})
        writer = ExtentWriter(
            self._store,
            self._store_id,
            self._threads,
            clock,
            pack_bytes=_PACK_BYTES,
            divert=boot.take,
            finished=lambda _: None,
        )
        try:
            changes = await asyncio.to_thread(find_changes, self._overlay, self._listing, self._lsn)
            self._rows = list(changes.rows)
            stored = {file.path: file.size for file in changes.files}
            stored |= {row.path: row.size for row in changes.rows if row.kind == "f" and row.content is None}
            places = boot_places(previous, stored)
            for file in changes.files:
                await self._put_file(writer, file, places)
            unchanged = {row.path: row for row in changes.rows}
            for (path, group), database in sorted(places.items()):
                if path in unchanged:
                    await self._put_group(writer, unchanged[path], group, database)
            rows = await writer.finish()
        finally:
            await writer.abort()
        boot_rows, boot_ref, boot_bytes = await boot.finish(self._store)
        pages = await self._write_pages([*rows, *boot_rows], clock.token(NONCE_BYTES))
        data, files = await asyncio.to_thread(write_file_listing, self._rows, nonce=clock.token(NONCE_BYTES))
        await create_named(self._store, keys.manifest(files.digest), data)
        snapshot = self._snapshot(clock, files, (*self._parent.pages, *pages), boot_ref)
        snapshot = await self._folded(
            clock, snapshot, await asyncio.to_thread(read_file_listing, data, files)
        )
        build = Build(
            snapshot,
            "",
            replayed_bytes=self._lsn - self._parent.lsn,
            changed_blocks=self._blocks,
            uploaded_bytes=writer.uploaded_bytes + boot_bytes,
        )
        return await self._commit(log, build, snapshot)

    async def _commit(self, log: BranchLog, build: Build, snapshot: Snapshot) -> Build:
        """Unless somebody else has one of this line that is as new."""

        def check(state: BranchState) -> None:
            on_tli = (one for one in state.snapshots if one.kind == BUILT and one.tli == snapshot.tli)
            if any(one.lsn >= snapshot.lsn for one in on_tli):
                raise LogConflict("another builder was faster")

        try:
            newest = await log.append(AddSnapshot(snapshot, self._began), check=check)
        except Superseded as error:
            raise Unavailable(f"the snapshot took too long: {error.message}", hint=error.hint) from error
        except LogConflict as error:
            return dataclasses.replace(build, snapshot=None, reason=str(error))
        if dropped := superfluous(newest.state.snapshots, self._rules):
            # Another builder that thins at the same moment drops the same ones.
            with contextlib.suppress(LogConflict):
                await log.append(DropSnapshots(dropped))
        return build

    async def _folded(self, clock: Clock, snapshot: Snapshot, listing: FileListing) -> Snapshot:
        """The same, with few enough page manifests for its readers.

        Folding waits until there are too many: groups that many snapshots changed are then stored anew once, and
        not at every second one.
        """
        if len({ref.lsn for ref in snapshot.pages}) <= 1 + MAX_DELTAS:
            return snapshot
        fetcher = self._source.fetcher
        source = ExtentSource(snapshot, fetcher)
        pages = await fold_deltas(
            self._store,
            self._store_id,
            self._threads,
            clock,
            fetcher,
            snapshot.pages,
            listing,
            lambda row, offset, length: source.content(row).read(offset, length),
        )
        return dataclasses.replace(snapshot, pages=pages)

    def _snapshot(
        self,
        clock: Clock,
        files: ManifestRef,
        pages: tuple[ManifestRef, ...],
        boot: ManifestRef | None,
    ) -> Snapshot:
        target, parent = self._target, self._parent
        spaces = {space.oid: space for space in parent.tablespaces}
        for event in target.events:
            oid = dict(event.values).get("oid", 0)
            if event.kind is EventKind.TABLESPACE_CREATE:
                spaces[oid] = Tablespace(oid, event.name or "")
            elif event.kind is EventKind.TABLESPACE_DROP:
                spaces.pop(oid, None)
        last = target.last_commit.time if target.last_commit is not None else parent.time
        return Snapshot(
            id=clock.token(8),
            kind=BUILT,
            tli=target.tli,
            lsn=self._lsn,
            checkpoint=checkpoint_place(self._lsn),
            end=self._lsn,
            time=max(last, parent.time),
            files=files,
            pages=pages,
            boot=boot,
            backup_label=None,
            tablespaces=tuple(spaces[oid] for oid in sorted(spaces)),
            settings=parent.settings,
            parent=parent.id,
            bytes=sum(row.size for row in self._rows if row.kind == "f"),
            checksum_failures=parent.checksum_failures,
        )

    async def _boot_rows(self) -> list[PageRow]:
        ref = self._parent.boot
        if ref is None:
            return []
        data = await self._store.get(keys.manifest(ref.digest))
        return await asyncio.to_thread(lambda: list(read_page_rows(data, ref)))

    async def _put_file(
        self, writer: ExtentWriter, file: ChangedFile, places: Mapping[tuple[str, int], int]
    ) -> None:
        """Store what changed of a file, and list it."""
        fd = self._overlay.open_file(file.path)
        content = self._source.content(file.shown) if file.shown is not None else None
        opened = OpenFile(
            self._overlay,
            fd=fd,
            size=file.size,
            base=content,
            base_path=None,
            valid_bytes=file.valid_bytes,
            adopt=_never,
        )
        try:
            row = FileRow(file.path, "f", file.size, file.mode, None, None, self._lsn)
            if treat(file.path, "f", file.size).inline:
                held = await opened.read(0, file.size)
                if file.path == CONTROL_FILE:
                    held = self._control(held)
                self._rows.append(dataclasses.replace(row, content=held))
                return
            if not file.whole and file.shown is not None:
                row = dataclasses.replace(row, born=file.shown.born)
            self._rows.append(row)

            async def of_changes(item: tuple[int, list[tuple[int, int]]]) -> list[Group]:
                group, runs = item
                found = []
                for first, count in await self._runs_to_store(file, group, runs):
                    at = (group * GROUP_BLOCKS + first) * BLOCK_BYTES
                    raw = await opened.read(at, count * BLOCK_BYTES)
                    found.append(Group(file.path, group, raw, UNKNOWN, None, None, first))
                return found

            async def of_boot_set(item: tuple[int, int]) -> list[Group]:
                group, database = item
                raw = await opened.read(group * _READ_BYTES, _READ_BYTES)
                return [Group(file.path, group, raw, UNKNOWN, None, database)]

            boot = {group: database for (path, group), database in places.items() if path == file.path}
            changed = (
                (group, [(first, count) for _, first, count in runs])
                for group, runs in groupby(changed_runs(fd, file), key=itemgetter(0))
                if group not in boot
            )
            await self._put_all(writer, changed, of_changes)
            await self._put_all(writer, boot.items(), of_boot_set)
        finally:
            opened.close()

    async def _put_all(
        self, writer: ExtentWriter, items: Iterable[_T], read: Callable[[_T], Awaitable[list[Group]]]
    ) -> None:
        """Read many at once, and those of a batch in the same moment: neighbours then come in one request."""

        async def read_batch(batch: list[_T]) -> list[list[Group]]:
            return await in_parallel(batch, read, limit=_BATCH_GROUPS)

        source = iter(items)
        batches = iter(lambda: list(islice(source, _BATCH_GROUPS)), [])
        async with aclosing(in_order(batches, read_batch, limit=_BATCHES)) as found:
            async for batch in found:
                for groups in batch:
                    for group in groups:
                        await self._put(writer, group)

    async def _runs_to_store(
        self, file: ChangedFile, group: int, runs: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """(first block, blocks) of what is stored of a group: what changed, or all of it, once it would otherwise
        have become costly to read."""
        if file.whole or file.shown is None:
            return runs
        blocks = min(GROUP_BLOCKS, -(-file.size // BLOCK_BYTES) - group * GROUP_BLOCKS)
        path, born = file.path, file.shown.born
        known = await self._source.with_reload(lambda: self._source.index.pieces(path, group, blocks, born))
        extents = {piece.ref.digest for piece in known}
        return runs if len(runs) + len(extents) <= MAX_EXTENTS else [(0, blocks)]

    async def _put_group(
        self,
        writer: ExtentWriter,
        row: FileRow,
        group: int,
        database: int,
    ) -> None:
        """A group of the boot set that did not change: the set is stored together."""
        length = min(_READ_BYTES, row.size - group * _READ_BYTES)
        raw = await self._source.content(row).read(group * _READ_BYTES, length)
        await writer.put(Group(row.path, group, raw, UNKNOWN, None, database))

    async def _put(self, writer: ExtentWriter, group: Group) -> None:
        self._blocks += -(-len(group.raw) // BLOCK_BYTES)
        if is_relation(group.path) and newest_page(group.raw) > self._lsn:
            raise CheckFailed(
                f"{group.path} has a page of {newest_page(group.raw)} in what was built as of {self._lsn}",
                hint="branches go on from older snapshots; please report this",
            )
        await writer.put(group)

    def _control(self, image: bytes) -> bytes:
        """The pg_control from which replay begins at S, with what the source had set by then."""
        before = parse_control(control_content(self._listing))
        full_page_writes = before.checkpoint.full_page_writes
        for event in self._target.events:
            # A change at a restart is told by checkpoints alone.
            if event.kind in (EventKind.FULL_PAGE_WRITES, EventKind.CHECKPOINT):
                full_page_writes = bool(dict(event.values)["full_page_writes"])
        return redo_point_control(
            image,
            self._lsn,
            tli=self._target.tli,
            parameters=parameters_as_of(before, self._target.events),
            full_page_writes=full_page_writes,
        )

    async def _write_pages(self, rows: list[PageRow], nonce: str) -> tuple[ManifestRef, ...]:
        if not rows:
            return ()
        written = await asyncio.to_thread(lambda: list(write_page_manifests(sort_rows(rows), nonce=nonce)))
        for data, ref in written:
            await create_named(self._store, keys.manifest(ref.digest), data)
        return tuple(dataclasses.replace(ref, lsn=self._lsn) for _, ref in written)


def newest_page(raw: bytes) -> Lsn:
    """The highest LSN in the headers of these pages (src/include/storage/bufpage.h: pd_lsn)."""
    whole = len(raw) // BLOCK_BYTES * BLOCK_BYTES
    words = np.frombuffer(raw, "<u4", count=whole // 4).reshape(-1, BLOCK_BYTES // 4)
    if not len(words):
        return Lsn(0)
    return Lsn(int((words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1]).max()))


def _never() -> int:
    raise RuntimeError("nothing is written while a snapshot is stored")
