"""What a mount is told of the replay that it is made for: ``replay.json``, for as long as that goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from restore.plan import BranchPlan, SegmentFile
from timeline.format.value_json import from_json, to_json
from timeline.lsn import Lsn

FEED, WAL = "feed", "wal"
"""In the branch's directory: where segments wait for Postgres to ask for them, and its pg_wal."""


@dataclass(frozen=True, slots=True)
class ReplayTask:
    """Where the WAL of a replay will be, and how to read it."""

    places: tuple[str, ...]
    """Directories where segment files appear, in the order in which they are looked at."""
    segments: tuple[SegmentFile, ...]
    redo: Lsn
    segment_bytes: int
    relation_segment_bytes: int
    tablespace_directory: str
    """Name of the version's directory inside a tablespace, ``PG_15_202209061``."""
    near: bool
    """Whether the store is on this host: then there is nothing to fetch ahead."""


def announce(plan: BranchPlan, directory: Path, *, near: bool) -> None:
    """Write it down for the mount of a branch in that directory, if there is anything to replay."""
    if plan.replayed_bytes == 0:
        return
    task = ReplayTask(
        places=(str(directory / FEED), str(directory / WAL)),
        segments=plan.segments,
        redo=plan.snapshot.lsn,
        segment_bytes=plan.incarnation.segment_bytes,
        relation_segment_bytes=plan.incarnation.relation_segment_bytes,
        tablespace_directory=f"PG_{plan.incarnation.major}_{plan.incarnation.catalog_version}",
        near=near,
    )
    replay_file(directory).write_text(json.dumps(to_json(task)))


def withdraw(directory: Path) -> None:
    """The replay is over; harmless when there was none."""
    replay_file(directory).unlink(missing_ok=True)


def replay_file(directory: Path) -> Path:
    """Where the mount of a branch in that directory finds its task."""
    return directory / "replay.json"


def read_task(file: Path) -> ReplayTask:
    """Raises OSError and ValueError."""
    return from_json(ReplayTask, json.loads(file.read_text()))
