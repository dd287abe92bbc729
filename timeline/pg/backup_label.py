"""backup_label and tablespace_map: where a base backup begins, and where its tablespaces lay.

Sources: src/backend/access/transam/xlogbackup.c (written), xlogrecovery.c (read).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from timeline.lsn import Lsn
from timeline.pg.errors import FormatError

BACKUP_LABEL_FILE = "backup_label"
TABLESPACE_MAP_FILE = "tablespace_map"

_START = re.compile(r"([0-9A-F]+/[0-9A-F]+) \(file ([0-9A-F]{24})\)")


@dataclass(frozen=True, slots=True)
class BackupLabel:
    """The contents of a backup_label file."""

    start: Lsn
    """The backup's redo point: replay begins here."""
    start_segment: str
    """Name of the segment file that holds it."""
    checkpoint: Lsn
    """Where the backup's checkpoint record starts."""
    tli: int
    method: str
    """``streamed`` for backups of a running server, ``pg_rewind`` otherwise."""
    from_standby: bool
    start_time: str
    """As the server wrote it, in its own log_timezone: for people only."""
    label: str


def parse_backup_label(text: str) -> BackupLabel:
    """Read a backup_label; raises FormatError naming the line that is missing or wrong.

    An incremental backup (Postgres 17) is refused: it is no data directory.
    """
    fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    if "INCREMENTAL FROM LSN" in fields:
        raise FormatError(
            BACKUP_LABEL_FILE,
            0,
            "this is an incremental backup",
            hint="combine it with pg_combinebackup first",
        )

    def field(name: str) -> str:
        if name not in fields:
            raise FormatError(BACKUP_LABEL_FILE, 0, f"expected a line {name!r}")
        return fields[name]

    start = _START.fullmatch(field("START WAL LOCATION"))
    if start is None:
        raise FormatError(BACKUP_LABEL_FILE, 0, "expected START WAL LOCATION: X/Y (file NAME)")
    checkpoint = field("CHECKPOINT LOCATION")
    if not Lsn.is_text(checkpoint):
        raise FormatError(BACKUP_LABEL_FILE, 0, "expected CHECKPOINT LOCATION: X/Y")
    tli = int(start[2][:8], 16)
    if fields.get("START TIMELINE", str(tli)) != str(tli):
        raise FormatError(
            BACKUP_LABEL_FILE, 0, f"expected START TIMELINE: {tli}, the tli of the segment named"
        )
    return BackupLabel(
        start=Lsn.parse(start[1]),
        start_segment=start[2],
        checkpoint=Lsn.parse(checkpoint),
        tli=tli,
        method=field("BACKUP METHOD"),
        from_standby=field("BACKUP FROM") == "standby",
        start_time=fields.get("START TIME", ""),
        label=fields.get("LABEL", ""),
    )


@dataclass(frozen=True, slots=True)
class TablespaceLink:
    """One row of a tablespace_map file."""

    oid: int
    path: str
    """Absolute, on the source's host."""


def parse_tablespace_map(text: str) -> tuple[TablespaceLink, ...]:
    """Rows of a tablespace_map; raises FormatError naming the line.

    A backslash takes the next character literally, even a newline.
    """
    links: list[TablespaceLink] = []
    entry: list[str] = []
    number = 1
    escaped = False
    for char in [*text, "\n"]:
        if not escaped and char in "\r\n":
            if entry:
                oid, space, path = "".join(entry).partition(" ")
                if not (oid.isdecimal() and space and path):
                    raise FormatError("tablespace_map, line", number, "expected: OID, space, path")
                links.append(TablespaceLink(int(oid), path))
                entry.clear()
            number += 1
        elif not escaped and char == "\\":
            escaped = True
        else:
            entry.append(char)
            escaped = False
    if escaped or entry:
        raise FormatError("tablespace_map, line", number, "expected a character after the last backslash")
    return tuple(links)
