"""Thinning keeps all young snapshots, fewer old ones, and every base backup."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.format.test_log_changes import SNAPSHOT
from timeline.format.branch_state import BASE, BUILT, Snapshot
from timeline.lsn import Lsn
from timeline.maintain.thin import RULES, superfluous

HOUR = 3600 * 1_000_000
NOW = 400 * 24 * HOUR


def made(hours_ago: float, *, kind: str = BUILT, tli: int = 1) -> Snapshot:
    time = NOW - int(hours_ago * HOUR)
    label = None if kind == BUILT else "START"
    return replace(
        SNAPSHOT,
        id=f"{kind}-{tli}-{time}",
        kind=kind,
        tli=tli,
        time=time,
        lsn=Lsn(time),
        end=Lsn(time),
        backup_label=label,
    )


def left(snapshots: list[Snapshot]) -> list[Snapshot]:
    gone = set(superfluous(snapshots))
    return [snapshot for snapshot in snapshots if snapshot.id not in gone]


def test_two_days_are_kept_whole() -> None:
    young = [made(minutes / 60) for minutes in range(48 * 60 - 1, -1, -5)]
    assert left(young) == young


def test_then_one_an_hour_one_a_day_one_a_month() -> None:
    many = [made(hours / 4) for hours in range(100 * 24 * 4, -1, -1)]
    kept = left(many)

    def between(first: float, last: float) -> int:
        return sum(first * 24 * HOUR <= NOW - snapshot.time < last * 24 * HOUR for snapshot in kept)

    assert between(0, 2) == 2 * 24 * 4
    assert 5 * 24 - 1 <= between(2, 7) <= 5 * 24 + 1
    assert 22 <= between(7, 30) <= 24
    assert 2 <= between(30, 101) <= 4


def test_base_backups_and_the_newest_of_each_tli_stay() -> None:
    base = [made(50 * 24 + minutes / 60, kind=BASE) for minutes in range(10)]
    old_line = [made(40 * 24 - minutes / 60, tli=1) for minutes in range(10)]
    kept = left([*base, *old_line, made(0, tli=2)])
    assert [snapshot for snapshot in kept if snapshot.kind == BASE] == base
    assert old_line[-1] in kept
    assert len([snapshot for snapshot in kept if snapshot in old_line]) == 1


def test_nothing_of_nothing() -> None:
    assert superfluous([]) == ()


@given(st.sets(st.integers(0, 60 * 24 * 4), min_size=1, max_size=60), st.integers(0, 60 * 24 * 4))
@example({2, 3, 2881, 2882}, 3)
def test_whenever_it_ran_a_period_that_had_a_snapshot_has_one_as_late(quarters: set[int], step: int) -> None:
    """Which of two on both sides of an age limit is left may depend on when it ran; that one is left does not."""
    snapshots = sorted((made(quarter / 4) for quarter in quarters), key=lambda snapshot: snapshot.time)
    early = [snapshot for snapshot in snapshots if snapshot.time <= NOW - step * HOUR // 4]
    now = snapshots[-1].time
    at_once, bit_by_bit = left(snapshots), left([*left(early), *snapshots[len(early) :]])

    def every_of(snapshot: Snapshot) -> float:
        age = (now - snapshot.time) / 1e6
        return next(rule.every_seconds for rule in RULES if age < rule.younger_than_seconds)

    def share(one: Snapshot, other: Snapshot) -> bool:
        every = max(every_of(one), every_of(other))
        return one.time // 1e6 // every == other.time // 1e6 // every

    for kept in (at_once, bit_by_bit):
        for snapshot in snapshots:
            assert snapshot in kept or (
                every_of(snapshot) and any(one.lsn >= snapshot.lsn and share(snapshot, one) for one in kept)
            )
    pairs = combinations(snapshots, 2)
    if not any(every_of(one) != every_of(other) and share(one, other) for one, other in pairs):
        assert at_once == bit_by_bit
