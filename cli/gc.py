"""``tl gc``: find what nothing in the store needs any more, and delete it in two runs, a grace period apart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from cli.config import Settings, store_options
from cli.duration import Duration
from cli.output import duration_text, emit_json, iso, local_time, note, say, warn
from cli.progress import count_progress
from timeline.ids import MAIN
from timeline.size_text import size_text

if TYPE_CHECKING:
    from cli.operations import RetentionPlan
    from timeline.catalog.branch_log import BranchLog
    from timeline.clock import Clock
    from timeline.format.branch_state import OpenMark
    from timeline.maintain.collect import Collected
    from timeline.maintain.garbage import Found, Tally
    from timeline.maintain.retention import RetentionPolicy
    from timeline.store.base import Store

SHORT_GRACE_SECONDS = 3600.0
"""Readers are warned for below this."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A mark that is not collected yet, and what it would delete at most."""

    mark: OpenMark
    tallies: tuple[Tally, ...]
    due: int
    """From then on, in micros."""
    due_now: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What one run found and did."""

    dropped: tuple[str, ...]
    """What the retention policy dropped, or would drop, in words."""
    found: Found | None
    """``None``: an earlier mark is waiting, so nothing was looked for."""
    collected: Collected | None
    waiting: Waiting | None
    unfinished: bool
    """An earlier collection is to be gone on with."""


@click.command("gc")
@click.option(
    "--grace",
    type=Duration(),
    metavar="DURATION",
    help="How long garbage is kept after it was marked, for readers that hold a plan (default: tl.toml, 24h).",
)
@click.option(
    "--window",
    type=Duration(),
    metavar="DURATION",
    help="Forget history that is older, with what no later moment needs (default: tl.toml; else all is kept).",
)
@click.option("--yes", is_flag=True, help="Do it: delete what is due, mark what is garbage now.")
@store_options
def gc_command(*, settings: Settings, grace: float | None, window: float | None, yes: bool) -> None:
    """Delete from the store what nothing in it needs any more. Without --yes: say what would be deleted, and when.

    Garbage is marked by one run and deleted by the first run that comes at least the grace period later, so run it
    daily, from a timer. With a window, the log first forgets what lies before it; the newest base backup older than
    the window stays, with all WAL since. What the log or a pin names is never deleted, and a writer may be as slow
    as it likes: one that slept through a collection is told to begin anew. In a bucket with versions, and under
    object lock, deleted objects stay until the bucket's own rules let them go.
    """
    from timeline.catalog.branch_log import BranchLog
    from timeline.clock import SystemClock
    from timeline.store.open import open_store

    plan = settings.operations.retention
    policy = _policy(plan, window)
    grace = grace if grace is not None else plan.grace_seconds
    if grace < SHORT_GRACE_SECONDS:
        warn(
            [
                f"with a grace period of {duration_text(grace)} a branch that is being made, or has no pin, may lose "
                "what it reads"
            ]
        )
    clock = SystemClock()

    async def run() -> Report:
        store = await open_store(
            settings.need_store(), endpoint_url=settings.endpoint_url, region=settings.region, clock=clock
        )
        try:
            log = BranchLog(store, MAIN, clock, clock.token(8))
            with count_progress("gc") as progress:
                return await (_collect_and_mark if yes else _look)(store, log, clock, grace, policy, progress)
        finally:
            await store.aclose()

    report = asyncio.run(run())
    if settings.json:
        emit_json(_document(report, grace, done=yes))
    else:
        _tell(report, clock.now(), grace, done=yes)
    if report.collected is not None:
        warn(_refusals(report.collected))
        if settings.need_store().startswith("s3://") and report.collected.deleted:
            note(
                "in a bucket with versions, what was deleted stays as old versions until its lifecycle rules say"
            )


async def _forget(
    store: Store, log: BranchLog, clock: Clock, policy: RetentionPolicy | None, *, dry_run: bool
) -> tuple[str, ...]:
    """What the log forgets before garbage is looked for, in words."""
    if policy is None:
        return ()
    from timeline.maintain.merge import merge_sealed
    from timeline.maintain.retention import apply_retention, plan_retention

    if dry_run:
        head = await log.load()
        if head is None:
            return ()
        plan = plan_retention(head.state, policy, clock.now())
    else:
        # Fewer ranges to walk.
        await merge_sealed(store, log, clock)
        plan = await apply_retention(store, log, clock, policy)
    verb = "would forget" if dry_run else "forgot"
    return (
        f"{verb} {_objects(len(plan.snapshots), 'snapshot')} and {size_text(plan.wal_bytes)} of WAL",
        *plan.reasons,
    )


def _policy(plan: RetentionPlan, window: float | None) -> RetentionPolicy | None:
    """What the log may forget; ``None``: nothing, for nobody said how long history is to be kept."""
    from timeline.maintain.retention import RetentionPolicy
    from timeline.maintain.thin import rules_of_ages

    seconds = window if window is not None else plan.window_seconds
    if seconds is None:
        return None
    return RetentionPolicy(
        window_seconds=seconds,
        rules=rules_of_ages(plan.keep_all_seconds, plan.hourly_seconds, plan.daily_seconds),
        minimum_bases=plan.min_bases,
    )


async def _look(
    store: Store,
    log: BranchLog,
    clock: Clock,
    grace: float,
    policy: RetentionPolicy | None,
    progress: Callable[[str, int, int], None],
) -> Report:
    """Writes nothing (P10)."""
    from timeline.maintain.collect import unfinished
    from timeline.maintain.garbage import find_garbage

    dropped = await _forget(store, log, clock, policy, dry_run=True)
    found = await find_garbage(store, log.branch, clock, progress)
    return Report(
        dropped=dropped,
        found=found,
        collected=None,
        waiting=await _waiting(store, log, clock, grace),
        unfinished=await unfinished(store, found.head) is not None,
    )


async def _collect_and_mark(
    store: Store,
    log: BranchLog,
    clock: Clock,
    grace: float,
    policy: RetentionPolicy | None,
    progress: Callable[[str, int, int], None],
) -> Report:
    from timeline.maintain.collect import collect, mark, unfinished

    dropped = await _forget(store, log, clock, policy, dry_run=False)
    collected = await collect(store, log, clock, grace, progress)
    waiting = await _waiting(store, log, clock, grace)
    head = await log.load()
    pending = head is not None and await unfinished(store, head) is not None
    found = None
    if waiting is None and not pending:
        found = (await mark(store, log, clock, progress)).found
        waiting = await _waiting(store, log, clock, grace)
    return Report(dropped, found, collected, waiting, pending)


async def _waiting(store: Store, log: BranchLog, clock: Clock, grace: float) -> Waiting | None:
    from timeline.maintain.collect import due_at, read_mark
    from timeline.maintain.garbage import tallies_of

    head = await log.load()
    opened = head.state.collection.mark if head is not None else None
    if opened is None:
        return None
    made = await read_mark(store, opened.id)
    if made is None:
        # Collected by somebody else since the log was read.
        return None
    due = due_at(opened, grace)
    return Waiting(opened, tallies_of(made.garbage, made.chunks, made.entries), due, clock.now() >= due)


def _tell(report: Report, now: int, grace: float, *, done: bool) -> None:
    for line in report.dropped:
        say(f"retention  {line}")
    collected = report.collected
    if collected is not None:
        kept = f"; {collected.kept:,} objects stay, which are named again" if collected.kept else ""
        say(f"deleted    {_amount(collected.deleted)}{kept}")
    found = report.found
    if found is not None:
        say(f"garbage    {_amount(found.tallies)}")
        say(f"of         {_amount(found.stored)}; {_objects(found.pins, 'pin')} in force")
        if found.left_over:
            say(f"           {found.left_over:,} more objects are for the mark after the next")
    waiting = report.waiting
    if report.unfinished:
        say("interrupted  an earlier collection; " + ("run it again" if done else "--yes goes on with it"))
    if waiting is not None:
        at = local_time(waiting.mark.at)
        if waiting.due_now and not done:
            say(f"marked     {at}: would delete {_amount(waiting.tallies)}, now")
        else:
            verb = "will" if done else "would"
            say(f"marked     {at}: {verb} delete {_amount(waiting.tallies)}, after {local_time(waiting.due)}")
            if done:
                say("next       run it again then")
    elif found is not None and found.tallies and not done:
        due = local_time(now + round(grace * 1e6))
        say(f"would mark this now, and delete {_amount(found.tallies)} after {due}; --yes does it")
    elif found is not None and not found.tallies:
        say("nothing to collect")


def _amount(tallies: Sequence[Tally]) -> str:
    objects, size = sum(one.objects for one in tallies), sum(one.bytes for one in tallies)
    kinds = ", ".join(f"{one.objects:,} {one.kind}" for one in tallies)
    return f"{_objects(objects, 'object')}, {size_text(size)}" + (f" ({kinds})" if tallies else "")


def _objects(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _refusals(collected: Collected) -> Iterator[str]:
    for one in collected.refused:
        yield f"the store refused to delete {one.objects:,} {one.kind}: {one.reason}"
    if not collected.finished:
        yield "the store refused to delete the mark itself; until it lets it go, nothing new is marked"


def _document(report: Report, grace: float, *, done: bool) -> dict[str, Any]:
    found, collected, waiting = report.found, report.collected, report.waiting
    return {
        "dry_run": not done,
        "grace_seconds": grace,
        "retention": list(report.dropped),
        "garbage": None if found is None else _kinds(found.tallies),
        "left_over": None if found is None else found.left_over,
        "stored": None if found is None else _kinds(found.stored),
        "pins": None if found is None else found.pins,
        "deleted": None if collected is None else _kinds(collected.deleted),
        "kept": None if collected is None else collected.kept,
        "refused": []
        if collected is None
        else [{"kind": one.kind, "objects": one.objects, "reason": one.reason} for one in collected.refused],
        "finished": not report.unfinished,
        "mark": None
        if waiting is None
        else {
            "id": waiting.mark.id,
            "time": iso(waiting.mark.at),
            "due": iso(waiting.due),
            "due_now": waiting.due_now,
            **_kinds(waiting.tallies),
        },
    }


def _kinds(tallies: Sequence[Tally]) -> dict[str, Any]:
    return {
        "objects": sum(one.objects for one in tallies),
        "bytes": sum(one.bytes for one in tallies),
        "kinds": {one.kind: {"objects": one.objects, "bytes": one.bytes} for one in tallies},
    }
