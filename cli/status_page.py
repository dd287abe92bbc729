"""``tl status`` for people: line 1 is the answer, the rest is why."""

from __future__ import annotations

from datetime import datetime

from cli.facts import StoreSize
from cli.output import duration_text, local_time, note, say, table, warn
from cli.status_result import DaemonStatus, SlotReport, StatusResult
from timeline.size_text import size_text

MOST_BRANCHES = 50
"""Lines; ``tl branches`` lists all."""


def print_status(result: StatusResult) -> None:
    """On stdout; warnings on stderr."""
    _answer(result)
    say(f"store      {result.store}")
    _snapshots(result)
    if result.slot is not None:
        _slot(result.slot)
    if result.size is not None:
        _size(result.size)
    if result.daemon is not None:
        _daemon(result.daemon)
    _host(result)
    if len(result.ranges) > 1:
        _ranges(result)
    if result.gaps:
        note(f"warning: {result.gaps} gap(s) in the history; targets inside are refused")
    warn(result.remarks)


def _answer(result: StatusResult) -> None:
    current = [found for found in result.ranges if not found.abandoned]
    if not result.recoverable or not current:
        say("recoverable: nothing yet" + (" (a base backup is under way)" if result.backup_under_way else ""))
        return
    newest = current[-1]
    fresh = (
        f"{duration_text(result.fresh_seconds)} ago" if result.fresh_seconds is not None else "age unknown"
    )
    expected = f"about {result.expected_seconds:.1f} s to the first query" if result.expected_seconds else ""
    say(
        f"recoverable from {_local(current[0].first_time)} to {_local(newest.last_time)} ({fresh}), {expected}"
    )


def _snapshots(result: StatusResult) -> None:
    if result.database_bytes is not None:
        say(
            f"snapshots  {len(result.snapshots)}, newest of {_local(result.newest_snapshot_time)}, "
            f"{size_text(result.database_bytes)}; {size_text(result.replay_bytes or 0)} of WAL since"
        )
    if result.base_backup_age_seconds is not None:
        say(f"base       {duration_text(result.base_backup_age_seconds)} old")


def _slot(slot: SlotReport) -> None:
    left = f", {size_text(slot.safe_bytes)} until it is lost" if slot.safe_bytes is not None else ""
    limit = f" (limit {size_text(slot.limit_bytes)})" if slot.limit_bytes is not None else ""
    alarm = {"low": "  LOW", "unreserved": "  IN DANGER", "lost": "  LOST"}.get(slot.alarm or "", "")
    say(f"slot       {slot.name}: {slot.wal_status}{left}{limit if left else ''}{alarm}")


def _size(size: StoreSize) -> None:
    total = sum(one.bytes for one in size.kinds)
    count = sum(one.objects for one in size.kinds)
    more = "" if size.complete else " or more"
    parts = ", ".join(
        f"{one.kind} {size_text(one.bytes)} in {one.objects}" for one in size.kinds if one.objects
    )
    say(f"size       {size_text(total)} in {count} objects{more}: {parts}")
    ratios = [
        f"{value:.2f} {what}"
        for value, what in (
            (size.wal_stored_ratio, "per byte of WAL"),
            (size.snapshot_stored_ratio, "per byte of the newest snapshot's content"),
        )
        if value is not None
    ]
    if ratios:
        say(f"           stored bytes: {', '.join(ratios)}")
    if size.snapshot_distinct_ratio is not None:
        say(
            f"           {size.snapshot_distinct_ratio:.2f} of what all snapshots list is stored, the rest is shared"
        )


def _daemon(daemon: DaemonStatus) -> None:
    state = f"pid {daemon.pid}" if daemon.running else f"not running since {_local(daemon.written)}"
    archiver = f", archiver {daemon.archiver.phase}" if daemon.archiver is not None else ""
    say(f"daemon     {state}{archiver}")
    if daemon.archiver is not None and daemon.archiver.error is not None:
        say(f"           archiver: {daemon.archiver.error}")
    for job in daemon.jobs:
        last = f"last success {_local(job.last_success)}" if job.last_success else "no success yet"
        took = f", {duration_text(job.last_seconds)}" if job.last_seconds is not None else ""
        failed = (
            f"; failed {job.failures_in_a_row} times since, exit code {job.last_exit_code}: {job.last_message}"
            if job.failures_in_a_row
            else ""
        )
        say(f"           {job.job}: {'running; ' if job.running else ''}{last}{took}{failed}")


def _host(result: StatusResult) -> None:
    ours = [branch for branch in result.branches if branch.store_url == result.store]
    for number, branch in enumerate(ours[:MOST_BRANCHES]):
        own = f"{size_text(branch.own_bytes)} own{'' if branch.own_complete else ' or more'}"
        title = "branches" if number == 0 else ""
        say(f"{title:<10} {branch.name}: {own}, {size_text(branch.fetched_bytes)} fetched")
    if len(ours) > MOST_BRANCHES:
        say(f"           and {len(ours) - MOST_BRANCHES} more")
    if result.cache is not None:
        hits = sum(branch.memory_hits + branch.disk_hits for branch in result.branches)
        every = hits + sum(branch.store_extents for branch in result.branches)
        share = f", {hits / every:.0%} of what branches read was here" if every else ""
        say(f"cache      {'' if result.cache.exact else 'about '}{size_text(result.cache.bytes)}{share}")


def _ranges(result: StatusResult) -> None:
    say("")
    table(
        ("tli", "from", "to", "known until", ""),
        (
            (
                str(found.tli),
                str(found.first),
                str(found.last),
                _local(found.last_time),
                "abandoned" if found.abandoned else "",
            )
            for found in result.ranges
        ),
    )


def _local(text: str | None) -> str:
    if text is None:
        return "-"
    return local_time(int(datetime.fromisoformat(text).timestamp() * 1_000_000))
