"""From tl.toml's values to what runs: the archiver's argv, and the jobs with theirs. Pure.

Everything is a command of ``tl`` in a child process: the daemon itself stays small, and what one of them does with its
memory or its threads is over when it ends.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from cli.operations import DaemonPlan, HookPlan
from cli.quantities import write_duration
from cli.schedule import Schedule
from cli.tl_toml import Cluster

ARCHIVE = "archive"
"""The archiver's name in logs and events; it is no job."""
HOST = ""
"""Cluster of the jobs that belong to none."""
_MIB = 1 << 20
_EXPIRE_SECONDS = 1800.0
_PASSWORD = re.compile(r"(password\s*=\s*)('(?:[^'\\]|\\.)*'|\S+)|(://[^:/@\s]*:)[^@\s]*(?=@)")


@dataclass(frozen=True, slots=True)
class Job:
    """One thing that is done again and again."""

    cluster: str
    name: str
    arguments: tuple[str, ...]
    """Of ``tl``."""
    schedule: Schedule
    timeout_seconds: float
    heavy: bool
    """Counts for ``concurrency``."""
    hooks: HookPlan

    @property
    def key(self) -> tuple[str, str]:
        """What it is known by across restarts and reloads."""
        return self.cluster, self.name


def archive_arguments(cluster: Cluster) -> tuple[str, ...] | None:
    """``tl``'s arguments for the cluster's archiver; ``None``: it runs elsewhere."""
    plan = cluster.operations.archive
    if not plan.enabled:
        return None
    arguments = ["archive", *_chosen(cluster), "--json-status", "1"]
    arguments += ["--max-delay", f"{plan.max_delay_seconds:g}"]
    snapshots = cluster.operations.snapshots
    arguments += ["--snapshot-every", f"{snapshots.every_bytes / _MIB:g}"]
    arguments += ["--snapshot-after", write_duration(snapshots.after_seconds)]
    arguments += ["--application-name", plan.application_name]
    arguments += ["--slot", plan.slot] if plan.slot is not None else []
    for flag, wanted in (
        ("--no-slot", plan.no_slot),
        ("--unbounded-slot", plan.unbounded_slot),
        ("--allow-gap", plan.allow_gap),
        ("--fast-checkpoint", plan.fast_checkpoint),
    ):
        arguments += [flag] if wanted else []
    arguments += _rate(plan.rate_limit_bytes)
    for standby in plan.standbys:
        arguments += ["--standby", standby]
    return tuple(arguments)


def jobs_of(cluster: Cluster) -> tuple[Job, ...]:
    """The cluster's jobs that have a schedule."""
    plan = cluster.operations
    chosen = (*_chosen(cluster), "--json")
    found: list[tuple[str, Schedule | None, tuple[str, ...], float]] = [
        ("snapshot", plan.snapshots.schedule, ("snapshot", *chosen), plan.snapshots.timeout_seconds),
        (
            "backup",
            plan.backup.schedule,
            (
                "backup",
                *chosen,
                *_rate(plan.backup.rate_limit_bytes),
                *(["--fast-checkpoint"] if plan.backup.fast_checkpoint else []),
            ),
            plan.backup.timeout_seconds,
        ),
        (
            "gc",
            plan.retention.schedule,
            ("gc", *chosen, "--yes", "--grace", write_duration(plan.retention.grace_seconds)),
            plan.retention.timeout_seconds,
        ),
        ("verify", plan.verify.structure, ("verify", *chosen), plan.verify.timeout_seconds),
        (
            "verify-data",
            plan.verify.data,
            ("verify", *chosen, "--data", "--budget", str(plan.verify.budget_bytes)),
            plan.verify.timeout_seconds,
        ),
        ("drill", plan.drill.schedule, ("drill", *chosen, *_drill(cluster)), plan.drill.timeout_seconds),
    ]
    return tuple(
        Job(cluster.name, name, arguments, schedule, timeout, heavy=True, hooks=plan.hooks)
        for name, schedule, arguments, timeout in found
        if schedule is not None
    )


def host_jobs(plan: DaemonPlan) -> tuple[Job, ...]:
    """The jobs that belong to no cluster."""
    if plan.expire is None:
        return ()
    return (Job(HOST, "expire", ("expire", "--json"), plan.expire, _EXPIRE_SECONDS, False, plan.hooks),)


def told(arguments: tuple[str, ...]) -> str:
    """The command for people, without passwords."""
    return _PASSWORD.sub(lambda found: (found[1] or found[3]) + "…", shlex.join(("tl", *arguments)))


def _chosen(cluster: Cluster) -> tuple[str, str]:
    return "--cluster", cluster.name


def _rate(count: int | None) -> list[str]:
    return ["--rate-limit", str(count)] if count is not None else []


def _drill(cluster: Cluster) -> list[str]:
    plan = cluster.operations.drill
    arguments: list[str] = []
    if plan.at == "random":
        arguments += ["--random"]
    elif plan.at != "latest":
        arguments += ["--at", plan.at]
    arguments += ["--rto", write_duration(plan.rto_seconds)] if plan.rto_seconds is not None else []
    arguments += ["--rpo", write_duration(plan.rpo_seconds)] if plan.rpo_seconds is not None else []
    for statement in plan.sql:
        arguments += ["--assert", statement]
    return [*arguments, "--full"] if plan.full else arguments
