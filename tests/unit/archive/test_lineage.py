"""Which tli to stream next, for every way in which servers get promoted."""

from __future__ import annotations

import pytest

from timeline.archive.lineage import check_history, derive_history, find_ancestor, first_tli, opened_tli
from timeline.errors import SplitBrain, UsageError
from timeline.format.branch_state import BranchState, Tli
from timeline.lsn import Lsn
from timeline.pg.segment import HistoryRow, parse_history


def tli(number: int, parent: int | None, start: int, *, end: int | None = None, history: str = "") -> Tli:
    """A tli of the branch."""
    return Tli(number, parent, Lsn(start), Lsn(start), Lsn(end) if end is not None else None, history or None)


def branch(current: int, *tlis: Tli) -> BranchState:
    """A branch of these tlis."""
    return BranchState("main", 1, (), tlis, current, (), (), (), None, None)


def rows(*pairs: tuple[int, int]) -> tuple[HistoryRow, ...]:
    """A history file."""
    return tuple(HistoryRow(number, Lsn(end), "promoted") for number, end in pairs)


def test_the_same_tli_goes_on() -> None:
    found = find_ancestor(branch(1, tli(1, None, 0)), 1, ())
    assert (found.tli, found.end, found.next_tli) == (1, None, None)


def test_a_promoted_server_is_met_where_it_left_our_tli() -> None:
    """EDGE 15."""
    found = find_ancestor(branch(1, tli(1, None, 0)), 2, rows((1, 500)))
    assert (found.tli, found.end, found.next_tli) == (1, 500, 2)


def test_the_next_tli_need_not_be_one_more() -> None:
    """EDGE 16."""
    found = find_ancestor(branch(1, tli(1, None, 0)), 5, rows((1, 500)))
    assert found.next_tli == 5


def test_hops_missed_are_taken_one_after_the_other() -> None:
    """EDGE 20."""
    line = rows((1, 500), (2, 700), (4, 900))
    found = find_ancestor(branch(1, tli(1, None, 0)), 6, line)
    assert (found.tli, found.end, found.next_tli) == (1, 500, 2)
    found = find_ancestor(branch(2, tli(1, None, 0, end=500), tli(2, 1, 500)), 6, line)
    assert (found.tli, found.end, found.next_tli) == (2, 700, 4)


def test_a_sibling_forks_from_the_tli_both_have() -> None:
    """EDGE 18: the line archived meanwhile is left, and stays."""
    state = branch(2, tli(1, None, 0, end=500), tli(2, 1, 500))
    found = find_ancestor(state, 3, rows((1, 400)))
    assert (found.tli, found.end, found.next_tli) == (1, 400, 3)


def test_a_server_left_behind_is_refused() -> None:
    """EDGE 17: the old primary comes back."""
    state = branch(2, tli(1, None, 0, end=500), tli(2, 1, 500))
    with pytest.raises(SplitBrain, match="left"):
        find_ancestor(state, 1, ())


def test_a_line_that_never_met_ours_is_refused() -> None:
    with pytest.raises(UsageError, match="in common"):
        find_ancestor(branch(4, tli(4, None, 900)), 3, rows((1, 100)))


def test_a_fork_before_the_archive_begins_is_refused() -> None:
    with pytest.raises(UsageError, match="before the archive"):
        find_ancestor(branch(1, tli(1, None, 500)), 2, rows((1, 400)))


def test_another_history_of_a_known_tli_is_a_split_brain() -> None:
    """EDGE 19."""
    state = branch(2, tli(1, None, 0, end=500), tli(2, 1, 500, history="1\t0/1F4\tpromoted\n"))
    check_history(state, 2, "1\t0/1F4\tpromoted\n")
    check_history(state, 3, "anything")
    with pytest.raises(SplitBrain, match="two histories"):
        check_history(state, 2, "1\t0/200\tpromoted\n")


def test_an_ancestors_history_follows_from_a_descendants() -> None:
    line = rows((1, 500), (2, 700), (4, 900))
    assert parse_history(derive_history(4, line)) == line[:2]


def test_the_archive_begins_on_the_tli_that_wrote_its_first_byte() -> None:
    line = rows((1, 500), (2, 700))
    assert [first_tli(3, line, Lsn(position)) for position in (499, 500, 699, 700)] == [1, 2, 2, 3]


def test_a_tli_opens_where_its_parent_ends() -> None:
    opened = opened_tli(5, 1, Lsn(500), "text")
    assert (opened.parent, opened.start, opened.sealed, opened.end, opened.history) == (
        1,
        500,
        500,
        None,
        "text",
    )
