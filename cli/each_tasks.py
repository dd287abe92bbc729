"""From ``tl each JOB`` to the tasks, and from their outcomes to what people read. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from cli.executor import Outcome, Task
from cli.tl_toml import Cluster
from timeline.errors import UsageError
from timeline.size_text import size_text

JOBS = ("snapshot", "verify", "gc", "drill")
"""Commands that find out from the store what is to be done, and may be run twice, or end anywhere."""
OF_THE_CLUSTER = ("gc", "drill")
"""Those that keep to tables of tl.toml, so whoever runs them must have it."""
NAMED_BY_US = ("--store", "--cluster", "--endpoint-url", "--region", "--json")
LONGEST_RUN = 10_000
"""Clusters in one run."""
_TURN = "1h"
"""How long a snapshot waits for another one on its host: they take turns there."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    cluster: str
    outcome: Outcome
    said: str
    """What came of it, in a few words."""


def chosen_clusters(
    known: Sequence[Cluster], names: Sequence[str], *, everything: bool
) -> tuple[Cluster, ...]:
    """Those asked for, in the file's order. Raises UsageError for unknown ones, and where nothing was asked for."""
    if everything and names:
        raise UsageError("--all and --cluster exclude each other")
    by_name = {cluster.name: cluster for cluster in known}
    for name in names:
        if name not in by_name:
            raise UsageError(f"no cluster {name!r} in tl.toml", hint=f"known: {', '.join(by_name) or 'none'}")
    chosen = tuple(cluster for cluster in known if everything or cluster.name in names)
    if not chosen:
        raise UsageError(
            "no cluster was named" if known else "tl.toml names no cluster",
            hint="--all, or --cluster NAME, which may be repeated" if known else "add a table [cluster.NAME]",
        )
    if len(chosen) > LONGEST_RUN:
        raise UsageError(f"{len(chosen)} clusters are too many for one run", hint=f"at most {LONGEST_RUN}")
    for cluster in chosen:
        if cluster.store is None:
            raise UsageError(f"tl.toml: cluster.{cluster.name}.store is missing")
    return chosen


def task_for(job: str, arguments: Sequence[str], cluster: Cluster, timeout_seconds: float) -> Task:
    """One of JOBS for one cluster."""
    assert cluster.store is not None
    argv = [job, *arguments, "--store", cluster.store, "--json"]
    argv += ["--endpoint-url", cluster.endpoint_url] if cluster.endpoint_url is not None else []
    argv += ["--region", cluster.region] if cluster.region is not None else []
    argv += ["--cluster", cluster.name] if job in OF_THE_CLUSTER else []
    if job == "snapshot" and "--wait" not in arguments:
        argv += ["--wait", _TURN]
    return Task(cluster.name, tuple(argv), timeout_seconds)


def refuse_named_by_us(arguments: Sequence[str]) -> None:
    """Raises UsageError for options of the job that ``tl each`` gives by itself."""
    for word in arguments:
        if word.partition("=")[0] in NAMED_BY_US:
            raise UsageError(
                f"{word.partition('=')[0]} comes from tl.toml", hint="choose with --cluster NAME"
            )


def row_of(job: str, outcome: Outcome) -> Row:
    """An outcome for people."""
    return Row(outcome.key, outcome, outcome.message or _said(job, outcome.document))


def _said(job: str, document: str | None) -> str:
    """What a job that succeeded did."""
    found = json.loads(document) if document is not None else {}
    if job == "snapshot":
        made = found.get("snapshots", [])
        return (
            f"{len(made)} built, at {made[-1]['lsn']}" if made else f"nothing to build: {found.get('reason')}"
        )
    if job == "verify":
        data = found.get("data")
        return "intact" if data is None else f"intact: {size_text(data['bytes'])} read"
    return "done"
