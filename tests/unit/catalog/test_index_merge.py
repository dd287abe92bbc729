"""Indexes of adjoining runs, as one."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.archived_wal import FIRST, NOON, SECOND, SEGMENT_BYTES, Server, index_of
from tests.support.format_values import same_index
from tests.support.wal_builder import Block
from timeline.catalog.index_merge import merge_indexes
from timeline.pg.wal import WalScanner

SERVER = Server(1, FIRST)
for _number in range(30):
    SERVER.commit(NOON + _number * SECOND, 100 + _number)
    SERVER.builder.append(10, 0, blocks=[Block(rel=16384 + _number % 3, block=_number)], main=b"abc")
    SERVER.fill(1 + 997 * _number % 9000)
    SERVER.restore_point(f"point {_number}", NOON)
LENGTH = SERVER.end - FIRST


@settings(deadline=None)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=8, unique=True))
def test_merged_is_as_scanned_in_one(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), LENGTH]
    wal = SERVER.bytes(FIRST, SERVER.end)
    scanner = WalScanner(SEGMENT_BYTES, 1, FIRST)
    parts = [index_of(scanner.feed(wal[one:two])) for one, two in pairwise(edges)]
    whole = index_of(WalScanner(SEGMENT_BYTES, 1, FIRST).feed(wal))
    assert same_index(merge_indexes(parts), whole)


def test_nothing_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_indexes([])
