"""RPO: what a loss of the source at this moment would cost, measured against the source where it answers.

The store is asked first and the source after it, so what is told is never better than the truth.

How ``rpo_micros`` is found, best first: commit times of both sides (``track_commit_timestamp`` on the source);
the source's clock against the time up to which the store's history is complete; and without an answer
from the source, this host's clock against that time, which is an age and says so.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from timeline.catalog.history import History
from timeline.catalog.line import incarnation_at
from timeline.catalog.partial import describe_missing
from timeline.catalog.target import Target
from timeline.catalog.when import AtLsn, Latest
from timeline.clock import Clock, Micros
from timeline.errors import TargetUnreachable, TimelineError
from timeline.format.evidence import RecoveryPoint
from timeline.lsn import Lsn
from timeline.store.base import Store

SOURCE_SECONDS = 30.0
"""How long the source is waited for, connection included."""


@dataclass(frozen=True, slots=True)
class SourceNow:
    """What the source said."""

    end: Lsn
    """End of its flushed WAL."""
    time: Micros
    """Its clock."""
    tracks_commits: bool
    last_commit: Micros | None
    """With ``track_commit_timestamp``: of its newest commit; ``None``: none since that was switched on."""


async def measure_point(
    store: Store, source: str | None, clock: Clock, *, objective_micros: int | None
) -> tuple[RecoveryPoint, tuple[str, ...]]:
    """The recovery point, and warnings. ``source``: conninfo. Raises what reading the store raises."""
    history = await History.load(store)
    newest = await _newest(history)
    head, complete, warnings = newest.head, newest.complete, list(newest.warnings)
    head_commit = head.last_commit.time if head.last_commit is not None else None
    answer = None
    if source is not None:
        identifier = incarnation_at(history.state, head.lsn).system_identifier
        try:
            async with asyncio.timeout(SOURCE_SECONDS):
                answer = await _ask(source, identifier)
        except TimeoutError:
            warnings.append(f"the source did not answer within {SOURCE_SECONDS:.0f} s")
        except TimelineError as error:
            warnings.append(f"the source was not asked: {error.message}")
    rpo_bytes: int | None = None
    rpo: int | None = None
    if answer is not None:
        rpo_bytes = max(0, answer.end - head.lsn)
        if rpo_bytes == 0:
            rpo, method = 0, "the store holds all WAL that the source has flushed"
        elif answer.tracks_commits and answer.last_commit is not None and head_commit is not None:
            rpo = max(0, answer.last_commit - head_commit)
            method = (
                "newest commit on the source against newest commit in the store, by the source's commit times"
            )
        elif complete is not None:
            rpo = max(0, answer.time - complete)
            method = "the source's clock against the time up to which the store's history is complete"
        else:
            method = "the store does not know up to when its history is complete"
        method = f"WAL flushed on the source against the head of the store; {method}"
    elif complete is not None:
        rpo = max(0, clock.now() - complete)
        method = (
            "the source did not answer: age of the store's newest complete moment by this host's clock"
            if source is not None
            else "no source was named: age of the store's newest complete moment by this host's clock"
        )
    else:
        method = "neither the source nor the store tells a time"
    point = RecoveryPoint(
        head=head.lsn,
        head_time=complete,
        head_commit_time=head_commit,
        source_reachable=answer is not None,
        source_lsn=answer.end if answer is not None else None,
        source_commit_time=answer.last_commit if answer is not None else None,
        rpo_bytes=rpo_bytes,
        rpo_micros=rpo,
        method=method,
        objective_micros=objective_micros,
    )
    return point, tuple(warnings)


@dataclass(frozen=True, slots=True)
class _Newest:
    """The newest moment in the store that can be proven."""

    head: Target
    complete: Micros | None
    """Up to when the history is complete, by the source's clock."""
    warnings: tuple[str, ...] = ()


async def _newest(history: History) -> _Newest:
    """Of an incomplete copy (EDGE 63) the end of what is whole: the RPO is told too large rather than too small."""
    try:
        return _Newest(await history.resolve(Latest()), await history.source_clock())
    except TargetUnreachable:
        # That something is missing is noticed on the way to it, no sooner.
        if not history.missing:
            raise
    ranges = await history.reachable()
    tli = history.state.current_tli
    reached = [each for each in ranges if each.tli == tli and not each.abandoned]
    if not reached:
        raise TargetUnreachable(
            f"nothing on tli {tli} can be recovered: {describe_missing(history.missing)}",
            hint="complete the copy",
        )
    whole = max(reached, key=lambda each: each.last)
    warning = f"{describe_missing(history.missing)}; the RPO is that of its whole part"
    return _Newest(await history.resolve(AtLsn(whole.last)), whole.last_time, (warning,))


async def _ask(conninfo: str, system_identifier: int) -> SourceNow:
    """Raises UsageError, Unavailable, ServerError, and TimelineError for another cluster."""
    from timeline.archive.source import Source

    source = await Source.open(conninfo, application_name="tl drill")
    try:
        ((found,),) = await source.rows("select system_identifier from pg_catalog.pg_control_system()")
        if int(found) & (1 << 64) - 1 != system_identifier:
            raise TimelineError("another cluster answers at the source's address")
        probe = await source.probe(slot=None, sender_pid=None)
        ((setting,),) = await source.rows("select current_setting('track_commit_timestamp')")
        last: int | None = None
        if setting == "on" and not probe.in_recovery:
            ((last,),) = await source.rows(
                "select (extract(epoch from timestamp) * 1000000)::int8 from pg_catalog.pg_last_committed_xact()"
            )
        return SourceNow(probe.end, probe.time, setting == "on" and not probe.in_recovery, last)
    finally:
        await source.aclose()
