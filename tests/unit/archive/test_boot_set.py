"""Which files a start and a first connection touch, against what was observed on real servers."""

from __future__ import annotations

import pytest

from timeline.archive.boot_set import (
    BOOT_BYTES,
    DATABASE_BYTES,
    MAX_DATABASES,
    SHARED,
    BootBudget,
    BootFile,
    BootRule,
)

# Groups read by Postgres 15 and 18 from start-up to the end of a first `select relname from pg_class`
# (traced).
TOUCHED = {
    "pg_xact/0000": (8192, 1),
    "pg_multixact/offsets/0000": (8192, 1),
    "global/1260": (8192, 1),
    "global/1262": (8192, 1),
    "global/2672": (16384, 1),
    "global/2965": (8192, 1),
    "base/5/1247": (122880, 1),
    "base/5/1249": (466944, 4),
    "base/5/1255": (786432, 1),
    "base/5/1259": (114688, 1),
    "base/5/2601": (8192, 1),
    "base/5/2602": (57344, 1),
    "base/5/2603": (40960, 1),
    "base/5/2610": (32768, 1),
    "base/5/2616": (24576, 1),
    "base/5/2617": (114688, 1),
    "base/5/2619": (253952, 2),
    "base/5/2654": (49152, 1),
    "base/5/2655": (40960, 1),
    "base/5/2659": (90112, 1),
    "base/5/2662": (32768, 1),
    "base/5/2663": (40960, 1),
    "base/5/2679": (16384, 1),
    "base/5/2688": (40960, 1),
    "base/5/2689": (49152, 1),
    "base/5/2690": (90112, 1),
    "base/5/2696": (32768, 1),
    "base/5/2703": (32768, 1),
    "base/5/3379": (8192, 1),
    "base/5/3455": (16384, 1),
}


@pytest.mark.parametrize("path", TOUCHED)
def test_what_was_observed_is_in_it(path: str) -> None:
    size, groups = TOUCHED[path]
    found = BootRule([5], {}).boot_file(path, size)
    assert found is not None and found.groups >= groups
    assert found.database == (5 if path.startswith("base") else SHARED)


@pytest.mark.parametrize(
    ("path", "size"),
    [
        ("base/5/16384", 8192),
        ("base/5/1249.1", 1 << 30),
        ("base/4/1259", 114688),
        ("base/5/2609", 1 << 20),
        ("base/5/1259", 0),
        ("pg_xact/0000", 256 * 1024),
        ("postgresql.conf", 30000),
        ("pg_wal/000000010000000000000001", 16 << 20),
        ("base/5/pg_filenode.map", 524),
    ],
)
def test_what_is_not(path: str, size: int) -> None:
    assert BootRule([5], {}).boot_file(path, size) is None


def test_tablespaces_small_files_and_rewritten_catalogs() -> None:
    rule = BootRule([7], {(7, 20000): 1259})
    assert rule.boot_file("pg_tblspc/16390/PG_15_202209061/7/1259", 114688) == BootFile(7, 1)
    assert rule.boot_file("base/7/20000", 114688) == BootFile(7, 1)
    assert rule.boot_file("base/7/20001", 114688) is None
    assert rule.boot_file("base/7/6113", 8192) == BootFile(7, 1)
    assert rule.boot_file("base/7/1259_vm", 8192) == BootFile(7, 1)


def test_only_the_first_databases_count() -> None:
    rule = BootRule(range(100, 100 + MAX_DATABASES + 1), {})
    assert rule.boot_file("base/100/1259", 8192) is not None
    assert rule.boot_file(f"base/{100 + MAX_DATABASES}/1259", 8192) is None


def test_budget_is_kept() -> None:
    budget = BootBudget()
    assert budget.admit(5, DATABASE_BYTES)
    assert not budget.admit(5, 1)
    admitted = DATABASE_BYTES
    for database in range(6, 100):
        while budget.admit(database, 100_000):
            admitted += 100_000
    assert admitted == budget.total <= BOOT_BYTES
