"""How a base backup differs from the newest snapshot: values for a report.

A difference is no verdict. The snapshot is older than the backup, so whatever was written in between
differs, and a page may change without any WAL (hint bits). Only replaying the snapshot to the backup's own
position could tell drift from work; here differences are counted and the ones that the pages' own LSNs
account for are told from the rest.

Memory: MAX_LISTED files.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass

import numpy as np

from timeline.format.extent import BLOCK_BYTES
from timeline.lsn import Lsn

MAX_LISTED = 100
"""Files named in a report; those with most differences win. All are counted."""

_RELATION = re.compile(r"(?:global|base/\d+|pg_tblspc/\d+/PG_[0-9_]+/\d+)/\d+(?:_fsm|_vm|_init)?(?:\.\d+)?")
_LSN_HALVES = np.dtype([("high", "<u4"), ("low", "<u4"), ("rest", "V8184")])


@dataclass(frozen=True, slots=True)
class FileDifference:
    """One file that is not what the snapshot has."""

    path: str
    kind: str
    """``changed``, ``added`` or ``removed``."""
    groups: int
    """Groups of 128 KiB it has now."""
    changed: int
    """Of those, how many differ."""
    unexplained: int
    """Of those, how many hold no page with an LSN after the snapshot: hint bits, no relation file, or
    drift."""


@dataclass(frozen=True, slots=True)
class Differences:
    """A base backup against the newest snapshot before it."""

    snapshot: str
    """Id of the snapshot."""
    snapshot_lsn: Lsn
    files_added: int
    files_removed: int
    files_changed: int
    groups_equal: int
    groups_changed: int
    groups_unexplained: int
    """Of the changed ones, as in FileDifference."""
    groups_not_compared: int
    """The snapshot has them in several overlapping extents: stored again without reading them back."""
    listed: tuple[FileDifference, ...]
    """At most MAX_LISTED, most differences first."""


class Comparison:
    """Collects differences file by file, in any order."""

    def __init__(self, snapshot: str, lsn: Lsn) -> None:
        self._snapshot = snapshot
        self._lsn = lsn
        self._largest: list[tuple[int, str, FileDifference]] = []
        self._counts = {"added": 0, "removed": 0, "changed": 0}
        self._equal = 0
        self._changed = 0
        self._unexplained = 0
        self._not_compared = 0

    @property
    def lsn(self) -> Lsn:
        """The snapshot's position: pages after it are expected to differ."""
        return self._lsn

    def count_equal(self, groups: int = 1) -> None:
        """Groups that are what the snapshot has."""
        self._equal += groups

    def count_not_compared(self, groups: int = 1) -> None:
        """Groups that were not compared."""
        self._not_compared += groups

    def add(self, difference: FileDifference) -> None:
        """A file that differs."""
        self._counts[difference.kind] += 1
        self._changed += difference.changed
        self._unexplained += difference.unexplained
        entry = (difference.changed, difference.path, difference)
        if len(self._largest) < MAX_LISTED:
            heapq.heappush(self._largest, entry)
        else:
            heapq.heappushpop(self._largest, entry)

    def differences(self) -> Differences:
        """The sum of it."""
        return Differences(
            self._snapshot,
            self._lsn,
            self._counts["added"],
            self._counts["removed"],
            self._counts["changed"],
            self._equal,
            self._changed,
            self._unexplained,
            self._not_compared,
            tuple(entry[2] for entry in sorted(self._largest, key=lambda entry: (-entry[0], entry[1]))),
        )


def explained_by_lsn(path: str, group: bytes | memoryview, since: Lsn) -> bool:
    """Whether some page of the group was written by WAL after ``since`` (its LSN,
    src/include/storage/bufpage.h)."""
    whole = len(group) // BLOCK_BYTES
    if not whole or _RELATION.fullmatch(path) is None:
        return False
    pages = np.frombuffer(group, _LSN_HALVES, whole)
    lsns = pages["high"].astype(np.uint64) << np.uint64(32) | pages["low"]
    return bool((lsns > np.uint64(since)).any())
