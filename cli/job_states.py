"""What becomes of a job's state as it is planned, started and ended, and which job runs next. Pure.

``next_due`` is decided once, jitter included, and kept over restarts: a run that fell into the daemon's absence is due
at once, and once, however many it would have been.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import tzinfo

from cli.child_process import Ended
from cli.job_figures import read_figures
from cli.jobs import Job
from cli.observed import JobState
from cli.said import failure_message
from cli.schedule import next_after, with_jitter
from timeline.clock import Micros

USAGE_PAUSE_SECONDS = 3600.0
"""A job whose words are wrong is not tried again sooner: only a new tl.toml or a new tl can help. A reload may."""
RETRY_SECONDS = 300.0
"""After a failure that may pass (exit code 7), or when the daemon ended first; doubled each time …"""
LONGEST_RETRY_SECONDS = 3600.0
"""… up to this, and never later than the schedule says."""
_USAGE, _UNAVAILABLE = 2, 7
_SECOND = 1_000_000


def planned(
    job: Job, before: JobState | None, now: Micros, zone: tzinfo, jitter_seconds: float, chance: float
) -> JobState:
    """The state of a job that a daemon takes up, from what the one before left."""
    state = before or JobState(job.name, 0, 0, None, None, None, None, None, "", None)
    # A clock that was ahead once must not put a job off until then.
    last = min(state.last_started, now) if state.last_started is not None else None
    due = with_jitter(
        job.schedule,
        next_after(job.schedule, last if last is not None else now, zone),
        jitter_seconds,
        chance,
    )
    if state.next_due is not None:
        due = min(due, state.next_due)
    if state.running_since is not None:
        # Its daemon was killed beside it; the run counts for nothing.
        due = min(due, now + round(RETRY_SECONDS * _SECOND))
    return dataclasses.replace(state, running_since=None, last_started=last, next_due=due)


def rescheduled(
    job: Job, state: JobState, now: Micros, zone: tzinfo, jitter_seconds: float, chance: float
) -> JobState:
    """The state after a reload that changed the job: what the old schedule had decided is void."""
    return planned(job, dataclasses.replace(state, next_due=None), now, zone, jitter_seconds, chance)


def started(state: JobState, now: Micros) -> JobState:
    """The state once it runs."""
    return dataclasses.replace(state, running_since=now, last_started=now, next_due=None)


def ended(
    job: Job, state: JobState, end: Ended, now: Micros, zone: tzinfo, jitter_seconds: float, chance: float
) -> JobState:
    """The state after a run. Times that went by while it ran are left out."""
    began = state.last_started if state.last_started is not None else now
    due = next_after(job.schedule, min(began, now), zone)
    if due <= now:
        due = next_after(job.schedule, now, zone)
    due = with_jitter(job.schedule, due, jitter_seconds, chance)
    if end.stopped:
        # Told to stop with the daemon: no failure, and no success either.
        return dataclasses.replace(
            state, running_since=None, next_due=min(due, now + round(RETRY_SECONDS * _SECOND))
        )
    good = end.code == 0 and not end.timed_out
    failures = 0 if good else state.failures_in_a_row + 1
    if end.code == _USAGE:
        due = max(due, now + round(USAGE_PAUSE_SECONDS * _SECOND))
    elif end.code == _UNAVAILABLE:
        pause = min(RETRY_SECONDS * 2.0 ** min(failures - 1, 10), LONGEST_RETRY_SECONDS)
        due = min(due, now + round(pause * _SECOND))
    return dataclasses.replace(
        state,
        runs=state.runs + 1,
        failures_in_a_row=failures,
        running_since=None,
        last_seconds=round(end.seconds, 3),
        last_exit_code=end.code,
        last_success=now if good else state.last_success,
        last_message="" if good else failure_message(end, job.timeout_seconds),
        next_due=due,
        figures=read_figures("\n".join(end.out)) or state.figures,
    )


def ready(
    jobs: Mapping[tuple[str, str], Job],
    states: Mapping[tuple[str, str], JobState],
    now: Micros,
    concurrency: int,
) -> tuple[Job, ...]:
    """The jobs to start now, the longest due first. None that runs is started again (nor one that a reload took
    away), and no more heavy ones run than ``concurrency``."""
    free = concurrency - sum(
        1
        for key, state in states.items()
        if state.running_since is not None and (key not in jobs or jobs[key].heavy)
    )
    due = sorted(
        (state.next_due, key)
        for key, state in states.items()
        if key in jobs
        and state.running_since is None
        and state.next_due is not None
        and state.next_due <= now
    )
    chosen = []
    for _, key in due:
        if jobs[key].heavy:
            if free <= 0:
                continue
            free -= 1
        chosen.append(jobs[key])
    return tuple(chosen)
