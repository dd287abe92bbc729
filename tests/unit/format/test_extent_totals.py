"""Bytes that page manifests name, each extent once."""

from __future__ import annotations

import pytest

from timeline.errors import DamagedStore
from timeline.format.extent import ExtentRef
from timeline.format.extent_totals import ExtentTotals
from timeline.format.manifest import PAGE_ROWS_PER_GROUP, PageRow
from timeline.format.page_manifest import write_page_manifest


def row(number: int, pack: str, offset: int, raw: int, stored: int) -> PageRow:
    digest = bytes([number % 256]) * 32
    extent = ExtentRef(
        first_block=0, raw_bytes=raw, pack=pack * 64, offset=offset, stored_bytes=stored, digest=digest
    )
    return PageRow(f"base/5/{number:06}", 0, extent)


def test_an_extent_that_two_manifests_name_counts_once() -> None:
    first = write_page_manifest([row(1, "a", 100, 8192, 1000), row(2, "b", 100, 16384, 3000)])
    second = write_page_manifest([row(1, "b", 100, 16384, 3000), row(2, "a", 200, 8192, 500)])
    totals = ExtentTotals()
    assert totals.sums() == (0, 0)
    totals.add(*first)
    assert totals.sums() == (24576, 4000)
    totals.add(*second)
    assert totals.sums() == (32768, 4500)
    totals.add(*second)
    assert totals.sums() == (32768, 4500)


def test_many_row_groups() -> None:
    rows = [
        row(number, "abc"[number % 3], number * 10, 8192, 10) for number in range(PAGE_ROWS_PER_GROUP * 2 + 5)
    ]
    totals = ExtentTotals()
    totals.add(*write_page_manifest(rows))
    assert totals.sums() == (len(rows) * 8192, len(rows) * 10)


def test_a_damaged_manifest_is_named() -> None:
    """P5."""
    data, ref = write_page_manifest([row(1, "a", 100, 8192, 1000)])
    damaged = bytearray(data)
    damaged[10] ^= 1
    with pytest.raises(DamagedStore, match=ref.digest):
        ExtentTotals().add(bytes(damaged), ref)
