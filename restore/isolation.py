"""Cut what would lead from a fresh branch to other servers, before anyone is offered it (P8, EDGE 62).

Subscriptions are disabled and lose slot name and connection string: ``DROP SUBSCRIPTION`` would drop
*production's* slot, and, while a table is still synchronising, even without a slot name its connection is
used to drop more of them. Foreign servers and user mappings only act when a query names them, so they are
listed and left.

Files are looked at first: a branch without any of this is not connected to at all. A collation version that
differs from the source's is told per database (EDGE 47).
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timeline.errors import CheckFailed, TimelineError
from timeline.format.log import Incarnation

if TYPE_CHECKING:
    import psycopg

_FILENODE_MAP = "global/pg_filenode.map"
_MAP_MAGIC = 0x592717
_MAP_ENTRIES = 64
_PG_SUBSCRIPTION = 6100
_PG_FOREIGN_SERVER = "1417"
_PG_USER_MAPPING = "1418"
_LISTED_DATABASES = 16
"""More databases than this with foreign servers are counted, not listed."""
_CONNECT_SECONDS = 30
_NOWHERE = "host=/nonexistent"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How we, and nobody else yet, reach a fresh branch."""

    sockets: str
    port: int
    superuser: str
    major: int


async def isolate(data: Path, endpoint: Endpoint, source: Incarnation) -> tuple[str, ...]:
    """Cut it off; the warnings its user should see. Raises TimelineError when it cannot be done."""
    subscriptions = _has_subscriptions(data)
    foreign = _databases_with_foreign_servers(data)
    drifted = _collations_may_differ(source)
    if not (subscriptions or foreign or drifted):
        return ()
    import psycopg

    warnings: list[str] = []
    try:
        async with await _connect_any(endpoint) as connection:
            if subscriptions:
                warnings += await _cut_subscriptions(connection)
            if drifted:
                warnings += await _compare_collations(connection, endpoint.major)
            names = await _database_names(connection, foreign)
        for name in names[:_LISTED_DATABASES]:
            async with await _connect(endpoint, name) as connection:
                warnings += await _list_foreign_servers(connection, name)
    except psycopg.Error as error:
        raise TimelineError(f"the branch cannot be isolated: {' '.join(str(error).split())}") from error
    if len(names) > _LISTED_DATABASES:
        warnings.append(f"{len(names) - _LISTED_DATABASES} more databases may hold foreign servers")
    return tuple(warnings)


def mapped_filenode(filenode_map: bytes, oid: int) -> int | None:
    """The file of a mapped relation (src/backend/utils/cache/relmapper.c); ``None`` when it is not mapped."""
    magic, count = struct.unpack_from("<Ii", filenode_map)
    if magic != _MAP_MAGIC or not 0 <= count <= _MAP_ENTRIES or len(filenode_map) < 8 + 8 * count:
        raise TimelineError(f"{_FILENODE_MAP} is not a relation map")
    pairs = struct.iter_unpack("<II", filenode_map[8 : 8 + 8 * count])
    return next((filenode for mapped, filenode in pairs if mapped == oid), None)


def _has_subscriptions(data: Path) -> bool:
    filenode = mapped_filenode((data / _FILENODE_MAP).read_bytes(), _PG_SUBSCRIPTION)
    # Rows that were deleted and not vacuumed also make pages: then there is simply nothing to cut.
    return filenode is None or _size(data / "global" / str(filenode)) != 0


def _databases_with_foreign_servers(data: Path) -> list[int]:
    """Oids of databases whose two catalogs have pages, or were rewritten to files of other names."""
    found = []
    for entry in sorted(os.listdir(data / "base")):
        if not entry.isdecimal():
            continue
        sizes = [_size(data / "base" / entry / file) for file in (_PG_FOREIGN_SERVER, _PG_USER_MAPPING)]
        if any(size != 0 for size in sizes):
            found.append(int(entry))
    return found


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _collations_may_differ(source: Incarnation) -> bool:
    if source.icu_version is not None:
        # Which ICU the branch's server was built with, only the server can tell.
        return True
    return source.libc_version is not None and _numbers(source.libc_version) != _numbers(_libc_version())


def _libc_version() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return ""


def _numbers(version: str) -> list[str]:
    return re.findall(r"\d+", version)[:2]


async def _connect_any(endpoint: Endpoint) -> psycopg.AsyncConnection[Any]:
    import psycopg

    try:
        return await _connect(endpoint, "postgres")
    except psycopg.OperationalError as error:
        if "does not exist" not in str(error):
            raise
        return await _connect(endpoint, "template1")


async def _connect(endpoint: Endpoint, database: str) -> psycopg.AsyncConnection[Any]:
    import psycopg

    # A login trigger of the source must not run for our sake, nor its libraries be loaded.
    options = "-c statement_timeout=0 -c lock_timeout=0 -c session_preload_libraries="
    if endpoint.major >= 17:
        options += " -c event_triggers=off"
    return await psycopg.AsyncConnection.connect(
        host=endpoint.sockets,
        port=endpoint.port,
        user=endpoint.superuser,
        dbname=database,
        options=options,
        autocommit=True,
        connect_timeout=_CONNECT_SECONDS,
    )


async def _cut_subscriptions(connection: psycopg.AsyncConnection[Any]) -> list[str]:
    # The shared catalog is written directly: ALTER SUBSCRIPTION would need a connection to every database,
    # among them those that allow none.
    async with connection.transaction():
        await connection.execute("SET LOCAL synchronous_commit = on")
        cursor = await connection.execute(
            "UPDATE pg_catalog.pg_subscription SET subenabled = false, subslotname = NULL, subconninfo = %s "
            "RETURNING subname",
            (_NOWHERE,),
        )
        names = sorted(name for (name,) in await cursor.fetchall())
    cursor = await connection.execute(
        "SELECT count(*) FROM pg_catalog.pg_subscription WHERE subenabled OR subslotname IS NOT NULL"
    )
    if (await cursor.fetchone() or (1,))[0] != 0:
        raise CheckFailed("subscriptions of the branch could not be disabled")
    return [f"subscription {name!r} is disabled; slot and connection are removed" for name in names]


async def _compare_collations(connection: psycopg.AsyncConnection[Any], major: int) -> list[str]:
    if major < 15:
        return [
            "libc or ICU differs from the source's: rebuild indexes on text before relying on their order"
        ]
    cursor = await connection.execute(
        "SELECT datname, datcollversion, pg_catalog.pg_database_collation_actual_version(oid) "
        "FROM pg_catalog.pg_database WHERE datallowconn AND datcollversion IS NOT NULL ORDER BY datname"
    )
    return [
        f"database {name!r}: collation version here is {actual}, on the source {recorded}: "
        "indexes on text may be out of order"
        for name, recorded, actual in await cursor.fetchall()
        if recorded != actual
    ]


async def _database_names(connection: psycopg.AsyncConnection[Any], oids: list[int]) -> list[str]:
    cursor = await connection.execute(
        "SELECT datname FROM pg_catalog.pg_database "
        "WHERE oid = ANY(%s::oid[]) AND datallowconn ORDER BY datname",
        (oids,),
    )
    return [name for (name,) in await cursor.fetchall()]


async def _list_foreign_servers(connection: psycopg.AsyncConnection[Any], database: str) -> list[str]:
    cursor = await connection.execute(
        "SELECT s.srvname, w.fdwname, count(u.oid) FROM pg_catalog.pg_foreign_server s "
        "JOIN pg_catalog.pg_foreign_data_wrapper w ON w.oid = s.srvfdw "
        "LEFT JOIN pg_catalog.pg_user_mapping u ON u.umserver = s.oid GROUP BY 1, 2 ORDER BY 1"
    )
    return [
        f"database {database!r}: foreign server {server!r} ({wrapper}, user mappings: {mappings}) still works"
        for server, wrapper, mappings in await cursor.fetchall()
    ]
