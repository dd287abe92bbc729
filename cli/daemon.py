"""``tl daemon``: archivers and everything that is done on a schedule, for all clusters of tl.toml."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from cli.config import config_path
from cli.output import emit_json, iso, local_time, say, table
from timeline.errors import UsageError


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """One line of ``tl daemon --check``."""

    cluster: str
    job: str
    schedule: str
    next_run: str
    """Without jitter."""
    command: str


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What ``tl daemon --check`` found."""

    config: str
    clusters: tuple[str, ...]
    archivers: tuple[PlannedJob, ...]
    jobs: tuple[PlannedJob, ...]


@click.command("daemon")
@click.option(
    "--config", metavar="FILE", help="The tl.toml to use (default: TL_CONFIG, then the usual places)."
)
@click.option(
    "--cluster", "clusters", multiple=True, metavar="NAME", help="Only this cluster; may be repeated."
)
@click.option("--check", is_flag=True, help="Check tl.toml and print the schedule; start nothing.")
@click.option("--print-unit", is_flag=True, help="Print a systemd unit for this installation; start nothing.")
@click.option(
    "--log", "log_format", type=click.Choice(["auto", "json", "human"]), help="Format of the log on stderr."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout (--check); a JSON log.")
def daemon_command(
    *,
    config: str | None,
    clusters: tuple[str, ...],
    check: bool,
    print_unit: bool,
    log_format: str | None,
    as_json: bool,
) -> None:
    """Archive, and do everything else on its schedule, until told to stop (SIGTERM, SIGINT).

    Archivers, snapshots, base backups, retention, verification, drills and the expiry of branches, as tl.toml says. Each
    runs as a process of its own; one that fails stops no other. SIGHUP reloads tl.toml. SIGTERM ends everything in
    order: archivers first make durable what is in flight.
    """
    path = _path(config)
    if print_unit:
        from cli.unit_file import unit_text

        text = unit_text(path)
        if as_json:
            emit_json({"unit": text})
        else:
            say(text.rstrip("\n"))
        return
    if path is None:
        raise UsageError("no tl.toml to work by", hint="`tl init` writes one; or name it with --config FILE")
    if check:
        _check(path, clusters, as_json=as_json)
        return
    _run(path, clusters, "json" if as_json and log_format is None else log_format)


def _path(config: str | None) -> Path | None:
    if config is None:
        found = config_path()
        return found.absolute() if found is not None else None
    return Path(config).absolute()


def _run(path: Path, clusters: tuple[str, ...], log_format: str | None) -> None:
    from cli.daemon_config import read_configuration, wants_json
    from cli.daemon_run import Daemon, only_daemon
    from cli.log_lines import Log
    from cli.output import on_terminal
    from restore.host import state_directory
    from timeline.clock import SystemClock

    configuration = read_configuration(path, clusters)
    state = state_directory(os.environ)
    clock = SystemClock()
    setting = log_format or configuration.document.daemon.log
    log = Log(sys.stderr, clock, as_json=wants_json(setting, terminal=on_terminal()))

    async def run() -> None:
        daemon = Daemon(
            path,
            clusters,
            configuration,
            state=state,
            environment=os.environ,
            clock=clock,
            log=log,
            fixed_log=log_format is not None,
            terminal=on_terminal(),
        )
        await daemon.run()

    with only_daemon(state):
        asyncio.run(run())


def _check(path: Path, clusters: tuple[str, ...], *, as_json: bool) -> None:
    result = planned_runs(path, clusters)
    if as_json:
        emit_json(result)
        return
    say(f"{result.config}: {len(result.clusters)} clusters, {len(result.jobs)} jobs")
    for each in result.archivers:
        say(f"archiver   {each.cluster}: {each.command}")
    from datetime import datetime

    table(
        ("next run", "cluster", "job", "schedule", "command"),
        (
            (
                local_time(int(datetime.fromisoformat(each.next_run).timestamp()) * 1_000_000)[:19],
                each.cluster or "-",
                each.job,
                each.schedule,
                each.command,
            )
            for each in result.jobs
        ),
    )


def planned_runs(path: Path, clusters: tuple[str, ...]) -> CheckResult:
    """The schedule that a daemon started now would follow, soonest first; raises UsageError for a bad tl.toml."""
    from cli.daemon_config import all_jobs, read_configuration, zone_of
    from cli.job_states import planned
    from cli.jobs import ARCHIVE, archive_arguments, told
    from cli.observed_json import jobs_before, read_state, state_file
    from restore.host import state_directory
    from timeline.clock import SystemClock

    configuration = read_configuration(path, clusters)
    try:
        before = jobs_before(read_state(state_file(state_directory(os.environ))))
    except (OSError, ValueError):
        # The daemon says so when it starts; it plans as for the first time, too.
        before = {}
    now = SystemClock().now()
    zone = zone_of(configuration.document, os.environ)
    runs = []
    for job in all_jobs(configuration):
        due = planned(job, before.get(job.key), now, zone, 0.0, 0.0).next_due or now
        runs.append(
            (due, PlannedJob(job.cluster, job.name, str(job.schedule), iso(due) or "", told(job.arguments)))
        )
    archivers = tuple(
        PlannedJob(cluster.name, ARCHIVE, "always", "", told(arguments))
        for cluster in configuration.clusters
        if (arguments := archive_arguments(cluster)) is not None
    )
    return CheckResult(
        str(path),
        tuple(cluster.name for cluster in configuration.clusters),
        archivers,
        tuple(run for _, run in sorted(runs, key=lambda each: each[0])),
    )
