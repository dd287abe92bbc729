"""What a source has that the host of its branches must have too. Looks only (P11)."""

from __future__ import annotations

from dataclasses import dataclass

from timeline.archive.slot import SlotStatus, find_slots
from timeline.archive.source import IncarnationFacts, Source
from timeline.clock import Clock

_LOCALES = ("lc_messages", "lc_monetary", "lc_numeric", "lc_time")


@dataclass(frozen=True, slots=True)
class StaleCollation:
    """A database whose indexes were built under another collation version than the source has now."""

    database: str
    recorded: str
    here: str


@dataclass(frozen=True, slots=True)
class Inventory:
    """The source, as its branches' host must be able to serve it."""

    facts: IncarnationFacts
    database_bytes: int
    preload_libraries: tuple[str, ...] | None
    """``None``: our user may not see them."""
    extensions: tuple[str, ...]
    """In the database we are connected to; each database has its own."""
    tablespaces: tuple[str, ...]
    stale_collations: tuple[StaleCollation, ...]
    time_zone: str
    locales: tuple[str, ...]
    ahead_seconds: float
    """How far its clock is ahead of this host's; right to about the time of one query."""
    slots: tuple[SlotStatus, ...]
    """Ours, of the store asked for."""


async def take_inventory(conninfo: str, clock: Clock, *, store_id: str | None) -> Inventory:
    """Ask the source; raises UsageError, Unavailable, ServerError."""
    source = await Source.open(conninfo)
    try:
        facts = await source.facts()
        settings = {
            str(name): str(value)
            for name, value in await source.rows("select name, setting from pg_catalog.pg_settings")
        }
        size = await source.rows(
            "select coalesce(sum(pg_catalog.pg_database_size(oid)), 0)::int8 from pg_catalog.pg_database "
            "where pg_catalog.has_database_privilege(oid, 'connect')"
        )
        extensions = await source.rows("select extname from pg_catalog.pg_extension order by 1")
        tablespaces = await source.rows(
            "select spcname from pg_catalog.pg_tablespace where spcname not in ('pg_default', 'pg_global') order by 1"
        )
        stale = (
            await source.rows(
                "select datname, datcollversion, pg_catalog.pg_database_collation_actual_version(oid) "
                "from pg_catalog.pg_database where datcollversion is distinct from "
                "pg_catalog.pg_database_collation_actual_version(oid) and datcollversion is not null and datallowconn"
            )
            if facts.major >= 15
            else []
        )
        before = clock.now()
        told = await source.rows("select (extract(epoch from clock_timestamp()) * 1000000)::int8")
        after = clock.now()
        slots = await find_slots(source.connection, store_id) if store_id is not None else ()
    finally:
        await source.aclose()
    preload = settings.get("shared_preload_libraries")
    return Inventory(
        facts=facts,
        database_bytes=int(size[0][0]),
        preload_libraries=None if preload is None else _elements(preload),
        extensions=tuple(str(name) for (name,) in extensions),
        tablespaces=tuple(str(name) for (name,) in tablespaces),
        stale_collations=tuple(StaleCollation(str(a), str(b), str(c)) for a, b, c in stale),
        time_zone=settings.get("TimeZone", "UTC"),
        locales=tuple(sorted({settings[name] for name in _LOCALES if settings.get(name)})),
        ahead_seconds=(int(told[0][0]) - (before + after) / 2) / 1e6,
        slots=slots,
    )


def _elements(setting: str) -> tuple[str, ...]:
    return tuple(part.strip().strip('"') for part in setting.split(",") if part.strip())
