"""pg_control: layouts and refusals. Values read from real servers are compared in the integration tests."""

from __future__ import annotations

import struct

import google_crc32c
import pytest

from timeline.pg.control import parse_control
from timeline.pg.errors import FormatError

VERSIONS = {
    14: (1300, 202107181),
    15: (1300, 202209061),
    16: (1300, 202307071),
    17: (1700, 202406281),
    18: (1800, 202506291),
}


def build(major: int, **change: int) -> bytearray:
    version, catalog = VERSIONS[major]
    data = bytearray(8192)
    struct.pack_into(
        "<QIII",
        data,
        0,
        0x77,
        change.get("version", version),
        change.get("catalog", catalog),
        change.get("state", 1),
    )
    struct.pack_into("<Id", data, 204, change.get("align", 8), 1234567.0)
    struct.pack_into("<I", data, 228, 16 << 20)
    if major >= 17:
        struct.pack_into("<i", data, 40 + 20, 2)
    if major == 18:
        data[256] = 1
    crc = 292 if major == 18 else 288
    struct.pack_into("<I", data, crc, google_crc32c.value(bytes(data[:crc])))
    return data


@pytest.mark.parametrize("major", VERSIONS)
def test_layout_of_each_major(major: int) -> None:
    control = parse_control(bytes(build(major)))
    assert control.major == major
    assert control.segment_bytes == 16 << 20
    assert control.checkpoint.wal_level == (2 if major >= 17 else None)
    assert control.default_char_signed == (True if major == 18 else None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 1201}, "control version 1201"),
        ({"version": 1900}, "control version 1900"),
        ({"catalog": 202007201}, "catalog version"),
        ({"catalog": 202406281}, "catalog version"),  # of 17, in a file of 15's layout
        ({"state": 9}, "cluster state 9"),
        ({"align": 4}, "alignment"),
    ],
)
def test_unknown_layouts_are_refused_by_name(change: dict[str, int], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        parse_control(bytes(build(15, **change)))


@pytest.mark.parametrize("offset", [0, 17, 41, 250, 287, 289])
def test_torn_reads_are_noticed(offset: int) -> None:
    """EDGE 31."""
    data = build(15)
    data[offset] ^= 0x10
    with pytest.raises(FormatError, match="checksum"):
        parse_control(bytes(data))


def test_short_files_are_refused() -> None:
    with pytest.raises(FormatError, match="296"):
        parse_control(bytes(build(15))[:200])
