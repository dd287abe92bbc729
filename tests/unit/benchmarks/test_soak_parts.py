"""The soak's own judgement: that it would notice."""

from __future__ import annotations

import pytest

from tests.soak.ledger import Entry, Line
from tests.soak.load import judge
from tests.soak.memory import MOST_SLOPE, Sample, memory_lines, process_name, slope
from tests.soak.plan import CALM_SECONDS, Event, SoakPlan
from timeline.lsn import Lsn

ENTRIES = tuple(Entry(number, 700 + number, 1, Lsn(1000 * number), float(number)) for number in range(1, 6))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({1, 2, 3}, ""),
        ({1, 2, 3, 9}, ""),
        ({1, 3}, "lacks 1 acknowledged"),
        ({1, 2, 3, 4}, "holds 1 later"),
        ({1, 2, 3, 8}, "holds 1 rows"),
    ],
)
def test_a_branch_is_judged_by_the_ledger(found: set[int], said: str) -> None:
    """Number 9 was sent and never answered: it may be there or not."""
    told = judge(found, ENTRIES[2], ENTRIES, frozenset({9}), Line().holds())
    assert told.startswith(said) and bool(told) == bool(said)


def test_what_a_left_server_had_beyond_the_fork_is_not_of_the_line() -> None:
    line = Line()
    line.left(1, Lsn(3500))
    assert [entry.number for entry in ENTRIES if line.holds()(entry)] == [1, 2, 3]


def test_a_leak_is_seen() -> None:
    grows = [Sample(400 + 5.0 * step, 1, "archive", 100 + step / 12 * 2) for step in range(120)]
    assert slope(grows) == pytest.approx(2.0)
    (line,) = memory_lines(grows, slopes=True)
    assert line.slope_mb_per_minute is not None and line.slope_mb_per_minute > MOST_SLOPE and not line.passed
    # Growth of a process's first minutes is none.
    assert memory_lines(grows[:60], slopes=True)[0].slope_mb_per_minute is None
    level = [Sample(one.seconds, 1, "archive", 100.0) for one in grows]
    assert memory_lines(level, slopes=True)[0].passed
    (high,) = memory_lines([Sample(5.0, 1, "daemon", 61.0)], slopes=False)
    assert not high.passed


def test_processes_are_told_by_their_command() -> None:
    assert process_name(["/x/bin/python", "-c", "code", "archive", "--cluster", "soak"]) == "archive"
    assert process_name(["/x/bin/python", "/x/bin/tl", "daemon", "--config", "f"]) == "daemon"
    assert process_name(["tl mount /b", ""]) == "mount"
    assert process_name(["/usr/lib/postgresql/15/bin/postgres", "-D", "branch"]) is None


@pytest.mark.parametrize("minutes", [3.0, 20.0])
def test_everything_happens_and_leaves_time_to_recover(minutes: float) -> None:
    for seed in range(20):
        plan = SoakPlan(seed, minutes)
        schedule = plan.schedule()
        assert {due.event for due in schedule} == set(Event)
        assert [due.at_seconds for due in schedule] == sorted(due.at_seconds for due in schedule)
        assert schedule[-1].at_seconds <= plan.seconds - CALM_SECONDS
        assert schedule == SoakPlan(seed, minutes).schedule()
