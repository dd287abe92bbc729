"""The page for Prometheus: what is known goes in, under a name, in base units; what is not stays out."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cli.facts import Facts, KeptFacts
from cli.job_figures import read_figures
from cli.metric_families import COUNTER, FAMILIES, SUMMARY
from cli.metrics import SILENT_SECONDS, Observed, exposition, lag_seconds
from cli.observed import ArchiverState, DaemonState, Figure
from tests.support import observed_values as known
from tests.support.observed_values import ARCHIVER, DAEMON, FACTS, GIB, NOW, SECOND

KEPT = KeptFacts("prod", NOW - 9000 * SECOND).with_round(FACTS)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(observed: Observed) -> Samples:
    """Every sample of the page, read back by Prometheus's own reader."""
    text = exposition(lambda: observed).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    """One value; labelled with the cluster unless told otherwise."""
    labels = {"cluster": "prod", **labels}
    return found[(name, tuple(sorted((key, text) for key, text in labels.items() if text)))]


ALL = Observed(NOW, DAEMON, (KEPT,))


def test_every_family_has_a_value_when_everything_is_known() -> None:
    text = exposition(lambda: ALL).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    told = {family.name.removesuffix("_total"): family for family in FAMILIES}
    assert set(families) == set(told)
    for name, family in families.items():
        assert family.documentation == told[name].help
        assert family.type == told[name].kind
        assert {label for sample in family.samples for label in sample.labels} == set(told[name].labels), name


def test_names_keep_the_conventions() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"tl_[a-z_]+", family.name)
        assert family.name.endswith("_total") == (family.kind == COUNTER), family.name
        assert not re.search(r"_(ms|milliseconds|kb|mb|minutes|hours)\b", family.name)
        if family.kind == SUMMARY:
            assert family.name.endswith("_seconds")
        assert len({one.name for one in FAMILIES}) == len(FAMILIES)
        assert family.help.endswith(".")


def test_the_archiver() -> None:
    found = samples(ALL)
    assert value(found, "tl_archiver_up") == 1
    assert value(found, "tl_archiver_phase", phase="streaming") == 1
    assert value(found, "tl_archiver_phase", phase="waiting") == 0
    assert value(found, "tl_archiver_restarts_total") == 2
    assert value(found, "tl_lag_bytes") == 8192
    assert value(found, "tl_lag_seconds") == 6
    assert value(found, "tl_durable_lsn_bytes") == 9 * GIB
    assert value(found, "tl_last_commit_timestamp_seconds") == NOW / 1e6 - 5
    assert value(found, "tl_upload_seconds_count") == 11
    assert value(found, "tl_upload_seconds_sum") == 1.5
    assert value(found, "tl_upload_errors_total") == 1
    assert value(found, "tl_archived_stored_bytes_total") == 3_000_000


def test_the_slot_is_the_newest_word_of_it() -> None:
    """EDGE 10: the archiver asks more often; when it is silent, the source itself is asked."""
    found = samples(ALL)
    assert value(found, "tl_slot_bytes_until_lost") == 40 << 20
    assert value(found, "tl_slot_wal_status", status="extended") == 1
    assert value(found, "tl_slot_limit_bytes") == 64 << 20
    silent = replace(ARCHIVER, reported_at=NOW - 500 * SECOND)
    found = samples(Observed(NOW, with_archiver(silent), (KEPT,)))
    assert value(found, "tl_slot_bytes_until_lost") == 50 << 20
    assert value(found, "tl_slot_wal_status", status="reserved") == 1
    assert value(found, "tl_slot_wal_status", status="extended") == 0


def test_the_store() -> None:
    found = samples(ALL)
    assert value(found, "tl_recoverable") == 1
    assert value(found, "tl_reachable_start_timestamp_seconds") == NOW / 1e6 - 7000
    assert value(found, "tl_reachable_end_timestamp_seconds") == NOW / 1e6 - 3
    assert value(found, "tl_gaps") == 1
    assert value(found, "tl_gap_bytes") == 64
    assert value(found, "tl_snapshot_age_seconds") == 100
    assert value(found, "tl_base_backup_age_seconds") == 7000
    assert value(found, "tl_replay_bytes") == GIB - 40
    assert value(found, "tl_store_bytes", kind="packs") == 4000
    assert value(found, "tl_store_objects", kind="manifests") == 5
    assert value(found, "tl_wal_stored_ratio") == 0.25


def test_jobs_drill_and_verification() -> None:
    found = samples(ALL)
    assert value(found, "tl_job_last_exit_code", job="verify-data") == 4
    assert value(found, "tl_job_failures_in_a_row", job="verify-data") == 1
    assert value(found, "tl_verify_damaged", job="verify-data") == 1
    assert value(found, "tl_verify_oldest_unchecked_seconds") == 86400
    assert value(found, "tl_drill_passed") == 1
    assert value(found, "tl_drill_rto_seconds") == 2.5
    assert value(found, "tl_drill_rpo_bytes") == 1024
    assert value(found, "tl_job_last_success_timestamp_seconds", job="drill") == NOW / 1e6 - 3600


def test_branches_and_cache() -> None:
    found = samples(ALL)
    assert value(found, "tl_branches") == 1
    assert value(found, "tl_branch_own_bytes", branch="fix") == 8192
    assert value(found, "tl_branch_fetched_bytes_total", branch="fix") == 700_000
    assert value(found, "tl_branch_age_seconds", branch="fix") == 60
    assert value(found, "tl_cache_hit_ratio", cluster="") == 0.9


def test_a_branch_is_told_once_though_every_cluster_tells_of_the_host() -> None:
    other = replace(known.STORE, url="file:///other")
    second = KeptFacts("second", NOW).with_round(replace(FACTS, store=other))
    found = samples(Observed(NOW, DAEMON, (KEPT, second)))
    assert value(found, "tl_branches") == 1
    assert value(found, "tl_branches", cluster="second") == 0
    assert [key for key in found if key[0] == "tl_branch_own_bytes"] == [
        ("tl_branch_own_bytes", (("branch", "fix"), ("cluster", "prod")))
    ]


def test_what_nobody_knows_is_left_out() -> None:
    found = samples(Observed(NOW, None, (KeptFacts("prod", NOW - 7 * SECOND),)))
    assert {name for name, _ in found} == {"tl_facts_age_seconds", "tl_facts_failed"}
    assert value(found, "tl_facts_age_seconds", part="store") == 7


def test_who_does_not_answer_any_more_leaves_its_last_facts_and_their_age() -> None:
    silent = Facts(NOW + 60 * SECOND, None, "no answer", None, None, None, "no route", known.HOST, None)
    kept = KEPT.with_round(silent)
    found = samples(Observed(NOW + 90 * SECOND, None, (kept,)))
    assert value(found, "tl_facts_age_seconds", part="store") == 110
    assert value(found, "tl_facts_failed", part="store") == 1
    assert value(found, "tl_facts_failed", part="source") == 1
    assert value(found, "tl_facts_age_seconds", part="host") == 30
    assert value(found, "tl_facts_failed", part="host") == 0
    assert value(found, "tl_gap_bytes") == 64
    # Ages go on.
    assert value(found, "tl_snapshot_age_seconds") == 190
    # Its size was not asked for: no failure.
    assert value(found, "tl_facts_failed", part="size") == 0
    again = kept.with_round(replace(FACTS, gathered_at=NOW + 100 * SECOND))
    found = samples(Observed(NOW + 100 * SECOND, None, (again,)))
    assert value(found, "tl_facts_age_seconds", part="store") == 0
    assert value(found, "tl_facts_failed", part="store") == 0


def test_a_child_that_was_ended_is_a_failure_of_all_parts() -> None:
    found = samples(Observed(NOW, None, (KEPT.without_answer("no facts within 180 s"),)))
    assert [value(found, "tl_facts_failed", part=part) for part in ("store", "source", "host")] == [1, 1, 1]
    assert value(found, "tl_slot_bytes_until_lost") == 50 << 20


def test_without_a_daemon_the_lag_is_between_source_and_store() -> None:
    found = samples(Observed(NOW, None, (KEPT,)))
    assert value(found, "tl_lag_bytes") == 4096
    assert value(found, "tl_lag_seconds") == 3
    caught_up = replace(FACTS, source=replace(known.SOURCE, end=known.STORE.durable))
    found = samples(Observed(NOW, None, (KeptFacts("prod", NOW).with_round(caught_up),)))
    assert (value(found, "tl_lag_bytes"), value(found, "tl_lag_seconds")) == (0, 0)


def with_archiver(archiver: ArchiverState) -> DaemonState:
    return replace(DAEMON, clusters=(replace(DAEMON.clusters[0], archiver=archiver),))


@pytest.mark.parametrize(
    ("changes", "lag", "up"),
    [
        ({}, 6.0, 1),
        ({"behind_since": None}, 0.0, 1),
        ({"behind_since": None, "reported_at": NOW - 100 * SECOND}, 100.0, 0),
        ({"phase": "waiting"}, 6.0, 0),
        ({"phase": "catching up"}, 6.0, 1),
        ({"pid": None}, 6.0, 0),
        ({"reported_at": None}, None, 0),
        ({"durable": None}, None, 1),
    ],
)
def test_an_archiver_that_says_nothing_is_not_taken_for_one_that_is_there(
    changes: dict[str, object], lag: float | None, up: int
) -> None:
    archiver = replace(ARCHIVER, **changes)  # type: ignore[arg-type]
    assert lag_seconds(archiver, NOW) == lag
    found = samples(Observed(NOW, with_archiver(archiver), ()))
    assert value(found, "tl_archiver_up") == up
    assert (("tl_lag_seconds", (("cluster", "prod"),)) in found) == (lag is not None)
    assert SILENT_SECONDS < 100


def test_names_of_people_cannot_break_the_page() -> None:
    odd = 'a"b\\c\nd'
    found = samples(Observed(NOW, None, (replace(KEPT, cluster=odd),)))
    assert value(found, "tl_recoverable", cluster=odd) == 1


def test_figures_of_a_job() -> None:
    printed = 'progress\n{"rto_seconds": 2.5, "passed": true, "id": "x", "nested": {"a": 1}, "none": null}\n'
    assert read_figures(printed) == (
        Figure("rto_seconds", 2.5),
        Figure("passed", 1.0),
        Figure("nested.a", 1.0),
    )
    assert read_figures("") == read_figures("no JSON") == read_figures("[1]") == ()
    assert read_figures('{"a": NaN, "b": 1e400}') == ()


def test_a_daemon_that_serves_metrics_stays_small() -> None:
    """P9: the libraries that ask stores and sources belong to its children."""
    code = "import sys, cli.metrics_feed; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "prometheus_client" in loaded
    assert not loaded & {"pyarrow", "numpy", "psycopg", "aiobotocore", "botocore", "numba", "zstandard"}


def test_a_job_of_the_host_belongs_to_no_cluster() -> None:
    found = samples(Observed(NOW, replace(DAEMON, host_jobs=(known.job("expire"),)), ()))
    assert found[("tl_job_last_exit_code", (("cluster", ""), ("job", "expire")))] == 0
