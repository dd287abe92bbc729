"""What of a source's data directory belongs in a snapshot, and in which form.

The server leaves out most of what must not be copied (src/backend/backup/basebackup.c). Here go, in
addition: the label and tablespace map, which the snapshot keeps in other places (in a branch tablespaces
are directories, so a map would make Postgres create links into the source's paths); what such files of an
earlier restore left behind; and signal files, which are orders to a server and not data (P8).
"""

from __future__ import annotations

from dataclasses import dataclass

INLINE_BYTES = 1024
"""A file up to this size stands in the file listing itself."""
CONTROL_FILE = "global/pg_control"
BACKUP_LABEL = "backup_label"
TABLESPACE_DIRECTORY = "pg_tblspc"

_LEFT_OUT = frozenset(
    {
        "backup_label",
        "backup_label.old",
        "backup_manifest",
        "postgresql.auto.conf.tmp",
        "postmaster.opts",
        "postmaster.pid",
        "recovery.signal",
        "standby.signal",
        "tablespace_map",
        "tablespace_map.old",
    }
)
_EMPTIED = frozenset(
    {
        "pg_dynshmem",
        "pg_notify",
        "pg_replslot",
        "pg_serial",
        "pg_snapshots",
        "pg_stat_tmp",
        "pg_subtrans",
        "pg_wal",
    }
)


@dataclass(frozen=True, slots=True)
class Treatment:
    """What to do with a member of the archive."""

    listed: bool
    inline: bool
    """Keep the content in the listing (or, for the label, for the snapshot) instead of cutting it into
    extents."""


def treat(path: str, kind: str, size: int) -> Treatment:
    """Decide by path, kind (``f``, ``d``, ``l``) and size."""
    if path in _LEFT_OUT:
        return Treatment(listed=False, inline=path == BACKUP_LABEL)
    top, _, rest = path.partition("/")
    if rest and top in _EMPTIED and not (kind == "d" and top == "pg_wal"):
        return Treatment(listed=False, inline=False)
    inline = kind == "f" and (size <= INLINE_BYTES or path == CONTROL_FILE)
    return Treatment(listed=True, inline=inline)


def is_storable(path: str) -> bool:
    """Whether a file listing can hold the name: it must be text."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
