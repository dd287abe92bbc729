"""Which parts of files a replay is about to read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from restore.mount_control import BlockRange
from restore.replay_reads import ReplayReads, relation_path
from timeline.lsn import Lsn
from timeline.pg.wal_blocks import FIRST_TOUCH_DTYPE

VERSION = "PG_15_202209061"
Row = tuple[int, int, int, int, int, bool]
"""Tablespace, database, relfilenode, fork, block, whether the WAL holds the page."""


@pytest.fixture
def reads() -> ReplayReads:
    return ReplayReads(16 << 20, 1 << 30, VERSION)


def replayed(reads: ReplayReads, rows: Sequence[Row], patch: pytest.MonkeyPatch) -> list[BlockRange]:
    """What the rows, as if found in a window of WAL, make it want."""
    touches = np.zeros(len(rows), FIRST_TOUCH_DTYPE)
    for number, (spc, db, rel, fork, block, known) in enumerate(rows):
        touches[number] = (spc, db, rel, fork, known, block)
    patch.setattr("restore.replay_reads.first_touches", lambda *_: touches)
    return reads.of(b"", Lsn(0))


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ((1664, 0, 1262, 0, 0), "global/1262"),
        ((1663, 5, 16384, 0, 0), "base/5/16384"),
        ((1663, 5, 16384, 1, 0), "base/5/16384_fsm"),
        ((1663, 5, 16384, 2, 3), "base/5/16384_vm.3"),
        ((1663, 5, 16384, 0, 12), "base/5/16384.12"),
        ((16500, 5, 16384, 3, 0), f"pg_tblspc/16500/{VERSION}/5/16384_init"),
    ],
)
def test_paths_of_relations(place: tuple[int, int, int, int, int], path: str) -> None:
    assert relation_path(*place, VERSION) == path


def test_only_blocks_that_replay_reads(reads: ReplayReads, monkeypatch: pytest.MonkeyPatch) -> None:
    """No image, no initialisation: read. Beside every heap block, its visibility and free space pages. What WAL wants first
    comes first."""
    rows = [
        (1663, 1, 5, 0, 131072 + 40000, False),
        (1663, 1, 5, 0, 7, False),
        (1663, 1, 5, 0, 9, True),
        (1663, 1, 5, 0, 8, False),
    ]
    assert replayed(reads, rows, monkeypatch) == [
        BlockRange("base/1/5.1", 40000, 1),
        BlockRange("base/1/5_fsm", 0, 3),
        BlockRange("base/1/5_fsm", 44, 1),
        BlockRange("base/1/5_vm", 0, 6),
        BlockRange("base/1/5", 7, 2),
    ]


def test_a_group_of_which_much_is_wanted_is_read_whole(
    reads: ReplayReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [(1663, 1, 5, 1, block, False) for block in (32, 47, 40)]
    many = [(1663, 1, 5, 1, block, False) for block in (64, 66, 77, 79)]
    assert replayed(reads, [*few, *many], monkeypatch) == [
        BlockRange("base/1/5_fsm", 32, 16),
        BlockRange("base/1/5_fsm", 64, 16),
    ]


def test_every_block_once(reads: ReplayReads, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was touched in an earlier window, be it by an image, is known to Postgres."""
    assert replayed(reads, [(1664, 0, 9, 1, 3, True)], monkeypatch) == []
    rows = [(1664, 0, 9, 1, 3, False), (1664, 0, 9, 1, 20, False), (1664, 0, 8, 1, 3, False)]
    assert replayed(reads, rows, monkeypatch) == [
        BlockRange("global/9_fsm", 20, 1),
        BlockRange("global/8_fsm", 3, 1),
    ]
    assert replayed(reads, rows, monkeypatch) == []
