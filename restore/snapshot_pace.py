"""How far apart snapshots are built. Pure.

Every build costs some seconds whatever it replays, and every snapshot what it stores; a branch, on the other hand, replays as
much as lies between two of them. The spacing asked for holds while builders keep up, and while they catch up with a backlog
that shrinks. Where more WAL comes than such steps take away, or so much waits that the newest moments would have to wait for
long, steps grow with the backlog, for most branches are made of the newest moments.
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.lsn import Lsn

SPACING_BYTES = 64 << 20
"""What is asked for otherwise; less is no measure for a backlog."""
BACKLOG_PART = 4
"""Of a backlog, one step takes this part …"""
STEP_BYTES = 512 << 20
"""… but no more than this."""
PATIENT_BYTES = 8 << 30
"""A longer backlog is not worked off in small steps, even if it shrinks."""
_SHRINKS = 0.75
"""It does when so much comes, at most, for what is built."""


@dataclass(frozen=True, slots=True)
class Stand:
    """Where a build began."""

    newest: Lsn
    """Redo point of the newest snapshot."""
    head: Lsn
    """End of the WAL in the store."""


def step_bytes(now: Stand, before: Stand | None, spacing: int = SPACING_BYTES) -> int:
    """How far beyond the newest snapshot to build at most; ``before``: where the last build of this run began; ``spacing``:
    the bytes of WAL that are wanted between two snapshots."""
    spacing = min(STEP_BYTES, max(SPACING_BYTES, spacing))
    backlog = now.head - now.newest
    shrinks = before is None or now.head - before.head <= _SHRINKS * (now.newest - before.newest)
    if shrinks and backlog <= PATIENT_BYTES:
        return spacing
    return min(STEP_BYTES, max(spacing, backlog // BACKLOG_PART))
