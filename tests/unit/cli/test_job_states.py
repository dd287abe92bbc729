"""What becomes of a job between runs, failures, restarts and reloads; no clock, no process."""

from __future__ import annotations

import dataclasses
from datetime import UTC

from hypothesis import given
from hypothesis import strategies as st

from cli.child_process import Ended
from cli.job_states import ended, planned, ready, rescheduled, started
from cli.jobs import Job
from cli.observed import JobState
from cli.operations import HookPlan
from cli.schedule import Cron, Every

SECOND = 1_000_000
HOUR = 3600 * SECOND
NOW = 1_795_000_000 * SECOND


def job(name: str = "gc", every: float = 6 * 3600.0, *, heavy: bool = True) -> Job:
    return Job("c", name, (name,), Every(every), 60.0, heavy, HookPlan())


def end(code: int, *, timed_out: bool = False, stopped: bool = False, seconds: float = 1.0) -> Ended:
    return Ended(code, (), ("tl: it broke", "hint: mend it"), seconds, timed_out, stopped)


def plan(one: Job, before: JobState | None, now: int = NOW) -> JobState:
    return planned(one, before, now, UTC, 0.0, 0.0)


def finish(one: Job, state: JobState, how: Ended, now: int) -> JobState:
    return ended(one, state, how, now, UTC, 0.0, 0.0)


def test_a_new_job_waits_one_interval() -> None:
    assert plan(job(), None).next_due == NOW + 6 * HOUR


@given(st.integers(0, 1000))
def test_missed_runs_are_made_up_for_once(missed: int) -> None:
    """However long the daemon was away, an overdue job runs once, then at its usual distance."""
    first = dataclasses.replace(plan(job(), None), last_started=NOW, next_due=NOW + 6 * HOUR)
    back = NOW + (missed + 1) * 6 * HOUR + 1
    state = plan(job(), first, back)
    assert ready({job().key: job()}, {job().key: state}, back, 1) == (job(),)
    after = finish(job(), started(state, back), end(0), back + SECOND)
    assert after.next_due == back + 6 * HOUR
    assert ready({job().key: job()}, {job().key: after}, back + SECOND, 1) == ()


def test_the_same_for_cron() -> None:
    nightly = dataclasses.replace(job(), schedule=Cron("0 3 * * *"))
    state = dataclasses.replace(plan(nightly, None), last_started=NOW - 240 * HOUR, next_due=None)
    state = plan(nightly, state)
    assert state.next_due is not None
    assert state.next_due <= NOW
    after = finish(nightly, started(state, NOW), end(0), NOW + SECOND)
    assert after.next_due is not None
    assert NOW < after.next_due <= NOW + 24 * HOUR


def test_a_run_longer_than_its_interval_is_not_followed_at_once() -> None:
    state = started(plan(job(every=60), None), NOW)
    after = finish(job(every=60), state, end(0, seconds=600), NOW + 600 * SECOND)
    assert after.next_due == NOW + 660 * SECOND


def test_a_clock_that_was_ahead_puts_nothing_off() -> None:
    wrong = dataclasses.replace(plan(job(), None), last_started=NOW + 1000 * HOUR, next_due=None)
    assert plan(job(), wrong).next_due == NOW + 6 * HOUR


def test_a_run_whose_daemon_was_killed_comes_again_soon() -> None:
    cut = started(plan(job(), None), NOW)
    assert plan(job(), cut, NOW + SECOND).next_due == NOW + 301 * SECOND
    assert plan(job(), cut, NOW + SECOND).running_since is None


def test_one_that_is_stopped_with_the_daemon_has_not_failed() -> None:
    after = finish(job(), started(plan(job(), None), NOW), end(-15, stopped=True), NOW + SECOND)
    assert (after.failures_in_a_row, after.runs, after.last_exit_code) == (0, 0, None)
    assert after.next_due == NOW + 301 * SECOND


def test_wrong_words_are_not_hammered_until_a_reload() -> None:
    often = job(every=1)
    after = finish(often, started(plan(often, None), NOW), end(2), NOW)
    assert after.next_due == NOW + HOUR
    assert after.last_message == "exit code 2: it broke (mend it)"
    assert rescheduled(often, after, NOW + SECOND, UTC, 0.0, 0.0).next_due == NOW + SECOND


def test_what_may_pass_is_tried_sooner_and_ever_more_slowly() -> None:
    state = started(plan(job(), None), NOW)
    waits = []
    for _ in range(6):
        state = finish(job(), started(state, NOW), end(7), NOW)
        assert state.next_due is not None
        waits.append((state.next_due - NOW) // SECOND)
    assert waits == [300, 600, 1200, 2400, 3600, 3600]


def test_failures_are_counted_until_a_success() -> None:
    state = plan(job(), None)
    for code in (1, 6, 4):
        state = finish(job(), started(state, NOW), end(code), NOW)
    assert (state.failures_in_a_row, state.runs, state.last_success) == (3, 3, None)
    late = finish(job(), started(state, NOW), end(0, timed_out=True), NOW)
    assert late.failures_in_a_row == 4
    assert "its time limit" in late.last_message
    good = finish(job(), started(late, NOW), end(0), NOW + 5)
    assert (good.failures_in_a_row, good.last_message, good.last_success) == (0, "", NOW + 5)


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(-10, 10), st.booleans()), max_size=12),
    st.integers(1, 4),
)
def test_no_overlap_and_no_more_heavy_ones_than_allowed(
    kinds: list[tuple[bool, bool, int, bool]], concurrency: int
) -> None:
    jobs, states = {}, {}
    for number, (heavy, running, due, known) in enumerate(kinds):
        one = job(f"j{number}", heavy=heavy)
        states[one.key] = dataclasses.replace(
            plan(one, None), running_since=NOW if running else None, next_due=None if running else NOW + due
        )
        if known or not running:
            jobs[one.key] = one
    chosen = ready(jobs, states, NOW, concurrency)
    busy = [key for key, state in states.items() if state.running_since is not None]
    assert not {one.key for one in chosen} & set(busy)
    heavy_busy = sum(1 for key in busy if key not in jobs or jobs[key].heavy)
    heavy_chosen = sum(one.heavy for one in chosen)
    assert heavy_chosen <= max(0, concurrency - heavy_busy)
    overdue = [one for key, one in jobs.items() if (at := states[key].next_due) is not None and at <= NOW]
    # Light ones never wait, and a heavy one waits for nothing but its turn.
    assert {one.key for one in overdue if not one.heavy} <= {one.key for one in chosen}
    assert heavy_chosen == min(sum(one.heavy for one in overdue), max(0, concurrency - heavy_busy))
