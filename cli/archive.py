"""``tl archive`` and ``tl backup``: getting a source's history into the store."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from cli.config import Settings, source_option, store_options
from cli.duration import Duration
from cli.footprint import keep_small
from cli.output import duration_text, emit_json, iso, note, say, warn
from cli.progress import bytes_progress
from cli.snapshot_schedule import DEFAULT_AFTER_SECONDS, DEFAULT_MIB, SnapshotSchedule
from timeline.errors import TimelineError, Unavailable, UsageError
from timeline.lsn import Lsn
from timeline.size_text import size_text

if TYPE_CHECKING:
    from cli.archiver_report import StatusWriter
    from timeline.archive.basebackup import BackupOptions, BackupReport
    from timeline.archive.runner import Archiver
    from timeline.archive.status import ArchiverStatus
    from timeline.catalog.branch_log import BranchLog
    from timeline.clock import Clock
    from timeline.format.branch_state import BranchState
    from timeline.store.base import Store

SEAL_PAUSE_SECONDS = 5.0
"""How often it is considered whether to look at the tail for sealing (``SealPace``: a look costs requests)."""
SEAL_RETRY_SECONDS = 60.0
STATUS_PAUSE_SECONDS = 1.0
"""How often the supervisor is told of progress."""
CATCH_UP_POLL_SECONDS = 0.02
ONCE_DELAY_SECONDS = 0.05
ONCE_REQUESTS_PER_SECOND = 1000.0
"""``--once`` has its small chunks bounded by its delay. The usual budget, which the full ones of a backlog exhaust,
would only hold back the last chunk, and with it the end, for two seconds."""
ONCE_PATIENCE_SECONDS = 20.0
"""How long ``--once`` waits for a source or store that does not answer; a service waits for ever."""
BACKUP_RETRIES = 3
BASE_POLL_SECONDS = 0.02
GAP_POLL_SECONDS = 2.0
"""How often the archiver's status (no request) is looked at for a base backup that is due."""


class _Rate(click.ParamType[int]):
    """A size with an optional unit, per second."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        text = str(value).strip().lower().removesuffix("/s").removesuffix("b")
        factor = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}.get(text[-1:], 1)
        try:
            return int(float(text.rstrip("kmg")) * factor)
        except ValueError:
            self.fail(f"{value!r} is no rate; write 50MB or 200k", param, ctx)


@dataclass(frozen=True, slots=True)
class ArchiveResult:
    """How a run of ``tl archive`` ended."""

    durable: Lsn | None
    source_end: Lsn | None
    last_commit_time: str | None
    chunks: int
    wal_bytes: int
    stored_bytes: int
    snapshot: str | None
    """Id of the base backup this run took."""
    elapsed_seconds: float


@dataclass(frozen=True, slots=True)
class BackupResult:
    """What ``tl backup`` did."""

    snapshot: str
    lsn: Lsn
    end: Lsn
    resumed: bool
    read_bytes: int
    uploaded_bytes: int
    groups: int
    groups_reused: int
    groups_resumed: int
    differing_groups: int | None
    """Groups whose content differs from the newest snapshot, as it was then; ``None`` without one. Change since
    then is expected: this is a measure of change, not of damage."""
    checksum_failures: int
    warnings: tuple[str, ...]
    elapsed_seconds: float


@click.command("archive")
@click.option(
    "--once", is_flag=True, help="Exit when the source's present position (and a base backup) is stored."
)
@click.option(
    "--max-delay",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Store received WAL when it is so old (default: 1).",
)
@click.option("--slot", metavar="NAME", help="Replication slot (default: named after the store).")
@click.option("--no-slot", is_flag=True, help="Stream without a slot; wal_keep_size alone protects the WAL.")
@click.option(
    "--unbounded-slot", is_flag=True, help="Make the slot though max_slot_wal_keep_size is unlimited."
)
@click.option(
    "--allow-gap", is_flag=True, help="Where the source has lost WAL, record a gap and go on after it."
)
@click.option("--rate-limit", type=_Rate(), metavar="SIZE", help="Read the base backup no faster, e.g. 50MB.")
@click.option("--fast-checkpoint", is_flag=True, help="Ask for an immediate checkpoint for the base backup.")
@click.option("--application-name", default="tl", show_default=True, help="As in synchronous_standby_names.")
@click.option(
    "--standby", "standbys", multiple=True, metavar="CONNINFO", help="Keep a slot on this standby, too."
)
@click.option(
    "--snapshot-every",
    type=click.FloatRange(min=0),
    default=DEFAULT_MIB,
    show_default=True,
    metavar="MIB",
    help="Build a snapshot whenever so much WAL has come; 0: never.",
)
@click.option(
    "--snapshot-after",
    type=Duration(),
    default=DEFAULT_AFTER_SECONDS,
    show_default="5m",
    metavar="DURATION",
    help="Build one after so long, too, if a sixteenth of it has come.",
)
@click.option(
    "--json-status",
    "status_descriptor",
    type=click.IntRange(min=1),
    metavar="DESCRIPTOR",
    help="Write the archiver's state there, one line of JSON per change; end when its reader has gone.",
)
@source_option
@store_options
def archive_command(
    *,
    settings: Settings,
    snapshot_every: float,
    snapshot_after: float,
    once: bool,
    max_delay: float | None,
    slot: str | None,
    no_slot: bool,
    unbounded_slot: bool,
    allow_gap: bool,
    rate_limit: int | None,
    fast_checkpoint: bool,
    application_name: str,
    standbys: tuple[str, ...],
    status_descriptor: int | None,
) -> None:
    """Stream the source's WAL into the store until told to stop (SIGINT, SIGTERM).

    The first run makes a replication slot on the source, then takes a base backup beside the stream. Undo: tl detach.
    Snapshots are built on this host from the store alone, by a child process, where FUSE and the binaries of the
    source's major version are at hand.
    """
    keep_small()
    from timeline.archive.status import REQUESTS_PER_SECOND, ArchiverConfig

    config = ArchiverConfig(
        conninfo=settings.need_source(),
        slot=slot,
        slotless=no_slot,
        allow_unbounded_slot=unbounded_slot,
        allow_gap=allow_gap,
        application_name=application_name,
        standbys=standbys,
        # A run that is to end soon has nothing to gain from waiting for more.
        max_delay_seconds=max_delay if max_delay is not None else (ONCE_DELAY_SECONDS if once else 1.0),
        requests_per_second=ONCE_REQUESTS_PER_SECOND if once else REQUESTS_PER_SECOND,
    )
    # Nobody waits for a spread checkpoint in a run that is meant to end.
    run = _Archive(
        settings,
        config,
        once=once,
        fast_checkpoint=fast_checkpoint or once,
        backup_rate=rate_limit,
        snapshot_mib=0 if once else snapshot_every,
        snapshot_after_seconds=snapshot_after,
        status_descriptor=status_descriptor,
    )
    result = asyncio.run(run.run())
    if settings.json:
        emit_json(result)
    elif result.durable is None:
        say("nothing was stored")
    else:
        say(
            f"stored up to {result.durable}: {size_text(result.wal_bytes)} of WAL as {size_text(result.stored_bytes)}"
            f" in {result.chunks} chunks, {duration_text(result.elapsed_seconds)}"
        )


class _Archive:
    """Archiver, base backup and sealing as one foreground run."""

    def __init__(
        self,
        settings: Settings,
        config: object,
        *,
        once: bool,
        fast_checkpoint: bool,
        backup_rate: int | None,
        snapshot_mib: float,
        snapshot_after_seconds: float,
        status_descriptor: int | None = None,
    ) -> None:
        from timeline.archive.status import ArchiverConfig
        from timeline.clock import SystemClock

        if not isinstance(config, ArchiverConfig):
            raise TypeError("an ArchiverConfig is expected")
        self._settings = settings
        self._config = config
        self._once = once
        self._fast_checkpoint = fast_checkpoint
        self._backup_rate = backup_rate
        self._snapshot_mib = snapshot_mib
        self._snapshot_after_seconds = snapshot_after_seconds
        self._status_descriptor = status_descriptor
        self._writer: StatusWriter | None = None
        self._based = asyncio.Event()
        self._clock: Clock = SystemClock()
        self._stop = asyncio.Event()
        self._said: tuple[str | None, ...] = ()
        self._warned: set[str] = set()
        self._snapshot: str | None = None

    async def run(self) -> ArchiveResult:
        """Until told to stop, or, with ``once``, until everything is stored."""
        from cli.archiver_report import StatusWriter
        from timeline.archive.runner import Archiver
        from timeline.store.open import open_store

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        began = self._clock.monotonic()
        store = await open_store(
            self._settings.need_store(),
            endpoint_url=self._settings.endpoint_url,
            region=self._settings.region,
            clock=self._clock,
        )
        if self._status_descriptor is not None:
            self._writer = StatusWriter(self._status_descriptor, self._clock, self._reader_gone)
        try:
            archiver = Archiver(store, self._config, self._clock, on_status=self._tell)
            streaming = asyncio.create_task(archiver.run(self._stop))
            backing_up = asyncio.create_task(self._ensure_base(archiver, store))
            sealing = asyncio.create_task(self._seal(store, archiver))
            catching_up = (
                asyncio.create_task(self._catch_up(archiver, backing_up, store)) if self._once else None
            )
            building = self._start_building(archiver)
            reporting = asyncio.create_task(self._report(archiver)) if self._writer is not None else None
            helpers = [
                task for task in (backing_up, sealing, building, catching_up, reporting) if task is not None
            ]
            try:
                # The archiver decides: it ends by a stop or by an error that cannot pass. A failed first backup
                # or catch-up ends it, too; a failed seal never does.
                watched = {task for task in (streaming, backing_up, catching_up) if task is not None}
                while streaming in watched:
                    done, watched = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                    for task in done - {streaming}:
                        if task.exception() is not None:
                            self._stop.set()
                await streaming
                for finished in (backing_up, catching_up):
                    if finished is not None and finished.done():
                        finished.result()
            finally:
                self._stop.set()
                for task in helpers:
                    task.cancel()
                await asyncio.gather(streaming, *helpers, return_exceptions=True)
                if self._writer is not None:
                    self._writer.write(archiver.status, archiver.durable, repeat=True)
                    self._writer.close()
        finally:
            await store.aclose()
        status = archiver.status
        return ArchiveResult(
            durable=status.durable,
            source_end=status.source_end,
            last_commit_time=iso(status.last_commit_time),
            chunks=status.chunks,
            wal_bytes=status.wal_bytes,
            stored_bytes=status.stored_bytes,
            snapshot=self._snapshot,
            elapsed_seconds=self._clock.monotonic() - began,
        )

    def _start_building(self, archiver: Archiver) -> asyncio.Task[None] | None:
        if self._snapshot_mib <= 0:
            return None
        schedule = SnapshotSchedule(
            self._settings,
            self._clock,
            every_mib=self._snapshot_mib,
            after_seconds=self._snapshot_after_seconds,
            note=note,
        )
        return asyncio.create_task(schedule.run(lambda: archiver.durable, self._based))

    async def _ensure_base(self, archiver: Archiver, store: Store) -> str | None:
        """Take a base backup when there is none, or none after a gap; the id of the first one taken.

        With ``once`` it returns when nothing is missing, else it goes on watching for gaps.
        """
        from timeline.archive.status import Phase
        from timeline.catalog.branch_log import BranchLog
        from timeline.ids import MAIN

        # The slot must hold WAL before the backup begins (EDGE 2); a gap is recorded before the stream does.
        await archiver.begun.wait()
        log = BranchLog(store, MAIN, self._clock, self._clock.token(8))
        checked = False
        while True:
            if archiver.status.phase in (Phase.CATCHING_UP, Phase.STREAMING) and not (
                checked and not archiver.status.needs_base
            ):
                head = await log.load()
                if head is not None and _lacks_base(head.state):
                    self._snapshot = await self._take_base(archiver, store, log)
                checked = True
                self._based.set()
                if self._once:
                    return self._snapshot
            await self._clock.sleep(BASE_POLL_SECONDS if not checked else GAP_POLL_SECONDS)

    async def _take_base(self, archiver: Archiver, store: Store, log: BranchLog) -> str:
        # Late: most runs find a base backup, and what makes one takes a tenth of a second and 30 MB to import.
        from timeline.archive.basebackup import BackupOptions, NotFollowed, take_base_backup

        options = BackupOptions(
            fast_checkpoint=self._fast_checkpoint, rate_bytes_per_second=self._backup_rate
        )
        note("taking a base backup (the source's files are read once)")
        attempt = 1
        while True:
            try:
                with bytes_progress("base backup", stays=True) as tell:
                    tell("checkpoint", 0, None)
                    report = await take_base_backup(
                        self._config.conninfo,
                        store,
                        log,
                        self._clock,
                        options=options,
                        on_status=lambda at: tell(at.phase, at.bytes_done, at.bytes_total),
                    )
            except NotFollowed as error:
                # Our own stream is on a tli before it, and comes there or ends, and we with it: the source is
                # not asked again meanwhile.
                while archiver.status.tli < error.tli:
                    await self._clock.sleep(GAP_POLL_SECONDS)
                continue
            except Unavailable as error:
                if attempt == BACKUP_RETRIES:
                    raise
                note(f"tl: base backup: {error.message}; trying again, what is uploaded stays")
                await self._clock.sleep(2.0**attempt)
                attempt += 1
                continue
            warn(report.warnings)
            note(
                f"base backup done: {size_text(report.read_bytes)} read, {size_text(report.uploaded_bytes)} stored,"
                f" {duration_text(report.elapsed_seconds)}"
            )
            return report.snapshot.id

    async def _seal(self, store: Store, archiver: Archiver) -> None:
        """Move chunks into packs whenever due, and merge what that leaves in the log. A failure is said and tried
        again: archiving does not depend on it."""
        from timeline.catalog.branch_log import BranchLog
        from timeline.catalog.tail import KnownChunks
        from timeline.ids import MAIN
        from timeline.maintain.merge import merge_sealed
        from timeline.maintain.seal import seal
        from timeline.maintain.seal_pace import SealPace

        log = BranchLog(store, MAIN, self._clock, self._clock.token(8))
        pace, known = SealPace(), KnownChunks()
        while True:
            await self._clock.sleep(SEAL_PAUSE_SECONDS)
            now = self._clock.monotonic()
            pace = pace.seen(archiver.durable, archiver.status.chunks, now)
            if not pace.is_due(now):
                continue
            try:
                while await seal(store, log, self._clock, known_chunks=known) is not None:
                    await merge_sealed(store, log, self._clock)
                pace = pace.asked(now)
            except TimelineError as error:
                note(f"tl: sealing: {error.message}; trying again in {SEAL_RETRY_SECONDS:g} s")
                await self._clock.sleep(SEAL_RETRY_SECONDS)

    async def _catch_up(self, archiver: Archiver, backing_up: asyncio.Task[str | None], store: Store) -> None:
        """Stop the archiver when a base backup is there and the position the source then has is stored."""
        from timeline.catalog.branch_log import BranchLog
        from timeline.ids import MAIN

        waiting_since: float | None = None
        while not backing_up.done():
            await asyncio.wait({backing_up}, timeout=0.2)
            status = archiver.status
            now = self._clock.monotonic()
            waiting_since = (waiting_since or now) if status.phase == "waiting" else None
            if waiting_since is not None and now - waiting_since > ONCE_PATIENCE_SECONDS:
                raise Unavailable(status.error or "the source does not answer", hint=status.hint)
        if backing_up.exception() is not None:
            return
        await self._reach_source(archiver)
        # A source may say only after the stream has begun that WAL is lost (EDGE 7), and a gap wants a base backup.
        log = BranchLog(store, MAIN, self._clock, self._clock.token(8))
        head = await log.load()
        if head is not None and _lacks_base(head.state):
            self._snapshot = await self._take_base(archiver, store, log)
            await self._reach_source(archiver)
        self._stop.set()

    async def _reach_source(self, archiver: Archiver) -> None:
        """Until the position that the source has now is stored."""
        from timeline.archive.source import Source

        source = await Source.open(self._config.conninfo)
        try:
            goal = (await source.probe(slot=None, sender_pid=None)).end
        finally:
            await source.aclose()
        while archiver.durable is None or archiver.durable < goal:
            await self._clock.sleep(CATCH_UP_POLL_SECONDS)

    async def _report(self, archiver: Archiver) -> None:
        """Keep the supervisor informed, whether anything changes or not."""
        from cli.archiver_report import REPEAT_SECONDS

        if self._writer is None:
            return
        told = self._clock.monotonic()
        while True:
            await self._clock.sleep(STATUS_PAUSE_SECONDS)
            now = self._clock.monotonic()
            repeat = now - told >= REPEAT_SECONDS
            told = now if repeat else told
            self._writer.write(archiver.status, archiver.durable, repeat=repeat)

    def _reader_gone(self) -> None:
        # Nothing is said: where the supervisor is gone, stderr most likely went with it.
        self._stop.set()

    def _tell(self, status: ArchiverStatus) -> None:
        if self._writer is not None:
            self._writer.write(status, None, repeat=False)
            if self._writer.gone:
                return
        for text in status.warnings:
            if text not in self._warned and len(self._warned) < 1000:
                self._warned.add(text)
                note(f"warning: {text}")
        news = (str(status.phase), status.error)
        if news == self._said:
            return
        self._said = news
        where = f" at {status.durable}" if status.durable is not None else ""
        note(f"{status.phase}{where}" + (f": {status.error}" if status.error else ""))
        if status.hint:
            note(f"hint: {status.hint}")


def _lacks_base(state: BranchState) -> bool:
    """Whether nothing can be restored at the head: no snapshot on its line, or none after the line's last gap."""
    from timeline.catalog.line import is_on, line_of

    line = line_of(state, state.current_tli)
    newest = max((snapshot.lsn for snapshot in state.snapshots if is_on(line, snapshot)), default=None)
    tlis = {span.tli for span in line}
    return newest is None or any(gap.end > newest for gap in state.gaps if gap.tli in tlis)


@click.command("backup")
@click.option("--rate-limit", type=_Rate(), metavar="SIZE", help="Read the source no faster, e.g. 50MB.")
@click.option("--fast-checkpoint", is_flag=True, help="Ask for an immediate checkpoint.")
@click.option(
    "--allow-checksum-failures", is_flag=True, help="Keep the backup though the server found broken pages."
)
@click.option(
    "--anew", is_flag=True, help="Store everything again, also what earlier snapshots have: after damage."
)
@source_option
@store_options
def backup_command(
    *,
    settings: Settings,
    rate_limit: int | None,
    fast_checkpoint: bool,
    allow_checksum_failures: bool,
    anew: bool,
) -> None:
    """Take another base backup: compare it with the newest snapshot, store and report what differs.

    One is never needed within an unbroken history; it shortens the replay of later branches, and with --anew
    everything after it is free of damage to older objects.
    """
    from timeline.archive.basebackup import BackupOptions

    options = BackupOptions(
        fast_checkpoint=fast_checkpoint,
        rate_bytes_per_second=rate_limit,
        allow_checksum_failures=allow_checksum_failures,
        anew=anew,
    )
    report = asyncio.run(_backup(settings, options))
    differences = report.differences
    result = BackupResult(
        snapshot=report.snapshot.id,
        lsn=report.snapshot.lsn,
        end=report.snapshot.end,
        resumed=report.resumed,
        read_bytes=report.read_bytes,
        uploaded_bytes=report.uploaded_bytes,
        groups=report.groups,
        groups_reused=report.groups_reused,
        groups_resumed=report.groups_resumed,
        differing_groups=report.groups - report.groups_reused if differences is not None else None,
        checksum_failures=report.checksum_failures,
        warnings=report.warnings,
        elapsed_seconds=report.elapsed_seconds,
    )
    if settings.json:
        emit_json(result)
        return
    warn(result.warnings)
    say(f"snapshot   {result.snapshot}: branches from {result.end} on replay less")
    say(
        f"read       {size_text(result.read_bytes)} in {duration_text(result.elapsed_seconds)}, "
        f"stored {size_text(result.uploaded_bytes)}"
    )
    if result.differing_groups is not None:
        say(
            f"differs    {result.differing_groups} of {result.groups} groups changed since the newest snapshot"
        )


async def _backup(settings: Settings, options: BackupOptions) -> BackupReport:
    from timeline.archive.basebackup import take_base_backup
    from timeline.catalog.branch_log import BranchLog
    from timeline.clock import SystemClock
    from timeline.ids import MAIN
    from timeline.store.open import open_store

    clock = SystemClock()
    conninfo = settings.need_source()
    store = await open_store(
        settings.need_store(), endpoint_url=settings.endpoint_url, region=settings.region, clock=clock
    )
    try:
        log = BranchLog(store, MAIN, clock, clock.token(8))
        if await log.load() is None:
            raise UsageError(
                f"{store.url}: nothing was ever archived here", hint="the first base backup is `tl archive`'s"
            )
        with bytes_progress("base backup", stays=True) as tell:
            tell("checkpoint", 0, None)
            return await take_base_backup(
                conninfo,
                store,
                log,
                clock,
                options=options,
                on_status=lambda at: tell(at.phase, at.bytes_done, at.bytes_total),
            )
    finally:
        await store.aclose()
