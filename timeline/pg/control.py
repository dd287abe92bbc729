"""pg_control: the state of a cluster, in the layouts of Postgres 14 to 18 on 64-bit little-endian machines.

Read, and written back with other values: what this module does not know of a file stays as it was.

Source: src/include/catalog/pg_control.h of each major (PG_CONTROL_VERSION 1300, 1700, 1800).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from enum import IntEnum

import google_crc32c

from timeline.clock import Micros
from timeline.lsn import Lsn
from timeline.pg.errors import FormatError

CONTROL_FILE = "global/pg_control"
CONTROL_FILE_BYTES = 8192
CHECKPOINT_BYTES = 88

_MAJOR_OF_CATALOG = {202107181: 14, 202209061: 15, 202307071: 16, 202406281: 17, 202506291: 18}
# The checksum ends the struct, and the struct has grown once.
_CRC_OFFSET = {1300: 288, 1700: 288, 1800: 292}
_VERSION_OF_MAJOR = {14: 1300, 15: 1300, 16: 1300, 17: 1700, 18: 1800}
_CHECKPOINT = struct.Struct("<QII?3xiQIIIIIII4xqIII4x")
_HEAD = struct.Struct("<QIIi4xqQ")
_TAIL = struct.Struct("<QQI4xQQ?3xi?3xiiiii?3xIdIIIIIIII?3xI")
_HEAD_OFFSET, _CHECKPOINT_OFFSET, _TAIL_OFFSET, _CHAR_SIGNED_OFFSET = 0, 40, 128, 256
_FLOAT_PROBE = 1234567.0


class ClusterState(IntEnum):
    """DBState: what the server was doing when it last wrote the file."""

    STARTUP = 0
    SHUT_DOWN = 1
    SHUT_DOWN_IN_RECOVERY = 2
    SHUTTING_DOWN = 3
    CRASH_RECOVERY = 4
    ARCHIVE_RECOVERY = 5
    IN_PRODUCTION = 6


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Body of a checkpoint record, also kept in pg_control."""

    redo: Lsn
    """Where replay begins."""
    tli: int
    prev_tli: int
    """The tli this one was forked from, when the checkpoint begins it; else ``tli``."""
    full_page_writes: bool
    wal_level: int | None
    """0 minimal, 1 replica, 2 logical; ``None`` before Postgres 17."""
    next_xid: int
    """64 bits: epoch above, xid below."""
    next_oid: int
    next_multi: int
    next_multi_offset: int
    oldest_xid: int
    oldest_xid_db: int
    oldest_multi: int
    oldest_multi_db: int
    time: Micros
    """Whole seconds of the source's clock."""
    oldest_commit_ts_xid: int
    newest_commit_ts_xid: int
    oldest_active_xid: int
    """0 in shutdown checkpoints."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Settings that a server reports in pg_control and, when they change, in its WAL."""

    wal_level: int
    """0 minimal, 1 replica, 2 logical."""
    wal_log_hints: bool
    track_commit_timestamp: bool
    max_connections: int
    max_worker_processes: int
    max_wal_senders: int
    max_prepared_transactions: int
    max_locks_per_transaction: int


@dataclass(frozen=True, slots=True)
class ControlFile:
    """The contents of pg_control."""

    system_identifier: int
    control_version: int
    catalog_version: int
    major: int
    state: ClusterState
    time: Micros
    """When the file was last written; whole seconds."""
    checkpoint_lsn: Lsn
    """Where the newest checkpoint record starts."""
    checkpoint: Checkpoint
    """A copy of it."""
    unlogged_lsn: Lsn
    min_recovery_point: Lsn
    """Replay must reach this before the cluster is consistent; 0 outside archive recovery."""
    min_recovery_point_tli: int
    backup_start_point: Lsn
    backup_end_point: Lsn
    backup_end_required: bool
    wal_level: int
    """0 minimal, 1 replica, 2 logical."""
    wal_log_hints: bool
    max_connections: int
    max_worker_processes: int
    max_wal_senders: int
    max_prepared_transactions: int
    max_locks_per_transaction: int
    track_commit_timestamp: bool
    max_align: int
    block_bytes: int
    relation_segment_blocks: int
    wal_block_bytes: int
    segment_bytes: int
    """Size of a WAL segment."""
    name_bytes: int
    index_max_keys: int
    toast_chunk_bytes: int
    large_object_chunk_bytes: int
    float8_by_value: bool
    data_checksum_version: int
    """0 when data pages carry no checksums."""
    default_char_signed: bool | None
    """``None`` before Postgres 18."""

    @property
    def redo(self) -> Lsn:
        """Where recovery of this cluster begins."""
        return self.checkpoint.redo

    @property
    def tli(self) -> int:
        """The tli of the newest checkpoint."""
        return self.checkpoint.tli

    @property
    def parameters(self) -> Parameters:
        """The settings it was last run with."""
        return Parameters(**{field.name: getattr(self, field.name) for field in fields(Parameters)})

    @property
    def data_checksums(self) -> bool:
        """Whether data pages carry checksums."""
        return self.data_checksum_version != 0


def parse_checkpoint(body: bytes, major: int) -> Checkpoint:
    """The body of a checkpoint record; raises FormatError when it is cut short."""
    if len(body) < CHECKPOINT_BYTES:
        raise FormatError("checkpoint", len(body), f"expected {CHECKPOINT_BYTES} bytes")
    (
        redo, tli, prev_tli, full_page_writes, wal_level, next_xid, next_oid, next_multi, next_multi_offset,
        oldest_xid, oldest_xid_db, oldest_multi, oldest_multi_db, time, oldest_commit_ts_xid,
        newest_commit_ts_xid, oldest_active_xid,
    ) = _CHECKPOINT.unpack_from(body)  # fmt: skip
    return Checkpoint(
        redo=Lsn(redo),
        tli=tli,
        prev_tli=prev_tli,
        full_page_writes=full_page_writes,
        wal_level=wal_level if major >= 17 else None,
        next_xid=next_xid,
        next_oid=next_oid,
        next_multi=next_multi,
        next_multi_offset=next_multi_offset,
        oldest_xid=oldest_xid,
        oldest_xid_db=oldest_xid_db,
        oldest_multi=oldest_multi,
        oldest_multi_db=oldest_multi_db,
        time=time * 1_000_000,
        oldest_commit_ts_xid=oldest_commit_ts_xid,
        newest_commit_ts_xid=newest_commit_ts_xid,
        oldest_active_xid=oldest_active_xid,
    )


def format_checkpoint(point: Checkpoint) -> bytes:
    """The body of a checkpoint record that ``parse_checkpoint`` reads as this."""
    return _CHECKPOINT.pack(
        point.redo,
        point.tli,
        point.prev_tli,
        point.full_page_writes,
        point.wal_level or 0,  # padding before Postgres 17
        point.next_xid,
        point.next_oid,
        point.next_multi,
        point.next_multi_offset,
        point.oldest_xid,
        point.oldest_xid_db,
        point.oldest_multi,
        point.oldest_multi_db,
        point.time // 1_000_000,
        point.oldest_commit_ts_xid,
        point.newest_commit_ts_xid,
        point.oldest_active_xid,
    )


def parse_control(data: bytes, *, name: str = CONTROL_FILE) -> ControlFile:
    """Read a pg_control file; ``name`` is only for messages.

    Raises FormatError for a layout that is not that of a supported major, for foreign architecture, and for a
    checksum that does not match (a torn read of a running server's file: read it again, EDGE 31).
    """
    if len(data) < max(_CRC_OFFSET.values()) + 4:
        raise FormatError(name, len(data), "expected at least 296 bytes")
    system_identifier, control_version, catalog_version, state, time, checkpoint_lsn = _HEAD.unpack_from(data)
    crc_offset = _CRC_OFFSET.get(control_version)
    if crc_offset is None:
        raise FormatError(
            name,
            8,
            f"control version {control_version} is not one of Postgres 14 to 18 on a little-endian machine",
            hint="this release reads Postgres 14 to 18 of 64-bit little-endian servers",
        )
    (stored_crc,) = struct.unpack_from("<I", data, crc_offset)
    if stored_crc != google_crc32c.value(bytes(data[:crc_offset])):
        raise FormatError(name, crc_offset, "checksum does not match the contents")
    major = _MAJOR_OF_CATALOG.get(catalog_version)
    if major is None or _VERSION_OF_MAJOR[major] != control_version:
        raise FormatError(
            name,
            12,
            f"catalog version {catalog_version} is not that of a released Postgres 14 to 18",
            hint="development versions and forks of Postgres are not supported",
        )
    (
        unlogged_lsn, min_recovery_point, min_recovery_point_tli, backup_start_point, backup_end_point,
        backup_end_required, wal_level, wal_log_hints, max_connections, max_worker_processes, max_wal_senders,
        max_prepared, max_locks, track_commit_timestamp, max_align, float_probe, block_bytes,
        relation_segment_blocks, wal_block_bytes, segment_bytes, name_bytes, index_max_keys,
        toast_chunk_bytes, large_object_chunk_bytes, float8_by_value, data_checksum_version,
    ) = _TAIL.unpack_from(data, _TAIL_OFFSET)  # fmt: skip
    if float_probe != _FLOAT_PROBE or max_align != 8:
        raise FormatError(name, 204, "expected 8-byte alignment and IEEE floats, as on 64-bit machines")
    try:
        cluster_state = ClusterState(state)
    except ValueError:
        raise FormatError(name, 16, f"unknown cluster state {state}") from None
    return ControlFile(
        system_identifier=system_identifier,
        control_version=control_version,
        catalog_version=catalog_version,
        major=major,
        state=cluster_state,
        time=time * 1_000_000,
        checkpoint_lsn=Lsn(checkpoint_lsn),
        checkpoint=parse_checkpoint(bytes(data[_CHECKPOINT_OFFSET:_TAIL_OFFSET]), major),
        unlogged_lsn=Lsn(unlogged_lsn),
        min_recovery_point=Lsn(min_recovery_point),
        min_recovery_point_tli=min_recovery_point_tli,
        backup_start_point=Lsn(backup_start_point),
        backup_end_point=Lsn(backup_end_point),
        backup_end_required=backup_end_required,
        wal_level=wal_level,
        wal_log_hints=wal_log_hints,
        max_connections=max_connections,
        max_worker_processes=max_worker_processes,
        max_wal_senders=max_wal_senders,
        max_prepared_transactions=max_prepared,
        max_locks_per_transaction=max_locks,
        track_commit_timestamp=track_commit_timestamp,
        max_align=max_align,
        block_bytes=block_bytes,
        relation_segment_blocks=relation_segment_blocks,
        wal_block_bytes=wal_block_bytes,
        segment_bytes=segment_bytes,
        name_bytes=name_bytes,
        index_max_keys=index_max_keys,
        toast_chunk_bytes=toast_chunk_bytes,
        large_object_chunk_bytes=large_object_chunk_bytes,
        float8_by_value=float8_by_value,
        data_checksum_version=data_checksum_version,
        default_char_signed=bool(data[_CHAR_SIGNED_OFFSET]) if major >= 18 else None,
    )


def rewrite_control(data: bytes, control: ControlFile) -> bytes:
    """The pg_control file ``data`` with the values of ``control`` and a checksum that fits them.

    Bytes that ControlFile says nothing of, like the authentication nonce, stay. Raises FormatError when
    ``data`` is not an intact pg_control, or is one of another cluster or layout.
    """
    old = parse_control(data)
    if (old.system_identifier, old.catalog_version) != (control.system_identifier, control.catalog_version):
        raise FormatError(CONTROL_FILE, 0, "expected the same cluster and major version")
    out = bytearray(data)
    _HEAD.pack_into(
        out,
        _HEAD_OFFSET,
        control.system_identifier,
        control.control_version,
        control.catalog_version,
        control.state,
        control.time // 1_000_000,
        control.checkpoint_lsn,
    )
    out[_CHECKPOINT_OFFSET:_TAIL_OFFSET] = format_checkpoint(control.checkpoint)
    _TAIL.pack_into(
        out,
        _TAIL_OFFSET,
        control.unlogged_lsn,
        control.min_recovery_point,
        control.min_recovery_point_tli,
        control.backup_start_point,
        control.backup_end_point,
        control.backup_end_required,
        control.wal_level,
        control.wal_log_hints,
        control.max_connections,
        control.max_worker_processes,
        control.max_wal_senders,
        control.max_prepared_transactions,
        control.max_locks_per_transaction,
        control.track_commit_timestamp,
        control.max_align,
        _FLOAT_PROBE,
        control.block_bytes,
        control.relation_segment_blocks,
        control.wal_block_bytes,
        control.segment_bytes,
        control.name_bytes,
        control.index_max_keys,
        control.toast_chunk_bytes,
        control.large_object_chunk_bytes,
        control.float8_by_value,
        control.data_checksum_version,
    )
    if control.default_char_signed is not None:
        out[_CHAR_SIGNED_OFFSET] = control.default_char_signed
    crc_offset = _CRC_OFFSET[control.control_version]
    struct.pack_into("<I", out, crc_offset, google_crc32c.value(bytes(out[:crc_offset])))
    return bytes(out)
