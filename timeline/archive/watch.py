"""Watches a running stream from beside it: the source's position and slot, coverage, fencing, and the status
for people.

Runs as a task of its own, so that neither a slow source nor a stalled store holds up the stream; what must
end the stream it leaves in ``failure``, which the stream looks at.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

from timeline.archive.committer import Committer
from timeline.archive.connect import ServerError
from timeline.archive.run_state import RunState
from timeline.archive.slot import advance_slot, create_slot, read_slot
from timeline.archive.source import Source, SourceProbe, is_synchronous
from timeline.archive.status import Phase
from timeline.archive.stream import TliStream
from timeline.errors import Fenced, TimelineError, Unavailable
from timeline.format.log_change import Cover
from timeline.format.wal_index import Coverage

TICK_SECONDS = 1.0
"""How often the status is shown."""
PROBE_TIMEOUT_SECONDS = 30.0
BEHIND_BYTES = 16 << 20
"""Further behind than this is catching up, not streaming."""


class Watch:
    """Watches one ``TliStream``. Must be closed with ``aclose``."""

    def __init__(
        self,
        run: RunState,
        stream: TliStream,
        committer: Committer,
        source: Source,
        *,
        tli: int,
        sender_pid: int,
    ) -> None:
        """``source``: the session's own connection, used until it fails; then one of ours."""
        self._run = run
        self._stream = stream
        self._committer = committer
        self._tli = tli
        self._sender_pid = sender_pid
        self._lent = source
        self._source: Source | None = source
        self._standbys: dict[str, Source] = {}
        self._probe: SourceProbe | None = None
        self._problems: dict[str, str] = {}
        self._covered: Coverage | None = None
        self._covered_at: float | None = None
        self._unreachable_since: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake: Callable[[], None] = lambda: None
        self.failure: TimelineError | None = None

    def start(self, wake: Callable[[], None]) -> None:
        """Begin; ``wake`` makes the stream look at ``failure``."""
        self._wake = wake
        self._task = asyncio.create_task(self._watch())

    def check(self) -> None:
        """Raise what must end the stream."""
        if self.failure is not None:
            raise self.failure
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    async def aclose(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._drop_source()
        for standby in self._standbys.values():
            await standby.aclose()
        self._standbys.clear()

    async def finish(self) -> None:
        """After a stop: the last coverage goes to the log, so that the history is complete up to the end."""
        with contextlib.suppress(TimeoutError, Unavailable):
            async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                await self._cover(at_once=True)
        self._show()

    async def _watch(self) -> None:
        run = self._run
        clock = run.clock
        next_probe = clock.monotonic()
        next_fence = next_probe + run.config.fence_check_seconds
        while self.failure is None:
            try:
                now = clock.monotonic()
                if now >= next_probe:
                    next_probe = now + run.config.probe_seconds
                    await self._ask_source()
                    await self._advance_standbys()
                if now >= next_fence:
                    next_fence = now + run.config.fence_check_seconds
                    await self._check_fence()
                await self._cover(at_once=False)
            except Unavailable as error:
                self._problems["store"] = error.message
            except TimelineError as error:
                self._fail(error)
            self._show()
            await clock.sleep(min(TICK_SECONDS, run.config.probe_seconds))

    def _fail(self, error: TimelineError) -> None:
        self.failure = error
        self._wake()

    async def _ask_source(self) -> None:
        """A probe; a source that does not answer is a warning, not an end, while its stream goes on."""
        run = self._run
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                if self._source is None:
                    name = f"{run.config.application_name} probe"
                    self._source = await Source.open(run.config.conninfo, application_name=name)
                probe = await self._source.probe(slot=run.slot, sender_pid=self._sender_pid)
        except (TimelineError, TimeoutError) as error:
            text = error.message if isinstance(error, TimelineError) else "no answer in time"
            self._problems["source"] = f"the source cannot be asked how it is: {text}"
            await self._lose_source()
            return
        self._problems.pop("source", None)
        self._unreachable_since = None
        if not probe.same_server:
            # A conninfo of several hosts may lead elsewhere than our walsender is.
            await self._drop_source()
            return
        self._probe = probe
        self._stream.see(probe, synchronous=self._is_synchronous(probe))

    async def _lose_source(self) -> None:
        await self._drop_source()
        now = self._run.clock.monotonic()
        if self._unreachable_since is None:
            self._unreachable_since = now
        stalled = self._committer.stats.stalled_since is not None or self._stream.buffered_bytes > 0
        if stalled and now - self._unreachable_since > self._run.config.shutdown_patience_seconds:
            self._fail(Unavailable("the source takes no new connections and the store does not take its WAL"))

    async def _drop_source(self) -> None:
        if self._source is not None and self._source is not self._lent:
            await self._source.aclose()
        self._source = None

    def _is_synchronous(self, probe: SourceProbe) -> bool:
        if probe.sync_state is not None:
            return probe.sync_state in ("sync", "quorum")
        return is_synchronous(probe.synchronous_names, self._run.config.application_name)

    async def _advance_standbys(self) -> None:
        """Keep a slot on every named standby no further behind than the store (slots do not follow a
        failover)."""
        run = self._run
        if run.slot is None:
            return
        for number, conninfo in enumerate(run.config.standbys, start=1):
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                    await self._advance(conninfo, run.slot)
                self._problems.pop(f"standby {number}", None)
            except (TimelineError, TimeoutError) as error:
                text = error.message if isinstance(error, TimelineError) else "no answer in time"
                self._problems[f"standby {number}"] = f"standby {number}: {text}"
                lost = self._standbys.pop(conninfo, None)
                if lost is not None:
                    await lost.aclose()

    async def _advance(self, conninfo: str, slot: str) -> None:
        run = self._run
        standby = self._standbys.get(conninfo)
        if standby is None:
            standby = await Source.open(conninfo, application_name=f"{run.config.application_name} standby")
            self._standbys[conninfo] = standby
        status = await read_slot(standby.connection, slot)
        if status is None:
            status = await create_slot(
                standby.connection, slot, allow_unbounded=run.config.allow_unbounded_slot
            )
        durable = self._committer.durable
        if status.restart_lsn is not None and status.restart_lsn < durable and not status.active:
            try:
                await advance_slot(standby.connection, slot, durable)
            except ServerError as error:
                # It has not replayed that far yet; the next turn will do.
                if error.sqlstate != "0A000" and error.sqlstate != "22023":
                    raise

    async def _check_fence(self) -> None:
        head = await self._run.log.load()
        if head is not None and head.state.epoch > self._run.epoch:
            raise Fenced(
                f"branch {self._run.branch}: another archiver took over (its epoch is {head.state.epoch}, "
                "mine "
                f"{self._run.epoch})",
                hint="this archiver stops; start it again only if the other one is gone for good",
            )
        self._problems.pop("store", None)

    async def _cover(self, *, at_once: bool) -> None:
        """Heartbeat: coverage that went into no chunk goes to the log, now and then."""
        run = self._run
        covered = self._stream.progress.covered
        stored = self._committer.stats.coverage
        if stored is not None and (self._covered is None or stored.time > self._covered.time):
            self._covered, self._covered_at = stored, run.clock.monotonic()
        if covered is None or covered.lsn > self._committer.durable:
            return
        if self._covered is not None and covered.time <= self._covered.time:
            return
        now = run.clock.monotonic()
        due = self._covered_at is None or now - self._covered_at >= run.config.heartbeat_seconds
        if due or at_once:
            await run.log.append(Cover(covered), epoch=run.epoch)
            self._covered, self._covered_at = covered, now

    def _show(self) -> None:
        run, stats, progress = self._run, self._committer.stats, self._stream.progress
        before = run.status
        if before.tli != self._tli:
            run.lag.forget()
        far = progress.source_end - self._committer.durable > BEHIND_BYTES
        shown = replace(
            before,
            phase=Phase.CATCHING_UP if far or not progress.caught_up else Phase.STREAMING,
            tli=self._tli,
            epoch=run.epoch,
            durable=self._committer.durable,
            received=progress.received,
            source_end=progress.source_end,
            source_time=progress.source_time,
            coverage=self._covered or before.coverage,
            last_commit_time=stats.last_commit_time or before.last_commit_time,
            committed_at=stats.committed_at or before.committed_at,
            slot=self._probe.slot if self._probe is not None else None,
            synchronous=progress.synchronous,
            sync_state=self._probe.sync_state if self._probe is not None else None,
            buffered_bytes=self._stream.buffered_bytes,
            behind_since=run.lag.see(
                run.clock.now(), source_end=progress.source_end, durable=self._committer.durable
            ),
            error=None,
            hint=None,
            warnings=self._warnings(),
        )
        run.status = shown
        run.publish(
            replace(
                shown,
                chunks=shown.chunks + stats.chunks,
                wal_bytes=shown.wal_bytes + stats.wal_bytes,
                stored_bytes=shown.stored_bytes + stats.stored_bytes,
                uploads=shown.uploads + stats.uploads,
                upload_seconds=shown.upload_seconds + stats.upload_seconds,
                upload_errors=shown.upload_errors + stats.upload_errors,
            )
        )

    def _warnings(self) -> tuple[str, ...]:
        found = list(self._problems.values())
        stalled = self._committer.stats.stalled_since
        if stalled is not None:
            seconds = self._run.clock.monotonic() - stalled
            found.append(f"the store has not taken a chunk for {seconds:.0f} s")
        probe = self._probe
        if probe is None:
            return tuple(found)
        if probe.slot is not None and probe.slot.warning is not None:
            found.append(probe.slot.warning)
        if self._stream.progress.synchronous:
            if probe.other_synchronous == 0:
                found.append(
                    "the archiver is the only synchronous standby: a store that stalls stalls every COMMIT"
                )
            if probe.synchronous_commit == "remote_apply":
                found.append(
                    "synchronous_commit is remote_apply: the archiver applies nothing, COMMIT hangs for ever"
                )
        return tuple(found)
