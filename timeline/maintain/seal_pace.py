"""When it is worth asking the store whether something is to be sealed. Pure.

Asking costs two LISTs, a GET for the log's head and one for each chunk that came since: every five seconds, on a server that
does nothing, more than all else an archiver asks for. Who archives knows what came, so it asks when a quarter of what
makes a seal due has come, and now and then while something may wait. What others left is found by the first question.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from timeline.lsn import Lsn
from timeline.maintain.seal import SEAL_BYTES, SEAL_CHUNKS, SEAL_SECONDS

_PARTS = 4
"""A seal comes later than it could by at most this part of its measure."""


@dataclass(frozen=True, slots=True)
class SealPace:
    """What an archiver of this process has made durable, and what of it was there at the last question."""

    durable: Lsn | None = None
    chunks: int = 0
    changed_at: float | None = None
    """When ``durable`` was last seen to move, monotonic; ``None``: not yet."""
    asked_durable: Lsn | None = None
    asked_chunks: int = 0
    asked_at: float | None = None
    """``None``: nothing was asked yet."""

    def seen(self, durable: Lsn | None, chunks: int, now: float) -> SealPace:
        """The archiver is so far, with so many chunks since it began."""
        moved = durable != self.durable
        return replace(self, durable=durable, chunks=chunks, changed_at=now if moved else self.changed_at)

    def is_due(self, now: float) -> bool:
        """Whether to ask."""
        if self.asked_at is None:
            return True
        come = abs((self.durable or 0) - (self.asked_durable or 0))
        if come >= SEAL_BYTES // _PARTS or self.chunks - self.asked_chunks >= SEAL_CHUNKS // _PARTS:
            return True
        # Sealed by age: until then something may wait that came last.
        waits = self.changed_at is not None and self.asked_at <= self.changed_at + SEAL_SECONDS
        return waits and now - self.asked_at >= SEAL_SECONDS / _PARTS

    def asked(self, now: float) -> SealPace:
        """After a question, by which all that was due is sealed."""
        return replace(self, asked_durable=self.durable, asked_chunks=self.chunks, asked_at=now)
