"""pg_control files made from nothing, of every major version.

Written from the format's description and not from the code under test: src/include/catalog/pg_control.h; the
offsets are what a compiler makes of it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import google_crc32c
from hypothesis import strategies as st

VERSIONS = {
    14: (1300, 202107181),
    15: (1300, 202209061),
    16: (1300, 202307071),
    17: (1700, 202406281),
    18: (1800, 202506291),
}
"""pg_control and catalog version."""

_BYTES = 8192
_NONCE = 257


@dataclass(frozen=True)
class Field:
    """One value of the file."""

    offset: int
    layout: str
    values: st.SearchStrategy[int]

    @property
    def places(self) -> range:
        """The bytes it takes."""
        return range(self.offset, self.offset + struct.calcsize(self.layout))


def _field(offset: int, layout: str, highest: int | None = None) -> Field:
    size = 8 * struct.calcsize(layout)
    return Field(offset, layout, st.integers(0, highest if highest is not None else (1 << size - 1) - 1))


FIELDS = {
    "system_identifier": _field(0, "<Q"),
    "control_version": _field(8, "<I"),
    "catalog_version": _field(12, "<I"),
    "state": _field(16, "<I", 6),
    "time": _field(24, "<q", 1 << 40),
    "checkpoint_lsn": _field(32, "<Q"),
    "redo": _field(40, "<Q"),
    "tli": _field(48, "<I"),
    "prev_tli": _field(52, "<I"),
    "full_page_writes": _field(56, "<B", 1),
    "checkpoint_wal_level": _field(60, "<i", 2),
    "next_xid": _field(64, "<Q"),
    "next_oid": _field(72, "<I"),
    "next_multi": _field(76, "<I"),
    "next_multi_offset": _field(80, "<I"),
    "oldest_xid": _field(84, "<I"),
    "oldest_xid_db": _field(88, "<I"),
    "oldest_multi": _field(92, "<I"),
    "oldest_multi_db": _field(96, "<I"),
    "checkpoint_time": _field(104, "<q", 1 << 40),
    "oldest_commit_ts_xid": _field(112, "<I"),
    "newest_commit_ts_xid": _field(116, "<I"),
    "oldest_active_xid": _field(120, "<I"),
    "unlogged_lsn": _field(128, "<Q"),
    "min_recovery_point": _field(136, "<Q"),
    "min_recovery_point_tli": _field(144, "<I"),
    "backup_start_point": _field(152, "<Q"),
    "backup_end_point": _field(160, "<Q"),
    "backup_end_required": _field(168, "<B", 1),
    "wal_level": _field(172, "<i", 2),
    "wal_log_hints": _field(176, "<B", 1),
    "max_connections": _field(180, "<i"),
    "max_worker_processes": _field(184, "<i"),
    "max_wal_senders": _field(188, "<i"),
    "max_prepared_transactions": _field(192, "<i"),
    "max_locks_per_transaction": _field(196, "<i"),
    "track_commit_timestamp": _field(200, "<B", 1),
    "max_align": _field(204, "<I"),
    "segment_bytes": _field(228, "<I"),
    "data_checksum_version": _field(252, "<I"),
}


def build_control(major: int, *, nonce: int = 0, **values: int) -> bytes:
    """A whole file with these values, reasonable ones elsewhere, and a checksum that fits."""
    version, catalog = VERSIONS[major]
    told = {
        "system_identifier": 0x77,
        "control_version": version,
        "catalog_version": catalog,
        "state": 1,
        "tli": 1,
        "prev_tli": 1,
        "checkpoint_wal_level": 2 if major >= 17 else 0,
        "next_xid": 0x5_00000300,
        "next_oid": 24576,
        "next_multi": 7,
        "max_align": 8,
        "segment_bytes": 16 << 20,
        "max_connections": 100,
        "max_locks_per_transaction": 64,
        "wal_level": 1,
        **values,
    }
    data = bytearray(_BYTES)
    struct.pack_into("<d", data, 208, 1234567.0)
    for name, value in told.items():
        struct.pack_into(FIELDS[name].layout, data, FIELDS[name].offset, value)
    if major == 18:
        data[256] = 1
    data[_NONCE : _NONCE + 16] = bytes([nonce]) * 16
    crc = 292 if major == 18 else 288
    struct.pack_into("<I", data, crc, google_crc32c.value(bytes(data[:crc])))
    return bytes(data)
