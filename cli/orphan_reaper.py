"""Process 1 of a container inherits every orphan, and has to take note of its end: there is no init below it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

PAUSE_SECONDS = 10.0
"""How often it is worth looking: an unreaped process costs one entry in a table."""
_MOST = 10_000
"""Processes looked at in one go."""


class Reaper:
    """Reaps ended children that nobody waits for.

    Our own are waited for, and are gone within moments of their end: one that is still there at the next look is an
    orphan that came to us.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._seen: frozenset[int] = frozenset()

    def look(self) -> int:
        """Reap what was there at the last look already; returns how many."""
        ended = self._ended()
        count = 0
        for pid in ended & self._seen:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
                count += 1
        self._seen = ended
        return count

    def _ended(self) -> frozenset[int]:
        found = set()
        me = os.getpid()
        for entry in list(self._proc.iterdir())[:_MOST]:
            if not entry.name.isdecimal():
                continue
            with contextlib.suppress(OSError, ValueError, IndexError):
                # After the name in parentheses, which may hold anything: state, then parent.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] == "Z" and int(fields[1]) == me:
                    found.add(int(entry.name))
        return frozenset(found)


def is_needed() -> bool:
    """Whether orphans come to us."""
    return os.getpid() == 1
