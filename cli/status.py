"""``tl status``: what can be recovered, how fresh it is, and what endangers it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import click

from cli.config import Settings, source_option, store_options
from cli.output import duration_text, emit_json, iso, local_time, note, say, size_text, table
from timeline.lsn import Lsn

REPLAY_BYTES_PER_SECOND = 100e6
START_SECONDS = 1.0
"""What a branch takes besides its replay; both are what was measured on a two-core machine."""
SOURCE_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class RangeStatus:
    """One stretch of reachable history."""

    tli: int
    first: Lsn
    last: Lsn
    first_time: str | None
    last_time: str | None
    abandoned: bool


@dataclass(frozen=True, slots=True)
class SlotReport:
    """The slot on the source, as far as the source was asked and answered."""

    name: str
    wal_status: str | None
    active: bool
    safe_bytes: int | None
    warning: str | None


@dataclass(frozen=True, slots=True)
class SnapshotStatus:
    """A place where replay can begin."""

    id: str
    kind: str
    """``base`` (a base backup) or ``built`` (from WAL)."""
    tli: int
    lsn: Lsn
    time: str | None


@dataclass(frozen=True, slots=True)
class StatusResult:
    """What ``tl status`` knows."""

    store: str
    store_id: str
    recoverable: bool
    ranges: tuple[RangeStatus, ...]
    fresh_seconds: float | None
    """Age of the newest recoverable moment, by the host's clock."""
    snapshots: tuple[SnapshotStatus, ...]
    """Oldest first."""
    newest_snapshot: str | None
    newest_snapshot_time: str | None
    database_bytes: int | None
    replay_bytes: int | None
    """WAL between the newest snapshot and the head."""
    expected_seconds: float | None
    unsealed_bytes: int
    backup_under_way: bool
    gaps: int
    slot: SlotReport | None
    remarks: tuple[str, ...]


@click.command("status")
@source_option
@store_options
def status_command(*, settings: Settings) -> None:
    """What is recoverable, and how fresh. Line 1 is the answer; the rest is why."""
    result = asyncio.run(_status(settings))
    if settings.json:
        emit_json(result)
    else:
        _print(result)


async def _status(settings: Settings) -> StatusResult:
    from timeline.catalog.history import History
    from timeline.clock import SystemClock
    from timeline.store.open import open_store

    clock = SystemClock()
    store = await open_store(
        settings.need_store(), endpoint_url=settings.endpoint_url, region=settings.region, clock=clock
    )
    try:
        history = await History.load(store)
        ranges = await history.reachable()
        tail = await history.tail(history.state.current_tli)
        remarks = list(await history.remarks())
    finally:
        await store.aclose()
    state = history.state
    current = [found for found in ranges if found.tli == state.current_tli and not found.abandoned]
    newest = state.snapshots[-1] if state.snapshots else None
    head = current[-1].last if current else None
    replay = max(0, head - newest.lsn) if head is not None and newest is not None else None
    slot = None
    if settings.source is not None:
        slot, problem = await _slot(settings.source, history.meta.store_id)
        remarks += [problem] if problem else []
        remarks += [slot.warning] if slot is not None and slot.warning else []
    last_time = current[-1].last_time if current else None
    return StatusResult(
        store=store.url,
        store_id=history.meta.store_id,
        recoverable=bool(current),
        ranges=tuple(
            RangeStatus(
                found.tli,
                found.first,
                found.last,
                iso(found.first_time),
                iso(found.last_time),
                found.abandoned,
            )
            for found in ranges
        ),
        fresh_seconds=max(0.0, (clock.now() - last_time) / 1e6) if last_time is not None else None,
        snapshots=tuple(
            SnapshotStatus(one.id, one.kind, one.tli, one.lsn, iso(one.time)) for one in state.snapshots
        ),
        newest_snapshot=newest.id if newest else None,
        newest_snapshot_time=iso(newest.time) if newest else None,
        database_bytes=newest.bytes if newest else None,
        replay_bytes=replay,
        expected_seconds=START_SECONDS + replay / REPLAY_BYTES_PER_SECOND if replay is not None else None,
        unsealed_bytes=tail.bytes,
        backup_under_way=state.progress is not None,
        gaps=len(state.gaps),
        slot=slot,
        remarks=tuple(remarks),
    )


async def _slot(conninfo: str, store_id: str) -> tuple[SlotReport | None, str | None]:
    """The slot's state, or why it could not be had: the store alone decides what is recoverable."""
    from timeline.archive.slot import read_slot, slot_name
    from timeline.archive.source import Source
    from timeline.errors import TimelineError

    name = slot_name(store_id)
    try:
        async with asyncio.timeout(SOURCE_TIMEOUT_SECONDS):
            source = await Source.open(conninfo)
            try:
                found = await read_slot(source.connection, name)
            finally:
                await source.aclose()
    except TimelineError as error:
        return None, f"the source could not be asked: {error.message}"
    except TimeoutError:
        return None, f"the source did not answer within {SOURCE_TIMEOUT_SECONDS:g} s"
    if found is None:
        return None, f"the source has no slot {name}: nothing holds its WAL for us"
    return (
        SlotReport(
            name=name,
            wal_status=str(found.wal_status) if found.wal_status is not None else None,
            active=found.active_pid is not None,
            safe_bytes=found.safe_bytes,
            warning=found.warning,
        ),
        None if found.active_pid is not None else "no archiver is connected to the slot: start `tl archive`",
    )


def _print(result: StatusResult) -> None:
    from datetime import datetime

    def local(text: str | None) -> str:
        if text is None:
            return "-"
        return local_time(int(datetime.fromisoformat(text).timestamp() * 1_000_000))

    current = [found for found in result.ranges if not found.abandoned]
    if not result.recoverable or not current:
        say("recoverable: nothing yet" + (" (a base backup is under way)" if result.backup_under_way else ""))
    else:
        newest = current[-1]
        fresh = (
            f"{duration_text(result.fresh_seconds)} ago"
            if result.fresh_seconds is not None
            else "age unknown"
        )
        expected = (
            f"about {result.expected_seconds:.1f} s to the first query" if result.expected_seconds else ""
        )
        say(
            f"recoverable from {local(current[0].first_time)} to {local(newest.last_time)} ({fresh}), {expected}"
        )
    say(f"store      {result.store}")
    if result.database_bytes is not None:
        say(
            f"snapshots  {len(result.snapshots)}, newest of {local(result.newest_snapshot_time)}, "
            f"{size_text(result.database_bytes)}; {size_text(result.replay_bytes or 0)} of WAL since"
        )
    if result.slot is not None:
        left = (
            f", {size_text(result.slot.safe_bytes)} until it is lost"
            if result.slot.safe_bytes is not None
            else ""
        )
        say(f"slot       {result.slot.name}: {result.slot.wal_status}{left}")
    if len(result.ranges) > 1:
        say("")
        table(
            ("tli", "from", "to", "known until", ""),
            (
                (
                    str(found.tli),
                    str(found.first),
                    str(found.last),
                    local(found.last_time),
                    "abandoned" if found.abandoned else "",
                )
                for found in result.ranges
            ),
        )
    if result.gaps:
        note(f"warning: {result.gaps} gap(s) in the history; targets inside are refused")
    for text in result.remarks:
        note(f"warning: {text}")
