"""What ``tl status`` tells, made of the facts: pure."""

from __future__ import annotations

from dataclasses import dataclass

from cli.facts import BranchFacts, CacheFacts, Facts, SlotFacts, SourceFacts, StoreFacts, StoreSize
from cli.observed import ArchiverState, ClusterState, DaemonState, JobState
from cli.output import iso
from timeline.clock import Micros
from timeline.lsn import Lsn
from timeline.size_text import size_text


@dataclass(frozen=True, slots=True)
class Speed:
    """Of branches of one kind of store, as measured (`benchmarks.branch --replay`, two cores, checkpoints far apart)."""

    start_seconds: float
    """Without any replay."""
    replay_bytes_per_second: float


NEAR = Speed(1.0, 50e6)
FAR = Speed(1.9, 15e6)
"""S3 at 20 ms; nearer, and with checkpoints more often, it is faster."""
LOW_SHARE = 0.2
"""Of the slot's room: less is an alarm."""


@dataclass(frozen=True, slots=True)
class RangeStatus:
    """One stretch of reachable history."""

    tli: int
    first: Lsn
    last: Lsn
    first_time: str | None
    last_time: str | None
    abandoned: bool


@dataclass(frozen=True, slots=True)
class SlotReport:
    """The slot on the source, as far as the source was asked and answered."""

    name: str
    wal_status: str | None
    active: bool
    safe_bytes: int | None
    warning: str | None
    limit_bytes: int | None
    """``max_slot_wal_keep_size``; ``None``: unlimited."""
    alarm: str | None
    """``low``, ``unreserved`` or ``lost``; ``None``: no reason for one."""


@dataclass(frozen=True, slots=True)
class SnapshotStatus:
    """A place where replay can begin."""

    id: str
    kind: str
    """``base`` (a base backup) or ``built`` (from WAL)."""
    tli: int
    lsn: Lsn
    time: str | None


@dataclass(frozen=True, slots=True)
class GapStatus:
    """WAL that is lost for good."""

    tli: int
    start: Lsn
    end: Lsn


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One of the daemon's jobs."""

    job: str
    running: bool
    last_success: str | None
    last_seconds: float | None
    last_exit_code: int | None
    failures_in_a_row: int
    last_message: str
    next_due: str | None


@dataclass(frozen=True, slots=True)
class ArchiverReport:
    """The archiver of the daemon on this host."""

    phase: str
    pid: int | None
    restarts: int
    durable: Lsn | None
    lag_bytes: int | None
    upload_errors: int
    error: str | None


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """The daemon on this host, as far as this cluster goes."""

    pid: int
    running: bool
    written: str | None
    archiver: ArchiverReport | None
    jobs: tuple[JobStatus, ...]


@dataclass(frozen=True, slots=True)
class StatusResult:
    """What ``tl status`` knows."""

    store: str
    store_id: str
    recoverable: bool
    ranges: tuple[RangeStatus, ...]
    fresh_seconds: float | None
    """Age of the newest recoverable moment, by the host's clock."""
    snapshots: tuple[SnapshotStatus, ...]
    """Oldest first."""
    newest_snapshot: str | None
    newest_snapshot_time: str | None
    snapshot_age_seconds: float | None
    base_backup_time: str | None
    base_backup_age_seconds: float | None
    database_bytes: int | None
    replay_bytes: int | None
    """WAL between the newest snapshot and the head."""
    expected_seconds: float | None
    durable: Lsn
    """All WAL before it is in the store."""
    lag_bytes: int | None
    """WAL that the source has and the store has not; ``None``: the source was not asked or did not answer."""
    unsealed_bytes: int
    backup_under_way: bool
    gaps: int
    gap_ranges: tuple[GapStatus, ...]
    slot: SlotReport | None
    size: StoreSize | None
    """Only with ``--size``."""
    branches: tuple[BranchFacts, ...]
    """Of this host, from any store."""
    cache: CacheFacts | None
    daemon: DaemonStatus | None
    """``None``: no daemon on this host ever had this cluster."""
    remarks: tuple[str, ...]


def slot_alarm(slot: SlotFacts, limit_bytes: int | None) -> str | None:
    """Whether the slot is about to be lost, in a word (EDGE 8, 10)."""
    if slot.wal_status in ("lost", "unreserved"):
        return slot.wal_status
    if slot.safe_bytes is not None and limit_bytes and slot.safe_bytes < LOW_SHARE * limit_bytes:
        return "low"
    return None


def make_result(
    facts: Facts, daemon: DaemonState | None, *, running: bool, cluster: str | None, now: Micros
) -> StatusResult:
    """``facts.store`` must be there. ``cluster``: the name in tl.toml, if there is one."""
    store = facts.store
    if store is None:
        raise ValueError("nothing is known of the store")
    head, newest, base = store.current, store.newest, store.newest_base
    replay = store.replay_bytes
    speed = FAR if store.url.startswith("s3:") else NEAR
    last_time = head.last_time if head is not None else None
    source = facts.source
    return StatusResult(
        store=store.url,
        store_id=store.store_id,
        recoverable=head is not None,
        ranges=tuple(
            RangeStatus(one.tli, one.first, one.last, iso(one.first_time), iso(one.last_time), one.abandoned)
            for one in store.ranges
        ),
        fresh_seconds=_age(now, last_time),
        snapshots=tuple(
            SnapshotStatus(one.id, one.kind, one.tli, one.lsn, iso(one.time)) for one in store.snapshots
        ),
        newest_snapshot=newest.id if newest else None,
        newest_snapshot_time=iso(newest.time) if newest else None,
        snapshot_age_seconds=_age(now, newest.time if newest else None),
        base_backup_time=iso(base.time) if base else None,
        base_backup_age_seconds=_age(now, base.time if base else None),
        database_bytes=newest.bytes if newest else None,
        replay_bytes=replay,
        expected_seconds=speed.start_seconds + replay / speed.replay_bytes_per_second
        if replay is not None
        else None,
        durable=store.durable,
        lag_bytes=max(0, source.end - store.durable) if source is not None else None,
        unsealed_bytes=store.unsealed_bytes,
        backup_under_way=store.backup_under_way,
        gaps=len(store.gaps),
        gap_ranges=tuple(GapStatus(one.tli, one.start, one.end) for one in store.gaps),
        slot=_slot(source) if source is not None else None,
        size=facts.size,
        branches=facts.host.branches if facts.host is not None else (),
        cache=facts.host.cache if facts.host is not None else None,
        daemon=_daemon(daemon, store, running=running, cluster=cluster),
        remarks=_remarks(facts, store),
    )


def _slot(source: SourceFacts) -> SlotReport | None:
    slot = source.slot
    if slot is None:
        return None
    return SlotReport(
        name=slot.name,
        wal_status=slot.wal_status,
        active=slot.active,
        safe_bytes=slot.safe_bytes,
        warning=slot.warning,
        limit_bytes=source.keep_limit_bytes,
        alarm=slot_alarm(slot, source.keep_limit_bytes),
    )


def _remarks(facts: Facts, store: StoreFacts) -> tuple[str, ...]:
    remarks = list(store.remarks)
    source = facts.source
    if facts.source_error is not None:
        remarks.append(f"the source could not be asked: {facts.source_error}")
    elif source is not None and source.slot is None:
        remarks.append("the source has no slot of ours: nothing holds its WAL for us; `tl archive` makes one")
    elif source is not None and source.slot is not None:
        if not source.slot.active:
            remarks.append("no archiver is connected to the slot: start `tl archive`")
        if slot_alarm(source.slot, source.keep_limit_bytes) == "low":
            left, limit = source.slot.safe_bytes or 0, source.keep_limit_bytes or 0
            remarks.append(
                f"only {size_text(left)} of {size_text(limit)} are left until the slot is lost, and history with it: "
                "let the archiver catch up, or raise max_slot_wal_keep_size"
            )
        elif source.slot.warning is not None:
            remarks.append(source.slot.warning)
    remarks += [
        f"{what}: {error}"
        for what, error in (("size", facts.size_error), ("branches", facts.host_error))
        if error
    ]
    return tuple(remarks)


def _daemon(
    state: DaemonState | None, store: StoreFacts, *, running: bool, cluster: str | None
) -> DaemonStatus | None:
    if state is None:
        return None
    ours = [one for one in state.clusters if _is_ours(one, store, cluster)]
    if not ours:
        return None
    return DaemonStatus(
        pid=state.pid,
        running=running,
        written=iso(state.written),
        archiver=_archiver(ours[0].archiver),
        jobs=tuple(_job(job) for job in ours[0].jobs),
    )


def _is_ours(one: ClusterState, store: StoreFacts, cluster: str | None) -> bool:
    return one.cluster == cluster if cluster is not None else one.store == store.url


def _archiver(state: ArchiverState | None) -> ArchiverReport | None:
    if state is None:
        return None
    known = state.source_end is not None and state.durable is not None
    return ArchiverReport(
        phase=state.phase,
        pid=state.pid,
        restarts=state.restarts,
        durable=state.durable,
        lag_bytes=max(0, (state.source_end or 0) - (state.durable or 0)) if known else None,
        upload_errors=state.upload_errors,
        error=state.error,
    )


def _job(job: JobState) -> JobStatus:
    return JobStatus(
        job=job.job,
        running=job.running_since is not None,
        last_success=iso(job.last_success),
        last_seconds=job.last_seconds,
        last_exit_code=job.last_exit_code,
        failures_in_a_row=job.failures_in_a_row,
        last_message=job.last_message,
        next_due=iso(job.next_due),
    )


def _age(now: Micros, then: Micros | None) -> float | None:
    return max(0.0, (now - then) / 1e6) if then is not None else None
