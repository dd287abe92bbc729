"""What a drill asks the recovered server in SQL: its catalogs, and the user's own assertions.

Every session is read-only, runs none of the source's libraries or login triggers, and has a statement time-out.
A check that could not be carried out fails when the server refused it, and is skipped, with the reason, when
there was nothing to carry it out on. Findings are bounded by MAX_FINDINGS; the server counts the rest.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, LiteralString, cast

import psycopg

from restore.isolation import Endpoint
from timeline.clock import Clock
from timeline.errors import TimelineError
from timeline.format.evidence import FAILED, MAX_FINDINGS, PASSED, SKIPPED, Check

CONNECT_SECONDS = 30
CATALOG_SECONDS = 900
"""For one statement of the catalog checks."""
MAX_SQL_BYTES = 1 << 20
_MESSAGE_CHARACTERS = 2_000
_DATABASE = re.compile(r"^\s*--\s*database:\s*(\S.*?)\s*$", re.MULTILINE)

_DATABASES: LiteralString = """
    select datname, datallowconn from pg_catalog.pg_database order by datname"""
_RELATIONS: LiteralString = """
    select count(*), count(*) filter (where relkind in ('r', 't', 'm')), count(*) filter (where relkind = 'i')
    from pg_catalog.pg_class"""
_FILES: LiteralString = """
    with stored as (
        select c.oid, c.relkind, pg_catalog.pg_relation_filepath(c.oid) as path,
               pg_catalog.pg_relation_size(c.oid) as size, a.amname,
               current_setting('block_size')::int8 as block,
               (select setting::int8 from pg_catalog.pg_settings where name = 'segment_size')
                   * current_setting('block_size')::int8 as segment
        from pg_catalog.pg_class c left join pg_catalog.pg_am a on a.oid = c.relam
        where c.relkind in ('r', 'i', 't', 'm', 'S') and c.relpersistence <> 't'),
    found as (
        select stored.*,
               (select sum((pg_catalog.pg_stat_file(path || case n when 0 then '' else '.' || n end, true)).size)
                from generate_series(0, greatest(size - 1, 0) / segment) n) as on_disk
        from stored where path is not null),
    wrong as (
        select oid::regclass::text || ': ' || case
                   when on_disk is null then 'file ' || path || ' is missing'
                   when on_disk <> size then 'file ' || path || ' has ' || on_disk || ' bytes in its segments, not ' || size
                   when mod(size, block) <> 0 then 'file ' || path || ' ends inside a block, at ' || size
                   else 'file ' || path || ' is empty, as no ' || coalesce(amname, 'sequence') || ' ever is' end as what
        from found
        where on_disk is distinct from size or mod(size, block) <> 0
              or size = 0 and (amname = 'btree' or relkind = 'S'))
    select (select count(*) from found), (select coalesce(sum(size), 0) from found)::int8,
           (select count(*) from wrong), (select array_agg(what) from (select what from wrong order by 1 limit %s) few)"""
_SEQUENCES: LiteralString = """
    select count(*), count(pg_catalog.pg_sequence_last_value(s.seqrelid))
    from pg_catalog.pg_sequence s join pg_catalog.pg_class c on c.oid = s.seqrelid and c.relpersistence <> 't'"""
_INVALID: LiteralString = """
    select count(*), (array_agg(indexrelid::regclass::text order by indexrelid))[1:%s]
    from pg_catalog.pg_index where not (indisvalid and indisready and indislive)"""
_COLLATIONS: LiteralString = """
    select count(*), count(*) filter (where recorded <> here),
           (array_agg('database ' || datname || ': ' || recorded || ' on the source, ' || here || ' on this host')
            filter (where recorded <> here))[1:%s]
    from (select datname, datcollversion as recorded,
                 pg_catalog.pg_database_collation_actual_version(oid) as here
          from pg_catalog.pg_database) compared"""


@dataclass(frozen=True, slots=True)
class Database:
    """One database of the recovered server."""

    name: str
    connectable: bool


@dataclass(frozen=True, slots=True)
class Assertion:
    """A statement of the user's that must give exactly one row whose first column is true."""

    name: str
    sql: str
    database: str = "postgres"


@dataclass(frozen=True, slots=True)
class Counted:
    """What one database holds."""

    database: str
    relations: int


Answer = tuple[str, str, Sequence[str], int]
"""Outcome, message, findings, how many there are in all."""


def read_assertion(name: str, data: bytes) -> Assertion:
    """From a file: SQL, with the database in a comment ``-- database: NAME`` (else postgres).

    Raises TimelineError for what is no text or more than MAX_SQL_BYTES.
    """
    if len(data) > MAX_SQL_BYTES:
        raise TimelineError(f"{name}: an assertion is at most {MAX_SQL_BYTES} bytes long")
    try:
        sql = data.decode()
    except UnicodeDecodeError as error:
        raise TimelineError(f"{name}: not UTF-8: {error}") from error
    named = _DATABASE.search(sql)
    return Assertion(name, sql, named[1] if named else "postgres")


class SqlChecks:
    """Checks on one running server."""

    def __init__(self, endpoint: Endpoint, major: int, clock: Clock) -> None:
        self._endpoint = endpoint
        self._major = major
        self._clock = clock

    async def first_query(self) -> str:
        """The server's version, by way of a catalog: the first answer. Raises TimelineError."""
        try:
            async with self._session("postgres", CATALOG_SECONDS) as connection:
                cursor = await connection.execute("select version() from pg_catalog.pg_class limit 1")
                row = await cursor.fetchone()
        except psycopg.Error as error:
            raise TimelineError(f"the recovered server does not answer: {_text(error)}") from error
        return str(row[0]) if row else ""

    async def databases(self) -> tuple[Database, ...]:
        """All of them; raises TimelineError."""
        try:
            async with self._session("postgres", CATALOG_SECONDS) as connection:
                rows = await (await connection.execute(_DATABASES)).fetchall()
        except psycopg.Error as error:
            raise TimelineError(f"the databases cannot be listed: {_text(error)}") from error
        return tuple(Database(name, allowed) for name, allowed in rows)

    async def count(self, databases: Sequence[Database]) -> tuple[Counted, ...]:
        """Relations of every database that can be connected to; raises TimelineError."""
        counted = []
        for database in databases:
            if not database.connectable:
                continue
            try:
                async with self._session(database.name, CATALOG_SECONDS) as connection:
                    row = await (await connection.execute(_RELATIONS)).fetchone()
            except psycopg.Error as error:
                raise TimelineError(f"database {database.name}: {_text(error)}") from error
            counted.append(Counted(database.name, int(row[0]) if row else 0))
        return tuple(counted)

    async def server(self) -> tuple[Check, ...]:
        """What is asked once of the whole server."""
        if self._major < 15:
            reason = f"PostgreSQL {self._major} does not record the collation version of a database"
            return (Check("catalog", "collation versions", None, SKIPPED, reason, 0),)

        async def collations(connection: psycopg.AsyncConnection[Any]) -> Answer:
            total, differing, findings = await _one(connection, _COLLATIONS, MAX_FINDINGS)
            told = f"{total} databases, of {differing} the collation version differs on this host"
            return PASSED, told, findings or (), differing

        return (
            await self._check("catalog", "collation versions", "postgres", collations, whole_server=True),
        )

    async def database(self, database: Database) -> tuple[Check, ...]:
        """The catalog checks of one database."""
        name = database.name
        if not database.connectable:
            return (Check("catalog", "connect", name, SKIPPED, "it does not allow connections", 0),)

        async def relations(connection: psycopg.AsyncConnection[Any]) -> Answer:
            total, tables, indexes = await _one(connection, _RELATIONS)
            return PASSED, f"{total} relations: {tables} tables, {indexes} indexes", (), 0

        async def files(connection: psycopg.AsyncConnection[Any]) -> Answer:
            count, size, wrong, findings = await _one(connection, _FILES, MAX_FINDINGS)
            told = f"{count} files, {size} bytes"
            if wrong:
                return (
                    FAILED,
                    f"{wrong} of {told} are not as the catalog says: {findings[0]}",
                    findings,
                    wrong,
                )
            return PASSED, told, (), 0

        async def sequences(connection: psycopg.AsyncConnection[Any]) -> Answer:
            total, used = await _one(connection, _SEQUENCES)
            return PASSED, f"{total} sequences were read, {used} of them in use", (), 0

        async def invalid(connection: psycopg.AsyncConnection[Any]) -> Answer:
            count, findings = await _one(connection, _INVALID, MAX_FINDINGS)
            # They were invalid on the source, too: recovery did its work.
            return PASSED, f"{count} indexes are marked invalid", findings or (), count

        checks = [await self._check("catalog", "connect", name, relations)]
        if checks[0].outcome != PASSED:
            return tuple(checks)
        for title, work in (
            ("relation files", files),
            ("sequences", sequences),
            ("invalid indexes", invalid),
        ):
            checks.append(await self._check("catalog", title, name, work))
        return tuple(checks)

    async def assertion(self, assertion: Assertion, *, timeout_seconds: float) -> Check:
        """One of the user's."""

        async def ask(connection: psycopg.AsyncConnection[Any]) -> Answer:
            rows = []
            # The extended protocol takes one statement; two rows are enough to know that it is not one.
            stream = cast(AsyncGenerator[Any, None], connection.cursor().stream(assertion.sql))
            async with aclosing(stream) as found:
                async for row in found:
                    rows.append(row)
                    if len(rows) == 2:
                        break
            if len(rows) != 1:
                many = "more than one row" if rows else "no row"
                return FAILED, f"gave {many}, and must give exactly one", (), 0
            if not rows[0] or rows[0][0] is not True:
                value = _short(repr(rows[0][0])) if rows[0] else "nothing"
                return FAILED, f"gave {value}, and must give true", (), 0
            return PASSED, "true", (), 0

        return await self._check(
            "assertion", assertion.name, assertion.database, ask, timeout_seconds=timeout_seconds
        )

    async def has_amcheck(self) -> bool:
        """Whether the extension can be created; raises TimelineError."""
        try:
            async with self._session("postgres", CATALOG_SECONDS) as connection:
                (found,) = await _one(
                    connection,
                    "select count(*) from pg_catalog.pg_available_extensions where name = 'amcheck'",
                )
        except psycopg.Error as error:
            raise TimelineError(f"the extensions cannot be listed: {_text(error)}") from error
        return bool(found)

    async def _check(
        self,
        group: str,
        name: str,
        database: str,
        work: Callable[[psycopg.AsyncConnection[Any]], Awaitable[Answer]],
        *,
        whole_server: bool = False,
        timeout_seconds: float = CATALOG_SECONDS,
    ) -> Check:
        began = self._clock.monotonic()
        try:
            async with self._session(database, timeout_seconds) as connection:
                outcome, message, findings, total = await work(connection)
        except psycopg.Error as error:
            outcome, message, findings, total = FAILED, _text(error), (), 0
        elapsed = int((self._clock.monotonic() - began) * 1e6)
        where = None if whole_server else database
        kept = tuple(_short(finding) for finding in findings[:MAX_FINDINGS])
        return Check(group, name, where, outcome, _short(message), elapsed, kept, int(total))

    @asynccontextmanager
    async def _session(
        self, database: str, timeout_seconds: float
    ) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        options = [
            "default_transaction_read_only=on",
            f"statement_timeout={max(1, int(timeout_seconds * 1000))}",
            "lock_timeout=60000",
            "session_preload_libraries=",
            "local_preload_libraries=",
        ]
        if self._major >= 17:
            options.append("event_triggers=off")
        connection = await psycopg.AsyncConnection.connect(
            host=self._endpoint.sockets,
            port=self._endpoint.port,
            user=self._endpoint.superuser,
            dbname=database,
            application_name="tl drill",
            connect_timeout=CONNECT_SECONDS,
            client_encoding="UTF8",
            options=" ".join(f"-c {option}" for option in options),
        )
        try:
            # A transaction that ends with the connection: nothing the statement does stays.
            await connection.set_read_only(True)
            yield connection
        finally:
            await connection.close()


async def _one(
    connection: psycopg.AsyncConnection[Any], query: LiteralString, *values: object
) -> tuple[Any, ...]:
    cursor = await connection.execute(query, values or None)
    row: tuple[Any, ...] | None = await cursor.fetchone()
    if row is None:
        raise TimelineError("a query that always gives a row gave none")
    return row


def _text(error: psycopg.Error) -> str:
    """Postgres's words, on one line."""
    parts = [error.diag.message_primary or str(error), error.diag.message_detail, error.diag.message_hint]
    return _short(" ".join(" ".join(part.split()) for part in parts if part))


def _short(text: str) -> str:
    return text if len(text) <= _MESSAGE_CHARACTERS else text[: _MESSAGE_CHARACTERS - 1] + "…"
