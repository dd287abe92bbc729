"""Reading a stream of WAL: which transactions ended, what happened that a branch must know, what was touched.

Consistency: what a scanner reports depends on the bytes alone, never on how they were cut into feeds. A
record is reported by the feed that brings its last byte, padding included (for XLOG_SWITCH: the last byte of
its segment). The scanner trusts nothing: page headers, the chain of record links and all lengths are checked;
not record checksums, which cost more than all the rest, and in whose place whoever stores the bytes has
digests.

Memory: about 1.5 MiB and what is reported; a record of 1 GiB adds nothing.

Sources: src/include/access/xact.h, src/include/access/xlog_internal.h, src/include/catalog/pg_control.h,
src/include/commands/tablespace.h, src/include/commands/dbcommands_xlog.h, src/backend/access/rmgrdesc/.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from timeline.clock import POSTGRES_EPOCH_MICROS, Micros
from timeline.lsn import Lsn
from timeline.pg.control import parse_checkpoint
from timeline.pg.errors import WalFormatError
from timeline.pg.wal_machine import Buffer, Machine, Matrix, as_bytes_array, warm_up

__all__ = [
    "COMMIT_DTYPE",
    "TOUCH_DTYPE",
    "RecordKind",
    "ScanResult",
    "WalFormatError",
    "WalRecordEvent",
    "WalScanner",
    "merge_results",
    "merge_touches",
    "warm_up",
]

COMMIT_DTYPE = np.dtype(
    [("start", "<u8"), ("end", "<u8"), ("time", "<i8"), ("xid", "<u4"), ("kind", "u1"), ("pad", "u1", (3,))]
)
"""One transaction end: LSN where its record starts, LSN just after it, micros, xid, and kind: 0 commit, 1
abort, 2 commit prepared, 3 abort prepared. The xid is the top-level one, but for aborts of subtransactions,
which are logged alike."""

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
"""One relation touched: tablespace, database, relfilenode; block references of all forks, of which full-page
images that replay restores; highest block of the main fork; starts of the first and last record that touch
it."""

CommitArray = npt.NDArray[np.void]
TouchArray = npt.NDArray[np.void]


class RecordKind(IntEnum):
    """Rare records that are reported one by one."""

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
class WalRecordEvent:
    """One rare record."""

    kind: RecordKind
    start: Lsn
    """Where the record starts."""
    end: Lsn
    """Just after it, MAXALIGNed; for SWITCH the end of its segment: where Postgres reads on."""
    time: Micros | None = None
    """The source's clock, of records that carry it."""
    name: str | None = None
    """Restore point: its name. Tablespace: its path on the source."""
    values: tuple[tuple[str, int], ...] = ()
    """Named numbers of the record; settings by the name they have in postgresql.conf."""


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What one feed completed; the fields mean what those of the stored WAL index mean."""

    last_record: Lsn
    """Start of the last record completed; 0 without one."""
    last_record_end: Lsn
    """Just after it: where Postgres reads on. 0 without one."""
    pending: Lsn
    """Where a new scanner must begin to lose nothing: the start of the unfinished record, or else the end of
    the bytes fed (the page start when that lies inside a page header). Never beyond the end of the bytes
    fed."""
    records: int
    commits: CommitArray
    """COMMIT_DTYPE, in WAL order."""
    events: tuple[WalRecordEvent, ...]
    """In WAL order."""
    touches: TouchArray
    """TOUCH_DTYPE, sorted by (spc, db, rel)."""


class WalScanner:
    """Reads WAL as it arrives, in pieces of any size.

    ``position`` must be the start of a record (or the end of the one before, even at a page boundary) or of a
    page; at a page start the rest of a record that began earlier is skipped and not reported. ``tli``: of the
    stream; pages of its ancestors are accepted too. ``major`` is told by the first page header; pass it when
    beginning inside a page: until the next header what differs between majors is read by a rule that errs for
    compressed images made for wal_consistency_checking and for COMMIT PREPARED with dropped statistics on 18.
    Zeros after the end of WAL are read over, up to the end of their segment.
    """

    def __init__(self, segment_bytes: int, tli: int, position: Lsn, *, major: int | None = None) -> None:
        self._machine = Machine(segment_bytes, tli, position, major)

    @property
    def position(self) -> Lsn:
        """LSN of the next byte to feed."""
        return Lsn(self._machine.position)

    @property
    def pending(self) -> Lsn:
        """As in ScanResult, at this moment."""
        return Lsn(self._machine.pending)

    @property
    def major(self) -> int | None:
        """Major version of the server that wrote the WAL, once known."""
        return int(self._machine.state[_scan().MAJOR]) or None

    @property
    def system_identifier(self) -> int | None:
        """System identifier in the last segment header read, ``None`` before one."""
        return (int(self._machine.state[_scan().SYSTEM_ID]) & (1 << 64) - 1) or None

    @property
    def at_zeros(self) -> bool:
        """Whether the bytes fed last are zeros after the end of WAL, which starts at ``pending``."""
        return self._machine.at_zeros

    def feed(self, data: Buffer) -> ScanResult:
        """Read the next bytes. Raises WalFormatError when they are not the WAL expected here, and from then
        on."""
        scan = _scan()
        machine = self._machine
        array = as_bytes_array(data)
        touches = _RelationTable()
        commits: list[CommitArray] = []
        events: list[WalRecordEvent] = []
        index = 0
        while True:
            index = machine.run(array, index)
            touches.add(machine.refs, machine.take(scan.OUT_REFS))
            if count := machine.take(scan.OUT_COMMITS):
                commits.append(_commit_rows(machine.commits[:count]))
            major = int(machine.state[scan.MAJOR])
            for row in machine.events[: machine.take(scan.OUT_EVENTS)].tolist():
                code, start, end, offset, length = row
                body = machine.event_bytes[offset : offset + length].tobytes()
                events.append(_decode_event(code, start, end, body, major))
            machine.take(scan.OUT_BYTES)
            if not machine.full:
                break
        return ScanResult(
            last_record=Lsn(machine.take(scan.LAST_START)),
            last_record_end=Lsn(machine.take(scan.LAST_END)),
            pending=self.pending,
            records=machine.take(scan.RECORDS),
            commits=np.concatenate(commits) if commits else np.empty(0, COMMIT_DTYPE),
            events=tuple(events),
            touches=touches.rows(),
        )


def merge_touches(parts: Sequence[TouchArray]) -> TouchArray:
    """Touches of consecutive runs of WAL, in any order, as one run's."""
    rows = np.concatenate(parts) if parts else np.empty(0, TOUCH_DTYPE)
    if len(rows) == 0:
        return rows
    rows = rows[np.lexsort((rows["rel"], rows["db"], rows["spc"]))]
    key = rows[["spc", "db", "rel"]]
    begins = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
    merged = rows[begins]
    for name, combine in _COMBINE:
        merged[name] = combine.reduceat(rows[name], begins)
    return merged


_COMBINE: tuple[tuple[str, np.ufunc], ...] = (
    ("references", np.add),
    ("images", np.add),
    ("max_block", np.maximum),
    ("first", np.minimum),
    ("last", np.maximum),
)


def merge_results(parts: Sequence[ScanResult]) -> ScanResult:
    """The result of feeding consecutive runs at once; there must be at least one."""
    completed = [part for part in parts if part.records]
    return ScanResult(
        last_record=completed[-1].last_record if completed else Lsn(0),
        last_record_end=completed[-1].last_record_end if completed else Lsn(0),
        pending=parts[-1].pending,
        records=sum(part.records for part in parts),
        commits=np.concatenate([part.commits for part in parts]),
        events=tuple(event for part in parts for event in part.events),
        touches=merge_touches([part.touches for part in parts]),
    )


class _RelationTable:
    """Sums references by relation; grows with the number of relations touched in one feed."""

    def __init__(self) -> None:
        scan = _scan()
        self._table: Matrix = np.empty((256, scan.TOUCH_COLUMNS), np.int64)
        self._slots = np.full(1024, -1, np.int32)
        self._used = 0

    def add(self, refs: Matrix, count: int) -> None:
        scan = _scan()
        done = 0
        while done < count:
            done, self._used = scan.tally(refs, done, count, self._table, self._slots, self._used)
            if done < count:
                self._table = np.concatenate((self._table, np.empty_like(self._table)))
                self._slots = np.full(4 * len(self._table), -1, np.int32)
                scan.fill_slots(self._table, self._used, self._slots)

    def rows(self) -> TouchArray:
        table = self._table[: self._used]
        rows = np.zeros(self._used, TOUCH_DTYPE)
        for column, name in enumerate(TOUCH_DTYPE.names or ()):
            rows[name] = table[:, column]
        return rows[np.lexsort((rows["rel"], rows["db"], rows["spc"]))]


def _commit_rows(table: Matrix) -> CommitArray:
    rows = np.zeros(len(table), COMMIT_DTYPE)
    rows["start"], rows["end"] = table[:, 0], table[:, 1]
    rows["time"] = table[:, 2] + POSTGRES_EPOCH_MICROS
    rows["xid"], rows["kind"] = table[:, 3], table[:, 4]
    return rows


def _decode_event(code: int, start: int, end: int, body: bytes, major: int) -> WalRecordEvent:
    kind, decode = _EVENTS[code]
    try:
        time, name, values = decode(body, major)
    except (struct.error, IndexError):
        raise WalFormatError(start, f"{kind.name} record of {len(body)} bytes is cut short") from None
    return WalRecordEvent(kind, Lsn(start), Lsn(end), time, name, tuple(values.items()))


_Decoded = tuple[Micros | None, str | None, dict[str, int]]


def _checkpoint(body: bytes, major: int, shutdown: int) -> _Decoded:
    point = parse_checkpoint(body, major)
    values = {
        "shutdown": shutdown,
        "redo": int(point.redo),
        "tli": point.tli,
        "prev_tli": point.prev_tli,
        "full_page_writes": int(point.full_page_writes),
        "next_xid": point.next_xid,
        "next_oid": point.next_oid,
        "next_multi": point.next_multi,
        "next_multi_offset": point.next_multi_offset,
        "oldest_xid": point.oldest_xid,
        "oldest_xid_db": point.oldest_xid_db,
        "oldest_multi": point.oldest_multi,
        "oldest_multi_db": point.oldest_multi_db,
        "oldest_commit_ts_xid": point.oldest_commit_ts_xid,
        "newest_commit_ts_xid": point.newest_commit_ts_xid,
        "oldest_active_xid": point.oldest_active_xid,
    }
    if point.wal_level is not None:
        values["wal_level"] = point.wal_level
    return point.time, None, values


def _parameter_change(body: bytes, major: int) -> _Decoded:
    names = (
        "max_connections",
        "max_worker_processes",
        "max_wal_senders",
        "max_prepared_transactions",
        "max_locks_per_transaction",
        "wal_level",
        "wal_log_hints",
        "track_commit_timestamp",
    )
    return None, None, dict(zip(names, map(int, struct.unpack_from("<6i2?", body)), strict=True))


def _restore_point(body: bytes, major: int) -> _Decoded:
    (time,) = struct.unpack_from("<q", body)
    return time + POSTGRES_EPOCH_MICROS, _text(body[8:]), {}


def _end_of_recovery(body: bytes, major: int) -> _Decoded:
    time, tli, prev_tli = struct.unpack_from("<qII", body)
    values = {"tli": tli, "prev_tli": prev_tli}
    if major >= 17:
        (values["wal_level"],) = struct.unpack_from("<i", body, 16)
    return time + POSTGRES_EPOCH_MICROS, None, values


def _overwrite(body: bytes, major: int) -> _Decoded:
    lsn, time = struct.unpack_from("<Qq", body)
    return time + POSTGRES_EPOCH_MICROS, None, {"overwritten": lsn}


def _tablespace_create(body: bytes, major: int) -> _Decoded:
    return None, _text(body[4:]), {"oid": struct.unpack_from("<I", body)[0]}


def _numbers(layout: str, *names: str) -> Callable[[bytes, int], _Decoded]:
    def decode(body: bytes, major: int) -> _Decoded:
        return None, None, dict(zip(names, map(int, struct.unpack_from(layout, body)), strict=True))

    return decode


def _text(raw: bytes) -> str:
    """A C string in the server's own, unknown encoding; whatever is not UTF-8 is shown escaped."""
    return raw.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


# By resource manager and info bits; XLOG_DBASE_CREATE of 14 has the code and the body of 15's FILE_COPY.
_EVENTS: dict[int, tuple[RecordKind, Callable[[bytes, int], _Decoded]]] = {
    0x0000: (RecordKind.CHECKPOINT, lambda body, major: _checkpoint(body, major, 1)),
    0x0010: (RecordKind.CHECKPOINT, lambda body, major: _checkpoint(body, major, 0)),
    0x0040: (RecordKind.SWITCH, _numbers("<")),
    0x0050: (RecordKind.BACKUP_END, _numbers("<Q", "start_point")),
    0x0060: (RecordKind.PARAMETER_CHANGE, _parameter_change),
    0x0070: (RecordKind.RESTORE_POINT, _restore_point),
    0x0080: (RecordKind.FULL_PAGE_WRITES, _numbers("<?", "full_page_writes")),
    0x0090: (RecordKind.END_OF_RECOVERY, _end_of_recovery),
    0x00D0: (RecordKind.OVERWRITE_CONTRECORD, _overwrite),
    0x0400: (
        RecordKind.DATABASE_CREATE_FILE_COPY,
        _numbers("<IIII", "db", "tablespace", "source_db", "source_tablespace"),
    ),
    0x0500: (RecordKind.TABLESPACE_CREATE, _tablespace_create),
    0x0510: (RecordKind.TABLESPACE_DROP, _numbers("<I", "oid")),
}


def _scan() -> Any:
    from timeline.pg import wal_scan

    return wal_scan
