"""What BASE_BACKUP says on the wire (doc/src/sgml/protocol.sgml, src/backend/backup/basebackup_copy.c),
without I/O.

Since Postgres 15 one COPY carries everything in messages that begin with a type byte; in 14 and before
there is one COPY of raw tar data for each tablespace, in the order of the tablespace list, and the options
are bare words.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from timeline.archive.tar_stream import BackupStreamError
from timeline.lsn import Lsn

MIN_RATE_KB = 32
MAX_RATE_KB = 1_048_576
"""What the server takes for MAX_RATE (src/backend/backup/basebackup.c)."""
_TYPED_MESSAGES_SINCE = 15


@dataclass(frozen=True, slots=True)
class SourceTablespace:
    """One row of the server's tablespace list; the data directory itself comes last and has no oid."""

    oid: int | None
    path: str | None
    size_bytes: int | None
    """The server's estimate, to whole KiB; only with PROGRESS."""


@dataclass(frozen=True, slots=True)
class NewArchive:
    """A new tar archive begins; ``oid`` is ``None`` for the data directory."""

    name: str
    oid: int | None


@dataclass(frozen=True, slots=True)
class ArchiveData:
    """The next bytes of the archive."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class ServerProgress:
    """Bytes the server has sent so far."""

    bytes_done: int


Message = NewArchive | ArchiveData | ServerProgress


def has_typed_messages(major: int) -> bool:
    """Whether the COPY carries typed messages (see above)."""
    return major >= _TYPED_MESSAGES_SINCE


def base_backup_command(major: int, *, label: str, fast: bool, rate_kb: int | None) -> bytes:
    """The command. WAL is not asked for, and not waited for: we archive it ourselves, and the source may
    have no archive_command at all. Checksums are verified by the server (its default)."""
    quoted = "'" + label.replace("'", "''") + "'"
    if not has_typed_messages(major):
        words = ["BASE_BACKUP LABEL", quoted, "PROGRESS"]
        if fast:
            words.append("FAST")
        words.append("NOWAIT")
        if rate_kb is not None:
            words.append(f"MAX_RATE {rate_kb}")
        words.append("TABLESPACE_MAP MANIFEST 'no'")
        return " ".join(words).encode()
    options = [
        f"LABEL {quoted}",
        "PROGRESS true",
        f"CHECKPOINT '{'fast' if fast else 'spread'}'",
        "WAIT false",
        "TABLESPACE_MAP true",
        "MANIFEST 'no'",
        "VERIFY_CHECKSUMS true",
    ]
    if rate_kb is not None:
        options.append(f"MAX_RATE {rate_kb}")
    return f"BASE_BACKUP ({', '.join(options)})".encode()


def parse_copy_message(data: memoryview) -> Message:
    """One CopyData message of Postgres 15 and later; raises BackupStreamError."""
    kind = bytes(data[:1])
    if kind == b"d":
        return ArchiveData(data[1:])
    if kind == b"p" and len(data) == 9:
        return ServerProgress(struct.unpack_from("!q", data, 1)[0])
    if kind == b"n":
        parts = bytes(data[1:]).split(b"\0")
        if len(parts) == 3:
            name = parts[0].decode("utf-8", "surrogateescape")
            oid = name.removesuffix(".tar")
            if parts[1] == b"":
                return NewArchive(name, None)
            if oid.isdigit():
                return NewArchive(name, int(oid))
    raise BackupStreamError(f"unexpected message in a base backup: {bytes(data[:64])!r}, {len(data)} bytes")


def parse_position(columns: list[bytes | None]) -> tuple[Lsn, int]:
    """(LSN, tli) of the rows that begin and end a backup."""
    if len(columns) < 2 or columns[0] is None or columns[1] is None:
        raise BackupStreamError("expected a position and a tli in a base backup")
    return Lsn.parse(columns[0].decode()), int(columns[1])


def parse_tablespace(columns: list[bytes | None]) -> SourceTablespace:
    """One row of the tablespace list."""
    if len(columns) != 3:
        raise BackupStreamError("expected oid, location and size of a tablespace")
    oid, path, size = columns
    return SourceTablespace(
        int(oid) if oid is not None else None,
        path.decode("utf-8", "surrogateescape") if path is not None else None,
        int(size) * 1024 if size is not None else None,
    )
