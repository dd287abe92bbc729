"""How long the source has had WAL that the store has not.

Commit times do not tell it: a quiet source has none, and a busy one is always a few bytes ahead. So the ends of
the source's WAL are remembered with the moments they were heard of, until the store has them.
"""

from __future__ import annotations

import collections

from timeline.clock import Micros
from timeline.lsn import Lsn

MOST_MARKS = 1024
"""Marks held at most; then every other one is forgotten, and an answer may be short by the time between two."""


class LagMeter:
    """Fed with what is known now and then; says since when the store is behind."""

    def __init__(self) -> None:
        self._marks: collections.deque[tuple[Lsn, Micros]] = collections.deque()

    def see(self, now: Micros, *, source_end: Lsn, durable: Lsn) -> Micros | None:
        """The moment, by the same clock as ``now``, since when the source is known to have had WAL that is not
        durable; ``None``: everything it was known to have is."""
        if source_end > durable and (not self._marks or source_end > self._marks[-1][0]):
            self._marks.append((source_end, now))
            if len(self._marks) > MOST_MARKS:
                # The oldest stays: it is the answer.
                self._marks = collections.deque(list(self._marks)[::2])
        while self._marks and self._marks[0][0] <= durable:
            self._marks.popleft()
        return self._marks[0][1] if self._marks else None

    def forget(self) -> None:
        """The source moved to another tli, whose positions say nothing of the old one's."""
        self._marks.clear()
