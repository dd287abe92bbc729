"""What the log says about a branch: its servers, tlis, WAL, snapshots, gaps, and how far collection has come.

Values only (SPEC.md, chapter 6). How they come about: log_change.py; how they are written: log.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.clock import Micros
from timeline.format import value_json
from timeline.format.manifest import ManifestRef
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn

BASE = "base"
BUILT = "built"
"""The two kinds of snapshot."""
BEGINNING = Lsn(0)
"""Before all WAL."""


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One initdb or pg_upgrade of the archived server: what a reader must match to run its files."""

    system_identifier: int
    major: int
    """Server major version, e.g. 15."""
    version_num: int
    """``server_version_num``."""
    architecture: str
    """``uname -m`` of the source as far as known (``x86_64``), from version()."""
    block_bytes: int
    segment_bytes: int
    """WAL segment size."""
    relation_segment_bytes: int
    """``segment_size``: 1 GiB unless built otherwise."""
    catalog_version: int
    control_version: int
    libc_version: str | None
    icu_version: str | None
    superuser: str
    """Name of role oid 10 (the bootstrap superuser) when the incarnation was recorded."""
    data_checksums: bool
    from_lsn: Lsn
    to_lsn: Lsn | None


@dataclass(frozen=True, slots=True)
class Tli:
    """One of Postgres's timelines in this branch."""

    tli: int
    parent: int | None
    """tli it forked from; ``None`` for the first one archived."""
    start: Lsn
    """First archived byte of it: the fork LSN, or where archiving began (a segment boundary)."""
    sealed: Lsn
    """WAL of this tli below this is in packs (chunks below are void); ``start`` when nothing is sealed."""
    end: Lsn | None
    """Where the source left it for another tli (the switch point); ``None`` while it is current. What was
    archived beyond ``end`` is an orphan tail: kept, named, never spliced."""
    history: str | None
    """Text of its history file, verbatim."""


@dataclass(frozen=True, slots=True)
class SealedRange:
    """WAL [start, end) of one tli, in packs, indexed by one WAL manifest."""

    tli: int
    start: Lsn
    end: Lsn
    manifest: ManifestRef
    min_commit_time: Micros | None
    max_commit_time: Micros | None
    commits: int
    restore_points: int | None = None
    """How many it holds, so that a search for one reads only the manifests that have any; ``None``: not
    counted."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of pg_settings that matters to a branch."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Tablespace:
    """A tablespace as of the snapshot."""

    oid: int
    source_path: str
    """On the source's host; never touched (P8)."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The complete state of every file at one LSN."""

    id: str
    kind: str
    """``base``: a base backup, usable from ``end`` on; ``built``: built from WAL, exact at ``lsn``."""
    tli: int
    lsn: Lsn
    """Redo LSN where replay starts."""
    checkpoint: Lsn
    end: Lsn
    """First LSN a branch can be at: the end of the backup; ``lsn`` for a built one."""
    time: Micros
    """Source clock when it was taken."""
    files: ManifestRef
    """File listing."""
    pages: tuple[ManifestRef, ...]
    """Page manifests, oldest (full) first; later ones override earlier ones block by block. At most 8."""
    boot: ManifestRef | None
    """A page manifest of the extents that a start and a first connection touch; a subset of ``pages``."""
    backup_label: str | None
    """Verbatim, for ``base``."""
    tablespaces: tuple[Tablespace, ...]
    settings: tuple[Setting, ...]
    parent: str | None
    """Snapshot id it was built on."""
    bytes: int
    """Sum of the sizes of the files it lists."""
    checksum_failures: int = 0
    """As the server counted them during the backup."""


@dataclass(frozen=True, slots=True)
class Gap:
    """WAL that was lost for good: targets inside are refused (P7)."""

    tli: int
    start: Lsn
    end: Lsn
    reason: str


@dataclass(frozen=True, slots=True)
class BackupProgress:
    """A base backup under way: packs uploaded so far, pinned against collection and known to a second try."""

    id: str
    manifests: tuple[ManifestRef, ...]
    """Page manifests of what is already uploaded (possibly from an earlier, interrupted try)."""
    bytes: int
    at: Micros


@dataclass(frozen=True, slots=True)
class OpenMark:
    """A marking run's result, which nobody has collected yet."""

    id: str
    """Of the mark object, ``marks/<id>``."""
    head: int
    """Number of the entry whose state it was computed from."""
    at: Micros
    """When, by the collector's clock."""


@dataclass(frozen=True, slots=True)
class Collection:
    """How far garbage collection has come."""

    mark: OpenMark | None = None
    """Waits for its grace period to pass."""
    collected: int = 0
    """Whoever commits objects must have begun at this entry or later; 0 while nothing was ever collected."""
    last: str | None = None
    """Id of the mark that was collected last; its object is there until everything in it is deleted."""


@dataclass(frozen=True, slots=True)
class BranchState:
    """Everything the log says about a branch."""

    branch: str
    epoch: int
    """Highest archiver epoch claimed."""
    incarnations: tuple[Incarnation, ...]
    tlis: tuple[Tli, ...]
    current_tli: int
    sealed: tuple[SealedRange, ...]
    """Sorted by (tli, start)."""
    snapshots: tuple[Snapshot, ...]
    """Oldest first."""
    gaps: tuple[Gap, ...]
    coverage: Coverage | None
    """Newest known; chunks may know a newer one."""
    progress: BackupProgress | None
    collection: Collection = Collection()

    @classmethod
    def empty(cls, branch: str) -> BranchState:
        """The state before the first entry: what the first change is applied to."""
        return cls(branch, 0, (), (), 0, (), (), (), None, None)

    def find_tli(self, number: int) -> Tli | None:
        """That tli, ``None`` when the branch never had it."""
        return next((tli for tli in self.tlis if tli.tli == number), None)

    def after_gap(self, tli: int, lsn: int) -> Lsn:
        """Where the WAL of a tli goes on at ``lsn``: the end of the gap that starts there, else ``lsn``
        itself.

        The chain of chunks and of sealed ranges is followed through this, and through nothing else, over a
        gap.
        """
        position = Lsn(lsn)
        for gap in sorted(self.gaps, key=lambda gap: gap.start):
            if gap.tli == tli and gap.start == position:
                position = gap.end
        return position


def snapshot_to_json(snapshot: Snapshot) -> value_json.Json:
    """The snapshot as the log writes it (plans and mounts carry it along)."""
    return value_json.to_json(snapshot)


def snapshot_from_json(value: value_json.Json) -> Snapshot:
    """The snapshot; raises ValueError that says what was expected."""
    return value_json.from_json(Snapshot, value)
