"""Retention on any history: what was reachable inside the window stays reachable, and the log takes every plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.format.test_log_changes import INCARNATION, REF, SNAPSHOT
from timeline.catalog.line import line_of, runs_on, usable_snapshots
from timeline.format import branch_state, log_change
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn
from timeline.maintain.retention import RetentionPlan, RetentionPolicy, plan_retention
from timeline.pg.segment import HistoryRow, format_history, parse_history

SEGMENT = 1 << 20
FIRST = Lsn(8 * SEGMENT)
HOUR = 3600 * 1_000_000
STEP = 300_000


@dataclass(frozen=True)
class Step:
    """One thing that happens to the branch."""

    kind: str
    amount: int


STEPS = st.lists(
    st.builds(
        Step,
        kind=st.sampled_from(
            ["wal", "wal", "wal", "wal", "base", "base", "built", "quiet", "gap", "fork", "progress"]
        ),
        amount=st.integers(0, 1000),
    ),
    max_size=40,
)
POLICIES = st.builds(
    RetentionPolicy,
    window_seconds=st.integers(0, 60).map(lambda hours: hours * 3600.0),
    minimum_bases=st.integers(1, 3),
    minimum_snapshots=st.integers(1, 4),
    orphans_seconds=st.none() | st.integers(0, 90).map(lambda hours: hours * 3600.0),
)


@dataclass
class World:
    """A state, and when each stretch of its WAL was written: one hour each."""

    state: branch_state.BranchState
    now: int = 1000 * HOUR
    written: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)
    """By tli: (start, end, time of the last commit)."""

    def time_of(self, tli: int, lsn: int) -> int:
        """When the WAL before an LSN was there."""
        line = line_of(self.state, tli)
        owner = next((span.tli for span in line if span.end is None or lsn <= span.end), tli)
        return next((time for start, end, time in self.written.get(owner, ()) if start < lsn <= end), 0)


def build(steps: list[Step]) -> World:
    tli = branch_state.Tli(1, None, FIRST, FIRST, None, None)
    begin = log_change.Begin(replace(INCARNATION, from_lsn=FIRST), tli)
    world = World(begin.apply(branch_state.BranchState.empty("main")))
    for number, step in enumerate(steps):
        state = world.state
        known = state.find_tli(state.current_tli)
        assert known is not None
        at = state.after_gap(known.tli, known.sealed)
        match step.kind:
            case "wal":
                world.now += HOUR
                end = Lsn(at + STEP + step.amount * 2000)
                commits = 0 if step.amount % 5 == 0 else 3
                sealed = branch_state.SealedRange(
                    known.tli,
                    at,
                    end,
                    REF,
                    world.now if commits else None,
                    world.now if commits else None,
                    commits,
                    0,
                )
                written = world.written.setdefault(known.tli, [])
                # What no commit dates is as old as what is before it: no time after that means a moment inside.
                before = written[-1][2] if written else 0
                written.append((at, end, world.now if commits else before))
                world.state = log_change.Seal(sealed, None).apply(state)
            case "base" if known.sealed - max(known.start, FIRST) > STEP:
                end = known.sealed
                lsn = Lsn(max(end - 1000 * (1 + step.amount), _run_start(state, known.tli, end)))
                base = replace(
                    SNAPSHOT,
                    id=f"base-{number}",
                    tli=known.tli,
                    lsn=lsn,
                    checkpoint=lsn,
                    end=end,
                    time=world.now,
                )
                world.state = log_change.AddSnapshot(base).apply(state)
            case "built":
                line = line_of(state, known.tli)
                runs = runs_on(state, line, {})
                if runs and runs[-1].pieces[-1].tli == known.tli:
                    usable = usable_snapshots(state, line, runs[-1])
                    if any(one.kind == branch_state.BASE for one in usable) and usable[0].end < known.sealed:
                        at = known.sealed
                        built = replace(
                            SNAPSHOT,
                            id=f"built-{number}",
                            kind=branch_state.BUILT,
                            tli=known.tli,
                            lsn=at,
                            checkpoint=at,
                            end=at,
                            time=world.now,
                            backup_label=None,
                        )
                        world.state = log_change.AddSnapshot(built).apply(state)
            case "quiet":
                world.now += step.amount % 50 * HOUR
                coverage = Coverage(known.tli, known.sealed, world.now)
                world.state = log_change.Cover(coverage).apply(state)
            case "gap" if at == known.sealed:
                resumed = Lsn(at - at % SEGMENT + SEGMENT * (1 + step.amount % 2))
                world.state = log_change.RecordGap(branch_state.Gap(known.tli, at, resumed, "lost")).apply(
                    state
                )
            case "fork":
                parents = [one for one in state.tlis if one.sealed > one.start]
                if not parents:
                    continue
                parent = parents[step.amount % len(parents)]
                span = parent.sealed - parent.start
                fork = Lsn(parent.start + span * (1 + step.amount % 8) // 8)
                rows = list(parse_history(parent.history or ""))
                history = format_history([*rows, HistoryRow(parent.tli, fork, "x")])
                new = branch_state.Tli(len(state.tlis) + 1, parent.tli, fork, fork, None, history)
                world.state = log_change.SwitchTli(parent.tli, fork, new).apply(state)
            case "progress" if step.amount % 10 == 0:
                progress = branch_state.BackupProgress("p", (), 0, world.now)
                world.state = log_change.RecordProgress(progress).apply(state)
    return world


def _run_start(state: branch_state.BranchState, tli: int, end: Lsn) -> int:
    runs = runs_on(state, line_of(state, tli), {})
    return next((run.start for run in runs if run.start < end <= run.end), 0)


def reachable(state: branch_state.BranchState, tli: int) -> list[tuple[Lsn, Lsn]]:
    """LSNs that can be had on the line of a tli."""
    line = line_of(state, tli)
    found = []
    for run in runs_on(state, line, {}):
        if snapshots := usable_snapshots(state, line, run):
            found.append((snapshots[0].end, run.end))
    return found


def carry_out(state: branch_state.BranchState, plan: RetentionPlan) -> branch_state.BranchState:
    if plan.snapshots:
        state = log_change.DropSnapshots(plan.snapshots).apply(state)
    if plan.forget:
        state = log_change.ForgetWal(plan.forget).apply(state)
    return state


def moments(ranges: list[tuple[Lsn, Lsn]], every: int = 50_000) -> set[int]:
    return {lsn for first, last in ranges for lsn in (*range(first, last, every), last)}


def restorable_bases(state: branch_state.BranchState) -> int:
    line = line_of(state, state.current_tli)
    usable = {
        one.id
        for run in runs_on(state, line, {})
        for one in usable_snapshots(state, line, run)
        if one.kind == branch_state.BASE
    }
    return len(usable)


@settings(max_examples=400, deadline=None)
@given(steps=STEPS, policy=POLICIES)
def test_the_window_stays_reachable(steps: list[Step], policy: RetentionPolicy) -> None:
    """P7, EDGE 18, 42: on every line that is kept; and the second run finds nothing more to do."""
    world = build(steps)
    before = world.state
    plan = plan_retention(before, policy, world.now)
    after = carry_out(before, plan)
    window = plan.window_start if plan.window_start is not None else 0
    source = window + int(policy.window_seconds * 1_000_000)
    orphans = policy.window_seconds if policy.orphans_seconds is None else policy.orphans_seconds
    assert plan.reasons
    for known in before.tlis:
        own = moments(reachable(before, known.tli))
        left = reachable(after, known.tli)
        for lsn in own:
            time = world.time_of(known.tli, lsn)
            if time <= window or (
                known.tli != before.current_tli and _newest(world, known.tli) < source - orphans * 1_000_000
            ):
                continue
            assert any(first <= lsn <= last for first, last in left), (known.tli, lsn, plan)
    head = reachable(before, before.current_tli)[-1:]
    assert head == [] or head[0][1] == reachable(after, before.current_tli)[-1][1]
    least = min(policy.minimum_bases, restorable_bases(before))
    assert restorable_bases(after) >= least
    assert plan_retention(after, policy, world.now).forget == ()
    assert plan_retention(after, policy, world.now).snapshots == ()


def _newest(world: World, tli: int) -> int:
    return max((time for _, _, time in world.written.get(tli, ())), default=0)
