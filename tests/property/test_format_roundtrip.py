"""Every codec gives back exactly what it was given."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import format_values as values
from timeline.errors import DamagedStore
from timeline.format import branch_state, keys, log
from timeline.format.chunk import HEADER_READ_BYTES, ChunkHeader, decode_chunk, decode_layout, encode_chunk
from timeline.format.digest import hex_digest_of
from timeline.format.extent import GROUP_BYTES, ExtentRef, decode_extent, encode_extent
from timeline.format.file_listing import read_file_listing, split, write_file_listing
from timeline.format.manifest import FileRow, PageRow, WalFrame
from timeline.format.mark import MarkObject, decode_mark, encode_mark
from timeline.format.meta import StoreMeta, decode_meta, encode_meta
from timeline.format.pack import EXTENTS, PackBuilder, verify_pack
from timeline.format.page_manifest import open_footer, read_page_rows, write_page_manifest
from timeline.format.pin import Pin, decode_pin, encode_pin
from timeline.format.wal_index import Coverage, WalIndex
from timeline.format.wal_manifest import read_wal_manifest, write_wal_manifest
from timeline.lsn import Lsn


@given(values.metas)
def test_meta(meta: StoreMeta) -> None:
    """[MET-1], [JSN-1]"""
    assert decode_meta(encode_meta(meta)) == meta


@given(values.entries())
@settings(max_examples=60)
def test_log_entry(entry: log.LogEntry) -> None:
    """Chapter 6: an entry and its state survive exactly."""
    data = log.encode_entry(entry)
    assert log.decode_entry(data, keys.log_entry("main", entry.number)) == entry
    assert b"\n" not in data[:-1]


@given(values.snapshots)
@settings(max_examples=30)
def test_snapshot_json(snapshot: branch_state.Snapshot) -> None:
    assert branch_state.snapshot_from_json(branch_state.snapshot_to_json(snapshot)) == snapshot


@given(
    st.binary(min_size=1, max_size=3000),
    st.integers(1, 1200),
    values.indexes,
    st.none() | values.coverages,
    st.integers(0, 1 << 63),
)
@settings(max_examples=60, deadline=None)
def test_chunk(piece: bytes, times: int, index: WalIndex, coverage: Coverage | None, start: int) -> None:
    """[CHK-1] to [CHK-4], [IDX-1]: one frame and several."""
    wal = piece * times
    header = ChunkHeader(
        "ab" * 16, "main", 1 << 63, 7, Lsn(start), Lsn(start + len(wal)), "w", 3, -1, coverage, ""
    )
    data = encode_chunk(header, wal, index)
    key = keys.chunk("main", 7, start)
    chunk = decode_chunk(data, key)
    assert chunk.wal == wal
    assert chunk.header == replace(header, digest=hex_digest_of(wal))
    assert values.same_index(chunk.index, index)
    assert decode_layout(data[:HEADER_READ_BYTES], key).size == len(data)


@given(st.lists(st.binary(min_size=1, max_size=GROUP_BYTES), max_size=4))
@settings(max_examples=30, deadline=None)
def test_extents_in_a_pack(raws: list[bytes]) -> None:
    """[EXT-2], [PAC-1], [KEY-2]"""
    builder = PackBuilder("ab" * 16, EXTENTS)
    places = []
    for raw in raws:
        stored, digest = encode_extent(raw)
        places.append((builder.add(stored), len(stored), digest))
    pack_id, data = builder.finish()
    assert verify_pack(data, pack_id, keys.pack(pack_id)).store_id == "ab" * 16
    for raw, (offset, stored_bytes, digest) in zip(raws, places, strict=True):
        ref = ExtentRef(0, len(raw), pack_id, offset, stored_bytes, digest)
        assert decode_extent(data[offset : offset + stored_bytes], ref, keys.pack(pack_id)) == raw


@given(values.page_rows())
@settings(max_examples=60, deadline=None)
def test_page_manifest(rows: list[PageRow]) -> None:
    """[PAG-1], [MAN-4]: whole, and by footer and row group."""
    data, ref = write_page_manifest(rows)
    assert list(read_page_rows(data, ref)) == rows
    footer = open_footer(ref, data[-ref.footer_bytes :])
    for row in rows:
        number = footer.find(row.path, row.group)
        assert number is not None
        entry = footer.entries[number]
        found = footer.decode(number, data[entry.offset : entry.offset + entry.length])
        expected = tuple(r.extent for r in rows if (r.path, r.group) == (row.path, row.group))
        assert found.lookup(row.path, row.group) == expected
        assert not found.lookup(row.path + "x", row.group) or any(r.path == row.path + "x" for r in rows)


@given(values.file_rows())
@settings(max_examples=60, deadline=None)
def test_file_listing(rows: list[FileRow]) -> None:
    """[FIL-1]"""
    data, ref = write_file_listing(rows)
    listing = read_file_listing(data, ref)
    assert list(listing) == sorted(rows, key=lambda row: split(row.path))
    for row in rows:
        assert listing.get(row.path) == row
        assert listing.get(row.path + "/nothing") is None or any(
            r.path == row.path + "/nothing" for r in rows
        )
        directory = split(row.path)[0]
        siblings = [r for r in rows if split(r.path)[0] == directory]
        assert list(listing.children(directory)) == sorted(siblings, key=lambda r: split(r.path))


@given(values.wal_frames())
@settings(max_examples=40, deadline=None)
def test_wal_manifest(frames: tuple[WalFrame, ...]) -> None:
    """[WMA-1], [WMA-2]"""
    data, ref = write_wal_manifest(frames)
    found = read_wal_manifest(data, ref)
    assert len(found) == len(frames) == ref.rows
    assert all(values.same_frame(one, two) for one, two in zip(found, frames, strict=True))


@given(
    st.sampled_from(["main", "b-1.x_y"]),
    st.integers(1, 1 << 31),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 10**12),
)
def test_keys(branch: str, tli: int, start: int, number: int) -> None:
    """[KEY-1], [KEY-3]: and a later entry sorts before an earlier one."""
    assert keys.parse_chunk(keys.chunk(branch, tli, start)) == keys.ChunkKey(branch, tli, Lsn(start))
    assert keys.parse_log_entry(keys.log_entry(branch, number)) == (branch, number)
    assert keys.log_entry(branch, number + 1) < keys.log_entry(branch, number)


def another(token: str) -> str:
    """A random name that is not this one."""
    return "00" * 16 if token != "00" * 16 else "11" * 16


@given(values.pins)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_pin(pin: Pin) -> None:
    """[PIN-1]: complete, and only under its own name."""
    data = encode_pin(pin)
    assert decode_pin(data, keys.pin(pin.id)) == pin
    with pytest.raises(DamagedStore, match="expected this key's pin"):
        decode_pin(data, keys.pin(another(pin.id)))


@given(values.marks)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_mark(mark: MarkObject) -> None:
    data = encode_mark(mark)
    assert decode_mark(data, keys.mark(mark.id)) == mark
    with pytest.raises(DamagedStore, match="expected this key's mark"):
        decode_mark(data, keys.mark(another(mark.id)))


@given(st.binary(min_size=32, max_size=32).map(bytes.hex), st.binary(min_size=16, max_size=16).map(bytes.hex))
def test_keys_of_what_is_collected(digest: str, token: str) -> None:
    assert keys.parse_pack(keys.pack(digest)) == digest
    assert keys.parse_manifest(keys.manifest(digest)) == digest
    assert keys.parse_pin(keys.pin(token)) == token
    assert keys.parse_mark(keys.mark(token)) == token
