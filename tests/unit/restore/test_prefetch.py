"""Which files and pages a replay is about to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from restore.mount_control import BlockRange
from restore.prefetch import PrefetchTask, relation_path, status_files, wanted_blocks
from timeline.lsn import Lsn
from timeline.pg.wal_blocks import FIRST_TOUCH_DTYPE

MIB = 1 << 20
VERSION = "PG_15_202209061"
TASK = PrefetchTask(
    data="/data", places=(), segments=(), redo=Lsn(0), end=Lsn(0), segment_bytes=16 * MIB,
    relation_segment_bytes=1 << 30, tablespace_directory=VERSION,
)  # fmt: skip


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


def test_only_blocks_that_replay_reads_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No image, no initialisation: read. Beside every heap block, its visibility and free space pages."""
    rows = [(5, 0, 7, False), (5, 0, 8, False), (5, 0, 9, True), (5, 0, 131072 + 40000, False)]
    touches = np.zeros(len(rows), FIRST_TOUCH_DTYPE)
    for number, (rel, fork, block, known) in enumerate(rows):
        touches[number] = (1663, 1, rel, fork, known, block)
    monkeypatch.setattr("timeline.pg.wal_blocks.first_touches", lambda *_: touches)
    assert list(wanted_blocks(TASK, b"", Lsn(0))) == [
        BlockRange("base/1/5", 7, 2),
        BlockRange("base/1/5.1", 40000, 1),
        BlockRange("base/1/5_fsm", 0, 3),
        BlockRange("base/1/5_fsm", 44, 1),
        BlockRange("base/1/5_vm", 0, 1),
        BlockRange("base/1/5_vm", 5, 1),
    ]


def test_the_newest_status_files(tmp_path: Path) -> None:
    (tmp_path / "pg_xact").mkdir()
    for name in ("0000", "0001", "000A"):
        (tmp_path / "pg_xact" / name).touch()
    assert list(status_files(tmp_path)) == [BlockRange("pg_xact/000A", 0, 32)]
