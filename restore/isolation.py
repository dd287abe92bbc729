"""Cut what would lead from a fresh branch to other servers, before anyone is offered it (P8, EDGE 62).

Subscriptions are disabled and lose slot name and connection string: ``DROP SUBSCRIPTION`` would drop
*production's* slot, and, while a table is still synchronising, even without a slot name its connection is
used to drop more of them. Foreign servers and user mappings only act when a query names them, so they are
listed and left.

Files are looked at first: a branch without any of this is not connected to at all. A collation version that
differs from the source's is told per database (EDGE 47).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restore.binaries import Binaries
from restore.icu_memory import IcuMemory
from timeline.errors import CheckFailed, TimelineError, Unavailable, UsageError
from timeline.format.branch_state import Incarnation

_FILENODE_MAP = "global/pg_filenode.map"
_MAP_MAGIC = 0x592717
_MAP_ENTRIES = 64
_PG_SUBSCRIPTION = 6100
_PG_FOREIGN_SERVER = "1417"
_PG_USER_MAPPING = "1418"
_LISTED_DATABASES = 16
"""More databases than this with foreign servers are counted, not listed."""
_CONNECT_SECONDS = 30
_QUERY_SECONDS = 120

_CUT_SUBSCRIPTIONS = """
set synchronous_commit = on;
with cut as (
    update pg_catalog.pg_subscription
    set subenabled = false, subslotname = null, subconninfo = 'host=/nonexistent'
    returning subname)
select coalesce(jsonb_agg(subname order by subname), '[]') from cut;
"""
"""The shared catalog is written directly: ALTER SUBSCRIPTION would need a connection to every database,
among them those that allow none. Synchronously: a crash of the branch must not bring a subscription
back."""
_SUBSCRIPTIONS_LEFT = """
select jsonb_agg(n) from (
    select count(*) as n from pg_catalog.pg_subscription where subenabled or subslotname is not null) counted;
"""
_COLLATIONS = """
select coalesce(jsonb_agg(jsonb_build_array(datname, datcollversion, here) order by datname), '[]')
from (select datname, datcollversion, pg_catalog.pg_database_collation_actual_version(oid) as here
      from pg_catalog.pg_database where datallowconn and datcollversion is not null) compared
where datcollversion <> here;
"""
_ICU = """
select jsonb_agg(version) from (
    select max(pg_catalog.pg_collation_actual_version(oid)) as version
    from pg_catalog.pg_collation where collprovider = 'i' and collversion is not null) asked;
"""
"""The very question that the archiver asked the source."""
_DATABASES = """
select coalesce(jsonb_agg(datname order by datname), '[]')
from pg_catalog.pg_database where datallowconn and oid = any ('{%s}'::oid[]);
"""
_FOREIGN_SERVERS = """
select coalesce(jsonb_agg(jsonb_build_array(srvname, fdwname, mappings) order by srvname), '[]')
from (select s.srvname, w.fdwname, count(u.oid) as mappings
      from pg_catalog.pg_foreign_server s
      join pg_catalog.pg_foreign_data_wrapper w on w.oid = s.srvfdw
      left join pg_catalog.pg_user_mapping u on u.umserver = s.oid
      group by 1, 2) listed;
"""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How we, and nobody else yet, reach a fresh branch."""

    sockets: str
    port: int
    superuser: str


async def isolate(
    data: Path, endpoint: Endpoint, binaries: Binaries, source: Incarnation, icu: IcuMemory
) -> tuple[str, ...]:
    """Cut it off; the warnings its user should see. Raises TimelineError when it cannot be done."""
    subscriptions = _has_subscriptions(data)
    foreign = _databases_with_foreign_servers(data)
    known_icu = icu.recall(binaries)
    drifted = source.icu_version not in (None, known_icu) or _libc_differs(source)
    if not (subscriptions or foreign or drifted):
        return ()
    psql = _Psql(endpoint, binaries)
    warnings: list[str] = []
    names: list[str] = []
    script = _CUT_SUBSCRIPTIONS + _SUBSCRIPTIONS_LEFT if subscriptions else ""
    if drifted and binaries.major >= 15:
        script += _COLLATIONS + _ICU
    if foreign:
        script += _DATABASES % ",".join(map(str, foreign))
    answers = iter(await _in_any_database(psql, script) if script else [])
    if subscriptions:
        cut, left = next(answers), next(answers)
        if left != [0]:
            raise CheckFailed("subscriptions of the branch could not be disabled")
        warnings += [f"subscription {name!r} is disabled; slot and connection are removed" for name in cut]
    if drifted and binaries.major >= 15:
        warnings += [
            f"database {name!r}: collation version here is {here}, on the source {recorded}: "
            "indexes on text may be out of order"
            for name, recorded, here in next(answers)
        ]
        if (found := next(answers)[0]) is not None:
            icu.note(binaries, found)
    elif drifted:
        warnings.append("libc or ICU differs from the source's: indexes on text may be out of order")
    if foreign:
        names = next(answers)
    for name in names[:_LISTED_DATABASES]:
        (servers,) = await psql.run(name, _FOREIGN_SERVERS)
        warnings += [
            f"database {name!r}: foreign server {server!r} ({wrapper}, user mappings: {mappings}) still works"
            for server, wrapper, mappings in servers
        ]
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


def _libc_differs(source: Incarnation) -> bool:
    return source.libc_version is not None and _numbers(source.libc_version) != _numbers(_libc_version())


def _libc_version() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return ""


def _numbers(version: str) -> list[str]:
    return re.findall(r"\d+", version)[:2]


async def ask_in_any_database(endpoint: Endpoint, binaries: Binaries, script: str) -> list[Any]:
    """What the script's queries give, each one line of JSON; raises TimelineError."""
    return await _in_any_database(_Psql(endpoint, binaries), script)


async def _in_any_database(psql: _Psql, script: str) -> list[Any]:
    try:
        return await psql.run("postgres", script)
    except _PsqlError as error:
        if "does not exist" not in error.message:
            raise
        return await psql.run("template1", script)


class _Psql:
    """Runs SQL through psql: no driver to import, and nothing of ours stays connected."""

    def __init__(self, endpoint: Endpoint, binaries: Binaries) -> None:
        self._endpoint = endpoint
        self._binaries = binaries

    async def run(self, database: str, script: str) -> list[Any]:
        """What the script's queries give, each one line of JSON; raises TimelineError."""
        # A login trigger of the source must not run for our sake, nor its libraries be loaded.
        options = "-c statement_timeout=0 -c lock_timeout=0 -c session_preload_libraries="
        if self._binaries.major >= 17:
            options += " -c event_triggers=off"
        process = await asyncio.create_subprocess_exec(
            find_psql(self._binaries),
            *("-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f", "-"),
            *("-h", self._endpoint.sockets, "-p", str(self._endpoint.port)),
            *("-U", self._endpoint.superuser, "-d", database),
            env={
                **self._binaries.environment(),
                "PGOPTIONS": options,
                "PGCONNECT_TIMEOUT": str(_CONNECT_SECONDS),
                "PGCLIENTENCODING": "UTF8",
            },
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_QUERY_SECONDS):
                out, err = await process.communicate(script.encode())
        except TimeoutError:
            raise Unavailable(f"the branch did not answer within {_QUERY_SECONDS} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            reason = " ".join(err.decode(errors="replace").split())
            raise _PsqlError(f"psql on the branch failed: {reason}")
        return [json.loads(line) for line in out.splitlines()]


class _PsqlError(TimelineError):
    """psql reports failure; its own words."""


def find_psql(binaries: Binaries) -> str:
    """The psql beside these binaries, or the host's; raises UsageError."""
    beside = binaries.directory / "psql"
    found = str(beside) if beside.exists() else shutil.which("psql")
    if found is None:
        raise UsageError("there is no psql on this host", hint="install the PostgreSQL client")
    return found
