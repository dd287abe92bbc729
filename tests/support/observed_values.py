"""A cluster of which everything is known: for tests of what is made of facts."""

from __future__ import annotations

from cli.facts import (
    BranchFacts,
    CacheFacts,
    Facts,
    GapFacts,
    HostFacts,
    KindSize,
    RangeFacts,
    SlotFacts,
    SnapshotFacts,
    SourceFacts,
    StoreFacts,
    StoreSize,
)
from cli.observed import ArchiverState, ClusterState, DaemonState, Figure, JobState, SlotState
from timeline.lsn import Lsn

SECOND = 1_000_000
NOW = 1_800_000_000 * SECOND
GIB = 1 << 30
URL = "file:///store"

STORE = StoreFacts(
    url=URL,
    store_id="0123456789abcdef0123456789abcdef",
    current_tli=2,
    durable=Lsn(9 * GIB),
    ranges=(
        RangeFacts(1, Lsn(GIB), Lsn(2 * GIB), NOW - 9000 * SECOND, NOW - 8000 * SECOND, True),
        RangeFacts(2, Lsn(GIB), Lsn(9 * GIB - 40), NOW - 7000 * SECOND, NOW - 3 * SECOND, False),
    ),
    snapshots=(
        SnapshotFacts("b1", "base", 2, Lsn(GIB), NOW - 7000 * SECOND, 1000),
        SnapshotFacts("s1", "built", 2, Lsn(8 * GIB), NOW - 100 * SECOND, 2000),
    ),
    gaps=(GapFacts(1, Lsn(100), Lsn(164)),),
    unsealed_bytes=12345,
    backup_under_way=False,
    remarks=(),
)
SIZE = StoreSize(
    kinds=(
        KindSize("chunks", 3, 300),
        KindSize("packs", 4, 4000),
        KindSize("manifests", 5, 500),
        KindSize("log", 6, 600),
        KindSize("other", 0, 0),
    ),
    complete=True,
    wal_stored_ratio=0.25,
    snapshot_stored_ratio=0.5,
    snapshot_distinct_ratio=0.75,
)
SOURCE = SourceFacts(
    end=Lsn(9 * GIB + 4096),
    time=NOW,
    keep_limit_bytes=64 << 20,
    slot=SlotFacts("tl_0123456789ab_main", "reserved", True, 50 << 20, None),
)
HOST = HostFacts(
    branches=(
        BranchFacts(
            name="fix",
            store_url=URL,
            mode="lazy",
            created=NOW - 60 * SECOND,
            expires=None,
            own_bytes=8192,
            own_complete=True,
            requests=7,
            fetched_bytes=700_000,
            store_extents=10,
            memory_hits=60,
            disk_hits=30,
        ),
    ),
    cache=CacheFacts(1 << 20, exact=True),
)
FACTS = Facts(
    gathered_at=NOW - 20 * SECOND,
    store=STORE,
    store_error=None,
    size=SIZE,
    size_error=None,
    source=SOURCE,
    source_error=None,
    host=HOST,
    host_error=None,
)
ARCHIVER = ArchiverState(
    pid=1,
    restarts=2,
    reported_at=NOW - 2 * SECOND,
    phase="streaming",
    tli=2,
    durable=Lsn(9 * GIB),
    received=Lsn(9 * GIB + 8192),
    source_end=Lsn(9 * GIB + 8192),
    last_commit_time=NOW - 5 * SECOND,
    coverage_time=NOW - 4 * SECOND,
    slot=SlotState("tl_0123456789ab_main", "extended", 40 << 20),
    synchronous=False,
    chunks=11,
    wal_bytes=11_000_000,
    stored_bytes=3_000_000,
    uploads=11,
    upload_seconds=1.5,
    upload_errors=1,
    error=None,
    behind_since=NOW - 6 * SECOND,
)


def job(name: str, *, exit_code: int = 0, figures: tuple[Figure, ...] = ()) -> JobState:
    """A job that ran once, an hour ago."""
    return JobState(
        job=name,
        runs=1,
        failures_in_a_row=int(exit_code != 0),
        running_since=None,
        last_started=NOW - 3600 * SECOND,
        last_seconds=1.5,
        last_exit_code=exit_code,
        last_success=NOW - 3600 * SECOND,
        last_message="" if exit_code == 0 else "it went wrong",
        next_due=NOW + 3600 * SECOND,
        figures=figures,
    )


JOBS = (
    job("verify-data", exit_code=4, figures=(Figure("data.oldest_age_seconds", 86400.0),)),
    job(
        "drill",
        figures=(Figure("rto_seconds", 2.5), Figure("rpo_seconds", 0.5), Figure("rpo_bytes", 1024.0)),
    ),
)
DAEMON = DaemonState(
    pid=1,
    started=NOW - 5000 * SECOND,
    written=NOW - SECOND,
    clusters=(ClusterState("prod", URL, ARCHIVER, JOBS),),
)
