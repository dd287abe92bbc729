"""What the archived server says about itself over an ordinary connection: facts that stay, and a probe of
the moment."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg

from timeline.archive.connect import SqlConnection, connect_sql, sql_error
from timeline.archive.slot import SlotStatus, read_slot
from timeline.clock import Micros
from timeline.errors import UsageError
from timeline.format.branch_state import Incarnation
from timeline.lsn import Lsn

OLDEST_MAJOR = 14
NEWEST_MAJOR = 18
"""Majors whose WAL and pg_control we read."""
STATEMENT_TIMEOUT = "20s"

_FACTS: LiteralString = """
    select c.system_identifier, c.catalog_version_no, c.pg_control_version,
           current_setting('server_version_num')::int4, version(),
           current_setting('block_size')::int4, current_setting('wal_block_size')::int4,
           (select setting::int8 from pg_catalog.pg_settings where name = 'wal_segment_size'),
           (select setting::int8 from pg_catalog.pg_settings where name = 'segment_size'),
           current_setting('data_checksums'),
           (select rolname from pg_catalog.pg_roles where oid = 10),
           (select max(pg_catalog.pg_collation_actual_version(oid)) from pg_catalog.pg_collation
            where collprovider = 'c' and collversion is not null),
           (select max(pg_catalog.pg_collation_actual_version(oid)) from pg_catalog.pg_collation
            where collprovider = 'i' and collversion is not null)
    from pg_catalog.pg_control_system() c"""

# The clock is read before the position, so all WAL that was flushed by that time lies below the position.
_PROBE_PRIMARY: LiteralString = """
    select (extract(epoch from clock_timestamp()) * 1000000)::int8,
    pg_catalog.pg_current_wal_flush_lsn()::text"""
_PROBE_STANDBY: LiteralString = """
    select (extract(epoch from clock_timestamp()) * 1000000)::int8,
           greatest(pg_catalog.pg_last_wal_receive_lsn(), pg_catalog.pg_last_wal_replay_lsn())::text"""
_UPSTREAM: LiteralString = """
    select received_tli, latest_end_lsn::text, (extract(epoch from last_msg_send_time) * 1000000)::int8
    from pg_catalog.pg_stat_wal_receiver"""
_SENDERS: LiteralString = """
    select pid, sync_state, application_name from pg_catalog.pg_stat_replication"""


@dataclass(frozen=True, slots=True)
class IncarnationFacts:
    """What a branch's host must match, and more of what does not change while the server runs."""

    system_identifier: int
    catalog_version: int
    control_version: int
    version_num: int
    architecture: str
    block_bytes: int
    wal_block_bytes: int
    segment_bytes: int
    relation_segment_bytes: int
    data_checksums: str
    """``on``, ``off``, or a state between the two."""
    superuser: str
    libc_version: str | None
    icu_version: str | None

    @property
    def major(self) -> int:
        """Server major version."""
        return self.version_num // 10000

    def incarnation(self, from_lsn: Lsn) -> Incarnation:
        """As the branch log records it."""
        return Incarnation(
            system_identifier=self.system_identifier,
            major=self.major,
            version_num=self.version_num,
            architecture=self.architecture,
            block_bytes=self.block_bytes,
            segment_bytes=self.segment_bytes,
            relation_segment_bytes=self.relation_segment_bytes,
            catalog_version=self.catalog_version,
            control_version=self.control_version,
            libc_version=self.libc_version,
            icu_version=self.icu_version,
            superuser=self.superuser,
            data_checksums=self.data_checksums == "on",
            from_lsn=from_lsn,
            to_lsn=None,
        )


@dataclass(frozen=True, slots=True)
class Upstream:
    """What a standby knows of the server it follows."""

    tli: int
    end: Lsn
    """End of that server's WAL when it sent its last message."""
    time: Micros
    """When that was, on its clock."""


@dataclass(frozen=True, slots=True)
class SourceProbe:
    """The source at one moment."""

    time: Micros
    """Its clock, read before ``end``."""
    end: Lsn
    """End of its flushed WAL; of a standby: of what it has received or replayed."""
    in_recovery: bool
    upstream: Upstream | None
    """Of a standby that streams, as far as our rights let us see it."""
    slot: SlotStatus | None
    same_server: bool
    """Whether our walsender runs on the server this probe reached (several hosts may be named in a
    conninfo)."""
    sync_state: str | None
    """Our walsender's: ``async``, ``potential``, ``sync`` or ``quorum``; ``None``: no right to see it."""
    synchronous_names: str
    """``synchronous_standby_names``, verbatim."""
    synchronous_commit: str
    """As a session of our user has it."""
    other_synchronous: int
    """How many other walsenders are synchronous."""


class Source:
    """An ordinary connection to the archived server. Must be closed with ``aclose``."""

    def __init__(self, connection: SqlConnection) -> None:
        self.connection = connection

    @classmethod
    async def open(cls, conninfo: str, *, application_name: str = "tl") -> Source:
        """Connect; raises UsageError or Unavailable with the reason in one line."""
        connection = await connect_sql(conninfo, application_name=application_name)
        source = cls(connection)
        await source.rows("select set_config('statement_timeout', %s, false)", STATEMENT_TIMEOUT)
        return source

    async def aclose(self) -> None:
        """Close the connection."""
        await self.connection.close()

    async def rows(self, query: LiteralString, *values: object) -> list[tuple[Any, ...]]:
        """Rows of a query; raises ServerError, Unavailable."""
        try:
            cursor = await self.connection.execute(query, values or None)
            return await cursor.fetchall()
        except psycopg.Error as error:
            raise sql_error(error) from error

    async def facts(self) -> IncarnationFacts:
        """Facts about the cluster and its binaries."""
        row = (await self.rows(_FACTS))[0]
        machine = re.search(r" on ([A-Za-z0-9_]+)-", str(row[4])) or re.search(
            r"(aarch64|x86_64)", str(row[4])
        )
        return IncarnationFacts(
            system_identifier=int(row[0]) & (1 << 64) - 1,
            catalog_version=int(row[1]),
            control_version=int(row[2]),
            version_num=int(row[3]),
            architecture=machine[1] if machine else "unknown",
            block_bytes=int(row[5]),
            wal_block_bytes=int(row[6]),
            segment_bytes=int(row[7]),
            relation_segment_bytes=int(row[8]) * int(row[5]),
            data_checksums=str(row[9]),
            superuser=str(row[10]),
            libc_version=row[11],
            icu_version=row[12],
        )

    async def in_recovery(self) -> bool:
        """Whether the source is a standby."""
        return bool((await self.rows("select pg_catalog.pg_is_in_recovery()"))[0][0])

    async def probe(self, *, slot: str | None, sender_pid: int | None) -> SourceProbe:
        """The source now. ``sender_pid``: our walsender's, if one runs. Raises ServerError, Unavailable."""
        in_recovery = await self.in_recovery()
        time, end = (await self.rows(_PROBE_STANDBY if in_recovery else _PROBE_PRIMARY))[0]
        upstream = None
        if in_recovery:
            known = [row for row in await self.rows(_UPSTREAM) if None not in row]
            upstream = Upstream(int(known[0][0]), Lsn.parse(known[0][1]), int(known[0][2])) if known else None
        senders = await self.rows(_SENDERS)
        names, commit = (
            await self.rows(
                "select current_setting('synchronous_standby_names'), current_setting('synchronous_commit')"
            )
        )[0]
        ours = [row for row in senders if row[0] == sender_pid]
        return SourceProbe(
            time=int(time),
            end=Lsn.parse(end) if end is not None else Lsn(0),
            in_recovery=in_recovery,
            upstream=upstream,
            slot=await read_slot(self.connection, slot) if slot is not None else None,
            same_server=bool(ours),
            sync_state=ours[0][1] if ours else None,
            synchronous_names=str(names),
            synchronous_commit=str(commit),
            other_synchronous=sum(row[1] in ("sync", "quorum") for row in senders if row[0] != sender_pid),
        )


_SYNC_LIST = re.compile(r"\s*(?:(?:first|any)?\s*\d+\s*\((?P<inner>.*)\))\s*", re.IGNORECASE | re.DOTALL)
_SYNC_NAME = re.compile(r'\s*(?:"(?P<quoted>(?:[^"]|"")*)"|(?P<plain>[^,"\s]+))\s*')


def synchronous_names(setting: str) -> tuple[str, ...]:
    """The names in ``synchronous_standby_names``, in order; ``*`` stands for every standby.

    Source: src/backend/replication/syncrep_gram.y.
    """
    match = _SYNC_LIST.fullmatch(setting)
    inner = match["inner"] if match else setting
    found = []
    for name in _SYNC_NAME.finditer(inner):
        quoted = name["quoted"]
        found.append(quoted.replace('""', '"') if quoted is not None else name["plain"])
    return tuple(found)


def is_synchronous(setting: str, application_name: str) -> bool:
    """Whether a standby of that name counts in ``synchronous_standby_names`` (names ignore case)."""
    return any(name == "*" or name.lower() == application_name.lower() for name in synchronous_names(setting))


def check_major(major: int) -> None:
    """Raises UsageError for a server whose WAL we cannot read."""
    if not OLDEST_MAJOR <= major <= NEWEST_MAJOR:
        raise UsageError(
            f"the source is Postgres {major}; supported are {OLDEST_MAJOR} to {NEWEST_MAJOR}",
            hint="use a version of tl that knows this major"
            if major > NEWEST_MAJOR
            else "upgrade the source",
        )
