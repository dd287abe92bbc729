"""The sorted text column of a manifest, searchable without making Python strings of it."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

_KNOWN = 64
"""Ranks remembered: many lookups in a row ask for few texts, and each text of the search is made from its bytes."""


class SortedTexts:
    """Distinct texts of a sorted dictionary column, and where the rows of each begin.

    The order is that of the rows, not of the file's dictionary: another writer's need not be sorted. Nothing
    here may touch ``pyarrow.compute``, whose import alone takes as long as decoding fifty row groups.
    """

    __slots__ = ("_codes", "_dictionary", "_known", "starts")

    def __init__(self, column: Any) -> None:
        """``column``: a dictionary-encoded Arrow array."""
        codes = column.indices.to_numpy()
        changes = np.flatnonzero(codes[1:] != codes[:-1]) + 1
        first = [0] if len(codes) else []
        self.starts: npt.NDArray[np.int64] = np.concatenate((first, changes, [len(codes)])).astype(np.int64)
        """First row of each text, and at last the number of rows."""
        self._codes = codes[self.starts[:-1]]
        self._dictionary = column.dictionary
        self._known: dict[str, int | None] = {}

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, rank: int) -> str:
        return str(self._dictionary[int(self._codes[rank])].as_py())

    def __iter__(self) -> Iterator[str]:
        texts = self._dictionary.to_pylist()
        return (texts[code] for code in self._codes.tolist())

    def find(self, text: str) -> int | None:
        """Rank of the text, ``None`` when it is not there."""
        try:
            return self._known[text]
        except KeyError:
            pass
        rank = bisect.bisect_left(self, text)
        found = rank if rank < len(self) and self[rank] == text else None
        if len(self._known) >= _KNOWN:
            self._known.clear()
        self._known[text] = found
        return found

    @property
    def ranks(self) -> npt.NDArray[np.int64]:
        """Rank of every row's text."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    @property
    def ascending(self) -> bool:
        """Whether the texts ascend, each occurring in one run of rows."""
        return all(one < two for one, two in pairwise(self))

    @property
    def nbytes(self) -> int:
        """Memory it holds."""
        return int(self.starts.nbytes + self._codes.nbytes + self._dictionary.nbytes)
