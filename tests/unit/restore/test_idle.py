"""When a branch counts as idle."""

from __future__ import annotations

from restore.idle import Activity, begin, is_over, judge, next_look

_SECOND = 1_000_000


def test_idle_from_the_last_look_that_saw_somebody() -> None:
    idle = begin(600, 0)
    assert next_look(idle) == 150 * _SECOND
    idle = judge(idle, Activity(0, 5), 150 * _SECOND)
    assert idle.since == 150 * _SECOND, "what was counted before the first look is not known"
    idle = judge(idle, Activity(0, 6), 300 * _SECOND)
    assert idle.since == 150 * _SECOND and next_look(idle) == 450 * _SECOND
    assert not is_over(idle, 749 * _SECOND) and is_over(idle, 750 * _SECOND)
    for somebody in (Activity(1, 7), Activity(0, 8), Activity(0, 1)):
        assert judge(idle, somebody, 500 * _SECOND).since == 500 * _SECOND
    left = judge(judge(idle, Activity(1, 7), 500 * _SECOND), Activity(0, 8), 600 * _SECOND)
    assert left.since == 600 * _SECOND, "who was connected may have left just now"


def test_looks_are_not_too_near() -> None:
    assert next_look(begin(60, 0)) == 30 * _SECOND
