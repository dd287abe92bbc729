"""From a target and a snapshot to everything a branch needs; pure.

The target T and the last record before it are decided by the catalog; here it is decided which WAL goes
into which file, what the data directory shows and hides, and what Postgres is told about recovery (DESIGN
of branching, steps 2, 4 and 6).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from timeline.catalog.line import replay_start
from timeline.errors import TargetUnreachable, TimelineError
from timeline.format.branch_state import BUILT, Incarnation, Setting, Snapshot, Tli
from timeline.format.wal_index import EventKind, WalEvent
from timeline.lsn import Lsn
from timeline.pg.control import ControlFile, Parameters
from timeline.pg.segment import (
    LineageSpan,
    history_name,
    lineage,
    parse_history,
    segment_name,
    segment_start,
)

BACKUP_LABEL = "backup_label"
RECOVERY_SIGNAL = "recovery.signal"
STANDBY_SIGNAL = "standby.signal"
_LIMITS = (
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
)

_HIDDEN = (
    "backup_label.old",
    "backup_manifest",
    "current_logfiles",
    "postmaster.opts",
    "postmaster.pid",
    "recovery.conf",
    "recovery.done",
    "standby.signal",
    # It would make Postgres link the source's own tablespace directories (EDGE 49).
    "tablespace_map",
    "tablespace_map.old",
)


@dataclass(frozen=True, slots=True)
class WalSpan:
    """WAL [start, end) as one tli wrote it."""

    tli: int
    start: Lsn
    end: Lsn


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """One file of pg_wal: whole in length, zero from ``end`` on."""

    name: str
    start: Lsn
    end: Lsn
    """Just after its last byte that counts, at most T."""


@dataclass(frozen=True, slots=True)
class HistoryFile:
    """One timeline history file."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class RedoPoint:
    """Where replay begins though the source made no checkpoint there (timeline/pg/redo_point.py)."""

    lsn: Lsn
    tli: int
    """Of the record there."""
    tli_start: Lsn
    page: Lsn
    """The WAL page that it shares with the forged checkpoint: the first that is read."""


@dataclass(frozen=True, slots=True)
class BranchPlan:
    """What it takes to have the parent as it was at T."""

    snapshot: Snapshot
    incarnation: Incarnation
    tli: int
    lsn: Lsn
    """T."""
    last_record: Lsn
    spans: tuple[WalSpan, ...]
    """In order, from the first byte that replay reads to T. The first segment of a tli holds its
    parent's bytes below the fork (EDGE 17), so spans need not begin at segment boundaries."""
    segments: tuple[SegmentFile, ...]
    histories: tuple[HistoryFile, ...]
    """Of every tli in the store."""
    recovery: tuple[Setting, ...]
    """To recover to T as a target; all but ``restore_command``."""
    events: tuple[WalEvent, ...]
    """Records among the WAL to replay that a branch must know of."""
    hidden: tuple[str, ...]
    """Paths of the snapshot that must not show."""
    backup_label: str | None
    redo_point: RedoPoint | None
    """``None``: the source's own checkpoint is where replay begins."""

    @property
    def replayed_bytes(self) -> int:
        """WAL between the snapshot's redo point and T."""
        return max(0, self.lsn - self.snapshot.lsn)


def make_plan(
    *,
    snapshot: Snapshot,
    incarnation: Incarnation,
    tlis: Sequence[Tli],
    tli: int,
    lsn: Lsn,
    last_record: Lsn,
    events: Sequence[WalEvent],
) -> BranchPlan:
    """The plan for T = ``lsn`` on the line that ends in ``tli``.

    ``events``: of the WAL from snapshot to T. Raises TargetUnreachable when the snapshot cannot reach T (P7),
    TimelineError when the log lacks the history of ``tli``.
    """
    if lsn < snapshot.end:
        raise TargetUnreachable(
            f"{lsn} lies before {snapshot.end}, where snapshot {snapshot.id} becomes consistent"
        )
    segment_bytes = incarnation.segment_bytes
    first = replay_start(snapshot, segment_bytes)
    spans = _spans(tlis, tli, first, lsn)
    begun = next((part for part in _lineage(tlis, tli) if part.tli == snapshot.tli), None)
    if begun is None or all(span.tli != snapshot.tli for span in spans):
        raise TargetUnreachable(
            f"snapshot {snapshot.id} of tli {snapshot.tli} is not on the line of tli {tli}"
        )
    return BranchPlan(
        snapshot=snapshot,
        incarnation=incarnation,
        tli=tli,
        lsn=lsn,
        last_record=last_record,
        spans=spans,
        segments=_segments(spans, segment_bytes),
        histories=_histories(tlis),
        recovery=_recovery(snapshot, tli, last_record),
        events=tuple(events),
        hidden=_HIDDEN if snapshot.backup_label is not None else (*_HIDDEN, BACKUP_LABEL),
        backup_label=snapshot.backup_label,
        redo_point=RedoPoint(snapshot.lsn, snapshot.tli, Lsn(begun.begin), first)
        if snapshot.kind == BUILT
        else None,
    )


def parameters_as_of(control: ControlFile, events: Sequence[WalEvent]) -> Parameters:
    """What was in force after the events: pg_control's, or what the last change said."""
    return _in_force(control, events)[-1]


def bounds_as_of(control: ControlFile, events: Sequence[WalEvent]) -> Parameters:
    """What binds recovery: pg_control, and every change of parameters replayed after it (EDGE 46).

    Limits are the highest ever in force, for replay passes through all of them; the others are the last.
    """
    in_force = _in_force(control, events)
    highest = {name: max(getattr(each, name) for each in in_force) for name in _LIMITS}
    return dataclasses.replace(in_force[-1], **highest)


def _in_force(control: ControlFile, events: Sequence[WalEvent]) -> list[Parameters]:
    """One after the other, pg_control's first."""
    found = [control.parameters]
    for event in events:
        if event.kind is EventKind.PARAMETER_CHANGE:
            values = dict(event.values)
            found.append(
                Parameters(
                    wal_level=values["wal_level"],
                    wal_log_hints=bool(values["wal_log_hints"]),
                    track_commit_timestamp=bool(values["track_commit_timestamp"]),
                    **{name: values[name] for name in _LIMITS},
                )
            )
    return found


def _spans(tlis: Sequence[Tli], tli: int, start: Lsn, end: Lsn) -> tuple[WalSpan, ...]:
    spans = []
    for part in _lineage(tlis, tli):
        first = max(part.begin, start)
        last = end if part.end is None else min(part.end, end)
        if first < last:
            spans.append(WalSpan(part.tli, Lsn(first), Lsn(last)))
    return tuple(spans)


def _lineage(tlis: Sequence[Tli], tli: int) -> tuple[LineageSpan, ...]:
    return lineage(tli, parse_history(_history_text(tlis, tli)))


def _history_text(tlis: Sequence[Tli], tli: int) -> str:
    known = next((entry for entry in tlis if entry.tli == tli), None)
    if known is None:
        raise TimelineError(f"the branch log does not know tli {tli}")
    if known.history is None and known.parent is not None:
        raise TimelineError(f"the branch log lacks the history file of tli {tli}")
    return known.history or ""


def _segments(spans: Sequence[WalSpan], segment_bytes: int) -> tuple[SegmentFile, ...]:
    """Files named by the tli of their last byte, as the server that wrote it named them."""
    if not spans:
        return ()
    segments: list[SegmentFile] = []
    start, end = segment_start(spans[0].start, segment_bytes), spans[-1].end
    while start < end:
        stop = Lsn(min(start + segment_bytes, end))
        owner = next(span.tli for span in spans if span.start < stop <= span.end)
        segments.append(SegmentFile(segment_name(owner, start, segment_bytes), start, stop))
        start = Lsn(start + segment_bytes)
    return tuple(segments)


def _histories(tlis: Sequence[Tli]) -> tuple[HistoryFile, ...]:
    # Not T's line alone: Postgres numbers its new tli past the history files it finds, and a number that
    # the store has already given to another line could never be archived (EDGE 19).
    return tuple(
        HistoryFile(history_name(entry.tli), entry.history) for entry in tlis if entry.history is not None
    )


def _recovery(snapshot: Snapshot, tli: int, last_record: Lsn) -> tuple[Setting, ...]:
    settings = [
        Setting("recovery_target_timeline", str(tli)),
        Setting("recovery_target_action", "promote"),
    ]
    if last_record >= snapshot.lsn:
        # Postgres ends with an error unless it meets a record at or after the target, so the target is
        # the last record itself. With nothing to replay there is none (EDGE 58): the WAL simply ends at
        # T.
        settings += [
            Setting("recovery_target_lsn", str(last_record)),
            Setting("recovery_target_inclusive", "on"),
        ]
    return tuple(settings)
