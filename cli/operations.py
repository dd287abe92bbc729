"""What is to be done with a cluster, and how often: the values of tl.toml's sub-tables. Frozen, no I/O.

The defaults are here and nowhere else. ``cli/tl.toml.example`` shows each of them, and a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cli.schedule import Every, Schedule

_HOUR = 3600.0
_DAY = 24 * _HOUR
DAILY = Every(_DAY)
_WEEKLY = Every(7 * _DAY)
_OFTEN = Every(600.0)


@dataclass(frozen=True, slots=True)
class ArchivePlan:
    """``[cluster.NAME.archive]``: the options of ``tl archive``."""

    enabled: bool = True
    """Whether the daemon runs an archiver; ``False``: it runs elsewhere, and only the jobs run here."""
    max_delay_seconds: float = 1.0
    slot: str | None = None
    """``None``: named after the store."""
    no_slot: bool = False
    unbounded_slot: bool = False
    allow_gap: bool = False
    rate_limit_bytes: int | None = None
    """Bytes per second that the first base backup may read; ``None``: as fast as it goes."""
    fast_checkpoint: bool = False
    application_name: str = "tl"
    standbys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BranchPlan:
    """``[cluster.NAME.branch]``: what every ``tl branch`` of the cluster does unless told otherwise."""

    run: tuple[str, ...] = ()
    """Scripts, by paths from the directory of tl.toml."""
    run_database: str = "postgres"
    run_timeout_seconds: float = 600.0
    stop_when_idle_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """``[cluster.NAME.snapshots]``."""

    every_bytes: int = 64 << 20
    """The archiver builds one whenever so much WAL has come; 0: never …"""
    after_seconds: float = 300.0
    """… and after so long, if a sixteenth of it has come."""
    schedule: Schedule | None = None
    """Builds by the clock, for a cluster whose archiver runs on a host that cannot build."""
    timeout_seconds: float = 6 * _HOUR


@dataclass(frozen=True, slots=True)
class BackupPlan:
    """``[cluster.NAME.backup]``: further base backups, which an unbroken history does not need."""

    schedule: Schedule | None = None
    rate_limit_bytes: int | None = None
    fast_checkpoint: bool = False
    timeout_seconds: float = _DAY


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """``[cluster.NAME.retention]``: what may be forgotten, and when it is collected."""

    schedule: Schedule | None = None
    """Daily as soon as the table is there: deletion is asked for by name."""
    window_seconds: float | None = None
    """Every moment of so long is kept; ``None``: all of them."""
    grace_seconds: float = _DAY
    """What nothing refers to is deleted only when it is so old."""
    min_bases: int = 1
    """So many base backups are kept, whatever their age."""
    keep_all_seconds: float = 2 * _DAY
    """Built snapshots younger than this are all kept, then …"""
    hourly_seconds: float = 7 * _DAY
    """… one an hour up to this age …"""
    daily_seconds: float = 30 * _DAY
    """… and one a day up to this, one a month beyond."""
    timeout_seconds: float = 6 * _HOUR


@dataclass(frozen=True, slots=True)
class VerifyPlan:
    """``[cluster.NAME.verify]``."""

    structure: Schedule | None = DAILY
    """Everything the log names is there."""
    data: Schedule | None = _WEEKLY
    """The bytes are what was written."""
    budget_bytes: int = 10 << 30
    """What one run over the data may read."""
    timeout_seconds: float = 12 * _HOUR


@dataclass(frozen=True, slots=True)
class DrillPlan:
    """``[cluster.NAME.drill]``: proof that recovery works."""

    schedule: Schedule | None = None
    at: str = "latest"
    """``latest``, ``random``, or any WHEN."""
    rto_seconds: float | None = None
    """The drill fails if recovery takes longer."""
    rpo_seconds: float | None = None
    """The drill fails if the newest recoverable moment is older."""
    sql: tuple[str, ...] = ()
    """Assertions: each must return true."""
    full: bool = False
    """A full restore instead of a lazy branch."""
    timeout_seconds: float = 6 * _HOUR


@dataclass(frozen=True, slots=True)
class AlertPlan:
    """``[cluster.NAME.alerts]``: a URL that hears from us while archiving is fresh."""

    heartbeat_url: str | None = None
    heartbeat_method: str = "GET"
    heartbeat_every_seconds: float = 300.0
    heartbeat_timeout_seconds: float = 10.0
    fresh_within_seconds: float = 300.0
    """How old the newest certainly complete moment may be."""


@dataclass(frozen=True, slots=True)
class HookPlan:
    """``[cluster.NAME.hooks]``: commands, as lists of words; never a shell."""

    on_failure: tuple[str, ...] = ()
    on_recovery: tuple[str, ...] = ()
    timeout_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class Operations:
    """All sub-tables of one cluster."""

    archive: ArchivePlan = field(default_factory=ArchivePlan)
    branch: BranchPlan = field(default_factory=BranchPlan)
    snapshots: SnapshotPlan = field(default_factory=SnapshotPlan)
    backup: BackupPlan = field(default_factory=BackupPlan)
    retention: RetentionPlan = field(default_factory=RetentionPlan)
    verify: VerifyPlan = field(default_factory=VerifyPlan)
    drill: DrillPlan = field(default_factory=DrillPlan)
    alerts: AlertPlan = field(default_factory=AlertPlan)
    hooks: HookPlan = field(default_factory=HookPlan)


@dataclass(frozen=True, slots=True)
class DaemonPlan:
    """``[daemon]``: the process itself."""

    metrics: str | None = None
    """HOST:PORT to serve metrics on; ``None``: nowhere."""
    log: str = "auto"
    """``json``, ``human``, or ``auto``: human on a terminal."""
    concurrency: int = 1
    """Heavy jobs at a time, over all clusters."""
    jitter_seconds: float = 30.0
    """Every run is put off by a random time below this, so that hosts do not act in step."""
    zone: str | None = None
    """What cron's hours are told in; ``None``: the host's."""
    expire: Schedule | None = _OFTEN
    """Deletes branches of this host whose time is over."""
    stop_grace_seconds: float = 120.0
    """How long children may take to end when told to; then they are killed."""
    hooks: HookPlan = field(default_factory=HookPlan)
    """For the jobs that belong to no cluster."""
