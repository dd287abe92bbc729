"""What a mount is told of the replay that it is made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from restore.plan import BranchPlan, SegmentFile
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


def replay_task(plan: BranchPlan, directory: Path, *, near: bool) -> ReplayTask | None:
    """For a branch in that directory; ``None``: there is nothing to replay."""
    if plan.replayed_bytes == 0:
        return None
    return ReplayTask(
        places=(str(directory / FEED), str(directory / WAL)),
        segments=plan.segments,
        redo=plan.snapshot.lsn,
        segment_bytes=plan.incarnation.segment_bytes,
        relation_segment_bytes=plan.incarnation.relation_segment_bytes,
        tablespace_directory=f"PG_{plan.incarnation.major}_{plan.incarnation.catalog_version}",
        near=near,
    )
