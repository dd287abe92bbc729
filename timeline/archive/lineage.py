"""Which tli to stream next: the archived branch is a tree of tlis, and the source stands at the end of one
line.

Pure. A server's line is told by its history file: the ancestors, each with the LSN where it was left. The
branch follows that line from the youngest tli it knows. What was archived of a tli beyond the point where
the line left it stays in the store as an orphan tail, under its own tli (EDGE 17, 18).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from timeline.errors import SplitBrain, UsageError
from timeline.format.branch_state import BranchState, Tli
from timeline.lsn import Lsn
from timeline.pg.segment import HistoryRow, format_history, lineage, tli_of


@dataclass(frozen=True, slots=True)
class Ancestor:
    """The youngest tli of the server's line that the branch knows."""

    tli: int
    end: Lsn | None
    """Where the line left it; ``None``: it is the server's present tli."""
    next_tli: int | None
    """What followed on the line; ``None`` as above."""


def find_ancestor(state: BranchState, server_tli: int, rows: Sequence[HistoryRow]) -> Ancestor:
    """Where the branch and the server's line meet. ``rows``: of the server's history file, oldest first.

    Raises SplitBrain when the server stands on a line that the branch has left, UsageError when they never
    meet.
    """
    line = lineage(server_tli, rows)
    known = {tli.tli for tli in state.tlis}
    meeting = next((index for index in reversed(range(len(line))) if line[index].tli in known), None)
    if meeting is None:
        raise UsageError(
            f"the source's line of history ({_line(server_tli, rows)}) has no tli in common with the store "
            f"({', '.join(str(number) for number in sorted(known))})",
            hint="archive it into a new store",
        )
    span = line[meeting]
    if span.end is None:
        if span.tli != state.current_tli:
            raise SplitBrain(
                f"the source is on tli {span.tli}, which the branch has left for tli {state.current_tli}",
                hint="point the archiver at the server that was promoted; the one it talks to was left behind",
            )
        return Ancestor(span.tli, None, None)
    start = next(tli.start for tli in state.tlis if tli.tli == span.tli)
    if span.end < start:
        raise UsageError(
            f"the source's line left tli {span.tli} at {span.end}, before the archive of it begins ({start})",
            hint="archive it into a new store",
        )
    return Ancestor(span.tli, span.end, line[meeting + 1].tli)


def check_history(state: BranchState, tli: int, text: str) -> None:
    """Raises SplitBrain when another history of the same tli is archived (EDGE 19)."""
    known = state.find_tli(tli)
    if known is not None and known.history is not None and known.history != text:
        raise SplitBrain(
            f"tli {tli} has two histories: the source's history file is not the one in the store",
            hint="two servers were promoted to the same tli; archive the other one into a store of its own",
        )


def opened_tli(tli: int, parent: int, start: Lsn, history: str) -> Tli:
    """A tli that begins where its parent was left."""
    return Tli(tli=tli, parent=parent, start=start, sealed=start, end=None, history=history)


def derive_history(tli: int, rows: Sequence[HistoryRow]) -> str:
    """The history of an ancestor, out of a descendant's, for servers that no longer have the file itself."""
    return format_history([row for row in rows if row.tli < tli])


def first_tli(server_tli: int, rows: Sequence[HistoryRow], position: Lsn) -> int:
    """Which tli of the line to begin with at ``position``."""
    return tli_of(position, lineage(server_tli, rows))


def _line(server_tli: int, rows: Sequence[HistoryRow]) -> str:
    return " → ".join(str(number) for number in (*(row.tli for row in rows), server_tli))
