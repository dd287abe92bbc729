"""What a soak does, and when: drawn from a seed before anything starts. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

WARM_UP_SECONDS = 20.0
"""Nothing is broken before."""
CALM_SECONDS = 25.0
"""Nor in the last seconds: what was broken is to be seen working again."""
EVERY_SECONDS = 75.0
"""Beyond one of each kind there is about one event in so long a time."""


class Event(StrEnum):
    """What happens to the servers and to the daemon."""

    RESTART = "source restarted (fast)"
    CRASH = "source restarted (immediate)"
    FAILOVER = "failed over to the standby"
    STALL = "store stalled"
    KILL_ARCHIVER = "archiver killed -9"
    RELOAD = "daemon reloaded"


@dataclass(frozen=True, slots=True)
class Due:
    """An event of the schedule."""

    at_seconds: float
    """Since the load began."""
    event: Event


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """Sizes and paces of one run."""

    seed: int
    minutes: float
    """Of load; setting up and checking come on top."""

    @property
    def is_long(self) -> bool:
        """Whether slopes can be told from noise."""
        return self.minutes >= 12

    @property
    def seconds(self) -> float:
        """Of load."""
        return self.minutes * 60

    @property
    def stall_seconds(self) -> float:
        """How long the store does not answer."""
        return 60.0 if self.is_long else 20.0

    @property
    def window_seconds(self) -> float:
        """Of retention."""
        return 180.0 if self.is_long else 45.0

    def schedule(self) -> tuple[Due, ...]:
        """In order: one of each kind, more in a longer run, evenly spread with some chance in it.

        The archiver is killed once, in the first half: it is to live long enough for its memory to settle.
        """
        draw = random.Random(self.seed)
        kinds = list(Event)
        first = WARM_UP_SECONDS
        last = self.seconds - CALM_SECONDS - self.stall_seconds
        count = max(len(kinds), int((last - first) / EVERY_SECONDS))
        while len(kinds) < count:
            kinds.append(draw.choice([event for event in Event if event is not Event.KILL_ARCHIVER]))
        draw.shuffle(kinds)
        killed, early = kinds.index(Event.KILL_ARCHIVER), draw.randrange(len(kinds) // 2)
        kinds[killed], kinds[early] = kinds[early], kinds[killed]
        step = (last - first) / len(kinds)
        return tuple(
            Due(first + step * (number + 0.3 * draw.random()), kind) for number, kind in enumerate(kinds)
        )
