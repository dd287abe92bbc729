"""A part of a store's packs, by the first digits of their names, so that several can read one store. Pure.

Names are digests, so equal parts of the names are about equal parts of the bytes, and every pack is in exactly one part
whoever divides, and whatever was added meanwhile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from timeline.errors import UsageError

MAX_PARTS = 256
_DIGEST_BYTES = 32
_PREFIXES = 1 << 16
"""The first four hex digits decide."""
_TEXT = re.compile(r"(\d{1,3})/(\d{1,3})")


@dataclass(frozen=True, slots=True)
class Part:
    """Part ``number`` of ``of``, 1 ≤ number ≤ of ≤ MAX_PARTS."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read ``K/N``; raises UsageError."""
        found = _TEXT.fullmatch(text.strip())
        if found is not None and 1 <= int(found[1]) <= int(found[2]) <= MAX_PARTS:
            return cls(int(found[1]), int(found[2]))
        raise UsageError(
            f"not a part: {text!r}", hint=f"write K/N, for example 1/4, with N at most {MAX_PARTS}"
        )

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def first(self) -> bool:
        """Whether what cannot be divided falls to this one."""
        return self.number == 1

    def holds(self, ids: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
        """Of raw digests (``S32``): which are in this part."""
        if not len(ids):
            return np.zeros(0, bool)
        raw = np.ascontiguousarray(ids).view(np.uint8).reshape(-1, _DIGEST_BYTES)
        prefix = raw[:, 0].astype(np.int64) << 8 | raw[:, 1]
        found: npt.NDArray[np.bool_] = prefix * self.of // _PREFIXES == self.number - 1
        return found


WHOLE = Part(1, 1)
