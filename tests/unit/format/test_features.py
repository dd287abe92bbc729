"""Envelopes of another version are refused by name (SPEC.md, [FEA-1] to [FEA-4])."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace

import pytest

from timeline.errors import DamagedStore, UnknownFeature
from timeline.format import sealed_json
from timeline.format.chunk import ChunkHeader, decode_chunk, decode_header, encode_chunk
from timeline.format.features import check_writable
from timeline.format.meta import StoreMeta, decode_meta, encode_meta
from timeline.format.pack import EXTENTS, PackBuilder, decode_pack_header
from timeline.format.wal_index import WalIndex, no_commits, no_touches
from timeline.lsn import Lsn

META = StoreMeta("ab" * 16, 1, (), (), None, 5)
INDEX = WalIndex(Lsn(0), Lsn(0), Lsn(10), 0, no_commits(), (), no_touches())


def a_chunk() -> bytes:
    return encode_chunk(
        ChunkHeader("ab", "main", 1, 1, Lsn(0), Lsn(10), "w", 1, 1, None, ""), bytes(10), INDEX
    )


def with_header(data: bytes, **changed: object) -> bytes:
    """The object with other header members and a right CRC."""
    length = int.from_bytes(data[8:12], "little")
    text = json.dumps({**json.loads(data[16 : 16 + length]), **changed}).encode()
    lengths = len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")
    return data[:8] + lengths + text + data[16 + length :]


def test_meta() -> None:
    for changed, feature in (
        ({"format_version": 2}, "format 2"),
        ({"read_features": ["sparse"]}, "sparse"),
        ({"digest_kind": "keyed-blake3"}, "digest kind keyed-blake3"),
        ({"key_id": "k1"}, "data key k1"),
    ):
        data = sealed_json.encode({**sealed_json.decode(encode_meta(META), "k"), **changed})
        with pytest.raises(UnknownFeature) as caught:
            decode_meta(data)
        assert caught.value.feature == feature
        assert caught.value.hint is not None
    with pytest.raises(DamagedStore, match="magic"):
        decode_meta(sealed_json.encode({"magic": "other"}))


def test_write_features_bind_writers_only() -> None:
    """[FEA-2]"""
    meta = decode_meta(encode_meta(replace(META, write_features=("tiering",))))
    with pytest.raises(UnknownFeature, match=r"cannot be written to.*tiering"):
        check_writable("tl.json", meta.write_features)


@pytest.mark.parametrize(
    ("changed", "feature"),
    [
        ({"digest_kind": "sha3"}, "digest kind sha3"),
        ({"cipher": "aes"}, "cipher aes"),
        ({"key_id": "k"}, "data key k"),
    ],
)
def test_envelopes(changed: dict[str, object], feature: str) -> None:
    """[DIG-1], [FEA-4]"""
    pack = PackBuilder("ab" * 16, EXTENTS).finish()[1]
    with pytest.raises(UnknownFeature) as caught:
        decode_header(with_header(a_chunk(), **changed), "k")
    assert caught.value.feature == feature
    with pytest.raises(UnknownFeature) as caught:
        decode_pack_header(with_header(pack, **changed), "k")
    assert caught.value.feature == feature


@pytest.mark.parametrize(
    "changed",
    [
        {"end": 11},
        {"start": -1},
        {"frames": [[5, 33 << 20]], "end": 33 << 20},
        {"frames": [[0, 10]]},
        {"frames": "x"},
        {"index": [5, 33 << 20]},
        {"index": [5, True]},
        {"tli": "1"},
        {"digest": None},
    ],
)
def test_headers_that_lie_are_damage(changed: dict[str, object]) -> None:
    """[CHK-1], [CHK-3]: a header with a right CRC and impossible contents allocates nothing."""
    with pytest.raises(DamagedStore):
        decode_header(with_header(a_chunk(), **changed), "k")


def test_wrong_digest_of_right_frames() -> None:
    """[CHK-3]: frames and header that agree on everything but the WAL's digest."""
    with pytest.raises(DamagedStore, match="expected WAL with BLAKE3"):
        decode_chunk(with_header(a_chunk(), digest="00" * 32), "k")


def test_impossible_chunks_are_not_written() -> None:
    header = ChunkHeader("ab", "main", 1, 1, Lsn(0), Lsn(10), "w", 1, 1, None, "")
    for wal in (b"", bytes(9), bytes(11)):
        with pytest.raises(ValueError, match="cannot hold"):
            encode_chunk(header, wal, INDEX)
    with pytest.raises(ValueError, match="cannot hold 0 bytes"):
        encode_chunk(replace(header, end=Lsn(0)), b"", INDEX)
    with pytest.raises(ValueError, match="header"):
        encode_chunk(replace(header, writer="w" * 5000), bytes(10), INDEX)
