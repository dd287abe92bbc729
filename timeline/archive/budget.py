"""A budget of requests: small chunks cost money, so there is a bound on how many are made in a second."""

from __future__ import annotations


class RequestBudget:
    """A token bucket. ``per_second`` is the sustained rate; ``burst`` how many may go at once after a
    rest."""

    def __init__(self, per_second: float, *, burst: float | None = None) -> None:
        if per_second <= 0:
            raise ValueError(f"a budget of {per_second} requests per second")
        self._rate = per_second
        self._burst = max(1.0, per_second * 2 if burst is None else burst)
        self._tokens = self._burst
        self._at: float | None = None

    def wait(self, now: float) -> float:
        """Seconds until a request fits; 0: now. ``now``: monotonic."""
        if self._at is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        return 0.0 if self._tokens >= 1.0 else (1.0 - self._tokens) / self._rate

    def spend(self, now: float) -> None:
        """One request was made; one that could not wait (a full chunk) is paid for by those that can."""
        self.wait(now)
        self._tokens = max(self._tokens - 1.0, -self._burst)
