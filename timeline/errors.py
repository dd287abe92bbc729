"""One tree of errors, split by what the reader should do about them.

Every error carries one line for people, a hint that names the cure where there is one, and the exit code that
the command line documents:

1 failed · 2 usage · 3 target unreachable · 4 store damaged · 5 fenced · 6 a check did not pass · 7
temporarily unavailable, try again
"""

from __future__ import annotations


class TimelineError(Exception):
    """Something failed for a reason that can be named; the root of the tree."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(TimelineError):
    """The request itself is wrong: fix the words and ask again."""

    exit_code = 2


class TargetUnreachable(TimelineError):
    """The moment asked for is not in the recorded history (P7); the message names the reachable range."""

    exit_code = 3


class DamagedStore(TimelineError):
    """Bytes in the store are not what was written (P5)."""

    exit_code = 4

    def __init__(self, key: str, offset: int, expectation: str, *, hint: str | None = None) -> None:
        """``key``: the object; ``offset``: byte offset inside it; ``expectation``: what should have been
        there."""
        super().__init__(f"{key}: at byte {offset}: {expectation}", hint=hint)
        self.key = key
        self.offset = offset
        self.expectation = expectation


class MissingObject(DamagedStore):
    """The branch log names an object that the store does not hold (after one reload of the log)."""

    def __init__(self, key: str) -> None:
        super().__init__(key, 0, "object is missing")


class Fenced(TimelineError):
    """Another archiver took over this branch (P4); this one must stop."""

    exit_code = 5


class SplitBrain(Fenced):
    """Two servers claim the same tli with different bytes; nothing is spliced."""


class LogConflict(TimelineError):
    """A change does not fit the state of the branch log it was meant for: read the log again and decide
    anew."""


class Superseded(LogConflict):
    """Garbage collection has passed the moment at which a writer began: what it made may be deleted, so nothing of
    it may be committed. Begun anew, the work succeeds."""

    exit_code = 7

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            hint="it was under way for longer than garbage collection waits; run it again",
        )


class UnknownFeature(TimelineError):
    """The store, or an object of it, uses a feature this version does not know; the message names it."""

    def __init__(self, where: str, feature: str, *, writing: bool = False) -> None:
        """``where``: the object that requires it; ``writing``: reading would still be possible."""
        verb = "written to" if writing else "read"
        super().__init__(
            f"{where}: cannot be {verb} without the feature {feature!r}, which this version does not know",
            hint="use a newer version of tl",
        )
        self.where = where
        self.feature = feature


class CheckFailed(TimelineError):
    """A check, preflight or drill did not pass."""

    exit_code = 6


class Unavailable(TimelineError):
    """A store or server did not answer within the bounded retries; nothing is wrong with the request."""

    exit_code = 7


class NotFound(TimelineError):
    """No object of that key. Internal to store callers, who turn it into what it means to them."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key}: no such object")
        self.key = key
