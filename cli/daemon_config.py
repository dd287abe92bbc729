"""Which clusters a daemon works for, and what follows from their tables. Pure but for reading the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

from cli.jobs import Job, archive_arguments, host_jobs, jobs_of
from cli.schedule import host_zone
from cli.tl_toml import Cluster, Document, parse_document
from timeline.errors import UsageError


@dataclass(frozen=True, slots=True)
class Configuration:
    """One good tl.toml."""

    text: str
    document: Document
    clusters: tuple[Cluster, ...]
    """Those this daemon was asked for."""


def read_configuration(path: Path, only: Sequence[str]) -> Configuration:
    """Raises UsageError for a file that cannot be used, or that lacks a cluster of ``only`` (empty: all)."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    document = parse_document(text, str(path))
    known = {cluster.name: cluster for cluster in document.clusters}
    for name in only:
        if name not in known:
            raise UsageError(f"{path}: no cluster {name!r}", hint=f"known: {', '.join(known) or 'none'}")
    chosen = tuple(cluster for cluster in document.clusters if not only or cluster.name in only)
    if not chosen:
        raise UsageError(f"{path}: no cluster to work for", hint="add a table [cluster.NAME]; `tl init` does")
    for cluster in chosen:
        if cluster.store is None:
            raise UsageError(f"{path}: cluster.{cluster.name}.store is missing")
        if cluster.operations.archive.enabled and cluster.source is None:
            raise UsageError(
                f"{path}: cluster.{cluster.name}.source is missing",
                hint=f"or write enabled = false in [cluster.{cluster.name}.archive]: it is archived elsewhere",
            )
    return Configuration(text, document, chosen)


def zone_of(document: Document, environment: Mapping[str, str]) -> tzinfo:
    """What cron's hours are told in."""
    named = document.daemon.zone
    return ZoneInfo(named) if named is not None else host_zone(environment)


def all_jobs(configuration: Configuration) -> tuple[Job, ...]:
    """Of the clusters in the file's order, then the host's."""
    jobs = [job for cluster in configuration.clusters for job in jobs_of(cluster)]
    return (*jobs, *host_jobs(configuration.document.daemon))


def wants_json(setting: str, *, terminal: bool) -> bool:
    """Whether log lines are JSON."""
    return setting == "json" or (setting == "auto" and not terminal)


def archives_alike(one: Cluster, other: Cluster) -> bool:
    """Whether an archiver of one does for the other."""

    def of(cluster: Cluster) -> tuple[object, ...]:
        address = (cluster.store, cluster.endpoint_url, cluster.region, cluster.source)
        return (*address, archive_arguments(cluster))

    return of(one) == of(other)
