"""Manifests: order, bounds, partial reads, and what other programs see of them (SPEC.md, chapter 5)."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zlib
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest

from timeline.errors import DamagedStore
from timeline.format import page_manifest
from timeline.format.extent import ExtentRef
from timeline.format.file_listing import read_file_listing, write_file_listing
from timeline.format.manifest import PAGE_ROWS_PER_GROUP, FileRow, PageRow, WalFrame
from timeline.format.page_manifest import (
    open_footer,
    read_page_rows,
    write_page_manifest,
    write_page_manifests,
)
from timeline.format.wal_index import COMMIT_DTYPE, EventKind, WalEvent, no_touches
from timeline.format.wal_manifest import read_wal_manifest, write_wal_manifest
from timeline.lsn import Lsn


def row(path: str, group: int, first_block: int = 0, raw_bytes: int = 8192) -> PageRow:
    seed = zlib.crc32(f"{path}/{group}/{first_block}".encode())
    digest = np.random.default_rng(seed).bytes(32)
    pack = f"{seed % 40:064x}"
    return PageRow(path, group, ExtentRef(first_block, raw_bytes, pack, seed % (1 << 25), 900, digest))


def many_rows(count: int) -> Iterator[PageRow]:
    return (row(f"base/5/{16384 + n // 9000}", n % 9000) for n in range(count))


def test_rows_of_one_group_share_a_row_group() -> None:
    """[PAG-2]: whichever extents stand at the boundary."""
    before = [row("a", n) for n in range(PAGE_ROWS_PER_GROUP - 1)]
    parts = [row("b", 7, first) for first in range(0, 16, 2)]
    data, ref = write_page_manifest([*before, *parts, row("c", 0)])
    footer = open_footer(ref, data[-ref.footer_bytes :])
    assert len(footer.entries) == 2
    number = footer.find("b", 7)
    assert number == 0
    entry = footer.entries[0]
    found = footer.decode(0, data[entry.offset : entry.offset + entry.length]).lookup("b", 7)
    assert [extent.first_block for extent in found] == list(range(0, 16, 2))


def test_a_partial_reader_needs_footer_and_one_row_group() -> None:
    """[MAN-4], P5: it sees nothing else of the object, and finds where to look."""
    rows = list(many_rows(30_000))
    data, ref = write_page_manifest(rows)
    footer = open_footer(ref, data[-ref.footer_bytes :])
    assert ref.footer_bytes < 8192
    for wanted in (rows[0], rows[8191], rows[8192], rows[20_000], rows[-1]):
        number = footer.find(wanted.path, wanted.group)
        assert number is not None
        entry = footer.entries[number]
        group = footer.decode(number, data[entry.offset : entry.offset + entry.length])
        assert group.lookup(wanted.path, wanted.group) == (wanted.extent,)
        assert group.nbytes < 70 * len(group) + 60_000
    assert footer.find("base/4/1", 0) is None
    assert footer.find("base/5/99999", 0) is None
    assert footer.find("base/5/16384", 9000) is None or not _lookup(footer, data, "base/5/16384", 9000)
    assert list(footer.find_path("base/5/16384")) == [0, 1]
    assert list(footer.find_path("nothing")) == []


def _lookup(footer: page_manifest.Footer, data: bytes, path: str, group: int) -> tuple[ExtentRef, ...]:
    number = footer.find(path, group)
    if number is None:
        return ()
    entry = footer.entries[number]
    return footer.decode(number, data[entry.offset : entry.offset + entry.length]).lookup(path, group)


def test_row_group_of_another_number_is_damage() -> None:
    rows = list(many_rows(20_000))
    data, ref = write_page_manifest(rows)
    footer = open_footer(ref, data[-ref.footer_bytes :])
    other = footer.entries[1]
    with pytest.raises(DamagedStore, match="bytes of rows with BLAKE3"):
        footer.decode(0, data[other.offset : other.offset + other.length])


def test_lookup_range() -> None:
    data, ref = write_page_manifest(
        [row("a", 3), row("b", 1), row("b", 2, 4), row("b", 2, 9), row("b", 8), row("c", 2)]
    )
    footer = open_footer(ref, data[-ref.footer_bytes :])
    entry = footer.entries[0]
    group = footer.decode(0, data[entry.offset : entry.offset + entry.length])
    assert [(number, extent.first_block) for number, extent in group.lookup_range("b", 2, 7)] == [
        (2, 4),
        (2, 9),
    ]
    assert not list(group.lookup_range("aa", 0, 9))


@pytest.mark.parametrize(
    "rows",
    [
        [row("b", 0), row("a", 0)],
        [row("a", 1), row("a", 0)],
        [row("a", 0, 3), row("a", 0, 3)],
        [row("a", 0, 3, 16384), row("a", 0, 4)],
        [row("a", 0, 15, 8193)],
        [row("a", 0, 0, 0)],
    ],
)
def test_rows_out_of_order_are_not_written(rows: list[PageRow]) -> None:
    """[PAG-1], [EXT-1]"""
    with pytest.raises(ValueError, match=r"order|overlap|outside"):
        write_page_manifest(rows)


def test_long_manifests_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """[PAG-5], P9: cut between groups, each a manifest of its own."""
    monkeypatch.setattr(page_manifest, "PAGE_MANIFEST_TARGET_BYTES", 200_000)
    rows = list(many_rows(30_000))
    parts = list(write_page_manifests(rows))
    assert len(parts) == 4
    assert [found for data, ref in parts for found in read_page_rows(data, ref)] == rows
    assert len(list(write_page_manifests([]))) == 1


def test_bounds_and_digests_are_in_the_footer() -> None:
    """[MAN-2], [MAN-3], [MAN-5]: as any Parquet reader sees them."""
    data, ref = write_page_manifest(many_rows(10_000), nonce="ab" * 16)
    file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    values = file.metadata.metadata
    assert values[b"tl.kind"] == b"pages"
    assert json.loads(values[b"tl.envelope"]) == {
        "format": 1,
        "requires": [],
        "digest_kind": "blake3",
        "key_id": None,
        "cipher": None,
        "nonce": "ab" * 16,
    }
    groups = json.loads(values[b"tl.row_groups"])
    assert [group[3:] for group in groups] == [
        ["base/5/16384", 0, "base/5/16384", 8191],
        ["base/5/16384", 8192, "base/5/16385", 999],
    ]
    for number, (offset, length, *_) in enumerate(groups):
        columns = [file.metadata.row_group(number).column(c) for c in range(8)]
        starts = [c.dictionary_page_offset or c.data_page_offset for c in columns]
        assert offset == min(starts)
        assert offset + length >= max(
            s + c.total_compressed_size for s, c in zip(starts, columns, strict=True)
        )
    assert file.read().num_rows == ref.rows == 10_000


def test_listing_of_many_files_is_compact_and_found_by_path() -> None:
    """[FIL-1]: 100,000 files, several row groups."""
    rows = [FileRow(f"base/{5 + n % 7}/{n}", "f", n, 0o600, None, None, Lsn(0)) for n in range(100_000)]
    rows += [
        FileRow("base", "d", 0, 0o700, None, None, Lsn(0)),
        FileRow("PG_VERSION", "f", 3, 0o600, b"15\n", None, Lsn(9)),
    ]
    listing = read_file_listing(*write_file_listing(rows))
    assert len(listing) == len(rows)
    assert listing.get("base/6/8") == rows[8]
    assert listing.get("base/6/9") is None
    assert [found.path for found in listing.children("")] == ["PG_VERSION", "base"]
    assert sum(1 for _ in listing.children("base/5")) == 14_286
    assert list(listing.children("base/5/0")) == []


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a//b", "a/./b", "a/"])
def test_paths_that_leave_the_directory_are_not_listed(path: str) -> None:
    with pytest.raises(ValueError, match="cannot be listed"):
        write_file_listing([FileRow(path, "f", 0, 0o600, None, None, Lsn(0))])


def test_a_path_is_listed_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        write_file_listing([FileRow("a", "f", 0, 0o600, None, None, Lsn(0))] * 2)


def test_manifest_of_another_kind() -> None:
    data, ref = write_file_listing([])
    with pytest.raises(DamagedStore, match="expected a manifest of wal, found one of files"):
        read_wal_manifest(data, ref)


def test_history_can_be_queried_without_us() -> None:
    """[WMA-2]: native nested columns, times as timestamps."""
    commits = np.zeros(2, COMMIT_DTYPE)
    commits["time"], commits["xid"] = [1_700_000_000_000_000, 1_700_000_001_000_000], [10, 11]
    event = WalEvent(EventKind.RESTORE_POINT, Lsn(5), Lsn(6), 1_700_000_002_000_000, "before-release")
    frame = WalFrame(
        1,
        Lsn(0),
        Lsn(100),
        "ab" * 32,
        40,
        50,
        bytes(32),
        Lsn(90),
        Lsn(100),
        Lsn(100),
        3,
        commits,
        (event,),
        no_touches(),
    )
    data, _ = write_wal_manifest([frame])
    (found,) = pq.read_table(io.BytesIO(data)).to_pylist()
    assert [commit["xid"] for commit in found["commits"]] == [10, 11]
    assert found["min_commit_time"].isoformat() == "2023-11-14T22:13:20+00:00"
    assert found["events"][0]["kind"] == "restore_point"
    assert found["events"][0]["name"] == "before-release"


def test_readers_of_wal_manifests_do_without_pyarrow_compute() -> None:
    """Its import takes a tenth of a second, in every `tl branch`."""
    code = "import sys, timeline.format.wal_manifest\nassert 'pyarrow.compute' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_chunks_and_log_do_not_import_pyarrow() -> None:
    """Start-up of a command that reads the log alone."""
    code = (
        "import sys, timeline.format.log, timeline.format.chunk, timeline.format.meta,"
        " timeline.format.extent, timeline.format.pack, timeline.format.wal_frame\n"
        "assert 'pyarrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lookups_do_not_import_pyarrow_compute() -> None:
    """Its import takes 80 ms, which a branch would wait for."""
    code = (
        "import sys\n"
        "from timeline.format.page_manifest import *\n"
        "from timeline.format.file_listing import *\n"
        "from timeline.format.manifest import *\n"
        "from timeline.format.extent import ExtentRef\n"
        "d, r = write_page_manifest([PageRow('a', 0, ExtentRef(0, 8192, 'ab', 0, 9, bytes(32)))])\n"
        "f = open_footer(r, d[-r.footer_bytes:]); e = f.entries[0]\n"
        "assert f.decode(0, d[e.offset:e.offset + e.length]).lookup('a', 0)\n"
        "l = read_file_listing(*write_file_listing([FileRow('a', 'f', 0, 384, None, None, 0)]))\n"
        "assert l.get('a') and list(l.children(''))\n"
        "assert 'pyarrow.compute' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
