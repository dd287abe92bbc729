"""Base backup: BASE_BACKUP of the source as a snapshot in the store, without a byte on local disk.

Order (P3): packs, page manifests, listing, then the one log entry that makes the snapshot. What an
interrupted backup uploaded is pinned by progress entries in the log; another try reads the source again
(its files have changed) but uploads only what is not there yet. Nothing is ever resumed in the middle: a
base backup is one run of the server's.

The caller guarantees that WAL is kept from before the backup's redo point on, by a slot or by an archiver
(EDGE 2); what it says in ``wal_held_from`` is checked. The snapshot may be committed before the WAL up to
its end is archived: a branch is possible from ``end`` on, which whoever plans a branch checks.

Two backups of one branch at a time are harmless to the store, but only the later one's progress stays pinned.

Memory: as stated in extent_writer.py, page_runs.py, known_pages.py, boot_pack.py and backup_intake.py,
beside 0.3 KB for each file of the source. Measured peak of the whole process, source 446 MiB: 190 MB into a
directory, 237 to 260 MB into S3, of which 105 MB are the program itself.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace

from timeline.archive.backup_commits import BackupCommits
from timeline.archive.backup_compare import Comparison, Differences
from timeline.archive.backup_facts import BackupFacts, read_clock, read_facts
from timeline.archive.backup_files import CONTROL_FILE
from timeline.archive.backup_intake import Intake, Previous
from timeline.archive.backup_protocol import (
    MAX_RATE_KB,
    MIN_RATE_KB,
    ArchiveData,
    NewArchive,
)
from timeline.archive.backup_stream import BackupEnd, BackupStream, open_backup_stream
from timeline.archive.boot_pack import BootPack
from timeline.archive.boot_set import BootRule
from timeline.archive.extent_writer import Encoded, ExtentWriter, create_named
from timeline.archive.known_pages import open_known
from timeline.archive.page_runs import PageRuns, join_runs
from timeline.archive.tar_stream import BackupStreamError
from timeline.catalog.branch_log import BranchLog, LogHead
from timeline.catalog.meta import read_meta
from timeline.clock import Clock
from timeline.errors import CheckFailed, Superseded, Unavailable, UsageError
from timeline.format import keys
from timeline.format.branch_state import BASE, BackupProgress, BranchState, Snapshot, Tablespace
from timeline.format.extent import ExtentRef
from timeline.format.file_listing import read_file_listing, write_file_listing
from timeline.format.manifest import ManifestRef, PageRow
from timeline.format.pack import NONCE_BYTES
from timeline.format.page_manifest import read_page_rows
from timeline.lsn import Lsn
from timeline.pg.backup_label import BackupLabel, parse_backup_label
from timeline.pg.control import parse_control
from timeline.pg.errors import FormatError
from timeline.store.base import Store

RUN_ROWS = 65_536
"""Rows that are written as a sorted run at the latest: about 25 MB in memory."""


class NotFollowed(Unavailable):
    """The source is on a tli that the archiver has not come to: its WAL would not be held."""

    def __init__(self, tli: int, branch: str) -> None:
        """``tli``: the source's."""
        super().__init__(
            f"the source is on tli {tli}, which branch {branch} does not know yet",
            hint="the archiver follows the source there: is it running, and is this its source?",
        )
        self.tli = tli


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """How to take a base backup."""

    label: str = "tl"
    fast_checkpoint: bool = False
    """Ask for an immediate checkpoint instead of a spread one: quicker to begin, harder on the source."""
    rate_bytes_per_second: int | None = None
    """Read the source no faster than this; 32 KiB to 1 GiB."""
    allow_checksum_failures: bool = False
    """Commit the snapshot even when the server found broken pages (EDGE 30)."""
    anew: bool = False
    """Refer to nothing that earlier snapshots stored: what is damaged there is read from the source again. Differences
    are not told."""
    wal_held_from: Lsn | None = None
    """From where on the caller knows WAL to be archived or held by a slot; ``None``: from the tli's first
    archived byte."""
    progress_seconds: float = 60.0
    """A progress entry at the first pack boundary after so long …"""
    progress_packs: int = 16
    """… or after so many packs."""
    pack_bytes: int = 16 << 20
    """Packs are closed at this size. Half of what the format aims at: an HTTP client holds a body twice, so
    up to six times this is in memory, and the archiver wants its share of the process."""
    threads: int = 2
    """Threads that hash and compress."""
    silence_seconds: float = 600.0
    """A source that sends nothing for so long while data flows is given up."""


@dataclass(frozen=True, slots=True)
class BackupStatus:
    """For a progress bar."""

    phase: str
    """``checkpoint``, ``copy`` or ``finish``."""
    bytes_done: int
    bytes_total: int | None
    """The server's estimate."""
    uploaded_bytes: int


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What a base backup did."""

    snapshot: Snapshot
    resumed: bool
    """An interrupted try had left something to build on."""
    read_bytes: int
    """Content of files the server sent."""
    groups: int
    """Groups of up to 128 KiB they were cut into."""
    groups_uploaded: int
    groups_reused: int
    """Already in the store, from the newest snapshot."""
    groups_resumed: int
    """Already in the store, from the interrupted try."""
    packs: int
    uploaded_bytes: int
    """In packs; manifests not counted."""
    boot_extents: int
    checksum_failures: int
    warnings: tuple[str, ...]
    """Of the server, and about files left out."""
    differences: Differences | None
    """Against the newest snapshot; ``None`` without one. Counts, not a verdict on drift (see
    backup_compare.py)."""
    elapsed_seconds: float


def _ignore(_: BackupStatus) -> None:
    pass


async def take_base_backup(
    conninfo: str,
    store: Store,
    log: BranchLog,
    clock: Clock,
    *,
    options: BackupOptions | None = None,
    on_status: Callable[[BackupStatus], None] = _ignore,
) -> BackupReport:
    """Take a base backup and commit it to the branch's log.

    ``conninfo``: of a role that may replicate, on the primary or a standby, with a database for ordinary
    queries.

    Raises UsageError (no store, no branch, refused by the source), CheckFailed (another system, WAL not
    held, broken pages, tli changed), Unavailable (connection or store), TimelineError with the server's own
    words.
    """
    options = options or BackupOptions()
    rate_kb = _rate_kb(options)
    meta = await read_meta(store, writing=True)
    head = await log.load()
    if head is None or not head.state.incarnations:
        raise UsageError(
            f"branch {log.branch} was never begun", hint="start archiving first: its slot must hold the WAL"
        )
    with ThreadPoolExecutor(options.threads, "tl-backup") as threads:
        facts = await read_facts(conninfo)
        async with open_backup_stream(conninfo, silence_seconds=options.silence_seconds) as stream:
            backup = _Backup(store, meta.store_id, log, head, clock, options, on_status, threads, facts)
            try:
                return await backup.run(conninfo, stream, head, rate_kb)
            except Superseded as error:
                raise Unavailable(
                    f"the base backup took too long: {error.message}", hint=error.hint
                ) from error


class _Backup:
    """One run; its parts share what is counted."""

    def __init__(
        self,
        store: Store,
        store_id: str,
        log: BranchLog,
        head: LogHead,
        clock: Clock,
        options: BackupOptions,
        on_status: Callable[[BackupStatus], None],
        threads: Executor,
        facts: BackupFacts,
    ) -> None:
        self._store = store
        self._store_id = store_id
        self._clock = clock
        self._options = options
        self._on_status = on_status
        self._threads = threads
        self._facts = facts
        self._began = clock.monotonic()
        self._pinned_at = self._began
        self._pinned_packs = 0
        self._carried: tuple[ManifestRef, ...] = ()
        self._progress_id = clock.token(8)
        self._runs = PageRuns(store, threads, clock)
        # Equal bytes are not stored twice, whether what is there can still be read or not.
        self._compared = None if options.anew else _newest(head.state)
        self._commits = BackupCommits(log, head, self._compared)
        self._groups = self._reused = self._resumed = 0
        self._intake: Intake | None = None

    async def run(
        self, conninfo: str, stream: BackupStream, head: LogHead, rate_kb: int | None
    ) -> BackupReport:
        """From the connection to the log entry."""
        state = head.state
        await self._check_source(stream, state)
        snapshot = self._compared
        boot = BootPack(self._store_id, self._clock, await self._boot_extents(snapshot))
        writer = ExtentWriter(
            self._store,
            self._store_id,
            self._threads,
            self._clock,
            pack_bytes=self._options.pack_bytes,
            divert=boot.take,
            finished=self._count,
        )
        intake = Intake(writer, BootRule(self._facts.databases, self._facts.rewritten))
        self._intake = intake
        comparison = await self._prepare(intake, snapshot, state.progress)
        self._on_status(BackupStatus("checkpoint", 0, None, 0))
        await stream.begin(label=self._options.label, fast=self._options.fast_checkpoint, rate_kb=rate_kb)
        self._check_wal(stream, state)
        try:
            await self._copy(stream, intake, writer)
            self._on_status(
                BackupStatus("finish", intake.read_bytes, stream.bytes_total, writer.uploaded_bytes)
            )
            rows = await writer.finish()
        finally:
            await writer.abort()
        end = self._verdict(stream)
        label = _label_of(intake, stream)
        self._check_control(intake)
        if end.checksum_failures and not self._options.allow_checksum_failures:
            await self._pin(rows, writer)
            raise self._broken_pages(end, stream)
        boot_rows, boot_ref, boot_bytes = await boot.finish(self._store)
        pages = await self._runs.finish([*rows, *boot_rows])
        pages = tuple(replace(ref, lsn=label.start) for ref in pages)
        intake.count_removed()
        data, files = write_file_listing(intake.files.values(), nonce=self._clock.token(NONCE_BYTES))
        await create_named(self._store, keys.manifest(files.digest), data)
        added = Snapshot(
            id=self._clock.token(8),
            kind=BASE,
            tli=stream.tli,
            lsn=label.start,
            checkpoint=label.checkpoint,
            end=end.end,
            time=await read_clock(conninfo),
            files=files,
            pages=pages,
            boot=boot_ref,
            backup_label=intake.backup_label,
            tablespaces=tuple(
                Tablespace(space.oid, space.path or "")
                for space in stream.tablespaces
                if space.oid is not None
            ),
            settings=self._facts.settings,
            parent=None,
            bytes=sum(row.size for row in intake.files.values()),
            checksum_failures=end.checksum_failures,
        )
        await self._commits.finish(added)
        return BackupReport(
            snapshot=added,
            resumed=bool(self._carried),
            read_bytes=intake.read_bytes,
            groups=self._groups,
            groups_uploaded=self._groups - self._reused - self._resumed,
            groups_reused=self._reused,
            groups_resumed=self._resumed,
            packs=writer.packs + bool(boot_bytes),
            uploaded_bytes=writer.uploaded_bytes + boot_bytes,
            boot_extents=len(boot),
            checksum_failures=end.checksum_failures,
            warnings=_warnings(stream, intake),
            differences=comparison.differences() if comparison is not None else None,
            elapsed_seconds=self._clock.monotonic() - self._began,
        )

    async def _check_source(self, stream: BackupStream, state: BranchState) -> None:
        """EDGE 12; and before the source is asked for a checkpoint, whether its WAL is followed."""
        identity = await stream.identify()
        expected = state.incarnations[-1]
        if identity.system_identifier != expected.system_identifier:
            raise CheckFailed(
                f"the source is system {identity.system_identifier}, branch {state.branch} holds "
                f"{expected.system_identifier}",
                hint="check the address; a new cluster needs a store of its own",
            )
        if state.find_tli(identity.tli) is None:
            raise NotFollowed(identity.tli, state.branch)
        if identity.tli != state.current_tli:
            raise CheckFailed(
                f"the source is on tli {identity.tli}, which branch {state.branch} has left for tli "
                f"{state.current_tli}",
                hint="an old primary after a failover, or a standby that lags? Check the address",
            )

    def _check_wal(self, stream: BackupStream, state: BranchState) -> None:
        """EDGE 2: without WAL from its redo point on, a base backup is worth nothing."""
        tli = state.find_tli(stream.tli)
        if tli is None:
            raise CheckFailed(
                f"the source is on tli {stream.tli}, which branch {state.branch} does not know yet",
                hint="let the archiver follow the source first, then take the backup again",
            )
        held_from = self._options.wal_held_from
        held_from = tli.start if held_from is None else held_from
        if stream.start < held_from:
            raise CheckFailed(
                f"the backup replays from {stream.start}, but WAL is held only from {held_from}",
                hint="from a standby, wait for its next restartpoint; else check the replication slot",
            )

    async def _prepare(
        self, intake: Intake, snapshot: Snapshot | None, progress: BackupProgress | None
    ) -> Comparison | None:
        """Learn what the store has: an interrupted try's manifests as one, the newest snapshot's as they
        are."""
        uploaded = None
        if progress is not None and progress.manifests:
            self._progress_id = progress.id
            self._carried = await join_runs(self._store, self._threads, self._clock, progress.manifests)
            await self._commits.carry_on(replace(progress, manifests=self._carried, at=self._clock.now()))
            uploaded = await open_known(self._store, self._threads, self._carried)
        if snapshot is None:
            intake.know(uploaded, None)
            return None
        comparison = Comparison(snapshot.id, snapshot.lsn)
        listing = read_file_listing(
            await self._store.get(keys.manifest(snapshot.files.digest)), snapshot.files
        )
        pages = await open_known(self._store, self._threads, snapshot.pages)
        intake.know(uploaded, Previous(pages, listing, comparison))
        return comparison

    async def _boot_extents(self, snapshot: Snapshot | None) -> dict[tuple[str, int], ExtentRef]:
        if snapshot is None or snapshot.boot is None:
            return {}
        data = await self._store.get(keys.manifest(snapshot.boot.digest))
        return {(row.path, row.group): row.extent for row in read_page_rows(data, snapshot.boot)}

    async def _copy(self, stream: BackupStream, intake: Intake, writer: ExtentWriter) -> None:
        while messages := await stream.read():
            for message in messages:
                if isinstance(message, ArchiveData):
                    await intake.feed(message.data)
                elif isinstance(message, NewArchive):
                    intake.begin_archive(message.name, message.oid)
            self._on_status(
                BackupStatus("copy", intake.read_bytes, stream.bytes_total, writer.uploaded_bytes)
            )
            if self._should_pin(writer):
                await self._pin(await writer.take_rows(), writer)
        intake.end_archive()

    def _should_pin(self, writer: ExtentWriter) -> bool:
        if writer.rows >= RUN_ROWS:
            return True
        return writer.pack_boundary and (
            self._clock.monotonic() - self._pinned_at >= self._options.progress_seconds
            or writer.packs - self._pinned_packs >= self._options.progress_packs
        )

    async def _pin(self, rows: list[PageRow], writer: ExtentWriter) -> None:
        """Name what is uploaded in the log, so that neither collection nor a second try misses it."""
        await self._runs.add(rows)
        manifests = (*self._carried, *self._runs.manifests)
        at = self._clock.now()
        progress = BackupProgress(self._progress_id, manifests, writer.uploaded_bytes, at)
        await self._commits.record(progress, writer)
        self._pinned_at = self._clock.monotonic()
        self._pinned_packs = writer.packs

    def _count(self, encoded: Encoded) -> None:
        self._groups += 1
        self._reused += bool(encoded.equal)
        self._resumed += encoded.resumed
        if self._intake is not None:
            self._intake.group_finished(encoded)

    def _verdict(self, stream: BackupStream) -> BackupEnd:
        end = stream.end
        if end is None:
            raise BackupStreamError("the base backup ended without its end position")
        if end.tli != stream.tli:
            raise CheckFailed(
                f"the source moved from tli {stream.tli} to {end.tli} during the backup",
                hint="take it again; what was uploaded is not uploaded twice",
            )
        return end

    def _check_control(self, intake: Intake) -> None:
        """EDGE 31: the server may read pg_control while it is being written."""
        row = intake.files.get(CONTROL_FILE)
        if row is None or row.content is None:
            raise BackupStreamError("the base backup has no pg_control")
        try:
            parse_control(row.content)
        except FormatError as error:
            raise Unavailable(
                f"pg_control in the base backup cannot be used: {error.message}",
                hint="take it again; what was uploaded is not uploaded twice",
            ) from error

    def _broken_pages(self, end: BackupEnd, stream: BackupStream) -> CheckFailed:
        seen = "; ".join(stream.notices[:3])
        return CheckFailed(
            f"the server found {end.checksum_failures} pages with wrong checksums: {seen or 'see its log'}",
            hint="repair the source, or accept broken pages with allow_checksum_failures",
        )


def _newest(state: BranchState) -> Snapshot | None:
    """The snapshot that a backup is compared with."""
    return state.snapshots[-1] if state.snapshots else None


def _label_of(intake: Intake, stream: BackupStream) -> BackupLabel:
    if intake.backup_label is None:
        raise BackupStreamError("the base backup has no backup_label")
    label = parse_backup_label(intake.backup_label)
    if (label.start, label.tli) != (stream.start, stream.tli):
        raise BackupStreamError(
            f"backup_label starts at {label.start} on tli {label.tli}, "
            f"the backup at {stream.start} on {stream.tli}"
        )
    return label


def _warnings(stream: BackupStream, intake: Intake) -> tuple[str, ...]:
    warnings = list(stream.notices)
    if stream.notices_dropped:
        warnings.append(f"{stream.notices_dropped} further warnings of the server")
    if intake.left_out:
        names = ", ".join(intake.left_out[:5])
        warnings.append(f"{len(intake.left_out)} files left out because their names are not UTF-8: {names}")
    return tuple(warnings)


def _rate_kb(options: BackupOptions) -> int | None:
    if options.rate_bytes_per_second is None:
        return None
    rate_kb = options.rate_bytes_per_second // 1024
    if not MIN_RATE_KB <= rate_kb <= MAX_RATE_KB:
        raise UsageError(
            f"a base backup cannot run at {options.rate_bytes_per_second} bytes a second",
            hint=f"choose between {MIN_RATE_KB} KiB and {MAX_RATE_KB >> 10} MiB a second",
        )
    return rate_kb
