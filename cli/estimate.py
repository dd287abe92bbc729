"""What a store will cost in a month: a rough figure, with its assumptions spelt out."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9
PRICE_GB_MONTH = 0.023
PRICE_PER_1000_PUT = 0.005
"""List prices of S3 Standard in us-east-1, US dollars."""
DATA_RATIO = 0.3
WAL_RATIO = 0.35
"""Stored bytes per raw byte; typical of zstd on tables and on WAL."""
KEPT_DAYS = 30
SECONDS_A_MONTH = 30 * 86400
BUSY_SHARE = 0.3
"""Share of seconds in which a database of that write rate has something to send."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A month of one store."""

    database_gb: float
    wal_gb_per_day: float | None
    """``None``: the server could not tell."""
    stored_gb: float
    put_requests: int
    dollars: float


def estimate_month(database_bytes: int, wal_bytes_per_second: float | None) -> Estimate:
    """The first full month, everything kept for 30 days."""
    rate = wal_bytes_per_second if wal_bytes_per_second is not None else database_bytes * 0.1 / 86400
    wal_month = rate * SECONDS_A_MONTH
    stored = (database_bytes * DATA_RATIO + wal_month * WAL_RATIO) / GB
    # One chunk a second while there is something to send, more when 4 MiB fill sooner; 12 heartbeats an hour.
    puts = int(SECONDS_A_MONTH * (BUSY_SHARE if rate > 0 else 0) + wal_month / (4 << 20) + 12 * 24 * 30)
    return Estimate(
        database_gb=database_bytes / GB,
        wal_gb_per_day=wal_bytes_per_second * 86400 / GB if wal_bytes_per_second is not None else None,
        stored_gb=stored,
        put_requests=puts,
        dollars=stored * PRICE_GB_MONTH + puts / 1000 * PRICE_PER_1000_PUT,
    )
