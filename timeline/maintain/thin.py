"""Thinning: the older a time, the fewer built snapshots of it are kept. Pure.

A snapshot that is dropped takes no history with it: its moment is then reached from an older one, by more replay.
So base backups always stay, and so does the newest of each tli. Ages count from the newest snapshot's own time,
on the source's clock (EDGE 55): an archive that stands still is not thinned any further.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from timeline.clock import Micros
from timeline.format.branch_state import BUILT, Snapshot

_SECOND = 1_000_000
_HOUR = 3600.0
_DAY = 24 * _HOUR


@dataclass(frozen=True, slots=True)
class Rule:
    """One snapshot in ``every_seconds`` for those younger than ``younger_than_seconds``; 0: all of them."""

    younger_than_seconds: float
    every_seconds: float


RULES = (Rule(2 * _DAY, 0), Rule(7 * _DAY, _HOUR), Rule(30 * _DAY, _DAY), Rule(math.inf, 30 * _DAY))
"""Youngest first."""


def rules_of_ages(keep_all_seconds: float, hourly_seconds: float, daily_seconds: float) -> tuple[Rule, ...]:
    """All up to the first age, then one an hour, one a day, and beyond the last age one a month."""
    return (
        Rule(keep_all_seconds, 0),
        Rule(hourly_seconds, _HOUR),
        Rule(daily_seconds, _DAY),
        Rule(math.inf, 30 * _DAY),
    )


def superfluous(snapshots: Sequence[Snapshot], rules: Sequence[Rule] = RULES) -> tuple[str, ...]:
    """Ids of the snapshots that the rules do not keep, in the order given.

    Of those that share a period the last one stays. The answer is stable: what is kept today is still there to be
    kept tomorrow, since every period of a rule lies in one of the next.
    """
    if not snapshots:
        return ()
    now = max(snapshot.time for snapshot in snapshots)
    last: dict[tuple[int, float, int], Snapshot] = {}
    newest: dict[int, Snapshot] = {}
    for snapshot in snapshots:
        newest[snapshot.tli] = max(newest.get(snapshot.tli, snapshot), snapshot, key=lambda one: one.lsn)
        if (period := _period(snapshot, now, rules)) is not None:
            last[period] = max(last.get(period, snapshot), snapshot, key=lambda one: one.lsn)
    kept = {snapshot.id for snapshot in (*last.values(), *newest.values())}
    return tuple(
        snapshot.id
        for snapshot in snapshots
        if snapshot.kind == BUILT and snapshot.id not in kept and _period(snapshot, now, rules) is not None
    )


def _period(snapshot: Snapshot, now: Micros, rules: Sequence[Rule]) -> tuple[int, float, int] | None:
    """What it shares with the snapshots of which one is kept; ``None``: it is kept in any case."""
    age = (now - snapshot.time) / _SECOND
    rule = next(rule for rule in rules if age < rule.younger_than_seconds)
    if rule.every_seconds == 0:
        return None
    return snapshot.tli, rule.every_seconds, int(snapshot.time // (rule.every_seconds * _SECOND))
