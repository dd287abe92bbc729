"""Which WAL the snapshots of a branch need: what no change may take from its log ([LOG-8])."""

from __future__ import annotations

from dataclasses import dataclass

from timeline.format.branch_state import BranchState, SealedRange, Snapshot
from timeline.lsn import Lsn


@dataclass(frozen=True, slots=True)
class NeededWal:
    """WAL [start, end) of a tli that a snapshot needs ([LOG-8]); ``end`` ``None``: all there will be."""

    tli: int
    start: Lsn
    end: Lsn | None
    snapshot: str

    def overlaps(self, sealed: SealedRange) -> bool:
        """Whether a sealed range holds any of it."""
        return (
            sealed.tli == self.tli
            and sealed.end > self.start
            and (self.end is None or sealed.start < self.end)
        )


def needed_wal(state: BranchState) -> tuple[NeededWal, ...]:
    """What no change may take from the log while its snapshots stand ([LOG-8]).

    Of every snapshot the WAL of its line from the start of the segment of its ``lsn`` to its ``end``; of the
    oldest one on the line that leads to the current tli all of that line from there on.
    """
    needed: list[NeededWal] = []
    current = _spans(state, state.current_tli)
    oldest: Snapshot | None = None
    for snapshot in state.snapshots:
        start = _segment_of(state, snapshot.lsn)
        own = _spans(state, snapshot.tli)
        needed += _clip(own, start, snapshot.end, snapshot.id)
        if _is_on(current, snapshot) and (oldest is None or snapshot.lsn < oldest.lsn):
            oldest = snapshot
    if oldest is not None:
        needed += _clip(current, _segment_of(state, oldest.lsn), None, oldest.id)
    return tuple(needed)


_Spans = list[tuple[int, Lsn, Lsn | None]]
"""A line, youngest tli first: (tli, start, end)."""


def _spans(state: BranchState, number: int) -> _Spans:
    spans: _Spans = []
    end: Lsn | None = None
    known = state.find_tli(number)
    while known is not None and len(spans) <= len(state.tlis):
        spans.append((known.tli, known.start, end))
        end = known.start
        known = None if known.parent is None else state.find_tli(known.parent)
    return spans


def _is_on(spans: _Spans, snapshot: Snapshot) -> bool:
    return any(
        tli == snapshot.tli and start <= snapshot.lsn and (end is None or snapshot.end <= end)
        for tli, start, end in spans
    )


def _clip(spans: _Spans, start: Lsn, end: Lsn | None, snapshot: str) -> list[NeededWal]:
    clipped = []
    for tli, begin, left in spans:
        last = left if end is None else end if left is None else min(left, end)
        if last is None or max(begin, start) < last:
            clipped.append(NeededWal(tli, Lsn(max(begin, start)), last, snapshot))
    return clipped


def _segment_of(state: BranchState, lsn: Lsn) -> Lsn:
    """Where the WAL segment of an LSN starts; the LSN itself while no server is known."""
    wrote = [one for one in state.incarnations if one.from_lsn <= lsn] or list(state.incarnations[:1])
    return Lsn(lsn - lsn % wrote[-1].segment_bytes) if wrote else lsn
