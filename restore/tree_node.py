"""What a Tree remembers: nodes, open files, open directories; and what it tells of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from restore.open_file import BaseContent, OpenFile
from restore.overlay import DIRECTORY, FILE
from restore.read_ahead import ReadAhead
from timeline.format.manifest import FileRow


class SnapshotContent(BaseContent, Protocol):
    """The content of one of the snapshot's files."""

    def read_ahead(self, groups: range) -> int:
        """Begin to fetch these groups; the first one that was not taken on, for the time being."""
        ...


@dataclass(frozen=True, slots=True)
class Attributes:
    """What ``stat`` tells."""

    inode: int
    kind: str
    """FILE, DIRECTORY or SYMLINK."""
    size: int
    mode: int
    """Permission bits."""
    mtime_ns: int
    links: int


@dataclass(slots=True, eq=False)
class Node:
    """One file, directory or symlink at its present place."""

    inode: int
    parent: Node | None
    name: str
    kind: str
    base: str | None
    """Snapshot path that shows through."""
    lookups: int = 0
    """References the kernel holds; of the snapshot's own inodes they are counted in Tree._row_lookups."""
    opens: int = 0
    file: OpenFile | None = None
    content: SnapshotContent | None = None
    gone: bool = False
    """Removed or replaced, and still open or known."""


@dataclass(slots=True, eq=False)
class Handle:
    node: Node
    file: OpenFile
    ahead: ReadAhead = field(default_factory=ReadAhead)


@dataclass(slots=True, eq=False)
class DirectoryHandle:
    node: Node
    own: list[str]
    """Names the overlay had when the directory was opened, whiteouts included, sorted."""
    own_set: frozenset[str]
    rows: range


def shown_kind(row: FileRow) -> str:
    """FILE or DIRECTORY: a symlink of the snapshot is never followed."""
    return FILE if row.kind == FILE else DIRECTORY


def shown_mode(row: FileRow) -> int:
    """Permission bits, with the owner's, who alone may enter the root."""
    if row.kind == FILE:
        return row.mode & 0o7777 | 0o600
    return (row.mode & 0o7777 if row.kind == DIRECTORY else 0o700) | 0o700
