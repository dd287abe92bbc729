"""Page LSNs and checksums, against the algorithm written out plainly."""

from __future__ import annotations

import random
import struct

import pytest

from timeline.lsn import Lsn
from timeline.pg.page import PAGE_BYTES, bad_pages, page_checksums, page_lsn, page_lsns

_OFFSETS = struct.unpack(
    ">32I",
    bytes.fromhex(
        "5B1F36E9 B8525960 02AB50AA 1DE66D2A 79FF467A 9BB9F8A3 217E7CD2 83E13D2C"
        "F8D4474F E39EB970 42C6AE16 993216FA 7B093B5D 98DAFF3C F718902A 0B1C9CDB"
        "E58F764B 187636BC 5D7B3BB1 E73DE7DE 92BEC979 CCA6C0B2 304A0979 85AA43D4"
        "783125BB 6CA8EAA2 E407EAC6 4B5CFC3E 9FBF8C76 15CA20BE F2CA9FD3 959BD756"
    ),
)


def plain_checksum(page: bytes, block: int) -> int:
    sums = list(_OFFSETS)
    words = list(struct.unpack("<2048I", page[:8] + b"\0\0" + page[10:])) + [0] * 64
    for index, word in enumerate(words):
        mixed = sums[index % 32] ^ word
        sums[index % 32] = (mixed * 16777619 & 0xFFFFFFFF) ^ (mixed >> 17)
    result = block
    for value in sums:
        result ^= value
    return result % 65535 + 1


def make_page(rng: random.Random, block: int, lsn: int = 5) -> bytes:
    page = bytearray(rng.randbytes(PAGE_BYTES))
    struct.pack_into("<II", page, 0, lsn >> 32, lsn & 0xFFFFFFFF)
    struct.pack_into("<HH", page, 12, 100, 7000)
    struct.pack_into("<H", page, 8, plain_checksum(bytes(page), block))
    return bytes(page)


def test_checksums_match_the_plain_algorithm() -> None:
    rng = random.Random(7)
    first = 131072 * 3 - 100  # blocks count through segment files
    pages = [make_page(rng, first + i) for i in range(300)]
    data = b"".join(pages)
    stored = [struct.unpack_from("<H", page, 8)[0] for page in pages]
    assert page_checksums(data, first).tolist() == stored
    assert bad_pages(data, first).tolist() == []
    assert len(bad_pages(data, first + 1)) > 290  # transposed pages are found


def test_lsns() -> None:
    rng = random.Random(8)
    lsns = [0x12_3456_789A, 1, 0xFFFFFFFF_FFFFFFF8]
    data = b"".join(make_page(rng, i, lsn) for i, lsn in enumerate(lsns))
    assert page_lsns(data).tolist() == lsns
    assert page_lsn(data[:PAGE_BYTES]) == Lsn(lsns[0])


def test_damage_new_pages_and_torn_ones() -> None:
    rng = random.Random(9)
    pages = [bytearray(make_page(rng, i, lsn=1000 + i)) for i in range(6)]
    pages[1][5000] ^= 1
    pages[2][:] = bytes(PAGE_BYTES)
    pages[3][:] = bytes(PAGE_BYTES)
    pages[3][8000] = 1
    pages[5][100] ^= 0x80
    data = b"".join(pages)
    assert bad_pages(data, 0).tolist() == [1, 3, 5]
    assert bad_pages(data, 0, before=Lsn(1005)).tolist() == [1, 3]
    with pytest.raises(ValueError, match="whole pages"):
        bad_pages(data[:-1], 0)
