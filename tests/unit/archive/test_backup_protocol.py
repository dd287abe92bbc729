"""The words of BASE_BACKUP per major version."""

from __future__ import annotations

import struct

import pytest

from timeline.archive.backup_protocol import (
    ArchiveData,
    NewArchive,
    ServerProgress,
    SourceTablespace,
    base_backup_command,
    parse_copy_message,
    parse_position,
    parse_tablespace,
)
from timeline.archive.tar_stream import BackupStreamError
from timeline.lsn import Lsn


def test_command_per_major() -> None:
    new = base_backup_command(15, label="it's", fast=False, rate_kb=2048)
    assert new == (
        b"BASE_BACKUP (LABEL 'it''s', PROGRESS true, CHECKPOINT 'spread', WAIT false, TABLESPACE_MAP true, "
        b"MANIFEST 'no', VERIFY_CHECKSUMS true, MAX_RATE 2048)"
    )
    old = base_backup_command(14, label="x", fast=True, rate_kb=None)
    assert old == b"BASE_BACKUP LABEL 'x' PROGRESS FAST NOWAIT TABLESPACE_MAP MANIFEST 'no'"


def test_messages() -> None:
    assert parse_copy_message(memoryview(b"nbase.tar\0\0")) == NewArchive("base.tar", None)
    assert parse_copy_message(memoryview(b"n16384.tar\0/srv/space\0")) == NewArchive("16384.tar", 16384)
    assert parse_copy_message(memoryview(b"p" + struct.pack("!q", 5 << 40))) == ServerProgress(5 << 40)
    data = parse_copy_message(memoryview(b"dabc"))
    assert isinstance(data, ArchiveData) and bytes(data.data) == b"abc"


@pytest.mark.parametrize("message", [b"", b"x", b"p123", b"nbase.tar", b"nwhat\0/path\0", b"m"])
def test_other_messages_are_refused(message: bytes) -> None:
    with pytest.raises(BackupStreamError, match="unexpected message"):
        parse_copy_message(memoryview(message))


def test_rows() -> None:
    assert parse_position([b"1/5A0003F8", b"3"]) == (Lsn.parse("1/5A0003F8"), 3)
    assert parse_tablespace([b"16384", b"/srv", b"12"]) == SourceTablespace(16384, "/srv", 12288)
    assert parse_tablespace([None, None, None]) == SourceTablespace(None, None, None)
    with pytest.raises(BackupStreamError):
        parse_position([b"1/0"])
    with pytest.raises(BackupStreamError):
        parse_tablespace([b"1"])
