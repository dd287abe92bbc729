"""tl.toml, key by key."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

import cli
from cli.archive import archive_command
from cli.jobs import archive_arguments, host_jobs, jobs_of, told
from cli.operations import DaemonPlan, Operations, RetentionPlan
from cli.schedule import Every
from cli.tl_toml import CLUSTER_KEYS, DAEMON_KEYS, HOOK_KEYS, SUB_TABLES, Document, parse_document
from timeline.errors import UsageError

EXAMPLE = (Path(cli.__file__).parent / "tl.toml.example").read_text()


def parse(text: str) -> Document:
    return parse_document(text, "tl.toml")


def refused(text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse(text)
    return caught.value


def test_the_example_names_every_key_with_its_default() -> None:
    shown = tomllib.loads(EXAMPLE)
    example = shown["cluster"]["example"]
    assert list(shown["daemon"]) == [*DAEMON_KEYS, "hooks"]
    assert list(shown["daemon"]["hooks"]) == list(HOOK_KEYS)
    assert list(example) == [*CLUSTER_KEYS, *SUB_TABLES]
    for name, (keys, _) in SUB_TABLES.items():
        assert list(example[name]) == list(keys), name
    document = parse(EXAMPLE)
    assert document.daemon == DaemonPlan()
    # Retention has a schedule as soon as its table is there.
    assert document.clusters[0].operations == Operations(retention=RetentionPlan(schedule=Every(86_400)))


def test_every_field_has_a_key() -> None:
    """What a plan holds can be said in tl.toml."""
    assert {key.field for key in DAEMON_KEYS.values()} | {"hooks"} == set(DaemonPlan.__slots__)
    for name, (keys, _) in SUB_TABLES.items():
        plan = getattr(Operations(), name)
        assert {key.field for key in keys.values()} == {each.name for each in dataclasses.fields(plan)}, name


@pytest.mark.parametrize("table", SUB_TABLES)
def test_unknown_keys_name_table_and_nearest(table: str) -> None:
    first = next(iter(SUB_TABLES[table][0]))
    error = refused(f"[cluster.a.{table}]\n{first}x = 1\n")
    assert error.message == f"tl.toml: unknown key '{first}x' in [cluster.a.{table}]"
    assert error.hint == f"did you mean '{first}'?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[daemno]\n", "unknown key 'daemno'"),
        ("daemon = 1\n", "daemon is not a table"),
        ("[cluster.a]\nretention = true\n", "cluster.a.retention is not a table"),
        ("[cluster.a.verify]\nstructure = 6\n", "cluster.a.verify.structure: text is expected"),
        ('[cluster.a.verify]\nbudget = "many"\n', "cluster.a.verify.budget: a size is expected"),
        ('[cluster.a.retention]\nwindow = "30"\n', "cluster.a.retention.window: a duration is expected"),
        ("[cluster.a.retention]\nmin_bases = 0\n", "a number from 1 to 1000"),
        ("[cluster.a.retention]\nmin_bases = true\n", "a number from 1 to 1000"),
        ('[cluster.a.retention]\nhourly = "1d"\n', r"\[cluster.a.retention\]: keep_all, hourly and daily"),
        ('[cluster.a.drill]\nschedule = "* * *"\n', "cluster.a.drill.schedule: a schedule is expected"),
        ('[cluster.a.drill]\nsql = "select 1"\n', "a list of at most 100 texts"),
        ("[cluster.a.drill]\nsql = [1]\n", "text is expected, not 1"),
        ('[cluster.a.drill]\ntimeout = "0s"\n', "longer than nothing"),
        ('[cluster.a.archive]\nenabled = "yes"\n', "true or false is expected"),
        ('[cluster.a.archive]\nrate_limit = "0"\n', "more than nothing"),
        ('[cluster.a.alerts]\nheartbeat_url = "file:///etc/passwd"\n', "a URL is expected"),
        ('[cluster.a.alerts]\nheartbeat_method = "PSOT"\n', "did you mean 'POST'"),
        ('[cluster.a.hooks]\non_failure = "mail"\n', "cluster.a.hooks.on_failure: a list"),
        ('[daemon]\nmetrics = "9187"\n', "HOST:PORT is expected"),
        ('[daemon]\nlog = "text"\n', "one of auto, json, human"),
        ("[daemon]\nconcurrency = 0\n", "a number from 1 to 64"),
        ('[daemon]\nzone = "Mars/Olympus"\n', "no zone 'Mars/Olympus'"),
        ("[daemon.hooks]\non_failre = []\n", r"unknown key 'on_failre' in \[daemon.hooks\]"),
        ('[cluster.""]\nstore = "x"\n', "empty name"),
    ],
)
def test_wrong_values_name_file_table_and_key(text: str, message: str) -> None:
    error = refused(text)
    with pytest.raises(UsageError, match=message):
        raise error
    assert error.message.startswith("tl.toml: ")


@pytest.mark.parametrize(
    ("after", "seconds"), [("30d", 30 * 86_400.0), ("500ms", 0.5), ("1000001s", 1_000_001.0)]
)
def test_what_the_archiver_is_told_it_understands(after: str, seconds: float) -> None:
    """A daemon's archiver that refuses its own options would archive nothing."""
    document = parse(f'[cluster.a]\nstore = "file:///a"\n[cluster.a.snapshots]\nafter = "{after}"\n')
    arguments = archive_arguments(document.clusters[0])
    assert arguments is not None
    assert archive_command.make_context("archive", list(arguments[1:])).params["snapshot_after"] == seconds


def test_what_runs_follows_from_it() -> None:
    document = parse(
        '[daemon]\nexpire = "off"\n'
        '[cluster.a]\nstore = "file:///a"\nsource = "host=x"\n'
        '[cluster.a.archive]\nslot = "mine"\nallow_gap = true\nrate_limit = "5MB"\nstandbys = ["host=y"]\nmax_delay = "200ms"\n'
        '[cluster.a.snapshots]\nevery = "96MiB"\nafter = "2m"\nschedule = "6h"\n'
        '[cluster.a.backup]\nschedule = "0 1 * * 0"\n'
        '[cluster.a.retention]\ngrace = "36h"\n'
        '[cluster.a.drill]\nschedule = "1d"\nat = "random"\nrto = "1m"\nsql = ["select true"]\nfull = true\n'
    )
    (cluster,) = document.clusters
    assert host_jobs(document.daemon) == ()
    assert archive_arguments(cluster) == (
        *("archive", "--cluster", "a", "--json-status", "1", "--max-delay", "0.2", "--snapshot-every", "96"),
        *("--snapshot-after", "2m"),
        *("--application-name", "tl", "--slot", "mine", "--allow-gap", "--rate-limit", "5242880"),
        *("--standby", "host=y"),
    )
    assert [(job.name, told(job.arguments)) for job in jobs_of(cluster)] == [
        ("snapshot", "tl snapshot --cluster a --json"),
        ("backup", "tl backup --cluster a --json"),
        ("gc", "tl gc --cluster a --json --yes --grace 36h"),
        ("verify", "tl verify --cluster a --json"),
        ("verify-data", "tl verify --cluster a --json --data --budget 10737418240"),
        ("drill", "tl drill --cluster a --json --random --rto 1m --assert 'select true' --full"),
    ]


def test_nothing_is_deleted_unasked() -> None:
    """P11: without a table of its own retention has no schedule."""
    (cluster,) = parse('[cluster.a]\nstore = "x"\n').clusters
    assert "gc" not in [job.name for job in jobs_of(cluster)]
    (off,) = parse("[cluster.a.archive]\nenabled = false\n").clusters
    assert archive_arguments(off) is None


def test_passwords_are_not_shown() -> None:
    shown = told(
        ("archive", "--standby", "host=y password=geheim user=z", "--standby", "postgres://u:geheim@h/d")
    )
    assert "geheim" not in shown
    assert "user=z" in shown
