"""Log sequence numbers: byte positions in Postgres's write-ahead log.

An LSN is an integer in code and on disk and ``X/XXXXXXXX`` to people (the form of ``pg_lsn``,
src/backend/utils/adt/pg_lsn.c; both the padded and the unpadded spelling are read).
"""

from __future__ import annotations

import re

from timeline.errors import UsageError

_TEXT = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")


class Lsn(int):
    """A byte position in the WAL, 0 ≤ value < 2⁶⁴. Arithmetic gives plain integers; wrap them again."""

    __slots__ = ()

    def __new__(cls, value: int = 0) -> Lsn:
        if not 0 <= value < 1 << 64:
            raise ValueError(f"LSN out of range: {value}")
        return super().__new__(cls, value)

    @classmethod
    def parse(cls, text: str) -> Lsn:
        """Read ``X/Y``; raises UsageError for anything else."""
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"not an LSN: {text!r}", hint="an LSN looks like 1/5A0003F8")
        return cls(int(match[1], 16) << 32 | int(match[2], 16))

    @classmethod
    def is_text(cls, text: str) -> bool:
        """Whether the text has the form of an LSN."""
        return _TEXT.fullmatch(text.strip()) is not None

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:08X}"

    def __repr__(self) -> str:
        return f"Lsn({self})"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec) if spec == "" or spec[-1] in "s<>^" else format(int(self), spec)
