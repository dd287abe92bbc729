"""Runs a daemon's jobs when they are due, each in a child process, and keeps what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import tzinfo

from cli.child_process import Ended, run_child
from cli.daemon_config import Configuration, all_jobs, zone_of
from cli.events import EventKind
from cli.job_states import ended, planned, ready, rescheduled, started
from cli.jobs import Job
from cli.log_lines import Level, Log, Throttle
from cli.observed import JobState
from cli.operations import HookPlan
from cli.output import iso
from cli.own_command import own_command
from cli.quantities import write_duration
from timeline.clock import Clock

Key = tuple[str, str]
Tell = Callable[[HookPlan, EventKind, str, str, str, int | None, int], None]
"""Hooks, kind, cluster, job, message, exit code, failures in a row."""
_USAGE = 2


class JobRunner:
    """The jobs of one daemon."""

    def __init__(
        self,
        configuration: Configuration,
        before: Mapping[Key, JobState],
        *,
        environment: Mapping[str, str],
        children: Mapping[str, str],
        clock: Clock,
        log: Log,
        tell: Tell,
        command: Callable[..., tuple[str, ...]] = own_command,
    ) -> None:
        """``before``: what an earlier daemon left. ``environment`` is ours, ``children`` that of the jobs;
        ``command`` makes an argv of a job's arguments."""
        self._configuration = configuration
        self._environment = environment
        self._children = children
        self._clock = clock
        self._log = log
        self._command = command
        self._tell = tell
        self._jobs = {job.key: job for job in all_jobs(configuration)}
        self._states = {key: self._planned(job, before.get(key)) for key, job in self._jobs.items()}
        self._running: dict[Key, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()

    @property
    def count(self) -> int:
        """Jobs that have a schedule."""
        return len(self._jobs)

    def start_due(self) -> None:
        """Start what is due and may run; returns at once."""
        now = self._clock.now()
        for job in ready(self._jobs, self._states, now, self._configuration.document.daemon.concurrency):
            self._states[job.key] = started(self._states[job.key], now)
            self._running[job.key] = asyncio.create_task(self._run(job), name=f"{job.cluster}/{job.name}")

    def raise_defect(self) -> None:
        """Raise what went wrong in the running of a job itself, if anything did."""
        for key, task in list(self._running.items()):
            if task.done():
                del self._running[key]
                task.result()

    def reload(self, configuration: Configuration) -> None:
        """Go on with other jobs, or with other times. One that runs goes on as it began."""
        same_times = configuration.document.daemon == self._configuration.document.daemon
        self._configuration = configuration
        jobs = {job.key: job for job in all_jobs(configuration)}
        for key, job in jobs.items():
            state = self._states.get(key)
            if state is None:
                self._states[key] = self._planned(job, None)
                continue
            # Words that were wrong may be right now.
            changed = job != self._jobs.get(key) or not same_times or state.last_exit_code == _USAGE
            if changed and state.running_since is None:
                self._states[key] = rescheduled(job, state, self._clock.now(), *self._chance())
        for key in self._states.keys() - jobs.keys() - self._running.keys():
            del self._states[key]
        self._jobs = jobs

    async def stop(self) -> None:
        """Tell all that run to end, and wait; bounded by the grace."""
        self._stop.set()
        await asyncio.gather(*self._running.values())

    def states(self, cluster: str) -> tuple[JobState, ...]:
        """Of the jobs of that cluster."""
        return tuple(state for key, state in self._states.items() if key[0] == cluster)

    def running(self) -> tuple[str, ...]:
        """Names of the jobs that run, for people."""
        return tuple(_name(key) for key in self._running)

    def failing(self) -> tuple[str, ...]:
        """Names of the jobs whose last run failed, for people."""
        return tuple(_name(key) for key, state in self._states.items() if state.failures_in_a_row)

    def _planned(self, job: Job, before: JobState | None) -> JobState:
        return planned(job, before, self._clock.now(), *self._chance())

    def _chance(self) -> tuple[tzinfo, float, float]:
        plan = self._configuration.document.daemon
        zone = zone_of(self._configuration.document, self._environment)
        return zone, plan.jitter_seconds, self._clock.random()

    async def _run(self, job: Job) -> None:
        cluster = job.cluster or None
        throttle = Throttle()

        def heard(line: str) -> None:
            if not line.strip() or not throttle.passes(self._clock.monotonic()):
                return
            self._log.emit(Level.INFO, "said", line, cluster=cluster, job=job.name)

        self._say("job_started", "started", cluster=cluster, job=job.name)
        end = await run_child(
            self._command(*job.arguments),
            environment=self._children,
            clock=self._clock,
            stop=self._stop,
            timeout_seconds=job.timeout_seconds,
            grace_seconds=self._configuration.document.daemon.stop_grace_seconds,
            on_error=heard,
        )
        if count := throttle.take_left_out():
            self._log.emit(
                Level.WARNING, "lines_left_out", f"{count} lines were left out", cluster=cluster, job=job.name
            )
        self._ended(self._jobs.get(job.key, job), end)
        del self._running[job.key]

    def _ended(self, job: Job, end: Ended) -> None:
        before = self._states[job.key]
        after = ended(job, before, end, self._clock.now(), *self._chance())
        if job.key in self._jobs:
            self._states[job.key] = after
        else:
            # A reload took it away while it ran.
            del self._states[job.key]
        cluster = job.cluster or None
        if end.stopped:
            self._say(
                "job_stopped", "stopped with the daemon; it will run again", cluster=cluster, job=job.name
            )
        elif after.failures_in_a_row:
            due = iso(after.next_due)
            message = f"failed: {after.last_message}; next try {due}"
            self._log.emit(Level.ERROR, "job_failed", message, cluster=cluster, job=job.name)
            if after.failures_in_a_row == 1:
                self._tell(
                    job.hooks, EventKind.FAILURE, job.cluster, job.name, after.last_message, end.code, 1
                )
        else:
            took = write_duration(round(end.seconds, 1))
            self._say("job_done", f"done in {took}", cluster=cluster, job=job.name)
            if before.failures_in_a_row:
                self._tell(
                    job.hooks,
                    EventKind.RECOVERY,
                    job.cluster,
                    job.name,
                    "works again",
                    0,
                    before.failures_in_a_row,
                )

    def _say(self, event: str, message: str, *, cluster: str | None, job: str) -> None:
        self._log.emit(Level.INFO, event, message, cluster=cluster, job=job)


def _name(key: Key) -> str:
    return "/".join(part for part in key if part)
