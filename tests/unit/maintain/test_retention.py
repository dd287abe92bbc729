"""Retention: what decides where the window ends, what holds everything back, and what goes with a line left."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.property.test_retention_model import Step, World, build, carry_out
from tests.support.archived_wal import FIRST, Archive, Server
from timeline.format import branch_state, log_change
from timeline.maintain.retention import PROGRESS_SECONDS, RetentionPolicy, apply_retention, plan_retention

HOUR = 3600 * 1_000_000
NOW_ONLY = RetentionPolicy(window_seconds=0)


def two_bases(hours_between: int = 10) -> World:
    wal = [Step("wal", 1)] * 4
    return build([*wal, Step("base", 0), *[Step("wal", 1)] * hours_between, Step("base", 0), *wal])


def test_the_newest_base_backup_before_the_window_is_the_floor() -> None:
    world = two_bases()
    first, second = world.state.snapshots
    plan = plan_retention(world.state, NOW_ONLY, world.now)
    assert plan.snapshots == (first.id,) and plan.wal_bytes > 0
    assert second.id in plan.reasons[0]
    after = carry_out(world.state, plan)
    assert after.sealed[0].start <= second.lsn < after.sealed[0].end
    whole = plan_retention(world.state, RetentionPolicy(window_seconds=12 * 3600.0), world.now)
    assert whole.snapshots == ()
    assert first.id in whole.reasons[0] and "tl backup" in whole.reasons[0]


def test_an_archive_that_stands_still_keeps_its_history() -> None:
    """EDGE 55: years later nothing more goes than on its last day."""
    world = two_bases()
    policy = RetentionPolicy(window_seconds=12 * 3600.0)
    today = plan_retention(world.state, policy, world.now)
    assert today.snapshots == ()
    assert plan_retention(world.state, policy, world.now + 100_000 * HOUR) == today


def test_a_source_whose_clock_ran_ahead_loses_nothing() -> None:
    """EDGE 55: this machine's clock bounds the window's end."""
    world = two_bases()
    last = world.state.sealed[-1]
    assert last.max_commit_time is not None
    ahead = replace(last, max_commit_time=last.max_commit_time + 100_000 * HOUR)
    state = replace(world.state, sealed=(*world.state.sealed[:-1], ahead))
    policy = RetentionPolicy(window_seconds=12 * 3600.0)
    before, after = (plan_retention(one, policy, world.now) for one in (world.state, state))
    # The window ends at ``now``, and so it would if that clock were right.
    assert (after.snapshots, after.forget) == (before.snapshots, before.forget) == ((), before.forget)


def test_minimum_numbers_are_never_violated() -> None:
    world = two_bases()
    for policy in (replace(NOW_ONLY, minimum_bases=2), replace(NOW_ONLY, minimum_snapshots=2)):
        assert plan_retention(world.state, policy, world.now).snapshots == ()
    with pytest.raises(ValueError, match="at least one base backup"):
        RetentionPolicy(minimum_bases=0)


def test_a_base_backup_under_way_holds_everything() -> None:
    """EDGE 42: until it has told of nothing for a day."""
    world = two_bases()
    progress = branch_state.BackupProgress("p", (), 0, world.now)
    state = log_change.RecordProgress(progress).apply(world.state)
    plan = plan_retention(state, NOW_ONLY, world.now)
    assert (plan.snapshots, plan.forget) == ((), ())
    assert "under way" in plan.reasons[0]
    late = world.now + int(PROGRESS_SECONDS) * 1_000_000
    assert plan_retention(state, NOW_ONLY, late).forget != ()


def test_an_orphan_tail_goes_when_it_is_old() -> None:
    """EDGE 18: the WAL before the fork, which the new line needs, stays."""
    wal = [Step("wal", 1)] * 8
    world = build([*wal[:2], Step("base", 0), *wal, Step("fork", 3), *wal])
    fork = world.state.tlis[1].start
    policy = RetentionPolicy(window_seconds=1000 * 3600.0, orphans_seconds=2 * 3600.0)
    plan = plan_retention(world.state, policy, world.now)
    (gone,) = plan.forget
    assert gone.tli == 1 and gone.start >= fork and plan.snapshots == ()
    after = carry_out(world.state, plan)
    assert any(one.tli == 1 and one.start <= fork <= one.end for one in after.sealed)
    assert "tli 1 beyond" in " ".join(plan.reasons)
    assert plan_retention(world.state, RetentionPolicy(window_seconds=1000 * 3600.0), world.now).forget == ()


def test_nothing_archived() -> None:
    async def work() -> None:
        archive = Archive()
        plan = await apply_retention(archive.store, archive.log, archive.clock, NOW_ONLY)
        assert (plan.snapshots, plan.forget) == ((), ())
        await archive.begin(Server(1, FIRST))
        plan = await apply_retention(archive.store, archive.log, archive.clock, NOW_ONLY)
        assert (plan.snapshots, plan.forget) == ((), ())

    asyncio.run(work())
