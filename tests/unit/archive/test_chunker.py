"""Cutting the stream, whatever pieces it comes in (EDGE 13)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from timeline.archive.budget import RequestBudget
from timeline.archive.chunker import SPARE_BUFFERS, ChunkBuffers, Chunker, RawChunk
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn


@given(
    start=st.integers(0, 300),
    pieces=st.lists(st.integers(1, 90), max_size=30),
    cuts=st.lists(st.booleans(), max_size=30),
)
def test_chunks_adjoin_and_never_cross_a_multiple(start: int, pieces: list[int], cuts: list[bool]) -> None:
    chunker = Chunker(1, Lsn(start), cut_bytes=64)
    wal = bytes(index % 251 for index in range(sum(pieces)))
    chunks: list[RawChunk] = []
    at = 0
    for number, size in enumerate(pieces):
        chunks += chunker.add(memoryview(wal)[at : at + size], now=1.0)
        at += size
        assert chunker.open_bytes < 64
        if number < len(cuts) and cuts[number]:
            cut = chunker.cut()
            chunks += [cut] if cut is not None else []
    last = chunker.cut()
    chunks += [last] if last is not None else []
    assert b"".join(bytes(chunk.wal) for chunk in chunks) == wal
    position = start
    for chunk in chunks:
        assert chunk.start == position
        assert 0 < len(chunk.wal) <= 64
        assert chunk.start // 64 == (chunk.end - 1) // 64
        position = chunk.end
    assert chunker.position == position


def test_the_oldest_byte_sets_the_age() -> None:
    chunker = Chunker(1, Lsn(0), cut_bytes=64)
    ages = [chunker.oldest]
    for data, now in ((b"a", 1.0), (b"b", 2.0), (b"x" * 64, 3.0)):
        chunker.add(data, now)
        ages.append(chunker.oldest)
    chunker.cut()
    assert [*ages, chunker.oldest] == [None, 1.0, 1.0, 3.0, None]
    assert chunker.cut() is None


def test_coverage_goes_with_the_chunk_that_holds_its_last_byte() -> None:
    chunker = Chunker(7, Lsn(0), cut_bytes=64)
    chunker.add(b"a" * 10, 0.0)
    chunker.cover(Lsn(10), 100)
    chunker.add(b"b" * 10, 0.0)
    first = chunker.cut()
    assert first is not None
    assert first.coverage == Coverage(7, Lsn(10), 100)
    chunker.add(b"c", 0.0)
    chunker.cover(Lsn(20), 200)
    second = chunker.cut()
    assert second is not None
    assert second.coverage is None, "it is about bytes that are cut already"


def test_coverage_of_what_has_not_come_is_not_taken() -> None:
    chunker = Chunker(1, Lsn(0), cut_bytes=64)
    chunker.add(b"a", 0.0)
    chunker.cover(Lsn(2), 100)
    chunk = chunker.cut()
    assert chunk is not None
    assert chunk.coverage is None


@given(st.lists(st.tuples(st.integers(1, 150), st.booleans(), st.integers(0, 3)), max_size=40))
def test_a_buffer_is_used_again_only_when_its_chunk_is_stored(steps: list[tuple[int, bool, int]]) -> None:
    buffers = ChunkBuffers(64)
    chunker = Chunker(1, Lsn(0), cut_bytes=64, buffers=buffers)
    wal = bytes(index % 251 for index in range(sum(size for size, _, _ in steps)))
    pending: list[RawChunk] = []
    at = 0
    for size, cut, stored in steps:
        pending += chunker.add(wal[at : at + size], 0.0)
        at += size
        if cut and (chunk := chunker.cut()) is not None:
            pending.append(chunk)
        assert all(bytes(chunk.wal) == wal[chunk.start : chunk.end] for chunk in pending)
        for chunk in pending[:stored]:
            buffers.give(chunk)
        del pending[:stored]


def test_few_buffers_are_kept_and_short_chunks_hold_none() -> None:
    buffers = ChunkBuffers(64)
    chunker = Chunker(1, Lsn(0), cut_bytes=64, buffers=buffers)
    chunks = chunker.add(bytes(64 * (SPARE_BUFFERS + 2)), 0.0)
    for chunk in chunks:
        buffers.give(chunk)
    kept = {id(buffers.take()) for _ in chunks} & {id(chunk.wal.obj) for chunk in chunks}
    assert len(kept) == SPARE_BUFFERS
    chunker.add(bytes(32), 0.0)
    short = chunker.cut()
    assert short is not None and isinstance(short.wal.obj, bytes)


def test_a_budget_allows_a_burst_and_then_its_rate() -> None:
    budget = RequestBudget(2.0, burst=3.0)
    for _ in range(3):
        assert budget.wait(0.0) == 0
        budget.spend(0.0)
    assert budget.wait(0.0) == 0.5
    assert budget.wait(0.5) == 0
    budget.spend(0.5)
    assert budget.wait(0.5) == 0.5


def test_requests_that_could_not_wait_are_paid_for_later() -> None:
    budget = RequestBudget(1.0, burst=1.0)
    budget.spend(0.0)
    budget.spend(0.0)
    assert budget.wait(0.0) == 2.0
    assert budget.wait(2.0) == 0
