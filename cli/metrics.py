"""Turns facts into a page for Prometheus.

A pure function of what is known already: no scrape asks the store, the source or the disk. A registry of our own,
so that nothing of the process itself is shown that was not meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from cli import metric_families as families
from cli.facts import HostFacts, KeptFacts, Part, SourceFacts, StoreFacts, StoreSize
from cli.metric_families import Family
from cli.observed import ArchiverState, ClusterState, DaemonState, JobState
from timeline.clock import Micros

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PHASES = ("connecting", "catching up", "streaming", "waiting", "stopped", "fenced")
"""As timeline.archive.status.Phase, which is not imported, for that brings the database library with it; and what the
daemon says of an archiver that stays down."""
WAL_STATUSES = ("reserved", "extended", "unreserved", "lost")
_DAMAGED = 4
"""Exit code."""


@dataclass(frozen=True, slots=True)
class Observed:
    """All that a page is made of."""

    now: Micros
    """Host's clock."""
    daemon: DaemonState | None
    clusters: tuple[KeptFacts, ...]


class FactsCollector(Collector):
    """What is known at the moment of the scrape."""

    def __init__(self, observe: Callable[[], Observed]) -> None:
        """``observe`` must return at once."""
        self._observe = observe

    def collect(self) -> Iterator[Metric]:
        """The families that have a value now."""
        return iter(_fill(self._observe()).metrics())

    def describe(self) -> Iterator[Metric]:
        """All families, so that registering asks for no values."""
        return iter([_empty(family) for family in families.FAMILIES])


def exposition(observe: Callable[[], Observed]) -> bytes:
    """The page, in the text format (CONTENT_TYPE)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FactsCollector(observe))
    return generate_latest(registry)


def lag_seconds(archiver: ArchiverState, now: Micros) -> float | None:
    """How long the source has had WAL that the store has not; ``None``: nothing was heard yet.

    An archiver that says nothing more may be behind since it last spoke.
    """
    if archiver.reported_at is None or archiver.durable is None:
        return None
    if archiver.behind_since is not None:
        return max(0.0, (now - archiver.behind_since) / 1e6)
    silent = (now - archiver.reported_at) / 1e6
    return silent if silent > SILENT_SECONDS else 0.0


SILENT_SECONDS = 30.0
"""An archiver reports at least every few seconds; after so long without a word nothing is known of it."""


def is_up(archiver: ArchiverState, now: Micros) -> bool:
    """Whether the archiver's process is there, speaks, and streams or catches up."""
    heard = archiver.reported_at is not None and now - archiver.reported_at <= SILENT_SECONDS * 1e6
    return archiver.pid is not None and heard and archiver.phase in ("streaming", "catching up")


class _Page:
    """Families in the order in which they first got a value."""

    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}

    def put(self, family: Family, value: float | None, *labels: str) -> None:
        """One value; nothing for ``None``."""
        if value is None:
            return
        metric = self._families.setdefault(family.name, _empty(family))
        if isinstance(metric, GaugeMetricFamily | CounterMetricFamily):
            metric.add_metric(labels, float(value))

    def put_summary(self, family: Family, count: int, total: float, *labels: str) -> None:
        """A count and a sum."""
        metric = self._families.setdefault(family.name, _empty(family))
        if isinstance(metric, SummaryMetricFamily):
            metric.add_metric(labels, count, total)

    def metrics(self) -> list[Metric]:
        """All of them."""
        return list(self._families.values())


def _empty(family: Family) -> Metric:
    if family.kind == families.COUNTER:
        return CounterMetricFamily(family.name.removesuffix("_total"), family.help, labels=family.labels)
    if family.kind == families.SUMMARY:
        return SummaryMetricFamily(family.name, family.help, labels=family.labels)
    return GaugeMetricFamily(family.name, family.help, labels=family.labels)


def _fill(seen: Observed) -> _Page:
    page = _Page()
    daemon_clusters = seen.daemon.clusters if seen.daemon is not None else ()
    if seen.daemon is not None:
        page.put(families.DAEMON_START, seen.daemon.started / 1e6)
    archivers = {one.cluster: one.archiver for one in daemon_clusters if one.archiver is not None}
    for cluster in daemon_clusters:
        _put_daemon(page, cluster, seen.now)
    for job in seen.daemon.host_jobs if seen.daemon is not None else ():
        _put_job(page, "", job)
    for kept in seen.clusters:
        _put_kept(page, kept, seen.now, archived=kept.cluster in archivers)
    every = {kept.cluster: kept for kept in seen.clusters}
    for name in dict.fromkeys([*every, *archivers]):
        _put_slot(page, name, every.get(name), archivers.get(name))
    _put_host(page, seen)
    return page


def _put_daemon(page: _Page, cluster: ClusterState, now: Micros) -> None:
    if cluster.archiver is not None:
        _put_archiver(page, cluster.cluster, cluster.archiver, now)
    for job in cluster.jobs:
        _put_job(page, cluster.cluster, job)


def _put_archiver(page: _Page, name: str, archiver: ArchiverState, now: Micros) -> None:
    page.put(families.ARCHIVER_UP, is_up(archiver, now), name)
    for phase in PHASES:
        page.put(families.ARCHIVER_PHASE, archiver.phase == phase, name, phase)
    page.put(families.ARCHIVER_RESTARTS, archiver.restarts, name)
    page.put(families.ARCHIVER_SYNCHRONOUS, archiver.synchronous, name)
    if archiver.reported_at is not None:
        page.put(families.FACTS_AGE, _age(now, archiver.reported_at), name, "archiver")
    if archiver.durable is not None and archiver.source_end is not None:
        page.put(families.LAG_BYTES, max(0, archiver.source_end - archiver.durable), name)
    page.put(families.LAG_SECONDS, lag_seconds(archiver, now), name)
    page.put(families.DURABLE_LSN, archiver.durable, name)
    page.put(families.SOURCE_LSN, archiver.source_end, name)
    page.put(families.LAST_COMMIT, _seconds(archiver.last_commit_time), name)
    page.put(families.COVERAGE, _seconds(archiver.coverage_time), name)
    page.put_summary(families.UPLOADS, archiver.uploads, archiver.upload_seconds, name)
    page.put(families.UPLOAD_ERRORS, archiver.upload_errors, name)
    page.put(families.ARCHIVED_CHUNKS, archiver.chunks, name)
    page.put(families.ARCHIVED_WAL, archiver.wal_bytes, name)
    page.put(families.ARCHIVED_STORED, archiver.stored_bytes, name)


def _put_job(page: _Page, name: str, job: JobState) -> None:
    page.put(families.JOB_RUNS, job.runs, name, job.job)
    page.put(families.JOB_RUNNING, job.running_since is not None, name, job.job)
    page.put(families.JOB_SUCCESS, _seconds(job.last_success), name, job.job)
    page.put(families.JOB_SECONDS, job.last_seconds, name, job.job)
    page.put(families.JOB_EXIT, job.last_exit_code, name, job.job)
    page.put(families.JOB_FAILURES, job.failures_in_a_row, name, job.job)
    page.put(families.JOB_NEXT, _seconds(job.next_due), name, job.job)
    figures = {figure.name: figure.value for figure in job.figures}
    ended = job.last_exit_code is not None
    if job.job in ("verify", "verify-data") and ended:
        page.put(families.VERIFY_DAMAGED, job.last_exit_code == _DAMAGED, name, job.job)
    if job.job == "verify-data":
        page.put(families.VERIFY_OLDEST, figures.get("data.oldest_age_seconds"), name)
    if job.job == "drill":
        page.put(families.DRILL_PASSED, job.last_exit_code == 0 if ended else None, name)
        page.put(families.DRILL_RTO, figures.get("rto_seconds"), name)
        page.put(families.DRILL_RPO, figures.get("rpo_seconds"), name)
        page.put(families.DRILL_RPO_BYTES, figures.get("rpo_bytes"), name)


def _put_kept(page: _Page, kept: KeptFacts, now: Micros, *, archived: bool) -> None:
    name = kept.cluster
    for label, part, asked in (
        ("store", kept.store_part, True),
        ("size", kept.size_part, kept.size_part != Part()),
        ("source", kept.source_part, kept.source_part != Part()),
        ("host", kept.host_part, True),
    ):
        if asked:
            since = part.at if part.at is not None else kept.since
            page.put(families.FACTS_AGE, _age(now, since), name, label)
            page.put(families.FACTS_FAILED, part.error is not None, name, label)
    if kept.store is not None:
        _put_store(page, name, kept.store, now)
    if kept.size is not None:
        _put_size(page, name, kept.size)
    if kept.source is not None:
        _put_source(page, name, kept.source)
    if kept.source is not None and kept.store is not None and not archived:
        _put_lag(page, name, kept.source, kept.store)


def _put_store(page: _Page, name: str, store: StoreFacts, now: Micros) -> None:
    current = store.current
    page.put(families.RECOVERABLE, current is not None, name)
    if current is not None:
        page.put(families.REACHABLE_START, _seconds(current.first_time), name)
        page.put(families.REACHABLE_END, _seconds(current.last_time), name)
    page.put(families.GAPS, len(store.gaps), name)
    page.put(families.GAP_BYTES, sum(gap.end - gap.start for gap in store.gaps), name)
    for kind in ("base", "built"):
        page.put(families.SNAPSHOTS, sum(one.kind == kind for one in store.snapshots), name, kind)
    newest, base = store.newest, store.newest_base
    if newest is not None:
        page.put(families.SNAPSHOT_AGE, _age(now, newest.time), name)
        page.put(families.DATABASE, newest.bytes, name)
    if base is not None:
        page.put(families.BASE_AGE, _age(now, base.time), name)
    page.put(families.REPLAY, store.replay_bytes, name)
    page.put(families.UNSEALED, store.unsealed_bytes, name)


def _put_size(page: _Page, name: str, size: StoreSize) -> None:
    for one in size.kinds:
        page.put(families.STORE_OBJECTS, one.objects, name, one.kind)
        page.put(families.STORE_BYTES, one.bytes, name, one.kind)
    page.put(families.STORE_COMPLETE, size.complete, name)
    page.put(families.WAL_RATIO, size.wal_stored_ratio, name)
    page.put(families.SNAPSHOT_RATIO, size.snapshot_stored_ratio, name)
    page.put(families.DISTINCT_RATIO, size.snapshot_distinct_ratio, name)


def _put_source(page: _Page, name: str, source: SourceFacts) -> None:
    page.put(families.SLOT_LIMIT, source.keep_limit_bytes, name)
    page.put(families.SLOT_EXISTS, source.slot is not None, name)
    if source.slot is not None:
        page.put(families.SLOT_ACTIVE, source.slot.active, name)


def _put_slot(page: _Page, name: str, kept: KeptFacts | None, archiver: ArchiverState | None) -> None:
    """The newer of what the source told us and what it told the archiver."""
    told: list[tuple[Micros, str | None, int | None]] = []
    if kept is not None and kept.source is not None and kept.source.slot is not None:
        slot = kept.source.slot
        told.append((kept.source_part.at or 0, slot.wal_status, slot.safe_bytes))
    if archiver is not None and archiver.slot is not None:
        told.append((archiver.reported_at or 0, archiver.slot.wal_status, archiver.slot.safe_bytes))
    if not told:
        return
    _, current, left = max(told, key=lambda one: one[0])
    for status in WAL_STATUSES:
        page.put(families.SLOT_STATUS, current == status, name, status)
    page.put(families.SLOT_LEFT, left, name)


def _put_lag(page: _Page, name: str, source: SourceFacts, store: StoreFacts) -> None:
    """Where no daemon archives: the two positions, which were not asked at the same moment."""
    current = store.current
    if current is None:
        return
    behind = max(0, source.end - store.durable)
    page.put(families.LAG_BYTES, behind, name)
    page.put(families.DURABLE_LSN, store.durable, name)
    page.put(families.SOURCE_LSN, source.end, name)
    if behind == 0:
        page.put(families.LAG_SECONDS, 0, name)
    elif current.last_time is not None:
        page.put(families.LAG_SECONDS, max(0.0, (source.time - current.last_time) / 1e6), name)


def _put_host(page: _Page, seen: Observed) -> None:
    """Branches once, whichever cluster's round told of them; each under the cluster it comes from."""
    told: list[tuple[Micros, HostFacts]] = [
        (kept.host_part.at or 0, kept.host) for kept in seen.clusters if kept.host is not None
    ]
    if not told:
        return
    host = max(told, key=lambda one: one[0])[1]
    names = {kept.store.url: kept.cluster for kept in seen.clusters if kept.store is not None}
    counts = dict.fromkeys([kept.cluster for kept in seen.clusters], 0)
    hits = misses = 0
    for branch in host.branches:
        cluster = names.get(branch.store_url, branch.store_url)
        counts[cluster] = counts.get(cluster, 0) + 1
        page.put(families.BRANCH_FETCHED, branch.fetched_bytes, cluster, branch.name)
        page.put(families.BRANCH_REQUESTS, branch.requests, cluster, branch.name)
        page.put(families.BRANCH_OWN, branch.own_bytes, cluster, branch.name)
        page.put(families.BRANCH_AGE, _age(seen.now, branch.created), cluster, branch.name)
        for found, count in (
            ("memory", branch.memory_hits),
            ("disk", branch.disk_hits),
            ("store", branch.store_extents),
        ):
            page.put(families.BRANCH_EXTENTS, count, cluster, branch.name, found)
        hits += branch.memory_hits + branch.disk_hits
        misses += branch.store_extents
    for cluster, count in counts.items():
        page.put(families.BRANCHES, count, cluster)
    page.put(families.CACHE_BYTES, host.cache.bytes if host.cache is not None else None)
    page.put(families.CACHE_RATIO, hits / (hits + misses) if hits + misses else None)


def _age(now: Micros, then: Micros) -> float:
    return max(0.0, (now - then) / 1e6)


def _seconds(moment: Micros | None) -> float | None:
    return moment / 1e6 if moment is not None else None
