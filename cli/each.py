"""``tl each``: one job for many clusters, several at a time, here or on the workers of a Dask cluster."""

from __future__ import annotations

import asyncio
import importlib
import json
import signal
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import click

from cli.config import config_path, read_clusters
from cli.duration import Duration
from cli.each_tasks import JOBS, Row, chosen_clusters, refuse_named_by_us, row_of, task_for
from cli.executor import LocalPlace, Place, Task, worst
from cli.executor_open import PlaceType, open_executor
from cli.output import duration_text, emit_json, say, table
from cli.progress import count_progress
from timeline.clock import Clock, SystemClock
from timeline.errors import UsageError

_LOCAL = LocalPlace(2)
"""One computes while another one waits for its store; each may take 0.3 GB."""
_SECONDS = 12 * 3600.0
_INTERRUPTED = 130
_COLUMNS = ("CLUSTER", "EXIT", "TOOK", "TRIES", "WHERE", "RESULT")


@click.command("each", context_settings={"ignore_unknown_options": True})
@click.option("--all", "everything", is_flag=True, help="All clusters of tl.toml.")
@click.option("--cluster", "names", multiple=True, metavar="NAME", help="This cluster; may be repeated.")
@click.option(
    "--executor",
    "place",
    type=PlaceType(),
    metavar="WHERE",
    help="local:N, so many processes of this host (default: local:2), or tcp://HOST:PORT of a Dask scheduler.",
)
@click.option(
    "--timeout",
    type=Duration(),
    default=_SECONDS,
    metavar="DURATION",
    help="For each cluster (default: 12h).",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.argument("job", type=click.Choice(JOBS))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF JOB]…")
def each_command(
    *,
    everything: bool,
    names: tuple[str, ...],
    place: Place | None,
    timeout: float,
    as_json: bool,
    job: str,
    arguments: tuple[str, ...],
) -> int:
    """Run JOB once for every cluster: snapshot, verify, gc or drill, with its own options.

    \b
    tl each snapshot --all
    tl each verify --all --data --budget 50GB --executor tcp://scheduler:8786
    tl each gc --yes --cluster prod --cluster test

    A Dask worker needs tl, what the job needs (FUSE and Postgres for snapshots and drills) and the credentials of the stores;
    for gc and drill a tl.toml with these clusters, too. Jobs may be run twice and killed anywhere: what was lost
    with a worker is begun anew elsewhere, three times in all. The exit code is the worst of all clusters'.
    """
    path = config_path()
    if path is None:
        raise UsageError(
            "there is no tl.toml", hint="`tl init` writes one; cli/tl.toml.example shows all of it"
        )
    clusters = chosen_clusters(read_clusters(path), names, everything=everything)
    _check_words(job, arguments)
    tasks = [task_for(job, arguments, cluster, timeout) for cluster in clusters]
    rows, stopped = asyncio.run(_run(job, tasks, place or _LOCAL, SystemClock()))
    order = {task.key: number for number, task in enumerate(tasks)}
    rows = sorted(rows, key=lambda row: order[row.cluster])
    code = worst(row.outcome.exit_code for row in rows)
    if as_json:
        emit_json({"job": job, "exit_code": code, "clusters": [_document(row) for row in rows]})
    else:
        table(_COLUMNS, (_cells(row) for row in rows))
        failed = sum(row.outcome.exit_code != 0 for row in rows)
        say(f"{len(rows) - failed} of {len(rows)} done" + (f", {failed} not" if failed else ""))
    return _INTERRUPTED if stopped else code


def _check_words(job: str, arguments: Sequence[str]) -> None:
    """Once here, and not once on every worker; raises UsageError, or what click says."""
    refuse_named_by_us(arguments)
    command: click.Command = getattr(importlib.import_module(f"cli.{job}"), f"{job}_command")
    command.make_context(f"tl each {job}", list(arguments))


async def _run(job: str, tasks: Sequence[Task], place: Place, clock: Clock) -> tuple[list[Row], bool]:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    executor = await open_executor(place, clock)
    rows: list[Row] = []
    try:
        with count_progress(job, total=len(tasks), lines=True) as tell:
            async with aclosing(executor.outcomes(tasks, stop)) as outcomes:
                async for outcome in outcomes:
                    rows.append(row_of(job, outcome))
                    tell(f"{rows[-1].cluster}: {rows[-1].said}", len(rows), len(tasks))
    finally:
        await executor.aclose()
    return rows, stop.is_set()


def _cells(row: Row) -> tuple[str, ...]:
    found = row.outcome
    took = duration_text(found.seconds)
    return row.cluster, str(found.exit_code), took, str(found.attempts), found.worker, row.said


def _document(row: Row) -> dict[str, Any]:
    found = row.outcome
    return {
        "cluster": row.cluster,
        "exit_code": found.exit_code,
        "message": found.message,
        "elapsed_seconds": found.seconds,
        "attempts": found.attempts,
        "worker": found.worker,
        "lines": found.lines,
        "result": None if found.document is None else json.loads(found.document),
    }
