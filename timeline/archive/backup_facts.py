"""What a base backup must ask the source over an ordinary connection: settings, databases, its clock.

Reads only (P11). A role that may replicate but not read everything gets fewer answers, never an error: a
setting it may not see is left out, a database it may not see is not in the boot set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import LiteralString

from timeline.archive.boot_set import MAX_DATABASES
from timeline.archive.source import Source
from timeline.clock import Micros
from timeline.format.branch_state import Setting

NEEDED_SETTINGS = (
    "DateStyle",
    "default_text_search_config",
    "lc_collate",
    "lc_ctype",
    "lc_messages",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_replication_slots",
    "max_wal_senders",
    "max_worker_processes",
    "server_encoding",
    "server_version_num",
    "session_preload_libraries",
    "shared_preload_libraries",
    "TimeZone",
    "track_commit_timestamp",
    "wal_level",
    "wal_log_hints",
    "wal_segment_size",
)
"""Recorded even where they have their default, because recovery or queries depend on them."""

SECRET_SETTINGS = (
    "archive_cleanup_command",
    "archive_command",
    "primary_conninfo",
    "recovery_end_command",
    "restore_command",
    "ssl_passphrase_command",
)
"""May hold credentials, and no branch may use them (P8): never recorded."""

_SETTINGS: LiteralString = """
    select name, setting from pg_catalog.pg_settings
    where (lower(name) = any(%s) or source in ('configuration file', 'command line', 'environment variable'))
      and name <> all(%s) and setting is not null
    order by name collate "C" """
_DATABASES: LiteralString = """
    select d.oid::int8
    from pg_catalog.pg_database d left join pg_catalog.pg_stat_database s on s.datid = d.oid
    where d.datallowconn and not d.datistemplate
    order by d.datname = current_database() desc, s.xact_commit desc nulls last, d.oid limit %s"""
_REWRITTEN: LiteralString = """
    select d.oid::int8, pg_catalog.pg_relation_filenode(c.oid)::int8, c.oid::int8
    from pg_catalog.pg_class c, pg_catalog.pg_database d
    where d.datname = current_database() and c.oid < 16384 and not c.relisshared
      and pg_catalog.pg_relation_filenode(c.oid) <> c.oid"""
_CLOCK: LiteralString = "select (extract(epoch from pg_catalog.clock_timestamp()) * 1000000)::int8"


@dataclass(frozen=True, slots=True)
class BackupFacts:
    """Answers of one short connection."""

    settings: tuple[Setting, ...]
    """Sorted by name; values as in pg_settings, numbers in the setting's own unit."""
    databases: tuple[int, ...]
    """OIDs of the databases one can connect to, most important first, at most MAX_DATABASES."""
    rewritten: dict[tuple[int, int], int]
    """(database, file number) → OID of catalogs of the connected database whose file was rewritten."""


async def read_facts(conninfo: str) -> BackupFacts:
    """Ask for everything but the time; raises UsageError, ServerError, Unavailable."""
    source = await Source.open(conninfo, application_name="tl base backup")
    try:
        needed = [name.lower() for name in NEEDED_SETTINGS]
        settings = await source.rows(_SETTINGS, needed, list(SECRET_SETTINGS))
        databases = await source.rows(_DATABASES, MAX_DATABASES)
        rewritten = await source.rows(_REWRITTEN)
    finally:
        await source.aclose()
    return BackupFacts(
        settings=tuple(Setting(name, value) for name, value in settings),
        databases=tuple(int(row[0]) for row in databases),
        rewritten={(int(row[0]), int(row[1])): int(row[2]) for row in rewritten},
    )


async def read_clock(conninfo: str) -> Micros:
    """The source's own time; raises as ``read_facts``."""
    source = await Source.open(conninfo, application_name="tl base backup")
    try:
        return int((await source.rows(_CLOCK))[0][0])
    finally:
        await source.aclose()
