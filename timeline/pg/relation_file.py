"""Which files of a data directory are relations, and which blocks of them a file holds.

Names: src/common/relpath.c. Files of databases lie in ``base/<database>``, in ``global`` or below a tablespace;
a relation's file is its number, perhaps a fork, perhaps the number of a segment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PAGE_BYTES = 8192

_RELATION = re.compile(
    r"(?:base/\d+|global|pg_tblspc/\d+/[^/]+/\d+)/\d+(?:_(?:fsm|vm|init))?(?:\.(?P<segment>[1-9]\d*))?"
)


@dataclass(frozen=True, slots=True)
class RelationFile:
    """One segment of one fork of a relation."""

    segment: int
    """0 is the first."""

    def first_block(self, segment_bytes: int) -> int:
        """Number, in its fork, of the first block of this file."""
        return self.segment * (segment_bytes // PAGE_BYTES)


def parse_relation_file(path: str) -> RelationFile | None:
    """What the path, relative to the data directory, says; ``None`` for a file that is not made of pages."""
    match = _RELATION.fullmatch(path)
    return RelationFile(int(match["segment"] or 0)) if match else None
