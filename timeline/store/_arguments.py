"""What every store refuses before it acts: malformed keys and impossible ranges."""

from __future__ import annotations

import re

from timeline.errors import UsageError

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")

LONGEST_KEY_BYTES = 900
"""S3 allows 1,024 bytes of prefix and key; a file name of a directory store allows 255 for each segment."""


def check_key(key: str) -> None:
    """Raise UsageError unless the key obeys base.py. A segment never begins with a dot: such names are the
    store's own (and ``..`` would lead out of it)."""
    if _KEY.fullmatch(key) is None or len(key) > LONGEST_KEY_BYTES:
        raise UsageError(f"not a key of a store: {key[:LONGEST_KEY_BYTES]!r}")


def check_range(start: int, length: int | None) -> None:
    """Raise UsageError for ranges that ``get`` does not define."""
    if length is not None and (length < 0 or start < 0):
        raise UsageError(f"not a range: {length} bytes from {start}")


def check_limit(limit: int | None) -> None:
    """Raise UsageError for a listing of fewer than no keys."""
    if limit is not None and limit < 0:
        raise UsageError(f"not a limit: {limit}")
