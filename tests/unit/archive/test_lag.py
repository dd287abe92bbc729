"""Since when the store is behind the source."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from timeline.archive.lag import MOST_MARKS, LagMeter
from timeline.lsn import Lsn


def test_it_counts_from_when_the_oldest_missing_byte_was_heard_of() -> None:
    meter = LagMeter()
    assert meter.see(10, source_end=Lsn(100), durable=Lsn(100)) is None
    assert meter.see(20, source_end=Lsn(200), durable=Lsn(100)) == 20
    assert meter.see(30, source_end=Lsn(300), durable=Lsn(150)) == 20
    # What was heard of at 20 is there; what came at 30 is not.
    assert meter.see(40, source_end=Lsn(400), durable=Lsn(200)) == 30
    assert meter.see(50, source_end=Lsn(400), durable=Lsn(400)) is None


def test_a_busy_source_whose_store_follows_is_not_ever_further_behind() -> None:
    meter = LagMeter()
    for second in range(2, 100):
        # Always behind, by what was written in the last second.
        assert meter.see(second, source_end=Lsn(second * 10), durable=Lsn(second * 10 - 10)) == second


def test_another_tlis_positions_do_not_count() -> None:
    meter = LagMeter()
    assert meter.see(10, source_end=Lsn(500), durable=Lsn(100)) == 10
    meter.forget()
    assert meter.see(20, source_end=Lsn(200), durable=Lsn(200)) is None


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=200))
def test_it_is_exact_while_nothing_is_forgotten(steps: list[tuple[int, int]]) -> None:
    """Against the definition: the first moment at which the source had more than the store has now."""
    meter, end, durable, heard = LagMeter(), 0, 0, []
    for now, (written, stored) in enumerate(steps):
        end += written
        durable = min(end, durable + stored)
        heard.append((now, end))
        expected = next((at for at, known in heard if known > durable), None)
        assert meter.see(now, source_end=Lsn(end), durable=Lsn(durable)) == expected


def test_its_memory_is_bounded_and_the_oldest_stays() -> None:
    """P9."""
    meter = LagMeter()
    for now in range(10 * MOST_MARKS):
        assert meter.see(now, source_end=Lsn(now + 1), durable=Lsn(0)) == 0
    assert len(meter._marks) <= MOST_MARKS
