"""What is worth knowing about a run of WAL without reading it again: values shared by chunks and WAL
manifests.

The numbers come from the WAL scan (timeline/pg/wal.py); the encodings are in chunk.py and manifest.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from timeline.clock import Micros
from timeline.lsn import Lsn

COMMIT_DTYPE = np.dtype(
    [("start", "<u8"), ("end", "<u8"), ("time", "<i8"), ("xid", "<u4"), ("kind", "u1"), ("pad", "u1", (3,))]
)
"""One transaction end: LSN where its record starts, LSN just after it, micros, top-level xid, CommitKind."""

TOUCH_DTYPE = np.dtype(
    [
        ("spc", "<u4"),
        ("db", "<u4"),
        ("rel", "<u4"),
        ("references", "<u4"),
        ("images", "<u4"),
        ("max_block", "<u4"),
        ("first", "<u8"),
        ("last", "<u8"),
    ]
)
"""One relation touched: tablespace, database and relfilenode; block references, of which full-page images;
highest block (main fork); LSNs of the first and last record that touch it."""

CommitArray = npt.NDArray[np.void]
TouchArray = npt.NDArray[np.void]


class CommitKind(IntEnum):
    """Transaction-end records (xact info codes, src/include/access/xact.h)."""

    COMMIT = 0
    ABORT = 1
    COMMIT_PREPARED = 2
    ABORT_PREPARED = 3


class EventKind(IntEnum):
    """Rare records a branch must know about without scanning."""

    RESTORE_POINT = 1
    PARAMETER_CHANGE = 2
    TABLESPACE_CREATE = 3
    TABLESPACE_DROP = 4
    CHECKPOINT = 5
    SWITCH = 6
    BACKUP_END = 7
    END_OF_RECOVERY = 8
    DATABASE_CREATE_FILE_COPY = 9
    FULL_PAGE_WRITES = 10
    OVERWRITE_CONTRECORD = 11


@dataclass(frozen=True, slots=True)
class WalEvent:
    """One rare record."""

    kind: EventKind
    start: Lsn
    """Where the record starts."""
    end: Lsn
    """Just after it, MAXALIGNed."""
    time: Micros | None = None
    """For restore points: the source's clock."""
    name: str | None = None
    """Restore point: its name. Tablespace: its path on the source."""
    values: tuple[tuple[str, int], ...] = ()
    """Named numbers of the record, e.g. PARAMETER_CHANGE: max_connections, wal_level, …; CHECKPOINT: redo,
    tli."""


@dataclass(frozen=True, slots=True)
class WalIndex:
    """Index of a run of WAL [start, end): the records that *complete* inside it (a record that began earlier
    and ends here is counted here, a record that is unfinished at the end is not)."""

    last_record: Lsn
    """Start of the last complete record; 0 when no record completes in the run."""
    last_record_end: Lsn
    """Just after it, MAXALIGNed; 0 as above."""
    pending: Lsn
    """Start of the record that is unfinished at the run's end; the run's end itself when the boundary is
    clean (then the next record starts there or, if that is a page header, right after the header)."""
    records: int
    """How many records complete here."""
    commits: CommitArray
    """COMMIT_DTYPE, in WAL order."""
    events: tuple[WalEvent, ...]
    """In WAL order."""
    touches: TouchArray
    """TOUCH_DTYPE, sorted by (spc, db, rel)."""

    @property
    def min_commit_time(self) -> Micros | None:
        """Earliest commit or abort time, ``None`` without one. Times are not monotonic along the WAL."""
        return int(self.commits["time"].min()) if len(self.commits) else None

    @property
    def max_commit_time(self) -> Micros | None:
        """Latest commit or abort time, ``None`` without one."""
        return int(self.commits["time"].max()) if len(self.commits) else None


@dataclass(frozen=True, slots=True)
class Coverage:
    """Up to ``time`` on the source's clock, the history is completely known, and ends at ``lsn``."""

    tli: int
    lsn: Lsn
    time: Micros


def no_commits() -> CommitArray:
    """An empty COMMIT_DTYPE array."""
    return np.empty(0, COMMIT_DTYPE)


def no_touches() -> TouchArray:
    """An empty TOUCH_DTYPE array."""
    return np.empty(0, TOUCH_DTYPE)
