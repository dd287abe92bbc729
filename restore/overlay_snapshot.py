"""From the overlay of a stopped builder to a snapshot in the log.

The overlay holds exactly the blocks that the WAL of (parent, S] changed. They become extents of a delta manifest; its
pg_control becomes one from which replay begins at S (timeline/pg/redo_point.py).

Order (P3): packs, manifests, listing, then the log entry, which is only made when no newer snapshot of the line was
committed meanwhile. One check stands against every unknown: a page of a relation with an LSN above S is refused.

Bounds: in memory rows of the blocks that one step changed (about 0.4 KB each), three batches of groups (4 MiB each), and
what extent_writer.py and fold.py state.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import TypeVar

import numpy as np

from restore.boot_places import boot_places
from restore.branch_make import control_content
from restore.fold import MAX_DELTAS, MAX_EXTENTS, fold_deltas
from restore.open_file import OpenFile
from restore.overlay import Overlay
from restore.overlay_changes import ChangedFile, changed_runs, find_changes, is_relation
from restore.plan import parameters_as_of
from restore.source import ExtentSource
from timeline.archive.backup_files import treat
from timeline.archive.boot_pack import BootPack
from timeline.archive.extent_writer import UNKNOWN, ExtentWriter, Group, create_named
from timeline.archive.page_runs import sort_rows
from timeline.catalog.branch_log import BranchLog
from timeline.catalog.parallel import in_order, in_parallel
from timeline.catalog.target import Target
from timeline.clock import Clock
from timeline.errors import CheckFailed, LogConflict, Superseded, Unavailable
from timeline.format import keys
from timeline.format.branch_state import BUILT, BranchState, Snapshot, Tablespace
from timeline.format.extent import BLOCK_BYTES, GROUP_BLOCKS, GROUP_BYTES
from timeline.format.file_listing import FileListing, read_file_listing, write_file_listing
from timeline.format.log_change import AddSnapshot, DropSnapshots
from timeline.format.manifest import FileRow, ManifestRef, PageRow
from timeline.format.pack import NONCE_BYTES
from timeline.format.page_manifest import read_page_rows, write_page_manifests
from timeline.format.wal_index import EventKind
from timeline.lsn import Lsn
from timeline.maintain.thin import Rule, superfluous
from timeline.pg.control import CONTROL_FILE, parse_control
from timeline.pg.redo_point import checkpoint_place, redo_point_control
from timeline.store.base import Store

_T = TypeVar("_T")

_PACK_BYTES = 16 << 20
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


class OverlaySnapshot:
    """One overlay, on its way to be a snapshot: ``run``, once."""

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
        """Store all of it and commit; a Build without a snapshot when another builder was faster.

        Raises CheckFailed (what was built cannot be trusted), Unavailable, DamagedStore, MissingObject.
        """
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
        snapshot = await self._folded(clock, snapshot, data)
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

    async def _folded(self, clock: Clock, snapshot: Snapshot, files: bytes) -> Snapshot:
        """The same, with few enough page manifests for its readers; ``files``: the object of its listing.

        Folding waits until there are too many: groups that many snapshots changed are then stored anew once, and
        not at every second one.
        """
        if len({ref.lsn for ref in snapshot.pages}) <= 1 + MAX_DELTAS:
            return snapshot
        listing = await asyncio.to_thread(read_file_listing, files, snapshot.files)
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
                raw = await opened.read(group * GROUP_BYTES, GROUP_BYTES)
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
        length = min(GROUP_BYTES, row.size - group * GROUP_BYTES)
        raw = await self._source.content(row).read(group * GROUP_BYTES, length)
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
