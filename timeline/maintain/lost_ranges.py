"""From holes in WAL and unusable snapshots to the moments that cannot be restored. Pure.

A moment can be had when a snapshot of its line ends at or before it and all WAL from the start of that snapshot's
replay is there. Each tli answers for its own part of its line; its ancestors answer for theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from timeline.catalog.line import Line, incarnation_at, line_of, replay_start
from timeline.format.branch_state import BranchState
from timeline.lsn import Lsn
from timeline.maintain.verify_report import LsnRange

Interval = tuple[int, int]
"""[start, end)."""


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union, ascending, adjoining ones joined, empty ones left out."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if start >= end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def without(intervals: Iterable[Interval], holes: Iterable[Interval]) -> list[Interval]:
    """What is in the first and not in the second."""
    left = merged(intervals)
    for start, end in merged(holes):
        left = [
            part
            for one, two in left
            for part in ((one, min(two, start)), (max(one, end), two))
            if part[0] < part[1]
        ]
    return left


def restorable(
    state: BranchState,
    wal: Mapping[int, Sequence[Interval]],
    holes: Sequence[LsnRange] = (),
    unusable: Set[str] = frozenset(),
) -> tuple[LsnRange, ...]:
    """The moments that can be had, tli by tli. ``wal``: what is there of each tli, before ``holes`` are cut
    out of it; ``unusable``: ids of snapshots."""
    found: list[LsnRange] = []
    for known in state.tlis:
        line = line_of(state, known.tli)
        intact: list[Interval] = []
        for span in line:
            cut = [(hole.start, hole.end) for hole in holes if hole.tli == span.tli]
            for start, end in without(wal.get(span.tli, ()), cut):
                intact.append((max(start, span.begin), end if span.end is None else min(end, span.end)))
        for start, end in merged(intact):
            first = min(_snapshot_ends(state, line, start, end, unusable), default=None)
            if first is not None and max(first, line[-1].begin) < end:
                found.append(LsnRange(known.tli, Lsn(max(first, line[-1].begin)), Lsn(end)))
    return tuple(found)


def lost(before: Iterable[LsnRange], after: Iterable[LsnRange]) -> tuple[LsnRange, ...]:
    """What was in the first and is not in the second."""
    before, after = list(before), list(after)
    return tuple(
        LsnRange(tli, Lsn(start), Lsn(end))
        for tli in sorted({one.tli for one in before})
        for start, end in without(
            [(one.start, one.end) for one in before if one.tli == tli],
            [(one.start, one.end) for one in after if one.tli == tli],
        )
    )


def _snapshot_ends(state: BranchState, line: Line, start: int, end: int, unusable: Set[str]) -> Iterable[int]:
    """Where moments begin, for each snapshot that replays within [start, end] of the line."""
    spans = {span.tli: span for span in line}
    for snapshot in state.snapshots:
        span = spans.get(snapshot.tli)
        if snapshot.id in unusable or span is None or snapshot.lsn < span.begin:
            continue
        if span.end is not None and snapshot.end > span.end:
            continue
        first = replay_start(snapshot, incarnation_at(state, snapshot.lsn).segment_bytes)
        if start <= first and snapshot.end <= end:
            yield snapshot.end
