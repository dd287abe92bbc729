"""Bytes that claim to be Postgres's and are not what a supported major version writes."""

from __future__ import annotations

from timeline.errors import TimelineError
from timeline.lsn import Lsn


class FormatError(TimelineError):
    """A file of Postgres's that cannot be read as what it claims to be."""

    def __init__(self, subject: str, offset: int, expectation: str, *, hint: str | None = None) -> None:
        """``subject``: which file; ``offset``: byte (or line) in it; ``expectation``: what belongs there."""
        super().__init__(f"{subject}: at {offset}: {expectation}", hint=hint)
        self.subject = subject
        self.offset = offset
        self.expectation = expectation


class WalFormatError(FormatError):
    """WAL that does not read as WAL; nothing from this position on may be believed."""

    def __init__(self, lsn: int, expectation: str, *, hint: str | None = None) -> None:
        """``lsn``: where; ``expectation``: what should have been there."""
        super().__init__("WAL", lsn, expectation, hint=hint)
        self.message = f"WAL at {Lsn(lsn)}: {expectation}"
        self.args = (self.message,)
        self.lsn = Lsn(lsn)
