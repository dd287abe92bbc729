"""What the rows of a manifest must be, beyond being intact: whole row groups at a time. Pure.

What is checked: page rows ascend, lie within their group and do not overlap [PAG-1]; listings ascend, every
directory that has entries is itself listed [FIL-1], inline content is as long as the file [FIL-2], kinds are
known. A file needs no extent at all [PAG-3]: what no extent names is zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from timeline.errors import DamagedStore
from timeline.format.extent import BLOCK_BYTES, GROUP_BYTES
from timeline.format.sorted_texts import SortedTexts

PAGE_COLUMNS = ("path", "group", "first_block", "raw_bytes", "pack", "offset", "stored_bytes")
PAGE_DICTIONARY = ("path", "pack")
FILE_COLUMNS = ("directory", "name", "kind", "size", "content")
FILE_DICTIONARY = ("directory", "kind")
_KINDS = {"f", "d", "l"}


def check_page_rows(table: Any, key: str, offset: int) -> None:
    """Raises DamagedStore(key, offset, …) for a row group of pages that breaks the rules."""
    if not table.num_rows:
        return
    paths = SortedTexts(table.column("path").combine_chunks())
    if not paths.ascending:
        raise DamagedStore(key, offset, "expected rows sorted by path")
    group = table.column("group").to_numpy().astype(np.uint64)
    places = paths.ranks.astype(np.uint64) << np.uint64(32) | group
    begin = table.column("first_block").to_numpy().astype(np.int64) * BLOCK_BYTES
    raw = table.column("raw_bytes").to_numpy().astype(np.int64)
    end = begin + raw
    if (raw == 0).any() or (end > GROUP_BYTES).any():
        raise DamagedStore(key, offset, "expected every extent inside its group")
    same = places[1:] == places[:-1]
    if (places[1:] < places[:-1]).any() or (begin[1:] < end[:-1])[same].any():
        raise DamagedStore(key, offset, "expected rows sorted by group and block, without overlaps")


class ListingRules:
    """Follows one file listing through its row groups. Holds the names of its directories."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._last: tuple[str, str] | None = None
        self._parents: set[str] = set()
        self._directories = {""}

    def feed(self, table: Any, offset: int) -> None:
        """The next row group; raises DamagedStore."""
        if not table.num_rows:
            return
        kinds = set(table.column("kind").combine_chunks().dictionary.to_pylist())
        if not kinds <= _KINDS:
            raise DamagedStore(
                self._key, offset, f"expected files, directories and links, found {kinds - _KINDS}"
            )
        parents = SortedTexts(table.column("directory").combine_chunks())
        names = table.column("name").combine_chunks()
        first = (parents[0], names[0].as_py())
        ascending = pc.all(_inside(parents, pc.less(names[:-1], names[1:])), min_count=0).as_py()
        if not parents.ascending or not ascending or (self._last is not None and first <= self._last):
            raise DamagedStore(self._key, offset, "expected rows sorted by directory and name")
        self._last = (parents[len(parents) - 1], names[-1].as_py())
        self._parents.update(parents)
        self._check_content(table, offset)
        directories = table.filter(pc.equal(table.column("kind").cast(pa.string()), "d"))
        for directory, name in zip(
            directories.column("directory").to_pylist(), directories.column("name").to_pylist(), strict=True
        ):
            self._directories.add(f"{directory}/{name}" if directory else name)

    def end(self) -> None:
        """After the last row group; raises DamagedStore."""
        unknown = sorted(self._parents - self._directories)
        if unknown:
            raise DamagedStore(self._key, 0, f"expected a row for the directory {unknown[0]}")

    def _check_content(self, table: Any, offset: int) -> None:
        lengths = pc.binary_length(table.column("content"))
        equal = pc.equal(lengths.cast(pa.uint64()), table.column("size"))
        if not pc.all(equal, min_count=0).as_py():
            raise DamagedStore(self._key, offset, "expected inline content as long as its file")


def _inside(parents: SortedTexts, less: Any) -> Any:
    """The comparisons of neighbours within one directory; those across two are null."""
    across = np.zeros(len(less), bool)
    across[parents.starts[1:-1] - 1] = True
    return pc.if_else(pa.array(across), pa.scalar(None, pa.bool_()), less)
