"""What a WHEN resolves to: values."""

from __future__ import annotations

from dataclasses import dataclass

from timeline.catalog.line import Span
from timeline.clock import Micros
from timeline.format.branch_state import Snapshot
from timeline.format.wal_index import WalEvent
from timeline.lsn import Lsn


@dataclass(frozen=True, slots=True)
class Commit:
    """One committed transaction."""

    start: Lsn
    """Where its commit record starts: a branch at this LSN does not hold the transaction."""
    end: Lsn
    """Just after the record: a branch at this LSN does."""
    time: Micros
    """By the source's clock. Not monotonic along the WAL."""
    xid: int
    """Modulo 2³²."""


@dataclass(frozen=True, slots=True)
class Target:
    """A moment that can be had, and from what."""

    tli: int
    """That wrote the byte before ``lsn``: numeric recovery_target_timeline."""
    lsn: Lsn
    """T, a record boundary: the state holds exactly the records that start before it (P6)."""
    last_record: Lsn
    """Start of the last record before T; below ``snapshot.lsn`` when there is nothing to replay (EDGE 58), 0
    when no record is known at all."""
    time: Micros | None
    """For a target given as a time, that time. For the head of a live line, the source's clock up to which
    nothing else happened, where known. Else the time of the last commit."""
    last_commit: Commit | None
    """The last one included, in WAL order; ``None`` when the archived WAL before T has none."""
    next_commit: Commit | None
    """The first one left out; ``None`` at the end of the line."""
    snapshot: Snapshot
    """The newest from which T can be replayed."""
    spans: tuple[Span, ...]
    """The WAL to replay: from ``snapshot.lsn`` to T, empty when they are equal."""
    events: tuple[WalEvent, ...]
    """Records among it that a branch must know of: parameter changes, tablespaces, databases copied file by
    file, full_page_writes switched."""


@dataclass(frozen=True, slots=True)
class ReachableRange:
    """Any moment in [first, last] can be had, on the line that leads to one tli."""

    tli: int
    """Name this one (``--tli``) to get there. Older parts of the range may be its ancestors'."""
    first: Lsn
    last: Lsn
    """The end of the last complete record, or where the source left the tli."""
    first_time: Micros
    """Times before this cannot be had, by the source's clock."""
    last_time: Micros | None
    """The history is known completely up to this time; ``None`` when nothing is known."""
    abandoned: bool
    """Beyond the point where the source left this tli for another: an orphan tail, kept and never spliced."""
