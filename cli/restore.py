"""``tl restore``: a full copy in an empty directory, for a stock Postgres to start from."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.branch import local_zone, resolve_now
from cli.config import Settings, source_option, store_options
from cli.output import duration_text, emit_json, iso, local_time, plain, say, warn
from cli.progress import bytes_progress
from timeline.size_text import size_text

if TYPE_CHECKING:
    from restore.export import RestoreResult


@click.command("restore")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--at", "at", metavar="WHEN", default="latest", show_default=True, help="As for `tl branch`.")
@click.option("--tli", type=int, metavar="N", help="Look on the line that leads to this Postgres timeline.")
@click.option(
    "--take-over",
    is_flag=True,
    help="Without the guards that keep a copy away from production's archive, standbys, subscriptions and jobs: "
    "for the server that replaces it.",
)
@source_option
@store_options
def restore_command(
    *, settings: Settings, directory: Path, at: str, tli: int | None, take_over: bool
) -> None:
    """Write a full copy as of WHEN into DIRECTORY, which must be empty or absent.

    Production is not touched. Start a stock Postgres of the same major version on it: it recovers to exactly WHEN and
    promotes. Then point `tl archive --source` at it to go on in the same store, without a new base backup.
    """
    result = asyncio.run(_restore(settings, directory, at, tli, take_over=take_over))
    target = result.target
    if settings.json:
        document = plain(result)
        document.pop("target")
        document |= {
            "tli": target.tli,
            "lsn": str(target.lsn),
            "time": iso(target.time),
            "last_commit_time": iso(target.last_commit.time) if target.last_commit else None,
            "next_commit_time": iso(target.next_commit.time) if target.next_commit else None,
        }
        emit_json(document)
        return
    warn(result.warnings)
    say(
        f"restored   {result.directory}, PostgreSQL {result.major}, in {duration_text(result.elapsed_seconds)}"
    )
    say(
        f"at         {target.lsn}"
        + (f", {local_time(target.time)} = {iso(target.time)}" if target.time else "")
    )
    if target.last_commit is not None:
        say(f"holds      every commit up to {local_time(target.last_commit.time)}")
    if target.next_commit is not None:
        say(f"leaves out the commit of {local_time(target.next_commit.time)} and later ones")
    say(f"fetched    {size_text(result.fetched_bytes)} in {result.requests} requests")
    say(f"replay     {size_text(result.replayed_bytes)} of WAL at the first start")
    say(f"next       start Postgres {result.major} on it: pg_ctl -D {result.directory} start")


async def _restore(
    settings: Settings, directory: Path, at: str, tli: int | None, *, take_over: bool
) -> RestoreResult:
    from restore.branch_request import StoreAddress
    from restore.export import restore_directory
    from restore.host import find_host
    from timeline.catalog.when import When, parse_when
    from timeline.clock import SystemClock

    address = StoreAddress(settings.need_store(), settings.endpoint_url, settings.region)
    clock = SystemClock()
    when: When
    if at.strip().lower() == "now":
        when = await resolve_now(settings)
    else:
        relative = at.strip().lower().endswith("ago")
        when = parse_when(at, local_zone(), await _source_clock(settings) if relative else None)
    with bytes_progress("restore", stays=True) as tell:
        return await restore_directory(
            address,
            when,
            directory.absolute(),
            find_host(os.environ),
            clock,
            tli=tli,
            take_over=take_over,
            report=lambda at: tell("", at.done_bytes, at.total_bytes),
        )


async def _source_clock(settings: Settings) -> int | None:
    from timeline.catalog.history import History
    from timeline.clock import SystemClock
    from timeline.store.open import open_store

    store = await open_store(
        settings.need_store(), endpoint_url=settings.endpoint_url, region=settings.region, clock=SystemClock()
    )
    try:
        return await (await History.load(store)).source_clock()
    finally:
        await store.aclose()
