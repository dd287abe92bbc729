"""What operators are told: that something fails, and that it works again."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class EventKind(StrEnum):
    """Which of the hooks it is for."""

    FAILURE = "failure"
    RECOVERY = "recovery"


@dataclass(frozen=True, slots=True)
class Event:
    """One change from working to failing or back."""

    time: str
    """ISO 8601, UTC."""
    kind: EventKind
    cluster: str
    """Empty: the host's own."""
    job: str
    message: str
    exit_code: int | None
    failures_in_a_row: int
    """Before a recovery: how many there had been."""
