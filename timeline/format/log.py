"""Branch log: the numbered entries that say what belongs to a branch (SPEC.md, chapter 6).

An entry is JSON: ``{"format": 1, "number": n, "branch": …, "writer": …, "nonce": …, "epoch": …, "at": micros,
"change": {"kind": …, …}, "state": {…} | absent, "requires": [read features]}``. ``state`` is the complete
state *after* the change. A writer includes it whenever it is smaller than 64 KiB and in any case in every
entry whose number is a multiple of 100; a reader goes back from the newest entry to the nearest with a state
and applies the changes since.

The change classes are pure: ``apply(state) -> state``.
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.clock import Micros
from timeline.format.manifest import ManifestRef
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn


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


@dataclass(frozen=True, slots=True)
class ClaimEpoch:
    """An archiver takes the branch: epoch + 1."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Begin:
    """First entry of a branch, or a new incarnation in it (major upgrade)."""

    incarnation: Incarnation
    tli: Tli


@dataclass(frozen=True, slots=True)
class SwitchTli:
    """The source moved from ``closed`` (ending at ``end``) to ``opened``."""

    closed: int
    end: Lsn
    opened: Tli


@dataclass(frozen=True, slots=True)
class Seal:
    """WAL moved from chunks to packs; the range starts where the tli's sealed LSN was."""

    sealed: SealedRange
    coverage: Coverage | None


@dataclass(frozen=True, slots=True)
class AddSnapshot:
    """A snapshot is complete; ends any progress."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class RecordProgress:
    """A base backup got this far (``None``: given up)."""

    progress: BackupProgress | None


@dataclass(frozen=True, slots=True)
class Cover:
    """Heartbeat: the history is complete up to here (§ coverage)."""

    coverage: Coverage


@dataclass(frozen=True, slots=True)
class RecordGap:
    """WAL was lost; the tli goes on at ``gap.end``."""

    gap: Gap


Change = ClaimEpoch | Begin | SwitchTli | Seal | AddSnapshot | RecordProgress | Cover | RecordGap


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One object of the log."""

    number: int
    branch: str
    writer: str
    nonce: str
    """Random, so that no two entries are ever equal bytes."""
    epoch: int
    """Epoch of the writer if it is an archiver, else 0 (epochs bind the archiver role only)."""
    at: Micros
    change: Change
    state: BranchState | None
