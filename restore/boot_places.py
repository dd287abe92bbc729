"""Which groups the boot set of a built snapshot holds: its parent's, and what names and sizes add."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from timeline.archive.boot_set import SHARED, BootRule
from timeline.format.extent import GROUP_BYTES
from timeline.format.manifest import PageRow

_DATABASE = re.compile(r"(?:base|pg_tblspc/\d+/PG_[^/]+)/(\d+)/")


def boot_places(previous: Iterable[PageRow], sizes: Mapping[str, int]) -> dict[tuple[str, int], int]:
    """(path, group) → the database on whose budget it is; ``sizes``: of all files that have extents."""
    places = {
        (row.path, row.group): _database(row.path)
        for row in previous
        if row.group * GROUP_BYTES < sizes.get(row.path, 0)
    }
    databases = sorted({database for database in places.values() if database != SHARED})
    rule = BootRule(databases, {})
    for path, size in sizes.items():
        found = rule.boot_file(path, size)
        if found is not None:
            places.update(((path, group), found.database) for group in range(found.groups))
    return places


def _database(path: str) -> int:
    match = _DATABASE.match(path)
    return SHARED if match is None else int(match[1])
