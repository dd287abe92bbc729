"""What a stopped server changed, told by its overlay: rows of a new file listing, and files with blocks to store.

The overlay must have no mount any more: only then has the kernel handed over everything. What a listing never
holds (the rule for base backups) is left out, and so is what is ours and not the source's: our
configuration, whose place the snapshot's own files take again, and ``pg_wal``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from restore.overlay import DIRECTORY, SYMLINK, WHITEOUT, Entry, Overlay
from restore.sparse import data_ranges
from timeline.archive.backup_files import treat
from timeline.errors import CheckFailed
from timeline.format.extent import BLOCK_BYTES, GROUP_BLOCKS
from timeline.format.file_listing import FileListing
from timeline.format.manifest import FileRow
from timeline.lsn import Lsn

_CONFIGURATION = frozenset({"postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf"})
_WAL = "pg_wal"
_FORK = re.compile(r"((?:base|pg_tblspc/\d+/PG_[^/]+)/\d+/|global/)(\d+)(_init|_fsm|_vm)?(?:\.\d+)?")
_RELATION_CACHE = "pg_internal.init"
_STATISTICS = "pg_stat/"


@dataclass(frozen=True, slots=True)
class ChangedFile:
    """A file of the overlay."""

    path: str
    size: int
    mode: int
    shown: FileRow | None
    """The snapshot's file that shows through below ``valid_bytes``."""
    valid_bytes: int
    whole: bool
    """Nothing of it is in older manifests under this path: all of it is stored."""


@dataclass(slots=True)
class Changes:
    """A new listing, but for the rows of the changed files."""

    rows: list[FileRow] = field(default_factory=list)
    files: list[ChangedFile] = field(default_factory=list)


def find_changes(overlay: Overlay, listing: FileListing, lsn: Lsn) -> Changes:
    """Everything the overlay shows over the snapshot; ``lsn``: from which on new directories exist.

    Raises CheckFailed for what no recovery does: links, and directories that were renamed.
    """
    changes = Changes()
    _visit(overlay, listing, "", True, lsn, changes)
    unlogged = {_relation(row.path) for row in changes.rows if _is_init_fork(row.path)}
    unlogged |= {_relation(file.path) for file in changes.files if _is_init_fork(file.path)}

    def is_reset(path: str) -> bool:
        # Replay made these from their init forks, as every start does; a base backup leaves them out (EDGE 29).
        return not _is_init_fork(path) and (relation := _relation(path)) is not None and relation in unlogged

    changes.rows = [row for row in changes.rows if not is_reset(row.path)]
    changes.files = [file for file in changes.files if not is_reset(file.path)]
    return changes


def changed_runs(fd: int, file: ChangedFile) -> Iterator[tuple[int, int, int]]:
    """(group, first block inside it, number of blocks) of what is to be stored, ascending.

    ``fd``: the overlay's file. Above the valid mark everything is: older manifests may name blocks there that
    were cut off since.
    """
    blocks = -(-file.size // BLOCK_BYTES)
    shown_blocks = 0 if file.whole else min(blocks, file.valid_bytes // BLOCK_BYTES)
    first = last = 0
    for start, stop in data_ranges(fd, 0, shown_blocks * BLOCK_BYTES):
        begin, end = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        if begin > last:
            yield from _by_group(first, last)
            first = begin
        last = max(last, end)
    if last < shown_blocks:
        yield from _by_group(first, last)
        first = shown_blocks
    yield from _by_group(first, blocks)


def is_relation(path: str) -> bool:
    """Whether the file holds pages with a page header."""
    return _FORK.fullmatch(path) is not None


def _by_group(first: int, last: int) -> Iterator[tuple[int, int, int]]:
    while first < last:
        group = first // GROUP_BLOCKS
        stop = min(last, (group + 1) * GROUP_BLOCKS)
        yield group, first % GROUP_BLOCKS, stop - first
        first = stop


def _visit(
    overlay: Overlay, listing: FileListing, directory: str, shows: bool, lsn: Lsn, changes: Changes
) -> None:
    """One directory that the overlay has; ``shows``: the snapshot's of the same path shows through."""
    own = set(overlay.names(directory))
    rows = {row.path: row for row in listing.children(directory)} if shows else {}
    paths = {f"{directory}/{name}" if directory else name for name in own}
    for path in sorted(paths | rows.keys()):
        row = rows.get(path)
        entry = overlay.lookup(path) if path in paths else None
        if path in _CONFIGURATION or path == _WAL or entry is None:
            if row is not None:
                _keep(listing, row, changes)
        elif entry.kind != WHITEOUT:
            _take(overlay, listing, path, entry, row, lsn, changes)


def _take(
    overlay: Overlay,
    listing: FileListing,
    path: str,
    entry: Entry,
    row: FileRow | None,
    lsn: Lsn,
    changes: Changes,
) -> None:
    if entry.kind == SYMLINK:
        raise CheckFailed(f"recovery made a link of {path}")
    if entry.kind == DIRECTORY:
        if entry.base not in (None, path):
            raise CheckFailed(f"recovery renamed directory {entry.base} to {path}")
        if not _is_listed(path, "d", 0):
            return
        shows = entry.base == path
        changes.rows.append(
            row if row is not None and shows else FileRow(path, "d", 0, entry.mode, None, None, lsn)
        )
        _visit(overlay, listing, path, shows, lsn, changes)
        return
    if not _is_listed(path, "f", entry.size):
        return
    shown = listing.get(entry.base) if entry.base is not None else None
    same = row is not None and shown is not None and shown.path == path and row.content is None
    changes.files.append(ChangedFile(path, entry.size, entry.mode, shown, entry.valid_bytes, whole=not same))


def _keep(listing: FileListing, row: FileRow, changes: Changes) -> None:
    """A row of the snapshot with everything below it."""
    if not _is_listed(row.path, row.kind, row.size):
        return
    changes.rows.append(row)
    if row.kind != "f":
        for child in listing.children(row.path):
            _keep(listing, child, changes)


def _is_listed(path: str, kind: str, size: int) -> bool:
    if path.endswith("/" + _RELATION_CACHE) or path.startswith(_STATISTICS):
        return False
    return treat(path, kind, size).listed


def _relation(path: str) -> str | None:
    """What all forks of a relation have in common."""
    match = _FORK.fullmatch(path)
    return None if match is None else match[1] + match[2]


def _is_init_fork(path: str) -> bool:
    match = _FORK.fullmatch(path)
    return match is not None and match[3] == "_init"
