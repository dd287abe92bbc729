"""``tl doctor``: what on source, store and host stands in the way, each with its cure."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import click

from cli.config import Settings, source_option, store_options
from cli.output import emit_json, say
from cli.source_findings import of_inventory, of_preflight
from timeline.errors import CheckFailed, TimelineError
from timeline.findings import Finding, Severity

if TYPE_CHECKING:
    from restore.host_fits import Wanted
    from timeline.archive.inventory import Inventory
    from timeline.store.base import Store

SOURCE_SECONDS = 60.0
"""For everything that the source is asked."""
_WORST_FIRST = (Severity.ERROR, Severity.WARNING, Severity.NOTE, Severity.OK)


@dataclass(frozen=True, slots=True)
class Archived:
    """What the store knows of the source, for a host that cannot reach it."""

    store_id: str
    major: int | None
    libc_version: str | None
    database_bytes: int | None


@click.command("doctor")
@click.option(
    "--read-only", is_flag=True, help="Write nothing to the store, for hosts that only make branches."
)
@click.option(
    "--unbounded-slot", is_flag=True, help="Accept a source whose max_slot_wal_keep_size is unlimited."
)
@click.option(
    "--application-name", default="tl", show_default=True, help="Name of the archiver on the source."
)
@source_option
@store_options
def doctor_command(
    *, settings: Settings, read_only: bool, unbounded_slot: bool, application_name: str
) -> int:
    """Look at source, store and host, and name what stands in the way, with its cure.

    Nothing is created or changed on the source. In the store one object under probe/ is created and deleted again,
    unless --read-only. What cannot be reached is a finding, and the rest is still looked at. Exit code 6 when there is
    an error among the findings.
    """
    found = asyncio.run(
        _doctor(
            settings, read_only=read_only, unbounded_slot=unbounded_slot, application_name=application_name
        )
    )
    counts = {severity: sum(one.severity is severity for one in found) for severity in Severity}
    if settings.json:
        emit_json(
            {
                "findings": [
                    {
                        "area": one.area,
                        "severity": str(one.severity),
                        "code": one.code,
                        "what": one.what,
                        "cure": one.cure,
                    }
                    for one in found
                ],
                "errors": counts[Severity.ERROR],
                "warnings": counts[Severity.WARNING],
                "notes": counts[Severity.NOTE],
            }
        )
    else:
        _print(found)
    return CheckFailed.exit_code if counts[Severity.ERROR] else 0


async def _doctor(
    settings: Settings, *, read_only: bool, unbounded_slot: bool, application_name: str
) -> list[Finding]:
    from restore.host_checks import check_host
    from restore.host_fits import check_fit

    stored, archived = await _store(settings, read_only=read_only)
    asked, inventory = await _source(
        settings,
        archived.store_id if archived is not None else None,
        unbounded_slot=unbounded_slot,
        application_name=application_name,
    )
    size = archived.database_bytes if archived is not None else None
    if inventory is not None:
        size = inventory.database_bytes
    host = await asyncio.to_thread(check_host, os.environ, database_bytes=size)
    wanted = _wanted(inventory, archived)
    if wanted is not None:
        host += await asyncio.to_thread(check_fit, wanted, os.environ)
    return [*asked, *stored, *host]


async def _store(settings: Settings, *, read_only: bool) -> tuple[list[Finding], Archived | None]:
    from timeline.clock import SystemClock
    from timeline.format import keys
    from timeline.store.open import open_store
    from timeline.store.verb_checks import check_verbs

    if settings.store is None:
        return [_not_looked_at("store", "name it with --store, TL_STORE or in tl.toml")], None
    try:
        store = await open_store(
            settings.store, endpoint_url=settings.endpoint_url, region=settings.region, clock=SystemClock()
        )
    except TimelineError as error:
        return [Finding("store", Severity.ERROR, "store", error.message, error.hint)], None
    try:
        found = await _place(store, settings, read_only=read_only)
        if any(one.code == "directory-permission" for one in found):
            return found, None
        found += await check_verbs(store, known_key=keys.META, read_only=read_only)
        if any(one.code == "store-unreachable" for one in found):
            return found, None
        more, archived = await _archived(store)
        return [*found, *more], archived
    finally:
        await store.aclose()


async def _place(store: Store, settings: Settings, *, read_only: bool) -> list[Finding]:
    """What the directory or bucket says of itself."""
    from timeline.store.bucket_checks import check_bucket
    from timeline.store.directory_checks import check_directory

    parts = urlsplit(store.url)
    if parts.scheme == "s3":
        return await check_bucket(
            parts.netloc,
            parts.path.strip("/") + "/" if parts.path.strip("/") else "",
            endpoint_url=settings.endpoint_url,
            region=settings.region,
        )
    return await asyncio.to_thread(check_directory, Path(unquote(parts.path)), read_only=read_only)


async def _archived(store: Store) -> tuple[list[Finding], Archived | None]:
    from timeline.catalog.branch_log import read_head
    from timeline.catalog.meta import read_meta
    from timeline.errors import UsageError
    from timeline.ids import MAIN

    try:
        meta = await read_meta(store)
        head = await read_head(store, MAIN)
    except UsageError:
        # No store yet, or no right to read it: both have been said.
        return [], None
    except TimelineError as error:
        cure = error.hint or "run `tl verify`"
        return [Finding("store", Severity.ERROR, "store-state", error.message, cure)], None
    if head is None or not head.state.incarnations:
        note = Finding(
            "store", Severity.NOTE, "nothing-archived", "nothing was archived yet", "start `tl archive`"
        )
        return [note], Archived(meta.store_id, None, None, None)
    last = head.state.incarnations[-1]
    size = head.state.snapshots[-1].bytes if head.state.snapshots else None
    found = []
    if head.state.gaps:
        what = f"the history has {len(head.state.gaps)} gap(s), in which nothing can be restored"
        found.append(
            Finding("store", Severity.NOTE, "gaps", what, "none: that WAL is lost; `tl verify` names them")
        )
    return found, Archived(meta.store_id, last.major, last.libc_version, size)


async def _source(
    settings: Settings, store_id: str | None, *, unbounded_slot: bool, application_name: str
) -> tuple[list[Finding], Inventory | None]:
    from timeline.archive.inventory import take_inventory
    from timeline.archive.preflight import check_source
    from timeline.clock import SystemClock

    if settings.source is None:
        return [_not_looked_at("source", "name it with --source, TL_SOURCE or in tl.toml")], None
    found: list[Finding] = []
    try:
        async with asyncio.timeout(SOURCE_SECONDS):
            preflight = await check_source(
                settings.source, application_name=application_name, allow_unbounded=unbounded_slot
            )
            found += of_preflight(preflight)
            inventory = await take_inventory(settings.source, SystemClock(), store_id=store_id)
    except TimelineError as error:
        cure = error.hint or "check conninfo, network and whether the server runs"
        return [*found, Finding("source", Severity.ERROR, "source-unreachable", error.message, cure)], None
    except TimeoutError:
        what = f"the source did not answer within {SOURCE_SECONDS:g} s"
        return [
            *found,
            Finding("source", Severity.ERROR, "source-unreachable", what, "look at its load"),
        ], None
    return [*found, *of_inventory(inventory)], inventory


def _wanted(inventory: Inventory | None, archived: Archived | None) -> Wanted | None:
    from restore.host_fits import Wanted

    if inventory is not None:
        return Wanted(
            major=inventory.facts.major,
            libc_version=inventory.facts.libc_version,
            preload_libraries=inventory.preload_libraries or (),
            extensions=inventory.extensions,
            time_zone=inventory.time_zone,
            locales=inventory.locales,
        )
    if archived is not None and archived.major is not None:
        return Wanted(archived.major, archived.libc_version)
    return None


def _not_looked_at(area: str, cure: str) -> Finding:
    return Finding(area, Severity.NOTE, f"no-{area}", f"no {area} was named, and none was looked at", cure)


def _print(found: list[Finding]) -> None:
    for severity in _WORST_FIRST:
        for one in found:
            if one.severity is severity:
                say(f"{severity:<8} {one.area:<7} {one.what}")
                if one.cure and severity is not Severity.OK:
                    say(f"{'':<16} → {one.cure}")
    errors = sum(one.severity is Severity.ERROR for one in found)
    say("")
    say(f"{errors} error(s)" if errors else "nothing stands in the way")
