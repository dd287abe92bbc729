"""Keeps one cluster's archiver running.

It is started again after a pause that doubles up to a bound, and is short again once it has been well for a while.
Two ends are different. *Fenced* (exit code 5): another archiver has taken the branch over. Taking it back would fence
that one, and so on for ever, so this one stays down until somebody who knows asks for it, by a reload or a restart.
*Usage* (exit code 2): the words in tl.toml are wrong, or the source says no; it is tried again, but rarely.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass

from cli.archiver_report import parse_report
from cli.child_process import Ended, run_child
from cli.events import EventKind
from cli.jobs import ARCHIVE
from cli.log_lines import Level, Log, Throttle
from cli.observed import ArchiverState
from cli.own_command import own_command
from cli.quantities import write_duration
from cli.said import failure_message
from timeline.clock import Clock, sleep_unless

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 300.0
HEALTHY_SECONDS = 60.0
"""One that has run so long, and archived, was well: the next failure is the first again."""
USAGE_PAUSE_SECONDS = 900.0
SILENCE_SECONDS = 300.0
"""One that has reported nothing for so long, of a report every few seconds, is stuck."""
WAITING_SECONDS = 300.0
"""An archiver that lives but has waited so long for source or store is reported as failing."""
_USAGE, _FENCED = 2, 5
_WELL = ("streaming", "catching up")

NOTHING = ArchiverState(
    pid=None,
    restarts=0,
    reported_at=None,
    phase="stopped",
    tli=0,
    durable=None,
    received=None,
    source_end=None,
    last_commit_time=None,
    coverage_time=None,
    slot=None,
    synchronous=False,
    chunks=0,
    wal_bytes=0,
    stored_bytes=0,
    uploads=0,
    upload_seconds=0.0,
    upload_errors=0,
    error=None,
)


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before the next start; pure."""

    failures: int = 0

    def after(self, code: int, healthy_seconds: float, chance: float) -> tuple[Backoff, float | None]:
        """The next state and the pause in seconds; ``None``: not by itself. ``chance`` in [0, 1) spreads starts."""
        failures = 1 if healthy_seconds >= HEALTHY_SECONDS else self.failures + 1
        if code == _FENCED:
            return Backoff(failures), None
        if code == _USAGE:
            return Backoff(failures), USAGE_PAUSE_SECONDS
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 20), LONGEST_PAUSE_SECONDS)
        return Backoff(failures), pause * (0.5 + chance / 2)


class ArchiverSupervisor:
    """One cluster's archiver."""

    def __init__(
        self,
        cluster: str,
        arguments: tuple[str, ...],
        *,
        environment: Mapping[str, str],
        clock: Clock,
        log: Log,
        grace_seconds: float,
        tell: Callable[[EventKind, str, int | None, int], None],
        command: Callable[..., tuple[str, ...]] = own_command,
    ) -> None:
        """``tell`` hears of failures and recoveries: kind, message, exit code, failures in a row. ``command``
        makes an argv of the arguments."""
        self.cluster = cluster
        self.arguments = arguments
        self.grace_seconds = grace_seconds
        self.state = NOTHING
        self._environment = environment
        self._clock = clock
        self._log = log
        self._command = command
        self._tell = tell
        self._throttle = Throttle()
        self._well_since: float | None = None
        self._failures = 0
        self._waiting_since: float | None = None
        self._heard_at = clock.monotonic()
        self._stop = asyncio.Event()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, after: Coroutine[None, None, None] | None = None) -> None:
        """Begin, once ``after`` (the end of a predecessor) is over, and go on until ``stop``."""
        self._task = asyncio.create_task(self._run(after), name=f"archiver of {self.cluster}")

    def wake(self) -> None:
        """Start now what rests: after a reload, or for one that was fenced."""
        self._wake.set()

    async def stop(self) -> None:
        """Tell the archiver to stop, and wait: it makes durable what is in flight. Bounded by the grace."""
        self._stop.set()
        if self._task is not None:
            await self._task

    def look(self) -> None:
        """End an archiver that says nothing any more: it would hold the slot, and archive nothing, for ever."""
        silent = self._clock.monotonic() - self._heard_at
        if self.state.pid is None or silent < SILENCE_SECONDS or self._stop.is_set():
            return
        self._heard_at = self._clock.monotonic()
        message = (
            f"it has said nothing for {silent:.0f} s: it is killed, which loses nothing, and started again"
        )
        self._log.emit(Level.ERROR, "archiver_silent", message, cluster=self.cluster, job=ARCHIVE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.state.pid, signal.SIGKILL)

    def failed(self) -> BaseException | None:
        """A defect of the supervision itself, which only a restart of the daemon mends."""
        if self._task is None or not self._task.done() or self._task.cancelled():
            return None
        return self._task.exception()

    async def _run(self, after: Coroutine[None, None, None] | None) -> None:
        if after is not None:
            await after
        backoff = Backoff()
        starts = 0
        while not self._stop.is_set():
            self._well_since = self._waiting_since = None
            self._heard_at = self._clock.monotonic()
            self.state = dataclasses.replace(
                NOTHING, restarts=starts, phase="connecting", error=self.state.error
            )
            starts += 1
            end = await run_child(
                self._command(*self.arguments),
                environment=self._environment,
                clock=self._clock,
                stop=self._stop,
                timeout_seconds=None,
                grace_seconds=self.grace_seconds,
                on_start=self._began,
                on_out=self._heard,
                on_error=self._passed_on,
            )
            # The last words stay: how far it had come is still true.
            self.state = dataclasses.replace(self.state, pid=None, phase="stopped")
            if end.stopped:
                self._ended_as_told(end)
                return
            # A word from while it ran was not meant for what happened now.
            self._wake.clear()
            backoff, pause = self._ended(end, backoff)
            await sleep_unless(self._clock, pause, self._stop, self._wake)

    def _ended(self, end: Ended, backoff: Backoff) -> tuple[Backoff, float | None]:
        well = self._clock.monotonic() - self._well_since if self._well_since is not None else 0.0
        backoff, pause = backoff.after(end.code, well, self._clock.random())
        message = failure_message(end, None)
        if pause is None:
            message += (
                "; another archiver has taken over. It is not started again by itself: reload or restart the "
            )
            message += "daemon where archiving is to go on"
        else:
            message += f"; starting again in {write_duration(round(pause, 1))}"
        phase = "fenced" if pause is None else self.state.phase
        self.state = dataclasses.replace(self.state, phase=phase, error=message)
        self._log.emit(Level.ERROR, "archiver_ended", message, cluster=self.cluster, job=ARCHIVE)
        self._fail(message, end.code)
        return backoff, pause

    def _ended_as_told(self, end: Ended) -> None:
        if end.code == 0:
            self._log.emit(
                Level.INFO,
                "archiver_stopped",
                "stopped; all that was in flight is durable",
                cluster=self.cluster,
                job=ARCHIVE,
            )
        else:
            self._log.emit(
                Level.WARNING,
                "archiver_stopped",
                f"stopped, but not cleanly: {failure_message(end, None)}; the source keeps the WAL that is missing",
                cluster=self.cluster,
                job=ARCHIVE,
            )

    def _began(self, pid: int) -> None:
        self.state = dataclasses.replace(self.state, pid=pid)
        self._log.emit(
            Level.INFO,
            "archiver_started",
            f"archiver started, process {pid}",
            cluster=self.cluster,
            job=ARCHIVE,
        )

    def _heard(self, line: str) -> None:
        try:
            report = parse_report(line)
        except ValueError as error:
            self._log.emit(
                Level.WARNING,
                "archiver_unclear",
                f"its state is unreadable: {error}",
                cluster=self.cluster,
                job=ARCHIVE,
            )
            return
        if report is None:
            # Its closing words; --json is not asked for, so they are for people.
            self._passed_on(line)
            return
        self._heard_at = self._clock.monotonic()
        if report.phase in _WELL and self._well_since is None:
            self._well_since = self._clock.monotonic()
            if self._failures:
                self._tell(EventKind.RECOVERY, "archiving again", None, self._failures)
                self._failures = 0
        elif report.phase not in _WELL:
            self._well_since = None
        self._consider_waiting(report)
        self.state = dataclasses.replace(
            report, pid=self.state.pid, restarts=self.state.restarts, reported_at=self._clock.now()
        )

    def _consider_waiting(self, report: ArchiverState) -> None:
        if report.phase in _WELL:
            self._waiting_since = None
            return
        now = self._clock.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since >= WAITING_SECONDS and not self._failures:
            message = f"not archiving for {now - self._waiting_since:.0f} s: {report.error or report.phase}"
            self._log.emit(Level.ERROR, "archiver_waits", message, cluster=self.cluster, job=ARCHIVE)
            self._fail(message, None)

    def _passed_on(self, line: str) -> None:
        if not line.strip() or not self._throttle.passes(self._clock.monotonic()):
            return
        if count := self._throttle.take_left_out():
            self._log.emit(
                Level.WARNING,
                "lines_left_out",
                f"{count} lines were left out",
                cluster=self.cluster,
                job=ARCHIVE,
            )
        self._log.emit(Level.INFO, "said", line, cluster=self.cluster, job=ARCHIVE)

    def _fail(self, message: str, code: int | None) -> None:
        self._failures += 1
        self._tell(EventKind.FAILURE, message, code, self._failures)
