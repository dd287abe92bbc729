"""Any truncation, any changed byte of an object is found, and the error says where (P5, [GEN-6])."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from timeline.errors import DamagedStore
from timeline.format import branch_state, keys, log, log_change
from timeline.format.chunk import ChunkHeader, decode_chunk, decode_header, encode_chunk
from timeline.format.extent import GROUP_BYTES, ExtentRef, decode_extent, encode_extent
from timeline.format.file_listing import read_file_listing, write_file_listing
from timeline.format.manifest import FileRow, PageRow, WalFrame
from timeline.format.meta import StoreMeta, decode_meta, encode_meta
from timeline.format.pack import WAL, PackBuilder, verify_pack
from timeline.format.page_manifest import open_footer, read_page_rows, write_page_manifest
from timeline.format.wal_frame import decode_wal_frame, encode_wal_frame
from timeline.format.wal_index import COMMIT_DTYPE, TOUCH_DTYPE, EventKind, WalEvent, WalIndex
from timeline.format.wal_manifest import read_wal_manifest, write_wal_manifest
from timeline.lsn import Lsn

_START = Lsn(0x1000000)


@dataclass(frozen=True, slots=True)
class Subject:
    """An object, how to read it, and where it lies in the object that errors name."""

    name: str
    key: str
    data: bytes
    read: Callable[[bytes], object]
    offset: int = 0
    equal_is_fine: bool = False
    """zstd leaves some bits of a frame without meaning: a flip that changes no decoded byte is no damage."""


def _wal() -> bytes:
    return np.random.default_rng(5).integers(0, 9, (1 << 20) + 777, np.uint8).tobytes()


def _index() -> WalIndex:
    event = WalEvent(EventKind.TABLESPACE_CREATE, _START, Lsn(_START + 64), None, "/mnt/x", (("oid", 16384),))
    return WalIndex(
        _START,
        Lsn(_START + 64),
        Lsn(_START + 64),
        9,
        np.ones(3, COMMIT_DTYPE),
        (event,),
        np.ones(5, TOUCH_DTYPE),
    )


def _chunk_subjects() -> list[Subject]:
    wal = _wal()
    header = ChunkHeader("ab" * 16, "main", 1, 1, _START, Lsn(_START + len(wal)), "w", 1, 2, None, "")
    key = keys.chunk("main", 1, _START)
    data = encode_chunk(header, wal, _index())
    head_bytes = decode_header(data, key)[1]
    return [
        Subject("chunk", key, data, lambda damaged: decode_chunk(damaged, key)),
        Subject("chunk header", key, data[:head_bytes], lambda damaged: decode_header(damaged, key)),
    ]


def _pack_subjects() -> list[Subject]:
    raw = np.random.default_rng(6).integers(0, 40, GROUP_BYTES, np.uint8).tobytes()
    stored, digest = encode_extent(raw)
    wal = _wal()
    wal_stored, wal_digest = encode_wal_frame(wal)
    builder = PackBuilder("ab" * 16, WAL)
    extent_at, wal_at = builder.add(stored), builder.add(wal_stored)
    pack_id, data = builder.finish()
    key = keys.pack(pack_id)
    ref = ExtentRef(0, len(raw), pack_id, extent_at, len(stored), digest)
    frame = _frame(pack_id, wal_at, len(wal_stored), wal_digest, len(wal))
    return [
        Subject("pack", key, data, lambda damaged: verify_pack(damaged, pack_id, key)),
        Subject("extent", key, stored, lambda damaged: decode_extent(damaged, ref, key), extent_at, True),
        Subject(
            "WAL frame", key, wal_stored, lambda damaged: decode_wal_frame(damaged, frame, key), wal_at, True
        ),
    ]


def _frame(pack: str, offset: int, stored_bytes: int, digest: bytes, raw_bytes: int) -> WalFrame:
    index = _index()
    return WalFrame(
        tli=1,
        start=_START,
        end=Lsn(_START + raw_bytes),
        pack=pack,
        offset=offset,
        stored_bytes=stored_bytes,
        digest=digest,
        last_record=index.last_record,
        last_record_end=index.last_record_end,
        pending=index.pending,
        records=index.records,
        commits=index.commits,
        events=index.events,
        touches=index.touches,
    )


def _manifest_subjects() -> list[Subject]:
    rows = [
        PageRow(
            f"base/5/{number + 100}",
            group,
            ExtentRef(0, 8192, "cd" * 32, 100 * number, 90, bytes([number] * 32)),
        )
        for number in range(20)
        for group in range(3)
    ]
    data, ref = write_page_manifest(rows)
    footer = open_footer(ref, data[-ref.footer_bytes :])
    entry = footer.entries[0]
    files, files_ref = write_file_listing(
        [FileRow(f"base/{n}", "f", n, 0o600, b"x" * n, None, Lsn(0)) for n in range(9)]
    )
    wal, wal_ref = write_wal_manifest([_frame("ef" * 32, 40, 50, bytes(32), 1 << 20)])
    footer_at = len(data) - ref.footer_bytes
    return [
        Subject("page manifest", keys.manifest(ref.digest), data, lambda bad: list(read_page_rows(bad, ref))),
        Subject(
            "page manifest footer",
            keys.manifest(ref.digest),
            data[footer_at:],
            lambda bad: open_footer(ref, bad),
            footer_at,
        ),
        Subject(
            "page manifest row group",
            keys.manifest(ref.digest),
            data[entry.offset : entry.offset + entry.length],
            lambda bad: footer.decode(0, bad),
            entry.offset,
        ),
        Subject(
            "file listing",
            keys.manifest(files_ref.digest),
            files,
            lambda bad: read_file_listing(bad, files_ref),
        ),
        Subject(
            "WAL manifest", keys.manifest(wal_ref.digest), wal, lambda bad: read_wal_manifest(bad, wal_ref)
        ),
    ]


def _json_subjects() -> list[Subject]:
    meta = StoreMeta("ab" * 16, 1, (), (), None, 5)
    key = keys.log_entry("main", 3)
    entry = log.LogEntry(
        3, "main", "w", "n", 1, 5, log_change.ClaimEpoch(1), branch_state.BranchState.empty("main")
    )
    return [
        Subject("tl.json", keys.META, encode_meta(meta), decode_meta),
        Subject("log entry", key, log.encode_entry(entry), lambda damaged: log.decode_entry(damaged, key)),
    ]


SUBJECTS = [*_chunk_subjects(), *_pack_subjects(), *_manifest_subjects(), *_json_subjects()]
each_subject = pytest.mark.parametrize(
    "subject", SUBJECTS, ids=lambda subject: subject.name.replace(" ", "-")
)


def _check(subject: Subject, damaged: bytes, *, equal_is_fine: bool = False) -> None:
    try:
        found = subject.read(damaged)
    except DamagedStore as error:
        assert error.key == subject.key
        assert subject.offset <= error.offset <= subject.offset + len(subject.data)
        assert error.expectation in str(error)
        return
    assert equal_is_fine
    assert found == subject.read(subject.data)


@each_subject
def test_undamaged(subject: Subject) -> None:
    """Otherwise the other tests prove nothing."""
    subject.read(subject.data)


@each_subject
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_changed_byte(subject: Subject, position: float, flip: int) -> None:
    """[GEN-6]: one byte anywhere."""
    damaged = bytearray(subject.data)
    damaged[int(position * len(damaged))] ^= flip
    _check(subject, bytes(damaged), equal_is_fine=subject.equal_is_fine)


@each_subject
def test_changed_bits_at_the_edges(subject: Subject) -> None:
    """[GEN-6]: every bit of the first and last bytes, where magics, lengths and headers are."""
    edge = min(64, len(subject.data) // 2)
    for at in [*range(edge), *range(len(subject.data) - edge, len(subject.data))]:
        for bit in range(8):
            damaged = bytearray(subject.data)
            damaged[at] ^= 1 << bit
            _check(subject, bytes(damaged), equal_is_fine=subject.equal_is_fine)


@each_subject
@given(position=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None)
def test_truncated(subject: Subject, position: float) -> None:
    """[GEN-6]: cut anywhere."""
    _check(subject, subject.data[: int(position * len(subject.data))])


@each_subject
def test_bytes_left_over(subject: Subject) -> None:
    """[CHK-3], [MAN-4], [PAC-3]: an object is exactly as long as it should be."""
    if subject.name == "chunk header":
        pytest.skip("what follows a header is no part of it")
    with pytest.raises(DamagedStore):
        subject.read(subject.data + b"\0")


def test_object_under_another_key() -> None:
    """[CHK-3], chapter 6: a chunk or entry copied to another key is not that key's."""
    chunk = SUBJECTS[0]
    with pytest.raises(DamagedStore, match="this key's chunk"):
        decode_chunk(chunk.data, keys.chunk("main", 2, _START))
    entry = log.LogEntry(
        3, "main", "w", "n", 1, 5, log_change.ClaimEpoch(1), branch_state.BranchState.empty("main")
    )
    with pytest.raises(DamagedStore, match="this key's entry"):
        log.decode_entry(log.encode_entry(entry), keys.log_entry("main", 4))


def test_digest_right_but_checksum_missing() -> None:
    """[ZST-1]: a frame without content checksum is refused, for rescue could not verify it."""

    raw = b"page" * 2048
    stored, digest = encode_extent(raw)
    bare = zstandard.ZstdCompressor(write_checksum=False, write_content_size=True).compress(raw)
    ref = ExtentRef(0, len(raw), "ab" * 32, 70, len(stored), digest)
    with pytest.raises(DamagedStore, match="with a checksum"):
        decode_extent(bare, replace(ref, stored_bytes=len(bare)), "packs/ab/ab")


def test_longer_content_is_refused_before_it_is_unpacked() -> None:
    """[ZST-1]: a frame of a gigabyte of zeros allocates nothing."""

    bomb = zstandard.ZstdCompressor(write_checksum=True, write_content_size=True).compress(bytes(64 << 20))
    ref = ExtentRef(0, GROUP_BYTES, "ab" * 32, 70, len(bomb), bytes(32))
    with pytest.raises(DamagedStore, match="131072 bytes"):
        decode_extent(bomb, ref, "packs/ab/ab")
