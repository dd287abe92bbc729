"""Which reads count as sequential, and what is fetched ahead of them."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from restore.read_ahead import MAX_WINDOW_BYTES, ReadAhead
from timeline.format.extent import GROUP_BYTES

SIZE = 1 << 30


def read_all(offsets: list[int], length: int, size: int = SIZE) -> list[range]:
    """What is asked for, all of it taken on."""
    ahead = ReadAhead()
    asked = []
    for offset in offsets:
        groups = ahead.note(offset, length, size)
        if groups:
            asked.append(groups)
            ahead.taken(groups.stop)
    return asked


def test_a_scan_is_fetched_once_ahead_of_the_reader_in_growing_steps() -> None:
    asked = read_all(list(range(0, 64 << 20, 65536)), 65536)
    groups = [group for span in asked for group in span]
    assert groups == sorted(set(groups))
    assert set(range(3, (64 << 20) // GROUP_BYTES)) <= set(groups)
    assert max(len(span) for span in asked) >= MAX_WINDOW_BYTES // GROUP_BYTES // 4
    assert len(asked) < 50


def test_random_reads_are_not_followed() -> None:
    chance = random.Random(1)
    assert read_all([chance.randrange(SIZE // 8192) * 8192 for _ in range(2000)], 8192) == []


def test_a_few_pages_in_order_are_not_a_scan() -> None:
    assert read_all(list(range(0, 200_000, 8192)), 8192) == []


def test_the_kernels_own_read_ahead_may_be_out_of_order() -> None:
    offsets = list(range(0, 8 << 20, GROUP_BYTES))
    for at in range(0, len(offsets) - 1, 2):
        offsets[at], offsets[at + 1] = offsets[at + 1], offsets[at]
    groups = {group for span in read_all(offsets, GROUP_BYTES) for group in span}
    assert len(groups) > 60


def test_never_beyond_the_end() -> None:
    size = 3 * (1 << 20) + 5
    asked = read_all(list(range(0, size, 65536)), 65536, size)
    assert max(span.stop for span in asked) == -(-size // GROUP_BYTES)


def test_what_was_not_taken_on_is_asked_for_again() -> None:
    ahead = ReadAhead()
    spans = [ahead.note(offset, GROUP_BYTES, SIZE) for offset in range(0, 2 << 20, GROUP_BYTES)]
    later = [span for span in spans if span]
    assert len(later) > 10
    assert all(span.start <= number + 2 for number, span in enumerate(spans) if span)


@given(st.lists(st.tuples(st.integers(0, SIZE), st.integers(1, 1 << 20)), max_size=60), st.integers(0, SIZE))
def test_whatever_is_read_stays_inside_window_and_file(reads: list[tuple[int, int]], size: int) -> None:
    ahead = ReadAhead()
    for offset, length in reads:
        groups = ahead.note(offset, length, size)
        assert len(groups) <= MAX_WINDOW_BYTES // GROUP_BYTES + 1
        assert not groups or groups.stop * GROUP_BYTES < size + GROUP_BYTES
