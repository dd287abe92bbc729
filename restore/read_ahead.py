"""Notices that a file is read from front to back, per open file."""

from __future__ import annotations

from timeline.format.extent import GROUP_BYTES

MAX_WINDOW_BYTES = 8 << 20
"""How far ahead of the reader at most."""
MIN_WINDOW_BYTES = 512 << 10
_CERTAIN_BYTES = 2 * GROUP_BYTES
"""Read in order before it counts as sequential."""
_BACK_BYTES = 1 << 20
"""The kernel's own read-ahead requests arrive slightly out of order."""
_FORWARD_BYTES = 256 << 10
_STEP_PART = 4
"""A window is topped up when a quarter of it has been used, so that requests stay large."""


class ReadAhead:
    """State of one open file; the window doubles with what was read in order."""

    __slots__ = ("_ahead", "_next", "_run_bytes")

    def __init__(self) -> None:
        self._next = 0
        self._run_bytes = 0
        self._ahead = 0

    def note(self, offset: int, length: int, size: int) -> range:
        """Tell of a read; the groups that should be fetched now, empty when none."""
        if self._next - _BACK_BYTES <= offset <= self._next + _FORWARD_BYTES:
            self._run_bytes += length
            self._next = max(self._next, offset + length)
        else:
            self._run_bytes = length
            self._next = offset + length
            self._ahead = 0
        if self._run_bytes < _CERTAIN_BYTES:
            return range(0)
        window = min(max(MIN_WINDOW_BYTES, 2 * self._run_bytes), MAX_WINDOW_BYTES)
        first = max(self._ahead, self._next // GROUP_BYTES)
        end = min(-(-(self._next + window) // GROUP_BYTES), -(-size // GROUP_BYTES))
        at_end = end * GROUP_BYTES >= size
        if end - first < (1 if at_end else max(1, window // GROUP_BYTES // _STEP_PART)):
            return range(0)
        return range(first, end)

    def taken(self, end: int) -> None:
        """The groups before ``end`` are fetched or being fetched."""
        self._ahead = max(self._ahead, end)
