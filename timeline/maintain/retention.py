"""Retention: which snapshots and which sealed WAL a branch no longer needs. The plan is pure; nothing is deleted here.

The log forgets, and what nobody names any more is the collector's (P2).

The ground rule. A moment is had by replaying WAL onto a base backup: stock recovery and ``restore/rescue.py`` know no
other way. So of each line that is kept there is a *floor*: the newest base backup that serves the whole window, or
failing that the oldest there is. It stays, and so does all WAL of the line from the start of the segment of its ``lsn`` on,
up to the head and across forks; what lies before it on the line goes. Whatever LSN of the window could be reached
before can be reached afterwards.

The window ends at the earlier of the newest time the log knows of the source's clock and this machine's clock. The
first: an archive that stands still keeps its history, however long (EDGE 55). The second: a source whose clock once
ran ahead does not lose its history by that.

Lines that the source left (orphan tails, and tlis that a restored server left behind) are kept like the current one
until their newest moment is old enough; then what is theirs alone goes.

Pins play no part: they keep objects and not log entries, and only the collector reads them. A branch has its snapshot in
its own record; that the log dropped it meanwhile changes nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from timeline.catalog.branch_log import BranchLog
from timeline.catalog.line import (
    Line,
    Piece,
    Run,
    covers,
    incarnation_at,
    is_on,
    line_of,
    runs_on,
    usable_snapshots,
)
from timeline.catalog.when import describe_time
from timeline.clock import Clock, Micros
from timeline.errors import LogConflict, Unavailable
from timeline.format.branch_state import BASE, BranchState, SealedRange, Snapshot
from timeline.format.log_change import DropSnapshots, ForgetWal, Forgotten
from timeline.lsn import Lsn
from timeline.maintain.thin import RULES, Rule, superfluous
from timeline.pg.segment import segment_start
from timeline.size_text import size_text
from timeline.store.base import Store

_SECOND = 1_000_000
_DAY = 86_400.0
PROGRESS_SECONDS = _DAY
"""A base backup under way needs WAL that the log does not tell: nothing goes meanwhile. One that told of no progress
for so long has been given up."""
ATTEMPTS = 4
"""So often a plan is made anew when others changed the log under it."""


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """What is to be kept. Raises ValueError for what no store can keep to."""

    window_seconds: float = 30 * _DAY
    """Any moment of so long a time before the head stays reachable."""
    rules: tuple[Rule, ...] = RULES
    """How many built snapshots of which age stay."""
    minimum_bases: int = 1
    """At least so many restorable base backups of the current line stay, where there are so many, …"""
    minimum_snapshots: int = 1
    """… and so many snapshots of it of either kind."""
    orphans_seconds: float | None = None
    """A line that the source left stays until its newest moment is so old; ``None``: as long as the window."""

    def __post_init__(self) -> None:
        if self.window_seconds < 0 or (self.orphans_seconds or 0) < 0:
            raise ValueError("a retention window cannot be negative")
        if self.minimum_bases < 1 or self.minimum_snapshots < 1:
            raise ValueError("at least one base backup must stay: nothing can be restored without")


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """What goes, and why the rest stays."""

    snapshots: tuple[str, ...]
    """Ids of those to drop."""
    forget: tuple[Forgotten, ...]
    """Sealed WAL to forget."""
    wal_bytes: int
    """How much that is, of raw WAL."""
    window_start: Micros | None
    """By the source's clock; ``None`` while it is not known."""
    reasons: tuple[str, ...]
    """For people."""


@dataclass(frozen=True, slots=True)
class _Floor:
    """From where on a line is kept."""

    base: Snapshot | None
    """``None``: there is no restorable one, and nothing goes."""
    keep_from: Lsn
    window: Lsn
    """Where the window starts on the line."""
    why: str

    def keeps(self, snapshot: Snapshot) -> bool:
        return self.base is None or snapshot.lsn >= self.base.lsn


@dataclass(frozen=True, slots=True)
class _Kept:
    """A line that stays, from its floor on."""

    line: Line
    floor: _Floor


def plan_retention(state: BranchState, policy: RetentionPolicy, now: Micros) -> RetentionPlan:
    """The plan; ``now``: this machine's clock. Pure."""
    source = _source_clock(state)
    if source is None or state.find_tli(state.current_tli) is None:
        return RetentionPlan((), (), 0, None, ("nothing is archived that could be forgotten",))
    end = min(source, now)
    window = end - int(policy.window_seconds * _SECOND)
    progress = state.progress
    if progress is not None and now - progress.at < PROGRESS_SECONDS * _SECOND:
        told = "nothing is dropped while a base backup is under way: it needs WAL from before it began"
        return RetentionPlan((), (), 0, window, (told,))
    thinned = set(superfluous(state.snapshots, policy.rules))
    current = line_of(state, state.current_tli)
    kept = [_Kept(current, _floor(state, current, policy, window, Lsn(0), thinned))]
    reasons = [_because(kept[0].floor, policy, window, state.current_tli)]
    orphans = policy.window_seconds if policy.orphans_seconds is None else policy.orphans_seconds
    for known in state.tlis:
        line = line_of(state, known.tli)
        off = _leaves(line, current)
        if off is None or (newest := _newest_moment(state, line, off)) is None:
            continue
        seconds = orphans if line[0].tli == current[0].tli else max(orphans, policy.window_seconds)
        horizon = end - int(seconds * _SECOND)
        if newest < horizon:
            reasons.append(
                f"tli {known.tli} beyond {off} is forgotten: the source left it, and its newest moment is of "
                f"{describe_time(newest)}"
            )
            continue
        floor = _floor(state, line, policy, min(window, horizon), off, set())
        kept.append(_Kept(line, floor))
        reasons.append(f"tli {known.tli}, which the source left, is kept from {floor.keep_from} on")
    return _plan(state, policy, kept, thinned, window, reasons)


async def apply_retention(
    store: Store, log: BranchLog, clock: Clock, policy: RetentionPolicy
) -> RetentionPlan:
    """Make the log forget; what it forgot. Somebody else doing the same at the same time is no failure.

    Raises Unavailable when the log changed under every one of ATTEMPTS plans; as ``BranchLog.append`` otherwise.
    """
    del store  # All that is needed is in the log, and nothing is deleted.
    dropped: tuple[str, ...] = ()
    for _ in range(ATTEMPTS):
        head = await log.load()
        if head is None:
            return RetentionPlan((), (), 0, None, ("nothing is archived that could be forgotten",))
        plan = plan_retention(head.state, policy, clock.now())
        try:
            if plan.snapshots:
                await log.append(DropSnapshots(plan.snapshots))
                dropped += plan.snapshots
            if plan.forget:
                await log.append(ForgetWal(plan.forget))
        except LogConflict:
            continue
        return RetentionPlan(dropped, plan.forget, plan.wal_bytes, plan.window_start, plan.reasons)
    raise Unavailable(
        f"branch {log.branch}: the log changed under {ATTEMPTS} plans of what to forget", hint="try again"
    )


def _source_clock(state: BranchState) -> Micros | None:
    """The newest time of the source that the log knows."""
    known = [snapshot.time for snapshot in state.snapshots]
    known += [one.max_commit_time for one in state.sealed if one.max_commit_time is not None]
    if state.coverage is not None:
        known.append(state.coverage.time)
    return max(known, default=None)


def _floor(
    state: BranchState, line: Line, policy: RetentionPolicy, horizon: Micros, off: Lsn, thinned: set[str]
) -> _Floor:
    """``off``: where the line leaves the current one; what lies before is had through that. 0 for that one itself."""
    runs = runs_on(state, line, {})
    window = _first_in_window(state, line, runs, horizon)
    # What the log does not know to be archived up to its end is no restorable base backup yet.
    usable = [snapshot for run in runs for snapshot in usable_snapshots(state, line, run)]
    bases = sorted({one.id: one for one in usable if one.kind == BASE}.values(), key=lambda one: one.lsn)
    if not bases:
        return _Floor(None, Lsn(0), window, "no base backup of it can be restored yet")
    serving = [
        number
        for number, base in enumerate(bases)
        if base.end <= off or (base.end <= window and base.time <= horizon)
    ]
    chosen = serving[-1] if serving else 0
    why = "it is the newest base backup from before the window" if serving else "no base backup is older"
    if off == 0:
        if chosen > max(0, len(bases) - policy.minimum_bases):
            chosen = max(0, len(bases) - policy.minimum_bases)
            why = f"the newest {policy.minimum_bases} base backups stay"
        left = [one for one in state.snapshots if is_on(line, one) and one.id not in thinned]
        while chosen > 0 and sum(one.lsn >= bases[chosen].lsn for one in left) < policy.minimum_snapshots:
            chosen -= 1
            why = f"the newest {policy.minimum_snapshots} snapshots stay"
    return _Floor(bases[chosen], _segment_of(state, bases[chosen]), window, why)


def _first_in_window(state: BranchState, line: Line, runs: Sequence[Run], horizon: Micros) -> Lsn:
    """No moment of the line that is later than the horizon lies before this."""
    first = runs[-1].end if runs else Lsn(0)
    for piece in _pieces(runs):
        if (latest := _of(piece).max_commit_time) is not None and latest > horizon:
            first = piece.start
            break
    covered = state.coverage
    if covered is not None and covered.time > horizon and any(covers(line, run, covered) for run in runs):
        # It may have stood there for long, in a run that ended before the window's first commit.
        first = min(first, covered.lsn)
    return first


def _leaves(line: Line, current: Line) -> Lsn | None:
    """Where a line goes another way than the current one; ``None``: it is the same."""
    for number, span in enumerate(line):
        if number == len(current) or current[number].tli != span.tli:
            return span.begin
        ends = [end for end in (span.end, current[number].end) if end is not None]
        if span.end != current[number].end:
            return min(ends)
    return None


def _newest_moment(state: BranchState, line: Line, off: Lsn) -> Micros | None:
    """The newest time known of what a line has beyond ``off``; ``None`` when it has nothing there."""
    pieces = list(_pieces(runs_on(state, line, {})))
    own = [piece for piece in pieces if piece.end > off]
    snapshots = [one for one in state.snapshots if is_on(line, one)]
    own_snapshots = [one for one in snapshots if one.end > off]
    if not own and not own_snapshots:
        return None
    known = _times(own, own_snapshots)
    # Without any commit of its own it is as old as what is before it.
    return max(known or _times(pieces, snapshots), default=None)


def _times(pieces: Iterable[Piece], snapshots: Iterable[Snapshot]) -> list[Micros]:
    latest = [_of(piece).max_commit_time for piece in pieces]
    return [*(time for time in latest if time is not None), *(one.time for one in snapshots)]


def _plan(
    state: BranchState,
    policy: RetentionPolicy,
    kept: Sequence[_Kept],
    thinned: set[str],
    window: Micros,
    reasons: Sequence[str],
) -> RetentionPlan:
    staying = [
        one
        for one in state.snapshots
        if any(is_on(each.line, one) and each.floor.keeps(one) for each in kept)
    ]
    thinned = thinned & {one.id for one in staying}
    spared = _spared(staying, thinned, kept[0].line, policy.minimum_snapshots)
    left = [one for one in staying if one.id not in thinned - spared]
    # A snapshot that another line keeps holds the current one's WAL as well: the log's own rule [LOG-8].
    shared = [_segment_of(state, one) for one in left if is_on(kept[0].line, one)]
    forget = _forgettable(state, kept, min([kept[0].floor.keep_from, *shared]))
    gone = {one.id for one in state.snapshots} - {one.id for one in left}
    return RetentionPlan(
        snapshots=tuple(one.id for one in state.snapshots if one.id in gone),
        forget=forget,
        wal_bytes=sum(
            sealed.end - sealed.start for sealed in state.sealed if any(one.holds(sealed) for one in forget)
        ),
        window_start=window,
        reasons=tuple(reasons),
    )


def _spared(staying: Sequence[Snapshot], thinned: set[str], line: Line, least: int) -> set[str]:
    """Those that the rules would drop and the minimum does not, newest first."""
    on_line = sorted((one for one in staying if is_on(line, one)), key=lambda one: one.lsn)
    missing = least - sum(one.id not in thinned for one in on_line)
    candidates = [one.id for one in on_line if one.id in thinned]
    return set(candidates[-missing:]) if missing > 0 else set()


def _forgettable(state: BranchState, kept: Sequence[_Kept], current_from: Lsn) -> tuple[Forgotten, ...]:
    starts = [current_from, *(each.floor.keep_from for each in kept[1:])]
    needed: dict[int, list[tuple[Lsn, Lsn | None]]] = {}
    for each, start in zip(kept, starts, strict=True):
        for span in each.line:
            begin = Lsn(max(span.begin, start))
            if span.end is None or begin < span.end:
                needed.setdefault(span.tli, []).append((begin, span.end))
    found: list[Forgotten] = []
    before: SealedRange | None = None
    """The range before, when that goes too."""
    for number, sealed in enumerate(state.sealed):
        if any(
            sealed.end > begin and (end is None or sealed.start < end)
            for begin, end in needed.get(sealed.tli, ())
        ):
            before = None
            continue
        if before is not None and before.tli == sealed.tli:
            found[-1] = Forgotten(sealed.tli, sealed.end, found[-1].start)
        else:
            is_first = number == 0 or state.sealed[number - 1].tli != sealed.tli
            found.append(Forgotten(sealed.tli, sealed.end, Lsn(0) if is_first else sealed.start))
        before = sealed
    return tuple(found)


def _because(floor: _Floor, policy: RetentionPolicy, window: Micros, tli: int) -> str:
    if floor.base is None:
        return f"all WAL of tli {tli} is kept: {floor.why}"
    told = (
        f"WAL since {floor.keep_from} is kept for the base backup {floor.base.id} of "
        f"{describe_time(floor.base.time)}: {floor.why} (the window starts {describe_time(window)})"
    )
    older = floor.window - floor.keep_from
    if older > 0:
        days = policy.window_seconds / _DAY
        told += (
            f"; {size_text(older)} of it are from before the window: a base backup (`tl backup`) lets go of what is "
            f"before it once it is {days:g} days old"
        )
    return told


def _segment_of(state: BranchState, snapshot: Snapshot) -> Lsn:
    return segment_start(snapshot.lsn, incarnation_at(state, snapshot.lsn).segment_bytes)


def _pieces(runs: Iterable[Run]) -> Iterable[Piece]:
    return (piece for run in runs for piece in run.pieces)


def _of(piece: Piece) -> SealedRange:
    """Its sealed range: without tails there is nothing else."""
    assert isinstance(piece.source, SealedRange)
    return piece.source
