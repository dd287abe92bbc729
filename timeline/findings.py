"""One thing that a check found, and its cure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing."""
    WARNING = "warning"
    """It works, with a risk or a lack."""
    ERROR = "error"
    """Something that was asked for cannot work, or would do harm."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis."""

    area: str
    """``source``, ``store`` or ``host``."""
    severity: Severity
    code: str
    """Stable name, for programs."""
    what: str
    cure: str | None = None
    """``None`` for what needs none."""
