"""From a WHEN to the exact record boundary it means, on one line of history (P6, P7).

Times follow the first-crossing rule, which is Postgres's own: T is where the first commit or abort record in
WAL order that is later than the time starts. Commit times are not monotonic along the WAL (EDGE 38), so a
transaction stamped earlier but logged after the crossing is left out. With no later record, the time must
lie within what is known to be complete, or it is refused (EDGE 35). Postgres never decides: given a target
that it cannot reach it promotes something else (EDGE 36).

Only indexes are read, and of sealed WAL only the manifests in question; one frame of WAL where a record's
predecessor or an arbitrary LSN's record boundary must be found.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from timeline.catalog.index_reader import Entry, IndexReader
from timeline.catalog.line import (
    Line,
    Piece,
    Run,
    covers,
    usable_snapshots,
)
from timeline.catalog.record_boundary import Boundary
from timeline.catalog.run_reader import ReadWal, RunReader
from timeline.catalog.tail import TailChunk
from timeline.catalog.target import Commit, Target
from timeline.catalog.when import (
    AtLsn,
    AtTime,
    BeforeRestorePoint,
    BeforeXid,
    Latest,
    Now,
    When,
    describe_time,
)
from timeline.clock import Micros
from timeline.errors import TargetUnreachable, UsageError
from timeline.format.branch_state import BASE, BranchState, Snapshot
from timeline.format.wal_index import CommitKind, Coverage, EventKind, WalEvent
from timeline.lsn import Lsn

_TOLD = frozenset(
    {
        EventKind.PARAMETER_CHANGE,
        EventKind.TABLESPACE_CREATE,
        EventKind.TABLESPACE_DROP,
        EventKind.DATABASE_CREATE_FILE_COPY,
        EventKind.CHECKPOINT,
        EventKind.FULL_PAGE_WRITES,
        EventKind.END_OF_RECOVERY,
    }
)
_COMMITTED = (CommitKind.COMMIT, CommitKind.COMMIT_PREPARED)


@dataclass(frozen=True, slots=True)
class Window:
    """What can be had of one run."""

    first: Snapshot
    """The first snapshot from which it replays; nothing before ``first.end`` can be had."""
    first_time: Micros
    """No time before this can be had."""
    head: Boundary
    """The end of its complete records."""
    known_until: Micros | None
    """Up to this source time nothing beyond the head can have happened; ``None``: nothing is known."""


class Resolver:
    """Resolves moments on one line. Methods raise NotFound and DamagedStore besides what they say."""

    def __init__(
        self,
        state: BranchState,
        line: Line,
        runs: Sequence[Run],
        coverages: Sequence[Coverage],
        reader: IndexReader,
        read_wal: ReadWal,
        *,
        stock: bool = False,
        without: str | None = None,
    ) -> None:
        """``coverages``: all that are known, of any tli; ``stock``: from base backups only; ``without``: not from the
        snapshot of that id."""
        self._stock = stock
        self._without = without
        self._state = state
        self._line = line
        self._runs = [RunReader(run, state, reader, read_wal) for run in runs]
        self._coverages = coverages
        leaf = state.find_tli(line[-1].tli)
        self._live = leaf is not None and leaf.end is None

    async def resolve(self, when: When) -> Target:
        """The target; raises TargetUnreachable with what can be reached."""
        match when:
            case Latest():
                return await self._latest()
            case AtTime(time):
                return await self._at_time(time)
            case AtLsn(lsn):
                return await self._at_lsn(lsn)
            case BeforeXid(xid):
                return await self._before_xid(xid)
            case BeforeRestorePoint(name):
                return await self._before_restore_point(name)
            case Now():
                raise UsageError("'now' is an LSN that only the source can tell: ask it first")

    async def windows(self) -> list[tuple[Run, Window]]:
        """The runs of which anything can be had, oldest first."""
        found = [(reader.run, await self._window(reader)) for reader in self._runs]
        return [(run, window) for run, window in found if window is not None]

    async def _latest(self) -> Target:
        asked = "the latest moment"
        if not self._runs:
            raise await self._unreachable(asked, "no WAL is archived yet")
        reader = self._runs[-1]
        return await self._target(asked, reader, await reader.head(), time=await self._known_until(reader))

    async def _at_time(self, time: Micros) -> Target:
        asked = describe_time(time)
        for reader in self._runs:
            crossing = await self._first_crossing(reader, time)
            snapshots = self._snapshots(reader)
            known = crossing is not None or time <= (await self._known_until(reader) or 0)
            if known and snapshots and time < snapshots[0].time:
                raise await self._unreachable(asked, _TOO_EARLY)
            if crossing is not None and crossing.start < reader.run.start:
                # Its first bytes are not there (any more), so neither is the moment before it.
                raise await self._unreachable(asked, _TOO_EARLY)
            if crossing is not None:
                boundary = await reader.before_record(crossing.start)
            elif known:
                boundary = await reader.head()
            else:
                continue
            return await self._target(asked, reader, boundary, time=time)
        raise await self._unreachable(asked, "the history is not known to be complete up to then")

    async def _at_lsn(self, lsn: Lsn) -> Target:
        asked = f"LSN {lsn}"
        reader = next((one for one in self._runs if one.run.start < lsn <= one.run.end), None)
        if reader is None:
            raise await self._unreachable(asked, self._why_not_here(lsn))
        head = await reader.head()
        if lsn > head.lsn:
            raise await self._unreachable(asked, f"the record that starts at {head.lsn} is not complete")
        return await self._target(asked, reader, head if lsn == head.lsn else await reader.boundary_at(lsn))

    async def _before_xid(self, xid: int) -> Target:
        asked = f"the moment before transaction {xid}"
        for reader in reversed(self._runs):
            # Ids come round again after 2³² of them: the newest is meant.
            pieces = reversed(reader.run.pieces)
            async with aclosing(reader.scan(pieces, _may_hold_commits)) as entries:
                async for entry in entries:
                    rows = np.flatnonzero(entry.commits["xid"] == xid & 0xFFFFFFFF)
                    if len(rows):
                        start = _commit(entry, int(rows[-1])).start
                        if start < reader.run.start:
                            raise await self._unreachable(asked, _TOO_EARLY)
                        return await self._target(asked, reader, await reader.before_record(start))
        raise await self._unreachable(asked, "its end is not in the archived WAL")

    async def _before_restore_point(self, name: str) -> Target:
        asked = f"restore point {name!r}"
        for reader in self._runs:
            async with aclosing(reader.scan(reader.run.pieces, _may_hold_restore_points)) as entries:
                async for entry in entries:
                    for event in entry.events:
                        if event.kind is EventKind.RESTORE_POINT and event.name == name:
                            # The record itself has no effects, so its end is the state it marks.
                            return await self._target(asked, reader, Boundary(event.end, event.start))
        raise await self._unreachable(asked, "there is none of that name in the archived WAL")

    async def _target(
        self, asked: str, reader: RunReader, boundary: Boundary, *, time: Micros | None = None
    ) -> Target:
        run, at = reader.run, boundary.lsn
        snapshots = self._snapshots(reader)
        usable = [snapshot for snapshot in snapshots if snapshot.end <= at]
        if not usable:
            raise await self._unreachable(asked, _TOO_EARLY if snapshots else _NO_BASE)
        snapshot = usable[-1]
        events = await _events(reader, snapshot.lsn, at)
        last_commit, next_commit = await _last_commit(reader, at), await _next_commit(reader, at)
        if time is None and last_commit is not None:
            time = last_commit.time
        return Target(
            tli=run.pieces[run.position(max(at - 1, run.start))].tli,
            lsn=at,
            last_record=boundary.last_record,
            time=time,
            last_commit=last_commit,
            next_commit=next_commit,
            snapshot=snapshot,
            spans=run.spans(snapshot.lsn, at),
            events=events,
        )

    def _snapshots(self, reader: RunReader) -> tuple[Snapshot, ...]:
        return tuple(
            one
            for one in usable_snapshots(self._state, self._line, reader.run)
            if one.id != self._without and (one.kind == BASE or not self._stock)
        )

    async def _first_crossing(self, reader: RunReader, time: Micros) -> Commit | None:
        """The first end of a transaction, committed or not, that is later than ``time``."""

        def may_cross(piece: Piece) -> bool:
            if isinstance(piece.source, TailChunk):
                return True
            latest = piece.source.max_commit_time
            return latest is not None and latest > time

        # A manifest that may hold the crossing nearly always does: none is fetched ahead.
        async with aclosing(reader.scan(reader.run.pieces, may_cross, ahead=1)) as entries:
            async for entry in entries:
                rows = np.flatnonzero(entry.commits["time"] > time)
                if len(rows):
                    return _commit(entry, int(rows[0]))
        return None

    async def _known_until(self, reader: RunReader) -> Micros | None:
        """Up to this time no record beyond the run's head can be stamped; ``None`` when nothing is known."""
        covered = [one for one in self._coverages if covers(self._line, reader.run, one)]
        if any(one.lsn == reader.run.end for one in covered):
            return max(one.time for one in covered)
        latest = await _latest_commit_time(reader, reader.run.pieces)
        if latest is not None and self._live and reader is self._runs[-1]:
            # The next record may well carry the last one's time.
            latest -= 1
        known = [one.time for one in covered]
        return max(known if latest is None else [*known, latest], default=None)

    async def _window(self, reader: RunReader) -> Window | None:
        snapshots = self._snapshots(reader)
        if not snapshots:
            return None
        head, first = await reader.head(), snapshots[0]
        if head.lsn < first.end:
            return None
        before = await _latest_commit_time(
            reader, reader.run.between(reader.run.start, first.end), before=first.end
        )
        return Window(
            first=first,
            first_time=first.time if before is None else max(first.time, before),
            head=head,
            known_until=await self._known_until(reader),
        )

    def _why_not_here(self, lsn: Lsn) -> str:
        if not self._runs:
            return "no WAL is archived yet"
        if lsn <= self._runs[0].run.start:
            return "it lies before the archived WAL"
        if lsn > self._runs[-1].run.end:
            return f"the archived WAL ends at {self._runs[-1].run.end}"
        tlis = {span.tli for span in self._line}
        for gap in self._state.gaps:
            if gap.tli in tlis and gap.start < lsn <= gap.end:
                return f"the WAL from {gap.start} to {gap.end} was lost ({gap.reason})"
        return "the WAL there is not in the store"

    async def _unreachable(self, asked: str, why: str) -> TargetUnreachable:
        told = [_describe(window) for _, window in (await self.windows())[-_WINDOWS_TOLD:]]
        tli = self._line[-1].tli
        reach = f"reachable on tli {tli}: {'; '.join(told)}" if told else f"nothing is reachable on tli {tli}"
        others = [str(known.tli) for known in self._state.tlis if known.tli != tli]
        return TargetUnreachable(
            f"{asked} cannot be reached: {why}; {reach}",
            hint=f"other lines of history: --tli {' or '.join(others)}" if others else None,
        )


_WINDOWS_TOLD = 6
_TOO_EARLY = "it lies before the first restorable moment"
_NO_BASE = "no base backup is complete from which the WAL there could be replayed"


def _describe(window: Window) -> str:
    until = "an unknown time" if window.known_until is None else describe_time(window.known_until)
    return (
        f"{window.first.end} to {window.head.lsn}, "
        f"{describe_time(window.first_time)} to {until} (known complete up to there)"
    )


def _may_hold_commits(piece: Piece) -> bool:
    return isinstance(piece.source, TailChunk) or piece.source.commits > 0


def _may_hold_restore_points(piece: Piece) -> bool:
    return isinstance(piece.source, TailChunk) or piece.source.restore_points != 0


async def _last_commit(reader: RunReader, before: Lsn) -> Commit | None:
    pieces = reversed(reader.run.between(reader.run.start, before))
    for piece in filter(_may_hold_commits, pieces):
        for part in filter(_may_hold_commits, reversed(await reader.parts(piece))):
            if part.start >= before:
                continue
            for entry in reversed(await reader.entries(part)):
                rows = np.flatnonzero(
                    np.isin(entry.commits["kind"], _COMMITTED) & (entry.commits["start"] < before)
                )
                if len(rows):
                    return _commit(entry, int(rows[-1]))
    return None


async def _next_commit(reader: RunReader, after: Lsn) -> Commit | None:
    for piece in filter(_may_hold_commits, reader.run.between(after, reader.run.end)):
        for part in filter(_may_hold_commits, await reader.parts(piece)):
            if part.end <= after:
                continue
            for entry in await reader.entries(part):
                rows = np.flatnonzero(
                    np.isin(entry.commits["kind"], _COMMITTED) & (entry.commits["start"] >= after)
                )
                if len(rows):
                    return _commit(entry, int(rows[0]))
    return None


async def _events(reader: RunReader, start: Lsn, end: Lsn) -> tuple[WalEvent, ...]:
    told: list[WalEvent] = []

    def overlaps(piece: Piece) -> bool:
        return piece.start < end and start < piece.end

    async with aclosing(reader.scan(reader.run.pieces, overlaps)) as entries:
        async for entry in entries:
            told += (event for event in entry.events if event.kind in _TOLD and start <= event.start < end)
    return tuple(told)


async def _latest_commit_time(
    reader: RunReader, pieces: Sequence[Piece], *, before: Lsn | None = None
) -> Micros | None:
    """The latest end of a transaction in the pieces, of those that start before an LSN when one is given."""
    times: list[Micros] = []
    unknown: list[Piece] = []
    for piece in pieces:
        # Of a merged range that is not wanted whole most parts still are.
        for part in (piece,) if _is_whole(piece, before) else await reader.parts(piece):
            if isinstance(part.source, TailChunk) or not _is_whole(part, before):
                if before is None or part.start < before:
                    unknown.append(part)
            elif part.source.max_commit_time is not None:
                times.append(part.source.max_commit_time)
    async with aclosing(reader.scan(unknown)) as entries:
        async for entry in entries:
            found = entry.commits["time"]
            if before is not None:
                found = found[entry.commits["start"] < before]
            if len(found):
                times.append(int(found.max()))
    return max(times, default=None)


def _is_whole(piece: Piece, before: Lsn | None) -> bool:
    return not piece.cut and (before is None or piece.end <= before)


def _commit(entry: Entry, row: int) -> Commit:
    found = entry.commits[row]
    return Commit(
        start=Lsn(int(found["start"])),
        end=Lsn(int(found["end"])),
        time=int(found["time"]),
        xid=int(found["xid"]),
    )
