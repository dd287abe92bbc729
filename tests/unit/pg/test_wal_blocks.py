"""First touches of blocks, for prefetch."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.wal_builder import PAGE, Block, WalBuilder
from timeline.lsn import Lsn
from timeline.pg.wal_blocks import first_touches

START = 0x7_00000000 - 3 * PAGE


def plain(wal: WalBuilder, begin: int = 0, end: int = 1 << 62) -> list[tuple[int, ...]]:
    rows: dict[tuple[int, ...], bool] = {}
    for record in wal.records:
        if record.start < begin or record.end > end:
            continue
        for block in record.blocks:
            key = (block.spc, block.db, block.rel, block.fork, block.block)
            rows.setdefault(key, (block.image is not None and block.apply) or block.init)
    return [(*key, restored) for key, restored in rows.items()]


def rows_of(wal: WalBuilder, begin: int = 0, end: int = 1 << 62) -> list[tuple[int, ...]]:
    begin = max(begin, wal.start)
    part = bytes(wal.wal)[begin - wal.start : end - wal.start]
    rows = first_touches(part, Lsn(begin), wal.segment_bytes)
    names = ["spc", "db", "rel", "fork", "block", "has_image_or_init"]
    return [tuple(row) for row in rows[names].tolist()]


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_first_touch_of_every_block_in_wal_order(seed: int) -> None:
    rng = random.Random(seed)
    wal = WalBuilder(START, major=rng.choice([14, 15, 18]))
    for _ in range(rng.choice([5, 200])):
        blocks = [
            Block(
                spc=rng.randrange(1663, 1665),
                db=rng.randrange(2),
                rel=rng.randrange(3),
                fork=rng.randrange(3),
                block=rng.randrange(20),
                image=rng.choice([None, b"i" * 50]),
                hole=True,
                apply=rng.random() < 0.5,
                init=rng.random() < 0.3,
            )
            for _ in range(rng.randrange(10))
        ]
        wal.append(10, 0, blocks=blocks)
    assert rows_of(wal) == plain(wal)


def many_records(rng: random.Random) -> WalBuilder:
    wal = WalBuilder(START)
    for _ in range(300):
        blocks = [Block(block=rng.randrange(50), image=rng.choice([None, b"i" * 900])) for _ in range(3)]
        wal.append(10, 0, blocks=blocks, main=rng.randbytes(rng.choice([0, 10, 20_000])))
    return wal


def test_windows_that_begin_with_the_rest_of_a_record() -> None:
    """A record across a cut is known in neither part."""
    wal = many_records(random.Random(5))
    end = wal.start + len(wal.wal)
    for begin in range(START, end - 8 * PAGE, 7 * PAGE):
        for stop in (end, begin + 6 * PAGE, begin + 6 * PAGE + 4096):
            assert rows_of(wal, begin, stop) == plain(wal, begin, stop)


def test_windows_that_begin_at_a_record() -> None:
    wal = many_records(random.Random(6))
    for record in wal.records[1::20]:
        assert rows_of(wal, record.start) == plain(wal, record.start)


def test_data_that_looks_like_records() -> None:
    """In a young cluster LSNs are small numbers, of which pages are full."""
    rng = random.Random(8)
    wal = WalBuilder(START)
    headers = 24 + 20 + 5
    for number in range(10):
        words = list(range(START, START + 400_000, 8))
        rng.shuffle(words)
        aligned = bytes(-headers % 8) + b"".join(word.to_bytes(8, "little") for word in words)
        wal.append(10, 0, blocks=[Block(block=number)], main=aligned)
    assert rows_of(wal) == plain(wal)


def test_after_a_switch_records_begin_with_the_next_segment() -> None:
    wal = WalBuilder(START)
    wal.append(10, 0, blocks=[Block(block=1)])
    wal.append(0, 0x40)
    assert wal.lsn % wal.segment_bytes == 0
    wal.append(10, 0, blocks=[Block(block=2)])
    wal.append(10, 0, blocks=[Block(block=3)])
    assert [row[4] for row in rows_of(wal)] == [1, 2, 3]


def test_broken_wal_is_left_to_those_who_replay_it() -> None:
    """What cannot be read is not told; nothing fails."""
    rng = random.Random(7)
    wal = many_records(rng)
    whole = wal.records[100].start
    before = plain(wal, 0, whole)
    for _ in range(200):
        broken = bytearray(wal.wal)
        for _ in range(rng.choice([1, 1000])):
            broken[rng.randrange(whole - wal.start, len(broken))] = rng.randrange(256)
        assert rows_of(replace(wal, wal=broken))[: len(before)] == before
    noise = rng.randbytes(5 * PAGE)
    assert len(first_touches(noise, Lsn(START), wal.segment_bytes)) <= 40
    assert len(first_touches(bytes(5 * PAGE), Lsn(START), wal.segment_bytes)) == 0


def test_very_many_blocks() -> None:
    rng = random.Random(3)
    wal = WalBuilder(START)
    for _ in range(2000):
        wal.append(
            10, 0, blocks=[Block(rel=rng.randrange(50), block=rng.randrange(1 << 32)) for _ in range(10)]
        )
    assert rows_of(wal) == plain(wal)
    assert len(rows_of(wal)) > 16_384


def test_no_wal_touches_nothing() -> None:
    assert len(first_touches(b"", Lsn(START), 1 << 20)) == 0
