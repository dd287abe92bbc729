"""One replication connection: meeting the server's line of history, streaming tli after tli, and what each
end means."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from timeline.archive import lineage
from timeline.archive.chunker import ChunkBuffers
from timeline.archive.committer import ChunkIdentity, Committer, Recut
from timeline.archive.connect import ServerError
from timeline.archive.protocol import StreamState, status_interval
from timeline.archive.receiver import NextTli, ReplicationConnection, SystemIdentity
from timeline.archive.resume import ResumePoint, find_resume_point
from timeline.archive.run_state import RunState
from timeline.archive.slot import (
    SlotMissing,
    SlotStatus,
    StreamAttempt,
    WalLost,
    behind,
    create_slot,
    drop_slot,
    judge_stream_error,
    read_slot,
    wal_lost,
)
from timeline.archive.source import IncarnationFacts, Source, check_major
from timeline.archive.stream import Overlap, TliStream
from timeline.archive.watch import Watch
from timeline.catalog.branch_log import LogHead
from timeline.catalog.tail import find_tail
from timeline.errors import Fenced, Unavailable, UsageError
from timeline.format.branch_state import BranchState, Gap, Tli
from timeline.format.log_change import Begin, RecordGap, SwitchTli
from timeline.lsn import Lsn
from timeline.pg.segment import HistoryRow, parse_history, segment_start


class Session:
    """What lives as long as one replication connection."""

    def __init__(
        self,
        run: RunState,
        source: Source,
        connection: ReplicationConnection,
        facts: IncarnationFacts,
        interval_seconds: float,
    ) -> None:
        self._run = run
        self._source = source
        self._connection = connection
        self._facts = facts
        self._interval = interval_seconds
        self._history_text = ""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, run: RunState) -> AsyncIterator[Session]:
        """Connect, for queries and for replication; raises UsageError or Unavailable with the reason in one
        line."""
        name, conninfo = run.config.application_name, run.config.conninfo
        async with contextlib.AsyncExitStack() as stack:
            source = await Source.open(conninfo, application_name=f"{name} session")
            stack.push_async_callback(source.aclose)
            connection = await ReplicationConnection.open(conninfo, application_name=name)
            stack.push_async_callback(connection.aclose)
            facts = await source.facts()
            check_major(facts.major)
            timeout = setting_seconds(await connection.setting("wal_sender_timeout"))
            yield cls(run, source, connection, facts, status_interval(timeout))

    async def stream(self, stop: asyncio.Event) -> None:
        """Stream tli after tli until told to stop; then everything received is durable and reported.

        Raises what ``Archiver.run`` raises, and Recut, Unavailable and ServerError, after which a new
        session may do better.
        """
        while not stop.is_set():
            identity = await self._connection.identify()
            if identity.system_identifier != self._facts.system_identifier:
                raise Unavailable("the two connections to the source reached two different clusters")
            rows = await self._server_history(identity.tli)
            head = await self._run.log.load()
            if head is not None:
                self._check_incarnation(head.state)
            status = await self._ensure_slot(identity, head)
            if head is None:
                head = await self._begin(identity, rows, status)
            self._check_epoch(head.state)
            if rows:
                lineage.check_history(head.state, identity.tli, self._history_text)
            self._run.begun()
            ancestor = lineage.find_ancestor(head.state, identity.tli, rows)
            resume = await self._resume(head.state, ancestor.tli, status)
            if ancestor.end is not None and ancestor.next_tli is not None and resume.end >= ancestor.end:
                await self._switch(ancestor.tli, NextTli(ancestor.next_tli, ancestor.end), rows)
                continue
            try:
                await self._stream_tli(identity, head.state, ancestor, resume, status, rows, stop)
            except WalLost as lost:
                if not self._run.config.allow_gap:
                    raise
                await self._record_gap(ancestor, lost, identity)

    async def _server_history(self, tli: int) -> tuple[HistoryRow, ...]:
        self._history_text = await self._connection.history(tli) if tli > 1 else ""
        return parse_history(self._history_text)

    def _check_incarnation(self, state: BranchState) -> None:
        known = state.incarnations[-1]
        if known.system_identifier != self._facts.system_identifier:
            raise UsageError(
                f"the source is another cluster: system identifier {self._facts.system_identifier}; the store "
                f"holds {known.system_identifier}",
                hint="was it made anew behind the same address? Archive it into a new store",
            )
        if known.segment_bytes != self._facts.segment_bytes:
            raise UsageError(
                f"the source's WAL segments now have {self._facts.segment_bytes} bytes; the store holds "
                f"segments of {known.segment_bytes}",
                hint="the segment size was changed with pg_resetwal: archive it into a new store",
            )

    def _check_epoch(self, state: BranchState) -> None:
        mine = self._run.epoch
        if 0 < mine < state.epoch:
            raise Fenced(
                f"branch {state.branch}: another archiver took over (its epoch is {state.epoch}, "
                f"mine {mine})",
                hint="this archiver stops; start it again only if the other one is gone for good",
            )

    async def _ensure_slot(self, identity: SystemIdentity, head: LogHead | None) -> SlotStatus | None:
        """The slot, made if this run may make it: at its start, or after a failover, which slots do not
        follow."""
        if self._run.slot is None:
            return None
        status = await read_slot(self._source.connection, self._run.slot)
        if status is None:
            switched = head is not None and head.state.current_tli != identity.tli
            if self._run.streamed and not switched:
                raise SlotMissing(self._run.slot)
            status = await self._make_slot()
        if not status.physical:
            raise UsageError(
                f"replication slot {self._run.slot} is a logical one, and none of ours",
                hint="drop or rename it on the source",
            )
        if status.lost and head is None:
            # Nothing is archived yet, so nothing is lost with it.
            status = await self._renew_slot()
        return status

    async def _make_slot(self) -> SlotStatus:
        if self._run.slot is None:
            raise ValueError("no slot is used")
        return await create_slot(
            self._source.connection, self._run.slot, allow_unbounded=self._run.config.allow_unbounded_slot
        )

    async def _renew_slot(self) -> SlotStatus:
        if self._run.slot is not None:
            await drop_slot(self._source.connection, self._run.slot)
        return await self._make_slot()

    async def _begin(
        self, identity: SystemIdentity, rows: tuple[HistoryRow, ...], status: SlotStatus | None
    ) -> LogHead:
        kept = status.restart_lsn if status is not None else identity.flushed
        if kept is None:
            raise WalLost("the replication slot holds no WAL", Lsn(0))
        start = segment_start(kept, self._facts.segment_bytes)
        tli = lineage.first_tli(identity.tli, rows, start)
        history = None
        if tli == identity.tli:
            history = self._history_text or None
        elif tli > 1:
            history = await self._history_of(tli, rows)
        opened = Tli(tli=tli, parent=None, start=start, sealed=start, end=None, history=history)
        return await self._run.log.append(Begin(self._facts.incarnation(start), opened))

    async def _history_of(self, tli: int, rows: tuple[HistoryRow, ...]) -> str:
        try:
            return await self._connection.history(tli)
        except ServerError:
            # A server restored from elsewhere need not have its ancestors' history files.
            return lineage.derive_history(tli, rows)

    async def _resume(self, state: BranchState, tli: int, status: SlotStatus | None) -> ResumePoint:
        return await find_resume_point(
            self._run.store,
            state,
            tli,
            segment_bytes=self._facts.segment_bytes,
            major=self._facts.major,
            kept_from=status.restart_lsn if status is not None else None,
        )

    async def _claim(self) -> None:
        if self._run.epoch == 0:
            self._run.epoch, _ = await self._run.log.claim_epoch()
            self._run.tell(epoch=self._run.epoch)

    async def _switch(self, closed: int, following: NextTli, rows: tuple[HistoryRow, ...]) -> None:
        await self._claim()
        history = await self._history_of(following.tli, rows)
        opened = lineage.opened_tli(following.tli, closed, following.start, history)
        await self._run.log.append(SwitchTli(closed, following.start, opened), epoch=self._run.epoch)

    async def _record_gap(self, ancestor: lineage.Ancestor, lost: WalLost, identity: SystemIdentity) -> None:
        """The WAL from ``lost`` on is gone for good: say so, and go on where the source still has some."""
        status = (
            await read_slot(self._source.connection, self._run.slot) if self._run.slot is not None else None
        )
        if self._run.slot is not None and (status is None or status.lost or status.restart_lsn is None):
            status = await self._renew_slot()
        kept = status.restart_lsn if status is not None else identity.flushed
        if kept is None:
            raise lost
        start = segment_start(kept, self._facts.segment_bytes)
        end = start if ancestor.end is None else min(start, ancestor.end)
        if end <= lost.position:
            raise lost
        await self._claim()
        gap = Gap(ancestor.tli, lost.position, end, lost.message)
        await self._run.log.append(RecordGap(gap), epoch=self._run.epoch)
        self._run.tell(needs_base=True)
        raise Recut(end, end)

    async def _stream_tli(
        self,
        identity: SystemIdentity,
        state: BranchState,
        ancestor: lineage.Ancestor,
        resume: ResumePoint,
        status: SlotStatus | None,
        rows: tuple[HistoryRow, ...],
        stop: asyncio.Event,
    ) -> None:
        in_recovery = await self._source.in_recovery()
        attempt = StreamAttempt(
            slot=self._run.slot,
            slot_status=status,
            tli=ancestor.tli,
            start=resume.end,
            server_tli=identity.tli,
            server_end=identity.flushed,
            in_recovery=in_recovery,
        )
        if ancestor.tli == identity.tli and identity.flushed < resume.end:
            raise behind(attempt)
        if status is not None and status.lost:
            raise wal_lost(resume.end, ancestor.tli, slot=status)
        try:
            following = await self._connection.start(
                slot=self._run.slot, start=resume.start, tli=ancestor.tli
            )
            if following is None:
                following = await self._run_stream(ancestor.tli, resume, stop, primary=not in_recovery)
        except ServerError as error:
            raise judge_stream_error(error, attempt) from error
        if following is not None:
            await self._switch(ancestor.tli, following, rows)

    async def _run_stream(
        self, tli: int, resume: ResumePoint, stop: asyncio.Event, *, primary: bool
    ) -> NextTli | None:
        run, config = self._run, self._run.config
        if run.epoch == 0:
            await self._claim()
            head = await run.log.load()
            if head is None:
                raise Unavailable("the branch log vanished")
            # Until the claim somebody else may have been at work; from now on nobody may.
            again = await find_tail(run.store, head.state, tli)
            if again.end != resume.end:
                raise Recut(again.end, again.end)
        if resume.tail.epoch > run.epoch:
            raise Fenced(
                f"another archiver has taken over: a chunk of tli {tli} has epoch {resume.tail.epoch}, "
                "this run "
                f"has {run.epoch}",
                hint="this archiver stops; start it again only if the other one is gone for good",
            )
        identity = ChunkIdentity(
            store_id=run.meta.store_id,
            branch=run.branch,
            system_identifier=self._facts.system_identifier,
            tli=tli,
            writer=run.writer,
            epoch=run.epoch,
        )
        async with contextlib.AsyncExitStack() as stack:
            buffers = ChunkBuffers()
            committer = Committer(
                run.store,
                identity,
                resume.end,
                resume.indexer,
                clock=run.clock,
                executor=run.executor,
                uploads_in_flight=config.uploads_in_flight,
                patience_seconds=config.store_patience_seconds,
                on_change=self._connection.wake,
                on_stored=buffers.give,
            )
            run.committer = committer
            stack.push_async_callback(committer.aclose)
            stack.callback(lambda: run.add(committer.stats))
            stream = TliStream(
                self._connection,
                committer,
                StreamState(resume.start, silent_until=resume.end, interval_seconds=self._interval),
                Overlap(tli, resume.start, resume.overlap),
                tli=tli,
                buffers=buffers,
                clock=run.clock,
                budget=run.budget,
                max_delay_seconds=config.max_delay_seconds,
                buffer_bytes=config.buffer_bytes,
                stop_patience_seconds=config.stop_patience_seconds,
                primary=primary,
            )
            watch = Watch(
                run, stream, committer, self._source, tli=tli, sender_pid=self._connection.server_pid
            )
            stack.push_async_callback(watch.aclose)
            watch.start(self._connection.wake)
            stopping = asyncio.create_task(_wake_on(stop, self._connection.wake))
            stack.callback(stopping.cancel)
            run.streamed = True
            following = await stream.run(stop, watch.check)
            await watch.finish()
            return following


async def _wake_on(event: asyncio.Event, wake: Callable[[], None]) -> None:
    await event.wait()
    wake()


_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def setting_seconds(setting: str) -> float:
    """A time setting as SHOW gives it, in seconds."""
    number = setting.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = setting[len(number) :].strip()
    return float(number or 0) * _UNITS.get(unit, 0.001)
