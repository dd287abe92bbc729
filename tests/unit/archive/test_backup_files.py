"""What of a data directory belongs in a snapshot."""

from __future__ import annotations

import pytest

from timeline.archive.backup_compare import MAX_LISTED, Comparison, FileDifference
from timeline.archive.backup_files import Treatment, is_storable, treat
from timeline.lsn import Lsn


@pytest.mark.parametrize(
    ("path", "kind", "size", "listed", "inline"),
    [
        ("base/5/1259", "f", 8192, True, False),
        ("PG_VERSION", "f", 3, True, True),
        ("global/pg_control", "f", 8192, True, True),
        ("backup_label", "f", 250, False, True),
        ("tablespace_map", "f", 30, False, False),
        ("standby.signal", "f", 0, False, False),
        ("base/5/standby.signal", "f", 0, True, True),
        ("pg_wal", "d", 0, True, False),
        ("pg_wal/archive_status", "d", 0, True, False),
        ("pg_wal/000000010000000000000001", "f", 16 << 20, False, False),
        ("pg_replslot/tl", "d", 0, False, False),
        ("pg_replslot/tl/state", "f", 200, False, False),
        ("pg_stat_tmp/global.stat", "f", 200, False, False),
        ("pg_stat/pgstat.stat", "f", 2000, True, False),
    ],
)
def test_treatment(path: str, kind: str, size: int, listed: bool, inline: bool) -> None:
    assert treat(path, kind, size) == Treatment(listed, inline)


def test_names_that_are_no_text() -> None:
    assert is_storable("base/ä")
    assert not is_storable(b"base/\xff".decode("utf-8", "surrogateescape"))


def test_all_differences_are_counted_and_the_largest_listed() -> None:
    comparison = Comparison("s", Lsn(5))
    for number in range(3 * MAX_LISTED):
        comparison.add(FileDifference(f"f{number:04}", "changed", 1000, number, number // 2))
    comparison.add(FileDifference("gone", "removed", 0, 0, 0))
    comparison.count_equal(7)
    result = comparison.differences()
    assert (result.files_changed, result.files_removed, result.files_added) == (3 * MAX_LISTED, 1, 0)
    assert result.groups_changed == sum(range(3 * MAX_LISTED)) and result.groups_equal == 7
    assert [difference.path for difference in result.listed] == [
        f"f{number:04}" for number in range(3 * MAX_LISTED - 1, 2 * MAX_LISTED - 1, -1)
    ]
