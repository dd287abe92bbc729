"""``tl init`` and ``tl detach``: beginning and ending a relation with a source server."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import click

from cli.config import Cluster, Settings, save_cluster, source_option, store_options
from cli.estimate import Estimate, estimate_month
from cli.output import emit_json, note, on_terminal, say
from timeline.errors import CheckFailed, TimelineError, UsageError


@dataclass(frozen=True, slots=True)
class InitResult:
    """What ``tl init`` found and made."""

    store: str
    store_id: str
    cluster: str | None
    config_file: str | None
    system_identifier: int
    server_version: int
    slot: str
    findings: tuple[dict[str, str], ...]
    host_notes: tuple[str, ...]
    estimate: Estimate


@click.command("init")
@click.argument("store_url", metavar="STORE", required=False)
@click.option(
    "--name", metavar="NAME", help="Name of the cluster in tl.toml (default: last part of the store's URL)."
)
@click.option("--no-save", is_flag=True, help="Do not write tl.toml.")
@click.option(
    "--unbounded-slot", is_flag=True, help="Accept a source whose max_slot_wal_keep_size is unlimited."
)
@click.option(
    "--application-name", default="tl", show_default=True, help="Name of the archiver on the source."
)
@source_option
@store_options
def init_command(
    *,
    settings: Settings,
    store_url: str | None,
    name: str | None,
    no_save: bool,
    unbounded_slot: bool,
    application_name: str,
) -> None:
    """Create STORE (file:///path or s3://bucket/prefix); check source, store and host.

    Nothing is created or changed on the source. What `tl archive` will do there, and how to undo it, is printed.
    """
    url = store_url or settings.need_store()
    if "://" not in url:
        url = f"file://{Path(url).absolute()}"
    settings = replace(settings, store=url)
    result = asyncio.run(_init(settings, unbounded_slot=unbounded_slot, application_name=application_name))
    if not no_save:
        cluster = name or url.rstrip("/").rsplit("/", 1)[-1] or "main"
        source = _without_password(settings.need_source())
        path, added = save_cluster(Cluster(cluster, url, settings.endpoint_url, settings.region, source))
        result = replace(result, cluster=cluster, config_file=str(path))
        if not added:
            note(
                f"note: {path} has a cluster {cluster!r} already and was left as it is; choose with --store or --name"
            )
    if settings.json:
        emit_json(result)
        return
    _print(result)


def _without_password(conninfo: str) -> str:
    from psycopg.conninfo import make_conninfo

    from timeline.archive.connect import parse_conninfo

    said = parse_conninfo(conninfo)
    if said.pop("password", None) is not None:
        note("note: the password is not written to tl.toml; put it in ~/.pgpass")
    return make_conninfo("", **said)


async def _init(settings: Settings, *, unbounded_slot: bool, application_name: str) -> InitResult:
    from timeline.archive.preflight import Severity, check_source
    from timeline.archive.slot import slot_name
    from timeline.archive.source import Source
    from timeline.catalog.meta import create_store
    from timeline.clock import SystemClock
    from timeline.errors import NotFound
    from timeline.format import keys
    from timeline.store.open import open_store
    from timeline.store.probe import check_conditional_create

    conninfo = settings.need_source()
    clock = SystemClock()
    preflight = await check_source(
        conninfo, application_name=application_name, allow_unbounded=unbounded_slot
    )
    if preflight.refused:
        for finding in preflight.refused[1:]:
            note(f"tl: {finding.what}\nhint: {finding.cure}")
        first = preflight.refused[0]
        raise CheckFailed(first.what, hint=first.cure)
    source = await Source.open(conninfo)
    try:
        database_bytes, wal_rate = await _source_size(source)
    finally:
        await source.aclose()
    store = await open_store(
        settings.need_store(), endpoint_url=settings.endpoint_url, region=settings.region, clock=clock
    )
    try:
        try:
            await store.get(keys.META)
        except NotFound:
            pass
        else:
            raise UsageError(
                f"{store.url}: there is a store already",
                hint="choose another place, or go on with it: tl archive",
            )
        leftover = await check_conditional_create(store, clock)
        meta = await create_store(store, clock)
    finally:
        await store.aclose()
    return InitResult(
        store=settings.need_store(),
        store_id=meta.store_id,
        cluster=None,
        config_file=None,
        system_identifier=preflight.facts.system_identifier,
        server_version=preflight.facts.version_num,
        slot=slot_name(meta.store_id),
        findings=tuple(
            {
                "severity": str(finding.severity),
                "code": finding.code,
                "what": finding.what,
                "cure": finding.cure,
            }
            for finding in preflight.findings
            if finding.severity is not Severity.REFUSE
        ),
        host_notes=(*_host_notes(preflight.facts.major), *([leftover] if leftover else [])),
        estimate=estimate_month(database_bytes, wal_rate),
    )


async def _source_size(source: object) -> tuple[int, float | None]:
    from timeline.archive.source import Source

    assert isinstance(source, Source)
    size = (
        await source.rows(
            "select coalesce(sum(pg_catalog.pg_database_size(oid)), 0)::int8 from pg_catalog.pg_database"
        )
    )[0][0]
    try:
        row = (
            await source.rows(
                "select wal_bytes::float8, extract(epoch from pg_catalog.now() - stats_reset)::float8"
                " from pg_catalog.pg_stat_wal"
            )
        )[0]
    except TimelineError:
        # Servers before 14 do not count WAL; the estimate then says that it guesses.
        return int(size), None
    seconds = float(row[1] or 0)
    return int(size), float(row[0]) / seconds if seconds > 3600 else None


def _host_notes(major: int) -> list[str]:
    import os

    from restore.binaries import find_binaries

    notes = []
    try:
        find_binaries(major, os.environ)
    except TimelineError as error:
        notes.append(f"no branches on this host yet: {error.message}")
    if not os.path.exists("/dev/fuse") or shutil.which("fusermount3") is None:
        notes.append("no FUSE on this host: branches here are full copies (--mode copy)")
    return notes


def _print(result: InitResult) -> None:
    estimate = result.estimate
    say(f"store       {result.store} ({result.store_id[:8]}), empty and ready")
    say(f"source      PostgreSQL {result.server_version // 10000}.{result.server_version % 10000}, "
        f"system identifier {result.system_identifier}")  # fmt: skip
    if result.config_file:
        say(f"settings    {result.config_file}, cluster {result.cluster!r}")
    for finding in result.findings:
        say(f"{finding['severity']:<11} {finding['what']}")
        say(f"{'':<11} → {finding['cure']}")
    for text in result.host_notes:
        say(f"note        {text}")
    wal = (
        f"{estimate.wal_gb_per_day:.1f} GB of WAL a day"
        if estimate.wal_gb_per_day is not None
        else "WAL rate unknown, guessed"
    )
    say(
        f"cost        about ${estimate.dollars:.2f} a month at S3's list price: {estimate.database_gb:.1f} GB database, {wal}; "
        f"{estimate.stored_gb:.1f} GB stored, {estimate.put_requests:,} PUTs"
    )
    say("")
    say("Nothing was changed on the source. `tl archive` will, there:")
    say(f"  make the replication slot {result.slot}, which keeps WAL until it is in the store")
    say("  take one base backup (read load; --rate-limit bounds it)")
    say("Undo both at any time: tl detach")
    say("")
    say("Next: tl archive")


@dataclass(frozen=True, slots=True)
class DetachResult:
    """What ``tl detach`` removed from the source."""

    dropped: tuple[str, ...]


@click.command("detach")
@click.option("--yes", is_flag=True, help="Do not ask.")
@source_option
@store_options
def detach_command(*, settings: Settings, yes: bool) -> None:
    """Remove everything `tl` made on the source: its replication slots. The store is left as it is."""
    result = asyncio.run(_detach(settings, yes=yes))
    if settings.json:
        emit_json(result)
    elif result.dropped:
        say(f"dropped {', '.join(result.dropped)}; nothing of tl is left on the source")
    else:
        say("nothing of tl is on the source")


async def _detach(settings: Settings, *, yes: bool) -> DetachResult:
    from timeline.archive.slot import drop_slot, find_slots
    from timeline.archive.source import Source
    from timeline.catalog.meta import read_meta
    from timeline.clock import SystemClock
    from timeline.store.open import open_store

    store = await open_store(
        settings.need_store(), endpoint_url=settings.endpoint_url, region=settings.region, clock=SystemClock()
    )
    try:
        meta = await read_meta(store)
    finally:
        await store.aclose()
    source = await Source.open(settings.need_source())
    try:
        slots = await find_slots(source.connection, meta.store_id)
        if slots and not yes:
            confirm(
                f"This drops the replication slot {', '.join(slot.name for slot in slots)}; "
                "WAL not yet in the store may then be lost to it."
            )
        for slot in slots:
            await drop_slot(source.connection, slot.name)
    finally:
        await source.aclose()
    return DetachResult(tuple(slot.name for slot in slots))


def confirm(what_dies: str) -> None:
    """Ask on a terminal; elsewhere ``--yes`` is needed. Raises UsageError, or Abort on a no."""
    import sys

    if not (on_terminal() and sys.stdin.isatty()):
        raise UsageError(what_dies, hint="give --yes to go ahead")
    note(what_dies)
    click.confirm("Go ahead?", abort=True, err=True)


__all__ = ["detach_command", "init_command"]
