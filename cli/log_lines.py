"""What the daemon says on stderr: one line per event, for people or as JSON, and its children's lines among them.

A child that floods its stderr floods no log: of each a burst is passed on, then a line now and then, and the number
of those left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import TextIO

from cli.output import iso
from timeline.clock import Clock

LONGEST_LINE = 4000
"""Characters of a message; the rest is cut off."""
BURST_LINES = 100
"""Lines of one child that are passed on at once …"""
LINES_PER_SECOND = 1.0
"""… and as many more as time gives."""


class Level(StrEnum):
    """How bad it is."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Log:
    """Writes events to one stream."""

    def __init__(self, stream: TextIO, clock: Clock, *, as_json: bool) -> None:
        self._stream = stream
        self._clock = clock
        self._as_json = as_json

    def use(self, *, as_json: bool) -> None:
        """Change the format from the next line on."""
        self._as_json = as_json

    def emit(
        self,
        level: Level,
        event: str,
        message: str,
        *,
        cluster: str | None = None,
        job: str | None = None,
    ) -> None:
        """One line. ``event``: a short constant name; ``message``: for people. A stream that is gone is no reason
        to stop archiving: what cannot be written is lost."""
        message = printable(message)
        now = iso(self._clock.now())
        if self._as_json:
            line = json.dumps(
                {
                    "time": now,
                    "level": str(level),
                    "cluster": cluster,
                    "job": job,
                    "event": event,
                    "message": message,
                },
                ensure_ascii=False,
            )
        else:
            who = "/".join(part for part in (cluster, job) if part) or "daemon"
            mark = "" if level is Level.INFO else f"{level}: "
            line = f"{now} {who}: {mark}{message}"
        try:
            print(line, file=self._stream, flush=True)
        except OSError:
            return


def printable(text: str) -> str:
    """At most ``LONGEST_LINE`` characters on one line, none of which moves a terminal's cursor."""
    cut = text[:LONGEST_LINE] + (" …" if len(text) > LONGEST_LINE else "")
    return "".join(char if char.isprintable() else " " for char in cut)


@dataclass(slots=True)
class Throttle:
    """How many lines of one child may pass. Pure; ``now`` is a monotonic time in seconds."""

    allowance: float = float(BURST_LINES)
    seen_at: float = 0.0
    left_out: int = 0
    """Since the last one that passed."""

    def passes(self, now: float) -> bool:
        """Count one line, and say whether it may pass."""
        earned = max(0.0, now - self.seen_at) * LINES_PER_SECOND
        self.allowance = min(float(BURST_LINES), self.allowance + earned)
        self.seen_at = now
        if self.allowance < 1.0:
            self.left_out += 1
            return False
        self.allowance -= 1.0
        return True

    def take_left_out(self) -> int:
        """How many were left out since this was last asked."""
        count, self.left_out = self.left_out, 0
        return count
