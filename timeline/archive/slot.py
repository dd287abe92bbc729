"""The physical replication slot that keeps WAL on the source until it is in the store.

Made only by the run that drains it, and refused while ``max_slot_wal_keep_size`` is unlimited (P11). What
goes wrong with slots has different error codes on different majors (EDGE 7), so errors are judged by code,
by the slot's row and by positions, never by words, which are translated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import psycopg
from psycopg import sql

from timeline.archive.connect import ServerError, SqlConnection, sql_error
from timeline.errors import Fenced, SplitBrain, TimelineError, Unavailable, UsageError
from timeline.ids import MAIN
from timeline.lsn import Lsn

PREFIX = "tl_"
_STORE_ID_DIGITS = 12
_NAME_BYTES = 63


class WalLost(TimelineError):
    """The source no longer has the WAL that should be archived next; the history has a gap for good (EDGE
    8)."""

    def __init__(self, message: str, position: Lsn) -> None:
        super().__init__(
            message,
            hint="`tl archive --allow-gap` records the gap, takes a new base backup and goes on after it; what is "
            "archived already stays restorable",
        )
        self.position = position
        """The next byte that should have been archived."""


class SlotBusy(Unavailable):
    """Another connection uses the slot: another archiver, or our own last one until the source notices its
    end."""

    def __init__(self, name: str, pid: int | None) -> None:
        by = f" by process {pid} of the source" if pid is not None else ""
        super().__init__(
            f"replication slot {name} is in use{by}",
            hint="is another `tl archive` running? A broken connection is noticed after wal_sender_timeout",
        )


class SlotMissing(TimelineError):
    """The slot does not exist (any more)."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"replication slot {name} does not exist on the source: somebody dropped it",
            hint="start `tl archive` again to make a new one",
        )


class WalStatus(StrEnum):
    """How safe the slot's WAL is (pg_replication_slots.wal_status)."""

    RESERVED = "reserved"
    EXTENDED = "extended"
    UNRESERVED = "unreserved"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class SlotStatus:
    """One row of pg_replication_slots."""

    name: str
    physical: bool
    active: bool
    active_pid: int | None
    restart_lsn: Lsn | None
    """WAL from the segment of this LSN on is kept; ``None``: nothing is."""
    wal_status: WalStatus | None
    """``None``: nothing is reserved."""
    safe_bytes: int | None
    """WAL that may still be written before the slot is in danger; ``None``: no limit."""
    invalidation: str | None
    """Why the server gave it up (17 and later)."""

    @property
    def lost(self) -> bool:
        """Whether it can never be streamed from again."""
        return self.wal_status is WalStatus.LOST or self.invalidation is not None

    @property
    def warning(self) -> str | None:
        """What an operator must know before it is too late (EDGE 8)."""
        if self.lost:
            return f"replication slot {self.name} is lost" + (
                f": {self.invalidation}" if self.invalidation else ""
            )
        if self.wal_status is WalStatus.UNRESERVED:
            return f"replication slot {self.name} loses its WAL at the next checkpoint"
        if self.wal_status is WalStatus.EXTENDED:
            left = f": {self.safe_bytes >> 20} MiB until it is lost" if self.safe_bytes is not None else ""
            return f"replication slot {self.name} holds more WAL than max_wal_size{left}"
        return None


def slot_name(store_id: str, branch: str = MAIN) -> str:
    """Name of the slot that feeds a branch of that store."""
    return (slot_prefix(store_id) + re.sub(r"[^a-z0-9_]", "_", branch.lower()))[:_NAME_BYTES]


def slot_prefix(store_id: str) -> str:
    """What the names of all slots of a store begin with."""
    return f"{PREFIX}{store_id[:_STORE_ID_DIGITS]}_"


async def read_slot(connection: SqlConnection, name: str) -> SlotStatus | None:
    """The slot as it is now; ``None``: there is none. Raises ServerError, Unavailable."""
    found = await _read(connection, "slot_name = %s", name)
    return found[0] if found else None


async def find_slots(connection: SqlConnection, store_id: str) -> tuple[SlotStatus, ...]:
    """All slots on this server that were made for the store."""
    return await _read(connection, "starts_with(slot_name, %s)", slot_prefix(store_id))


async def keep_limit_bytes(connection: SqlConnection) -> int | None:
    """``max_slot_wal_keep_size``; ``None``: unlimited."""
    rows = await _query(
        connection,
        "select setting::int8 from pg_catalog.pg_settings where name = 'max_slot_wal_keep_size'",
    )
    mebibytes = int(rows[0][0])
    return None if mebibytes < 0 else mebibytes << 20


async def create_slot(connection: SqlConnection, name: str, *, allow_unbounded: bool) -> SlotStatus:
    """Make the slot, reserving WAL at once (EDGE 1).

    Raises UsageError when a stalled archiver could fill the source's disk through it and ``allow_unbounded``
    is not set, or the source has no room for another slot.
    """
    if not allow_unbounded and await keep_limit_bytes(connection) is None:
        raise UsageError(
            "max_slot_wal_keep_size is unlimited on the source: a slot not drained would fill its disk",
            hint="set it, e.g. ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf(); "
            "or accept the risk with --unbounded-slot",
        )
    try:
        await connection.execute("select pg_catalog.pg_create_physical_replication_slot(%s, true)", (name,))
    except psycopg.errors.DuplicateObject:
        pass
    except psycopg.errors.ConfigurationLimitExceeded:
        raise UsageError(
            "the source has no free replication slot",
            hint="raise max_replication_slots, or drop an unused slot",
        ) from None
    except psycopg.errors.InsufficientPrivilege:
        raise UsageError(
            "the source's user may not make a replication slot",
            hint="on the source: ALTER ROLE … REPLICATION",
        ) from None
    except psycopg.Error as error:
        raise sql_error(error) from error
    made = await read_slot(connection, name)
    if made is None:
        raise SlotMissing(name)
    return made


async def advance_slot(connection: SqlConnection, name: str, lsn: Lsn) -> None:
    """Let the server forget WAL before ``lsn``: for the slots on standbys, which nobody streams from."""
    await _query(
        connection,
        "select pg_catalog.pg_replication_slot_advance(%s, %s::pg_catalog.pg_lsn)",
        name,
        str(lsn),
    )


async def drop_slot(connection: SqlConnection, name: str) -> bool:
    """Remove the slot; whether there was one. Raises SlotBusy while an archiver uses it."""
    try:
        await connection.execute("select pg_catalog.pg_drop_replication_slot(%s)", (name,))
    except psycopg.errors.UndefinedObject:
        return False
    except psycopg.errors.ObjectInUse:
        status = await read_slot(connection, name)
        raise SlotBusy(name, status.active_pid if status is not None else None) from None
    except psycopg.Error as error:
        raise sql_error(error) from error
    return True


@dataclass(frozen=True, slots=True)
class StreamAttempt:
    """What was asked of the server when it refused."""

    slot: str | None
    slot_status: SlotStatus | None
    """Read before streaming."""
    tli: int
    start: Lsn
    server_tli: int
    server_end: Lsn
    in_recovery: bool


def judge_stream_error(error: ServerError, attempt: StreamAttempt) -> TimelineError:
    """What an error of START_REPLICATION, or of the stream itself, means (EDGE 7).

    14 to 16 say 58P01 after the stream has begun when the slot's WAL is gone, 17 and 18 say 55000 at once.
    """
    code = error.sqlstate
    name = attempt.slot or "none"
    status = attempt.slot_status
    if code == "55006":
        return SlotBusy(name, status.active_pid if status is not None else None)
    if code == "42704":
        return SlotMissing(name)
    if code == "55000" and status is not None and not status.physical:
        return UsageError(
            f"replication slot {name} is a logical one, and none of ours",
            hint="drop or rename it on the source",
        )
    if code in ("58P01", "55000"):
        return wal_lost(attempt.start, attempt.tli, slot=status)
    if code.startswith("57P") or code == "53300":
        return Unavailable(error.message)
    if attempt.tli == attempt.server_tli and attempt.server_end < attempt.start:
        return behind(attempt)
    if code == "42501":
        return UsageError(error.message, hint="on the source: ALTER ROLE … REPLICATION")
    return Unavailable(
        f"the source refuses to stream tli {attempt.tli} from {attempt.start}: {error.message}"
    )


def wal_lost(start: Lsn, tli: int, *, slot: SlotStatus | None) -> WalLost:
    """The error for WAL that the source has removed."""
    why = f" ({slot.warning})" if slot is not None and slot.lost else ""
    return WalLost(f"the source has removed the WAL of tli {tli} from {start} on{why}", start)


def behind(attempt: StreamAttempt) -> TimelineError:
    """The error for a server whose WAL ends before what is archived of the same tli."""
    text = (
        f"the source's WAL of tli {attempt.tli} ends at {attempt.server_end}, what is archived goes on to "
        f"{attempt.start}"
    )
    if attempt.in_recovery:
        return Unavailable(f"{text}: this standby is behind", hint="waiting until it has caught up")
    return SplitBrain(
        f"{text}: the source lost WAL or was set back",
        hint="archive it into a new store; what is archived here stays restorable",
    )


def is_final(error: TimelineError) -> bool:
    """Whether trying again later cannot help."""
    return isinstance(error, Fenced | UsageError | WalLost | SlotMissing)


async def _read(connection: SqlConnection, condition: str, value: str) -> tuple[SlotStatus, ...]:
    # As JSON, because the columns grew from major to major.
    rows = await _query(
        connection,
        "select pg_catalog.to_jsonb(s) from pg_catalog.pg_replication_slots s where "
        + condition
        + " order by slot_name",
        value,
    )
    return tuple(_status(row[0]) for row in rows)


def _status(row: dict[str, Any]) -> SlotStatus:
    restart = row["restart_lsn"]
    return SlotStatus(
        name=row["slot_name"],
        physical=row["slot_type"] == "physical",
        active=bool(row["active"]),
        active_pid=row["active_pid"],
        restart_lsn=Lsn.parse(restart) if restart is not None else None,
        wal_status=WalStatus(row["wal_status"]) if row["wal_status"] is not None else None,
        safe_bytes=row["safe_wal_size"],
        invalidation=row.get("invalidation_reason"),
    )


async def _query(connection: SqlConnection, query: str, *values: str) -> list[tuple[Any, ...]]:
    try:
        cursor = await connection.execute(sql.SQL(query), values)
        return await cursor.fetchall()
    except psycopg.Error as error:
        raise sql_error(error) from error
