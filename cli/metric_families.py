"""The metrics, by name: what each means, in which unit. ``cli.metrics`` fills them.

Base units only: seconds, bytes, ratios. Ages are reckoned when the page is made, by this host's clock against the
clock that the instant comes from. A value nobody knows is left out, never made up.
"""

from __future__ import annotations

from dataclasses import dataclass

GAUGE = "gauge"
COUNTER = "counter"
SUMMARY = "summary"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family."""

    name: str
    """As an expression names it, without the ``_sum`` and ``_count`` of a summary."""
    kind: str
    help: str
    labels: tuple[str, ...] = ("cluster",)


DAEMON_START = Family(
    "tl_daemon_start_timestamp_seconds", GAUGE, "When the daemon began, seconds since 1970.", ()
)
FACTS_AGE = Family(
    "tl_facts_age_seconds",
    GAUGE,
    "How long ago the part (store, size, source, host, archiver) last answered; since the asking began if never.",
    ("cluster", "part"),
)
FACTS_FAILED = Family(
    "tl_facts_failed",
    GAUGE,
    "1 while the part does not answer, and old facts are shown.",
    ("cluster", "part"),
)

ARCHIVER_UP = Family(
    "tl_archiver_up", GAUGE, "1 while the archiver's process runs and streams or catches up."
)
ARCHIVER_PHASE = Family(
    "tl_archiver_phase",
    GAUGE,
    "1 for the phase the archiver is in: connecting, catching up, streaming, waiting or stopped.",
    ("cluster", "phase"),
)
ARCHIVER_RESTARTS = Family(
    "tl_archiver_restarts_total", COUNTER, "Times the daemon started the archiver again."
)
ARCHIVER_SYNCHRONOUS = Family(
    "tl_archiver_synchronous", GAUGE, "1 while a COMMIT on the source may wait for the archiver."
)
LAG_BYTES = Family("tl_lag_bytes", GAUGE, "WAL that the source has and the store has not.")
LAG_SECONDS = Family(
    "tl_lag_seconds",
    GAUGE,
    "How long the source has had WAL that the store has not: what a loss of the source now would cost (RPO).",
)
DURABLE_LSN = Family("tl_durable_lsn_bytes", GAUGE, "Everything before this WAL position is in the store.")
SOURCE_LSN = Family("tl_source_lsn_bytes", GAUGE, "End of the source's WAL, as last heard.")
LAST_COMMIT = Family(
    "tl_last_commit_timestamp_seconds",
    GAUGE,
    "Latest end of a transaction in the store, source's clock, seconds since 1970.",
)
COVERAGE = Family(
    "tl_coverage_timestamp_seconds",
    GAUGE,
    "The history is known to be complete up to then, source's clock, seconds since 1970.",
)
UPLOADS = Family("tl_upload_seconds", SUMMARY, "Seconds the store took for each chunk of WAL it accepted.")
UPLOAD_ERRORS = Family(
    "tl_upload_errors_total", COUNTER, "Uploads the store did not answer, after its client's own retries."
)
ARCHIVED_CHUNKS = Family("tl_archived_chunks_total", COUNTER, "Chunks of WAL the archiver stored.")
ARCHIVED_WAL = Family(
    "tl_archived_wal_bytes_total", COUNTER, "WAL the archiver stored, as the source wrote it."
)
ARCHIVED_STORED = Family("tl_archived_stored_bytes_total", COUNTER, "Bytes of objects made for that WAL.")

SLOT_EXISTS = Family("tl_slot_exists", GAUGE, "1 while the source has our replication slot.")
SLOT_ACTIVE = Family("tl_slot_active", GAUGE, "1 while an archiver is connected to the slot.")
SLOT_STATUS = Family(
    "tl_slot_wal_status",
    GAUGE,
    "1 for the state of the slot's WAL: reserved, extended, unreserved (in danger now) or lost.",
    ("cluster", "status"),
)
SLOT_LEFT = Family(
    "tl_slot_bytes_until_lost",
    GAUGE,
    "WAL the source may still write before the slot is lost, and with it history; absent without a limit.",
)
SLOT_LIMIT = Family(
    "tl_slot_limit_bytes", GAUGE, "The source's max_slot_wal_keep_size; absent when unlimited."
)

RECOVERABLE = Family("tl_recoverable", GAUGE, "1 when the source's newest history can be recovered.")
REACHABLE_START = Family(
    "tl_reachable_start_timestamp_seconds",
    GAUGE,
    "Earliest moment that can be had, source's clock, seconds since 1970.",
)
REACHABLE_END = Family(
    "tl_reachable_end_timestamp_seconds",
    GAUGE,
    "Latest moment that can be had, source's clock, seconds since 1970.",
)
GAPS = Family("tl_gaps", GAUGE, "Stretches of WAL that are lost for good.")
GAP_BYTES = Family("tl_gap_bytes", GAUGE, "WAL in them.")
SNAPSHOTS = Family(
    "tl_snapshots", GAUGE, "Snapshots, by kind: base (backups) and built (from WAL).", ("cluster", "kind")
)
SNAPSHOT_AGE = Family("tl_snapshot_age_seconds", GAUGE, "Age of the newest snapshot of any kind.")
BASE_AGE = Family("tl_base_backup_age_seconds", GAUGE, "Age of the newest base backup.")
REPLAY = Family("tl_replay_bytes", GAUGE, "WAL that a branch at the head replays before its first query.")
DATABASE = Family("tl_database_bytes", GAUGE, "Files of the newest snapshot.")
UNSEALED = Family("tl_unsealed_bytes", GAUGE, "WAL that is still in chunks.")
STORE_OBJECTS = Family("tl_store_objects", GAUGE, "Objects in the store.", ("cluster", "kind"))
STORE_BYTES = Family("tl_store_bytes", GAUGE, "Bytes in the store.", ("cluster", "kind"))
STORE_COMPLETE = Family(
    "tl_store_size_complete", GAUGE, "0 when there are more objects than are counted at a time."
)
WAL_RATIO = Family("tl_wal_stored_ratio", GAUGE, "Bytes stored per byte of WAL, newest sealed range.")
SNAPSHOT_RATIO = Family(
    "tl_snapshot_stored_ratio", GAUGE, "Bytes stored per byte of content, newest snapshot: compression."
)
DISTINCT_RATIO = Family(
    "tl_snapshot_distinct_ratio",
    GAUGE,
    "Content stored, once each, per byte of files that all snapshots list: deduplication.",
)

_JOB = ("cluster", "job")
JOB_RUNS = Family("tl_job_runs_total", COUNTER, "Runs of a scheduled job that ended.", _JOB)
JOB_RUNNING = Family("tl_job_running", GAUGE, "1 while the job runs.", _JOB)
JOB_SUCCESS = Family(
    "tl_job_last_success_timestamp_seconds", GAUGE, "When it last succeeded, seconds since 1970.", _JOB
)
JOB_SECONDS = Family("tl_job_last_duration_seconds", GAUGE, "How long its last run took.", _JOB)
JOB_EXIT = Family(
    "tl_job_last_exit_code",
    GAUGE,
    "Exit code of its last run: 0 done, 4 store damaged, 6 a check did not pass, 7 try again.",
    _JOB,
)
JOB_FAILURES = Family("tl_job_failures_in_a_row", GAUGE, "Failed runs since the last success.", _JOB)
JOB_NEXT = Family("tl_job_next_run_timestamp_seconds", GAUGE, "When it is due, seconds since 1970.", _JOB)

VERIFY_OLDEST = Family(
    "tl_verify_oldest_unchecked_seconds",
    GAUGE,
    "Time since the part of the store that was not read longest was.",
)
VERIFY_DAMAGED = Family("tl_verify_damaged", GAUGE, "1 when the last verification found damage.", _JOB)
DRILL_PASSED = Family("tl_drill_passed", GAUGE, "1 when the last recovery drill passed.")
DRILL_RTO = Family("tl_drill_rto_seconds", GAUGE, "Time to the first query in the last drill.")
DRILL_RPO = Family(
    "tl_drill_rpo_seconds", GAUGE, "What a loss of the source would have cost, in the last drill."
)
DRILL_RPO_BYTES = Family("tl_drill_rpo_bytes", GAUGE, "The same in WAL.")

_BRANCH = ("cluster", "branch")
BRANCHES = Family("tl_branches", GAUGE, "Branches on this host.")
BRANCH_FETCHED = Family(
    "tl_branch_fetched_bytes_total", COUNTER, "Bytes it fetched from the store since its last start.", _BRANCH
)
BRANCH_REQUESTS = Family(
    "tl_branch_requests_total", COUNTER, "Requests it made of the store since its last start.", _BRANCH
)
BRANCH_OWN = Family("tl_branch_own_bytes", GAUGE, "What it keeps on this host's disk for itself.", _BRANCH)
BRANCH_AGE = Family("tl_branch_age_seconds", GAUGE, "Time since it was made.", _BRANCH)
BRANCH_EXTENTS = Family(
    "tl_branch_extents_total",
    COUNTER,
    "Extents it read, by where they were found (memory, disk, store), since its last start.",
    ("cluster", "branch", "found"),
)
CACHE_BYTES = Family("tl_cache_bytes", GAUGE, "Extents that this host keeps for all branches.", ())
CACHE_RATIO = Family(
    "tl_cache_hit_ratio",
    GAUGE,
    "Share of the extents that this host's branches read since their starts and that did not come from the store.",
    (),
)

FAMILIES: tuple[Family, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Family))
"""All of them."""
