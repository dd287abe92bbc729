"""First touches of blocks, for prefetch."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.wal_builder import PAGE, Block, WalBuilder
from timeline.lsn import Lsn
from timeline.pg.wal_blocks import first_touches

START = 0x7_00000000 - 3 * PAGE


def plain(wal: WalBuilder) -> list[tuple[int, ...]]:
    rows: dict[tuple[int, ...], bool] = {}
    for record in wal.records:
        for block in record.blocks:
            key = (block.spc, block.db, block.rel, block.fork, block.block)
            rows.setdefault(key, (block.image is not None and block.apply) or block.init)
    return [(*key, restored) for key, restored in rows.items()]


def rows_of(wal: WalBuilder) -> list[tuple[int, ...]]:
    rows = first_touches(bytes(wal.wal), Lsn(wal.start), wal.segment_bytes)
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


def test_more_blocks_than_fit_at_first() -> None:
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
