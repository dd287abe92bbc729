"""Raw extents a mount has in memory: the ones used last, and those fetched ahead that nobody has asked for yet.

Bounds: MEMORY_BYTES of the former; AHEAD_BYTES of the latter, what is on its way to them included. Knows nothing of stores
and never waits.
"""

from __future__ import annotations

from collections import OrderedDict

from timeline.clock import Clock

MEMORY_BYTES = 8 << 20
AHEAD_BYTES = 16 << 20
"""More is refused, for read-ahead is only a help."""
AHEAD_SECONDS = 2.0
"""What was not asked for after so long may make room."""


class ExtentMemory:
    """Raw extents by digest."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._used: OrderedDict[bytes, bytes] = OrderedDict()
        """The one that was used last comes last."""
        self._used_bytes = 0
        self._ahead: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        """And since when."""
        self._ahead_bytes = 0
        """Of those, and of what was announced."""

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._used or digest in self._ahead

    def get(self, digest: bytes) -> bytes | None:
        """The extent, which counts as used from now on."""
        raw = self._used.get(digest)
        if raw is not None:
            self._used.move_to_end(digest)
        elif digest in self._ahead:
            raw, _ = self._ahead.pop(digest)
            self._ahead_bytes -= len(raw)
            self.keep(digest, raw)
        return raw

    def keep(self, digest: bytes, raw: bytes) -> None:
        """Keep an extent that is being used."""
        if digest in self._used:
            return
        self._used[digest] = raw
        self._used_bytes += len(raw)
        while self._used_bytes > MEMORY_BYTES:
            _, oldest = self._used.popitem(last=False)
            self._used_bytes -= len(oldest)

    def keep_ahead(self, digest: bytes, raw: bytes) -> None:
        """Keep an extent that nobody has asked for, if there is room."""
        if self.has_room_ahead(len(raw)):
            self._ahead[digest] = (raw, self._clock.monotonic())
            self._ahead_bytes += len(raw)

    def announce(self, raw_bytes: int) -> None:
        """So much is on its way to ``keep_ahead`` from now on."""
        self._ahead_bytes += raw_bytes

    def withdraw(self, raw_bytes: int) -> None:
        """So much of what was announced is not on its way any more: it came, or could not be had."""
        self._ahead_bytes -= raw_bytes

    def has_room_ahead(self, size: int) -> bool:
        """Whether there is room for so much more, when what waited for AHEAD_SECONDS is dropped for it."""
        oldest_allowed = self._clock.monotonic() - AHEAD_SECONDS
        while self._ahead_bytes + size > AHEAD_BYTES:
            if not self._ahead:
                return False
            digest, (raw, since) = next(iter(self._ahead.items()))
            if since > oldest_allowed:
                return False
            del self._ahead[digest]
            self._ahead_bytes -= len(raw)
        return True

    def clear(self) -> None:
        """Keep nothing; what was announced stays so."""
        self._used.clear()
        self._used_bytes = 0
        self._ahead_bytes -= sum(len(raw) for raw, _ in self._ahead.values())
        self._ahead.clear()
