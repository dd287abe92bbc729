"""Lines of history, and the unbroken runs of WAL that the store holds along them. Pure.

A *line* is what leads to one tli: its ancestors, each up to the fork, and the tli itself. What an ancestor
wrote beyond the fork is not on it (EDGE 18); that is on the ancestor's own line, which stays branchable. A
*run* is a stretch of a line without a hole: nothing replays across the end of a run (P7).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from timeline.catalog.tail import Tail, TailChunk
from timeline.errors import UsageError
from timeline.format.branch_state import BUILT, BranchState, Incarnation, SealedRange, Snapshot
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn
from timeline.pg.redo_point import first_page
from timeline.pg.segment import HistoryRow, LineageSpan, lineage, parse_history, segment_start

Line = tuple[LineageSpan, ...]
"""Oldest span first; the last one is the tli whose line it is."""


class WalSpan(Protocol):
    """WAL [start, end) as one tli wrote it."""

    @property
    def tli(self) -> int: ...

    @property
    def start(self) -> Lsn: ...

    @property
    def end(self) -> Lsn: ...


@dataclass(frozen=True, slots=True)
class Span:
    """WAL [start, end) as one tli wrote it."""

    tli: int
    start: Lsn
    end: Lsn


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a line that one sealed range or one chunk holds."""

    tli: int
    start: Lsn
    end: Lsn
    """Where the line leaves the source, at a fork possibly before the source's own end."""
    source: SealedRange | TailChunk

    @property
    def cut(self) -> bool:
        """Whether the source goes on where the line does not."""
        return self.end < self.source.end


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of a line without a hole."""

    pieces: tuple[Piece, ...]
    """At least one, adjoining."""

    @property
    def start(self) -> Lsn:
        """First byte."""
        return self.pieces[0].start

    @property
    def end(self) -> Lsn:
        """Just after the last byte, which may belong to an unfinished record."""
        return self.pieces[-1].end

    def between(self, start: int, end: int) -> tuple[Piece, ...]:
        """The pieces that hold any byte of [start, end)."""
        return tuple(piece for piece in self.pieces if piece.start < end and start < piece.end)

    def clipped(self, start: int, end: int) -> tuple[Piece, ...]:
        """The pieces that hold exactly [start, end)."""
        return tuple(
            replace(piece, start=Lsn(max(start, piece.start)), end=Lsn(min(end, piece.end)))
            for piece in self.between(start, end)
        )

    def position(self, lsn: int) -> int:
        """Number of the piece that holds the byte at ``lsn``; raises ValueError when none does."""
        for number, piece in enumerate(self.pieces):
            if piece.start <= lsn < piece.end:
                return number
        raise ValueError(f"no WAL at {Lsn(lsn)} in this run")

    def spans(self, start: int, end: int) -> tuple[Span, ...]:
        """[start, end), by the tlis that wrote it."""
        spans: list[Span] = []
        for piece in self.between(start, end):
            first, last = Lsn(max(start, piece.start)), Lsn(min(end, piece.end))
            if spans and spans[-1].tli == piece.tli:
                spans[-1] = Span(piece.tli, spans[-1].start, last)
            else:
                spans.append(Span(piece.tli, first, last))
        return tuple(spans)


def line_of(state: BranchState, tli: int) -> Line:
    """The line that leads to ``tli``, by its history file; by the recorded parent where there is none.

    Raises UsageError for a tli the branch never had, FormatError for an unreadable history file.
    """
    known = state.find_tli(tli)
    if known is None:
        names = ", ".join(str(entry.tli) for entry in state.tlis) or "none"
        raise UsageError(f"branch {state.branch} has no tli {tli}", hint=f"it has: {names}")
    if known.history is not None:
        return lineage(tli, parse_history(known.history))
    if known.parent is None:
        return lineage(tli, ())
    older = line_of(state, known.parent)
    rows = [HistoryRow(span.tli, span.end or known.start, "") for span in older]
    return lineage(tli, rows)


def needed_tails(state: BranchState, line: Line) -> tuple[int, ...]:
    """The tlis of a line whose part of it reaches into unsealed WAL."""
    return tuple(
        known.tli
        for span in line
        if (known := state.find_tli(span.tli)) is not None and (span.end is None or span.end > known.sealed)
    )


def runs_on(state: BranchState, line: Line, tails: Mapping[int, Tail]) -> tuple[Run, ...]:
    """The runs along a line, oldest first; ``tails``: at least those of ``needed_tails``."""
    runs: list[list[Piece]] = []
    for span in line:
        sources: list[SealedRange | TailChunk] = [part for part in state.sealed if part.tli == span.tli]
        if span.tli in tails:
            sources += tails[span.tli].chunks
        for source in sources:
            start = Lsn(max(source.start, span.begin))
            end = source.end if span.end is None else Lsn(min(source.end, span.end))
            if start >= end:
                continue
            piece = Piece(span.tli, start, end, source)
            if runs and runs[-1][-1].end == start:
                runs[-1].append(piece)
            else:
                runs.append([piece])
    return tuple(Run(tuple(pieces)) for pieces in runs)


def incarnation_at(state: BranchState, lsn: int) -> Incarnation:
    """The incarnation that wrote the WAL at ``lsn``; raises UsageError for a branch without any."""
    for incarnation in reversed(state.incarnations):
        if incarnation.from_lsn <= lsn:
            return incarnation
    if not state.incarnations:
        raise UsageError(f"branch {state.branch} has no server yet", hint="start `tl archive`")
    return state.incarnations[0]


def replay_start(snapshot: Snapshot, segment_bytes: int) -> Lsn:
    """The first byte of WAL that a branch of this snapshot needs.

    Postgres checks the header of the segment that it begins in. For a built snapshot that header is forged like
    the checkpoint.
    """
    if snapshot.kind == BUILT:
        return first_page(snapshot.lsn)
    return segment_start(snapshot.lsn, segment_bytes)


def is_on(line: Line, snapshot: Snapshot) -> bool:
    """Whether a line goes through a snapshot, from its redo point to where it is complete."""
    return any(
        span.tli == snapshot.tli
        and span.begin <= snapshot.lsn
        and (span.end is None or snapshot.end <= span.end)
        for span in line
    )


def usable_snapshots(state: BranchState, line: Line, run: Run) -> tuple[Snapshot, ...]:
    """The snapshots of the line from which this run replays, by the first LSN each can be at."""
    usable = []
    for snapshot in state.snapshots:
        first = replay_start(snapshot, incarnation_at(state, snapshot.lsn).segment_bytes)
        if is_on(line, snapshot) and run.start <= first and snapshot.end <= run.end:
            usable.append(snapshot)
    return tuple(sorted(usable, key=lambda snapshot: (snapshot.end, snapshot.lsn)))


def covers(line: Line, run: Run, coverage: Coverage) -> bool:
    """Whether a statement of coverage was made on this run of this line, and not on another's orphan tail."""
    span = next((span for span in line if span.tli == coverage.tli), None)
    if span is None or not run.start <= coverage.lsn <= run.end or coverage.lsn < span.begin:
        return False
    return span.end is None or coverage.lsn <= span.end
