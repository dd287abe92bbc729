"""The daemon's life: start, one look at everything twice a second, reload, drain.

One event loop with no heavy library in it. Work is done by children; here are only their states, so that one that
fails, hangs or floods is one line in a log, and archiving goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cli.daemon_config import Configuration, archives_alike, read_configuration, wants_json
from cli.daemon_metrics import MetricsServer, start_metrics
from cli.events import Event, EventKind
from cli.heartbeat import Heartbeat
from cli.hooks import Hooks
from cli.job_runner import JobRunner, Key
from cli.jobs import ARCHIVE, HOST, archive_arguments
from cli.log_lines import Level, Log
from cli.observed import ClusterState, DaemonState, JobState
from cli.observed_json import jobs_before, read_state, state_file, write_state
from cli.operations import HookPlan
from cli.orphan_reaper import PAUSE_SECONDS, Reaper, is_needed
from cli.output import iso
from cli.service_manager import ServiceManager
from cli.supervise import ArchiverSupervisor
from cli.tl_toml import Cluster
from timeline.clock import Clock, sleep_unless
from timeline.errors import TimelineError, UsageError

TICK_SECONDS = 0.5
WRITE_PAUSE_SECONDS = 1.0
"""The state file is written at most so often."""
HOOK_PATIENCE_SECONDS = 10.0
"""How long hooks may go on after everything else has stopped."""
_NOT_FOR_CHILDREN = (
    # What a cluster's table says must not be overruled by what was meant for a command by hand.
    *("TL_STORE", "TL_CLUSTER", "TL_SOURCE", "TL_ENDPOINT_URL", "TL_REGION"),
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),
)


@contextlib.contextmanager
def only_daemon(state: Path) -> Iterator[None]:
    """Hold the state directory; raises UsageError while another daemon does, TimelineError when it cannot be made."""
    directory = state_file(state).parent
    try:
        # As `tl branch` would make it: where root owns it, the account that runs Postgres passes through.
        state.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        file = (directory / "lock").open("a")
    except OSError as error:
        raise TimelineError(
            f"cannot use {directory}: {error.strerror}",
            hint="set TL_STATE to a directory that may be written",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"another daemon uses {state}", hint="one serves all clusters of a tl.toml; or set TL_STATE"
            ) from None
        yield


class Daemon:
    """Everything that runs for one tl.toml."""

    def __init__(
        self,
        path: Path,
        only: Sequence[str],
        configuration: Configuration,
        *,
        state: Path,
        environment: Mapping[str, str],
        clock: Clock,
        log: Log,
        fixed_log: bool,
        terminal: bool,
    ) -> None:
        """``fixed_log``: the format was asked for by an option, which a reload does not overrule."""
        self._path = path
        self._only = only
        self._configuration = configuration
        self._state_file = state_file(state)
        self._environment = environment
        self._clock = clock
        self._log = log
        self._fixed_log = fixed_log
        self._terminal = terminal
        self._manager = ServiceManager(environment, clock)
        self._kept_configuration = self._state_file.parent / "tl.toml"
        self._children = {k: v for k, v in environment.items() if k not in _NOT_FOR_CHILDREN} | {
            "TL_CONFIG": os.fspath(self._kept_configuration)
        }
        self._hooks = Hooks(clock, self._children, log)
        self._archivers: dict[str, ArchiverSupervisor] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._heartbeats: dict[str, Heartbeat] = {}
        self._runner = JobRunner(
            configuration,
            self._read_before(),
            environment=environment,
            children=self._children,
            clock=clock,
            log=log,
            tell=self._tell,
        )
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()
        self._began = clock.now()
        self._written_at: float | None = None
        self._written: tuple[object, ...] = ()
        self._write_trouble = ""
        self._reaper = Reaper()
        self._reaped_at = clock.monotonic()

    async def run(self) -> None:
        """Until SIGTERM or SIGINT; raises UsageError for what only a start can find out."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        metrics = await self._start_metrics()
        try:
            self._keep_configuration()
            for cluster in self._configuration.clusters:
                self._take_up(cluster, None)
            self._say("daemon_started", self._extent())
            self._write(force=True)
            self._manager.ready(self._summary())
            try:
                while not self._stop.is_set():
                    self._tick()
                    await sleep_unless(self._clock, TICK_SECONDS, self._stop, self._reload)
            finally:
                await self._drain()
        finally:
            if metrics is not None:
                await metrics.aclose()
            self._manager.close()

    def facts(self) -> DaemonState:
        """All that is known now."""
        clusters = tuple(
            ClusterState(
                cluster.name,
                cluster.store or "",
                self._archivers[cluster.name].state if cluster.name in self._archivers else None,
                self._runner.states(cluster.name),
            )
            for cluster in self._configuration.clusters
        )
        return DaemonState(os.getpid(), self._began, self._clock.now(), clusters, self._runner.states(HOST))

    # The look at everything.

    def _tick(self) -> None:
        """Nothing in here waits: the watchdog is fed by it, and is to bite when it gets stuck."""
        if self._reload.is_set():
            self._reload.clear()
            self._reload_now()
        # A defect of our own is worth a restart by whoever supervises us.
        self._runner.raise_defect()
        self._runner.start_due()
        for name, heartbeat in self._heartbeats.items():
            heartbeat.consider(self._archivers[name].state)
        for archiver in self._archivers.values():
            archiver.look()
            if (defect := archiver.failed()) is not None:
                raise defect
        self._write(force=False)
        self._manager.say(self._summary())
        self._manager.feed()
        if is_needed() and self._clock.monotonic() - self._reaped_at >= PAUSE_SECONDS:
            self._reaped_at = self._clock.monotonic()
            self._reaper.look()

    # Clusters.

    def _take_up(self, cluster: Cluster, predecessor: ArchiverSupervisor | None) -> None:
        """Begin to work for a cluster, or go on with what has changed."""
        self._heartbeats.pop(cluster.name, None)
        arguments = archive_arguments(cluster)
        if arguments is None:
            self._archivers.pop(cluster.name, None)
            if predecessor is not None:
                self._let_go(predecessor)
            return

        def tell(kind: EventKind, message: str, code: int | None, failures: int) -> None:
            if kind is EventKind.RECOVERY or failures == 1:
                current = next(
                    (each for each in self._configuration.clusters if each.name == cluster.name), cluster
                )
                self._tell(current.operations.hooks, kind, cluster.name, ARCHIVE, message, code, failures)

        archiver = ArchiverSupervisor(
            cluster.name,
            arguments,
            environment=self._children,
            clock=self._clock,
            log=self._log,
            grace_seconds=self._configuration.document.daemon.stop_grace_seconds,
            tell=tell,
        )
        archiver.start(predecessor.stop() if predecessor is not None else None)
        self._archivers[cluster.name] = archiver
        self._watch(cluster)

    def _watch(self, cluster: Cluster) -> None:
        known = self._heartbeats.get(cluster.name)
        if known is None or known.plan != cluster.operations.alerts:
            self._heartbeats[cluster.name] = Heartbeat(
                cluster.name, cluster.operations.alerts, self._clock, self._log
            )

    def _let_go(self, archiver: ArchiverSupervisor) -> None:
        task = asyncio.create_task(archiver.stop())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _tell(
        self,
        plan: HookPlan,
        kind: EventKind,
        cluster: str,
        job: str,
        message: str,
        code: int | None,
        failures: int,
    ) -> None:
        event = Event(iso(self._clock.now()) or "", kind, cluster, job, message, code, failures)
        if kind is EventKind.RECOVERY:
            self._say("recovered", message, cluster=cluster or None, job=job)
        self._hooks.fire(plan, event)

    # Reload.

    def _reload_now(self) -> None:
        self._manager.reloading()
        try:
            new = read_configuration(self._path, self._only)
            if new.document.daemon.metrics != self._configuration.document.daemon.metrics:
                raise UsageError(
                    f"{self._path}: daemon.metrics is read at the start only", hint="restart the daemon"
                )
        except UsageError as error:
            hint = f" ({error.hint})" if error.hint else ""
            message = f"not reloaded, the old configuration stays: {error.message}{hint}"
            self._log.emit(Level.ERROR, "reload_failed", message)
            self._manager.ready(self._summary())
            return
        old, self._configuration = self._configuration, new
        self._keep_configuration()
        if not self._fixed_log:
            self._log.use(as_json=wants_json(new.document.daemon.log, terminal=self._terminal))
        self._runner.reload(new)
        self._reload_clusters(old)
        self._say("reloaded", self._extent())
        self._manager.ready(self._summary())

    def _reload_clusters(self, old: Configuration) -> None:
        before = {cluster.name: cluster for cluster in old.clusters}
        for cluster in self._configuration.clusters:
            known = before.pop(cluster.name, None)
            running = self._archivers.get(cluster.name)
            if running is not None and known is not None and archives_alike(known, cluster):
                running.grace_seconds = self._configuration.document.daemon.stop_grace_seconds
                running.wake()
                self._watch(cluster)
            else:
                self._take_up(cluster, running)
        for name in before:
            self._heartbeats.pop(name, None)
            if (gone := self._archivers.pop(name, None)) is not None:
                self._let_go(gone)

    def _keep_configuration(self) -> None:
        """Children read the last good configuration, whatever is being edited; raises TimelineError."""
        unfinished = self._kept_configuration.with_suffix(".new")
        try:
            unfinished.touch(mode=0o600)
            unfinished.write_text(self._configuration.text, encoding="utf-8")
            unfinished.replace(self._kept_configuration)
        except OSError as error:
            raise TimelineError(f"{self._kept_configuration}: {error.strerror}") from error

    # The end.

    async def _drain(self) -> None:
        self._say("daemon_stopping", "stopping: archivers make durable what is in flight, jobs end")
        self._manager.stopping("stopping")
        feeding = asyncio.create_task(self._feed())
        # Each of them is bounded by the grace.
        await asyncio.gather(
            *(archiver.stop() for archiver in self._archivers.values()),
            *self._leaving,
            self._runner.stop(),
            return_exceptions=True,
        )
        for heartbeat in self._heartbeats.values():
            await heartbeat.close()
        await self._hooks.close(HOOK_PATIENCE_SECONDS)
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        self._write(force=True)
        self._say("daemon_stopped", "stopped")

    async def _feed(self) -> None:
        while True:
            self._manager.feed()
            await self._clock.sleep(TICK_SECONDS)

    # What others see.

    async def _start_metrics(self) -> MetricsServer | None:
        address = self._configuration.document.daemon.metrics
        return await start_metrics(address, self.facts, self._children) if address is not None else None

    def _read_before(self) -> dict[Key, JobState]:
        try:
            return jobs_before(read_state(self._state_file))
        except (OSError, ValueError) as error:
            message = f"{self._state_file} cannot be read ({error}): jobs are planned as for the first time"
            self._log.emit(Level.WARNING, "state_unreadable", message)
            return {}

    def _write(self, *, force: bool) -> None:
        now = self._clock.monotonic()
        if not force and self._written_at is not None and now - self._written_at < WRITE_PAUSE_SECONDS:
            return
        facts = self.facts()
        news = (facts.clusters, facts.host_jobs)
        if not force and news == self._written:
            return
        self._written_at = now
        try:
            write_state(self._state_file, facts)
        except OSError as error:
            # A full disk is no reason to stop archiving; it is said once.
            if self._write_trouble != str(error):
                self._write_trouble = str(error)
                self._log.emit(Level.ERROR, "state_unwritten", f"{self._state_file}: {error}")
            return
        self._written, self._write_trouble = news, ""

    def _summary(self) -> str:
        well = sum(one.state.phase in ("streaming", "catching up") for one in self._archivers.values())
        text = f"archiving {well} of {len(self._archivers)}"
        for what, names in (("running", self._runner.running()), ("failing", self._runner.failing())):
            text += f"; {what}: {', '.join(names)}" if names else ""
        return text

    def _extent(self) -> str:
        return f"{len(self._configuration.clusters)} clusters, {self._runner.count} jobs"

    def _say(self, event: str, message: str, *, cluster: str | None = None, job: str | None = None) -> None:
        self._log.emit(Level.INFO, event, message, cluster=cluster, job=job)
