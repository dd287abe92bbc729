"""What the daemon knows of its clusters: handed to the metrics, and kept in a file for ``tl status``.

Values only: nothing here asks a store or a source. Instants are micros of this host's clock unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.clock import Micros
from timeline.lsn import Lsn


@dataclass(frozen=True, slots=True)
class SlotState:
    """The replication slot, as the archiver last saw it."""

    name: str
    wal_status: str | None
    """Postgres's word: reserved, extended, unreserved, lost."""
    safe_bytes: int | None
    """WAL the source may still write before the slot is lost; ``None``: no limit."""


@dataclass(frozen=True, slots=True)
class ArchiverState:
    """One cluster's archiver process."""

    pid: int | None
    """``None`` while there is none."""
    restarts: int
    """Since the daemon began."""
    reported_at: Micros | None
    """When the rest was last heard; ``None``: never."""
    phase: str
    """As ``timeline.archive.status.Phase``."""
    tli: int
    durable: Lsn | None
    received: Lsn | None
    source_end: Lsn | None
    last_commit_time: Micros | None
    """Source's clock."""
    coverage_time: Micros | None
    """Source's clock: up to then the history is known to be complete."""
    slot: SlotState | None
    synchronous: bool
    chunks: int
    wal_bytes: int
    stored_bytes: int
    uploads: int
    upload_seconds: float
    """Sum over uploads."""
    upload_errors: int
    """Tries that failed."""
    error: str | None
    behind_since: Micros | None = None
    """Since when the source is known to have had WAL that the store has not; ``None``: it has all, or nobody
    knows."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that a job's JSON told, for example ``rto_seconds``."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class JobState:
    """One scheduled job of one cluster."""

    job: str
    """``snapshot``, ``gc``, ``verify``, ``verify-data``, ``drill``, ``backup``, ``expire``."""
    runs: int
    failures_in_a_row: int
    running_since: Micros | None
    last_started: Micros | None
    last_seconds: float | None
    last_exit_code: int | None
    last_success: Micros | None
    last_message: str
    """What a failed run said; empty after a success."""
    next_due: Micros | None
    figures: tuple[Figure, ...] = ()
    """Of the last run that told any: ``cli.job_figures.read_figures`` of what it printed."""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """All that the daemon knows of one cluster."""

    cluster: str
    store: str
    archiver: ArchiverState | None
    """``None``: this daemon does not archive it."""
    jobs: tuple[JobState, ...]


@dataclass(frozen=True, slots=True)
class DaemonState:
    """Written whenever it changes, at most once a second."""

    pid: int
    started: Micros
    written: Micros
    clusters: tuple[ClusterState, ...]
    host_jobs: tuple[JobState, ...] = ()
    """Those that belong to no cluster: ``expire``."""
