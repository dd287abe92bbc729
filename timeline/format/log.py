"""Branch log: the numbered entries that say what belongs to a branch (SPEC.md, chapter 6).

An entry is JSON: ``{"format": 1, "number": n, "branch": …, "writer": …, "nonce": …, "epoch": …, "at": micros,
"change": {"kind": …, …}, "state": {…} | absent, "requires": [read features]}``. ``state`` is the complete
state *after* the change. A writer includes it whenever it is smaller than 64 KiB and in any case in every
entry whose number is a multiple of 100; a reader goes back from the newest entry to the nearest with a state
and applies the changes since.

The change classes are pure: ``apply(state) -> state``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from timeline.clock import Micros
from timeline.errors import DamagedStore, LogConflict, Superseded, UnknownFeature
from timeline.format import keys, sealed_json, value_json
from timeline.format.features import COLLECTION, check_readable
from timeline.format.manifest import ManifestRef
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn

BASE = "base"
BUILT = "built"
"""The two kinds of snapshot."""

STATE_EVERY = 100
"""Every entry whose number is a multiple of this holds the state."""
STATE_BYTES = 64 << 10
"""States smaller than this are in every entry."""
FORMAT = 1
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


@dataclass(frozen=True, slots=True)
class ClaimEpoch:
    """An archiver takes the branch: epoch + 1."""

    epoch: int

    def apply(self, state: BranchState) -> BranchState:
        """Raises LogConflict unless it is the next epoch."""
        if self.epoch != state.epoch + 1:
            raise LogConflict(f"epoch {self.epoch} cannot follow epoch {state.epoch}")
        return replace(state, epoch=self.epoch)


@dataclass(frozen=True, slots=True)
class Begin:
    """First entry of a branch, or a new incarnation in it (major upgrade)."""

    incarnation: Incarnation
    tli: Tli

    def apply(self, state: BranchState) -> BranchState:
        """Ends the incarnation before it where this one starts. Raises LogConflict when the tli is known
        already."""
        if state.find_tli(self.tli.tli) is not None:
            raise LogConflict(f"tli {self.tli.tli} is in the branch already")
        if state.incarnations and self.incarnation.from_lsn < state.incarnations[-1].from_lsn:
            raise LogConflict(
                f"an incarnation cannot begin at {self.incarnation.from_lsn}, before the last one"
            )
        earlier = state.incarnations
        if earlier and earlier[-1].to_lsn is None:
            earlier = (*earlier[:-1], replace(earlier[-1], to_lsn=self.incarnation.from_lsn))
        return replace(
            state,
            incarnations=(*earlier, self.incarnation),
            tlis=(*state.tlis, self.tli),
            current_tli=self.tli.tli,
        )


@dataclass(frozen=True, slots=True)
class SwitchTli:
    """The source moved from ``closed`` (ending at ``end``) to ``opened``.

    ``closed`` need not be the current tli: a server restored from an earlier moment forks from that moment's
    tli. Only the first fork from a tli ends it; a later one finds its place in ``opened.start``.
    """

    closed: int
    end: Lsn
    opened: Tli

    def apply(self, state: BranchState) -> BranchState:
        """Raises LogConflict when ``closed`` is unknown, no parent of ``opened``, or ``opened`` known
        already."""
        closed = _known_tli(state, self.closed)
        if self.opened.parent != self.closed:
            raise LogConflict(
                f"tli {self.opened.tli} forks from {self.opened.parent}, not from {self.closed}"
            )
        if state.find_tli(self.opened.tli) is not None:
            raise LogConflict(f"tli {self.opened.tli} is in the branch already")
        if self.end < closed.start:
            raise LogConflict(f"tli {self.closed} starts at {closed.start} and cannot end at {self.end}")
        if closed.end is None:
            state = _with_tli(state, replace(closed, end=self.end))
        return replace(state, tlis=(*state.tlis, self.opened), current_tli=self.opened.tli)


@dataclass(frozen=True, slots=True)
class Seal:
    """WAL moved from chunks to packs; the range starts where the tli's sealed LSN was."""

    sealed: SealedRange
    coverage: Coverage | None
    began: int | None = None
    """As ``check_began`` says."""

    def apply(self, state: BranchState) -> BranchState:
        """Raises LogConflict unless the range starts where the tli's sealed WAL ends (after a gap there, if
        any), Superseded as ``check_began``."""
        check_began(state, self.began)
        tli = _known_tli(state, self.sealed.tli)
        start = state.after_gap(tli.tli, tli.sealed)
        if self.sealed.start != start:
            raise LogConflict(
                f"tli {tli.tli} is sealed up to {start}; a range cannot start at {self.sealed.start}"
            )
        if self.sealed.end <= start:
            raise LogConflict(f"a sealed range cannot end at {self.sealed.end}, where it starts at {start}")
        if any(gap.tli == tli.tli and start <= gap.start < self.sealed.end for gap in state.gaps):
            raise LogConflict(f"a sealed range cannot cross the gap between {start} and {self.sealed.end}")
        state = _with_tli(state, replace(tli, sealed=self.sealed.end))
        ranges = sorted((*state.sealed, self.sealed), key=lambda sealed: (sealed.tli, sealed.start))
        return replace(state, sealed=tuple(ranges), coverage=_newer(state.coverage, self.coverage))


@dataclass(frozen=True, slots=True)
class AddSnapshot:
    """A snapshot is complete; a base backup ends any progress."""

    snapshot: Snapshot
    began: int | None = None
    """As ``check_began`` says."""

    def apply(self, state: BranchState) -> BranchState:
        """Raises LogConflict when its id is taken, its tli unknown, or it contradicts itself, Superseded as
        ``check_began``."""
        check_began(state, self.began)
        added = self.snapshot
        _known_tli(state, added.tli)
        if any(snapshot.id == added.id for snapshot in state.snapshots):
            raise LogConflict(f"snapshot {added.id} is in the branch already")
        if added.kind not in (BASE, BUILT):
            raise LogConflict(f"no kind of snapshot: {added.kind}")
        if added.end < added.lsn:
            raise LogConflict(f"a snapshot replayed from {added.lsn} cannot be complete at {added.end}")
        if (added.kind == BASE) != (added.backup_label is not None):
            raise LogConflict(
                f"snapshot {added.id}: a backup label belongs to a base backup, and to nothing else"
            )
        return replace(
            state,
            snapshots=(*state.snapshots, added),
            progress=None if added.kind == BASE else state.progress,
        )


@dataclass(frozen=True, slots=True)
class RecordProgress:
    """A base backup got this far (``None``: given up)."""

    progress: BackupProgress | None
    began: int | None = None
    """As ``check_began`` says."""

    def apply(self, state: BranchState) -> BranchState:
        """Raises Superseded as ``check_began``, but for ``None``, which names nothing."""
        if self.progress is not None:
            check_began(state, self.began)
        return replace(state, progress=self.progress)


@dataclass(frozen=True, slots=True)
class Cover:
    """Heartbeat: the history is complete up to here (§ coverage)."""

    coverage: Coverage

    def apply(self, state: BranchState) -> BranchState:
        """Keeps the newer one. Raises LogConflict when its tli is unknown."""
        _known_tli(state, self.coverage.tli)
        return replace(state, coverage=_newer(state.coverage, self.coverage))


@dataclass(frozen=True, slots=True)
class RecordGap:
    """WAL was lost; the tli goes on at ``gap.end``."""

    gap: Gap

    def apply(self, state: BranchState) -> BranchState:
        """Raises LogConflict when it is empty, in sealed WAL, overlaps another gap, or its tli is unknown."""
        tli = _known_tli(state, self.gap.tli)
        if self.gap.end <= self.gap.start:
            raise LogConflict(f"a gap cannot end at {self.gap.end}, where it starts at {self.gap.start}")
        if self.gap.start < tli.sealed:
            raise LogConflict(f"WAL below {tli.sealed} is sealed; no gap can start at {self.gap.start}")
        for other in state.gaps:
            if other.tli == tli.tli and self.gap.start < other.end and other.start < self.gap.end:
                raise LogConflict(f"the gap from {other.start} to {other.end} is recorded already")
        return replace(state, gaps=(*state.gaps, self.gap))


@dataclass(frozen=True, slots=True)
class DropSnapshots:
    """Snapshots that nobody is to start from any more; what they alone name is garbage."""

    ids: tuple[str, ...]

    def apply(self, state: BranchState) -> BranchState:
        """Raises LogConflict when one is unknown."""
        known = {snapshot.id for snapshot in state.snapshots}
        if unknown := sorted(set(self.ids) - known):
            raise LogConflict(f"branch {state.branch} has no snapshot {', '.join(unknown)}")
        left = tuple(snapshot for snapshot in state.snapshots if snapshot.id not in self.ids)
        return replace(state, snapshots=left)


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Sealed WAL of one tli that nobody needs any more: the ranges that lie wholly in [start, below)."""

    tli: int
    below: Lsn
    start: Lsn = BEGINNING
    """Above 0 for what lies behind WAL that is still needed: the orphan tail of an ancestor."""

    def holds(self, sealed: SealedRange) -> bool:
        """Whether a sealed range goes with it."""
        return sealed.tli == self.tli and self.start <= sealed.start and sealed.end <= self.below


@dataclass(frozen=True, slots=True)
class ForgetWal:
    """Sealed ranges leave the log; what they alone name is garbage. ``Tli.sealed`` stays where it is."""

    ranges: tuple[Forgotten, ...]

    def apply(self, state: BranchState) -> BranchState:
        """Raises LogConflict when a tli is unknown, WAL not sealed is named, nothing is left to forget, or a
        snapshot of the state needs what would go ([LOG-8])."""
        for one in self.ranges:
            tli = _known_tli(state, one.tli)
            if one.below > tli.sealed:
                raise LogConflict(
                    f"tli {tli.tli} is sealed up to {tli.sealed}; no WAL up to {one.below} can go"
                )
        left: list[SealedRange] = []
        gone: list[SealedRange] = []
        for sealed in state.sealed:
            (gone if any(one.holds(sealed) for one in self.ranges) else left).append(sealed)
        if not gone:
            raise LogConflict(f"branch {state.branch} has forgotten that WAL already")
        needed = needed_wal(state)
        for sealed in gone:
            for span in needed:
                if span.overlaps(sealed):
                    raise LogConflict(
                        f"snapshot {span.snapshot} needs the WAL of tli {sealed.tli} from {sealed.start} "
                        f"to {sealed.end}"
                    )
        return replace(state, sealed=tuple(left))


@dataclass(frozen=True, slots=True)
class MergeSealed:
    """Adjoining sealed ranges of a tli become one, of the same extent, with one manifest of all their rows."""

    merged: SealedRange
    began: int | None = None
    """As ``check_began`` says."""

    def apply(self, state: BranchState) -> BranchState:
        """Raises LogConflict unless two or more ranges adjoin and make up exactly the merged one, Superseded as
        ``check_began``."""
        check_began(state, self.began)
        merged = self.merged
        _known_tli(state, merged.tli)
        parts: list[SealedRange] = []
        left: list[SealedRange] = []
        for sealed in state.sealed:
            touched = sealed.tli == merged.tli and merged.start < sealed.end and sealed.start < merged.end
            (parts if touched else left).append(sealed)
        ends = [merged.start, *(sealed.end for sealed in parts)]
        if len(parts) < 2 or ends[-1] != merged.end or [sealed.start for sealed in parts] != ends[:-1]:
            raise LogConflict(
                f"tli {merged.tli}: no adjoining sealed ranges make up {merged.start} to {merged.end}"
            )
        if merge_ranges(parts, merged.manifest) != merged or merged.manifest.rows != sum(
            part.manifest.rows for part in parts
        ):
            raise LogConflict(
                f"tli {merged.tli}: the range from {merged.start} to {merged.end} is not what it is made of"
            )
        ranges = sorted((*left, merged), key=lambda sealed: (sealed.tli, sealed.start))
        return replace(state, sealed=tuple(ranges))


def merge_ranges(parts: Sequence[SealedRange], manifest: ManifestRef) -> SealedRange:
    """What a manifest of all rows of adjoining ranges (at least one), in order, is to the log."""
    points = [part.restore_points for part in parts]
    return SealedRange(
        tli=parts[0].tli,
        start=parts[0].start,
        end=parts[-1].end,
        manifest=manifest,
        min_commit_time=min(
            (part.min_commit_time for part in parts if part.min_commit_time is not None), default=None
        ),
        max_commit_time=max(
            (part.max_commit_time for part in parts if part.max_commit_time is not None), default=None
        ),
        commits=sum(part.commits for part in parts),
        restore_points=None if None in points else sum(point for point in points if point is not None),
    )


@dataclass(frozen=True, slots=True)
class Mark:
    """A marking run is over: ``marks/<id>`` lists what was garbage in the state of entry ``head``."""

    id: str
    head: int
    """Read after all keys had been listed, and before the mark object was written."""
    at: Micros
    after: str | None
    """Id of the mark collected last as of ``head``, whose collection was finished."""

    def apply(self, state: BranchState) -> BranchState:
        """Raises LogConflict while another mark is open, or when one was collected since ``head``: it might not be
        finished."""
        if state.collection.mark is not None:
            raise LogConflict(f"mark {state.collection.mark.id} is not collected yet")
        if state.collection.last != self.after:
            raise LogConflict(f"mark {state.collection.last} was collected meanwhile")
        return replace(
            state, collection=replace(state.collection, mark=OpenMark(self.id, self.head, self.at))
        )


@dataclass(frozen=True, slots=True)
class Collect:
    """What the open mark lists is going to be deleted, but for what was named since."""

    id: str

    def apply(self, state: BranchState) -> BranchState:
        """From here on whoever began before the mark cannot commit. Raises LogConflict unless that is the open
        mark."""
        mark = state.collection.mark
        if mark is None or mark.id != self.id:
            raise LogConflict(f"mark {self.id} is not open")
        return replace(state, collection=Collection(None, mark.head + 1, mark.id))


Change = (
    ClaimEpoch
    | Begin
    | SwitchTli
    | Seal
    | AddSnapshot
    | RecordProgress
    | Cover
    | RecordGap
    | DropSnapshots
    | ForgetWal
    | MergeSealed
    | Mark
    | Collect
)


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
    """The state after the change; ``None`` where the writer left it out."""


def encode_entry(entry: LogEntry) -> bytes:
    """The object; leaves the state out when it is long and the number does not demand it.

    Raises ValueError when the number demands a state and there is none, or the state is another branch's.
    """
    if entry.state is not None and entry.state.branch != entry.branch:
        raise ValueError(f"an entry of {entry.branch} cannot hold the state of {entry.state.branch}")
    if entry.state is None and entry.number % STATE_EVERY == 0:
        raise ValueError(f"entry {entry.number} must hold the state")
    members: dict[str, object] = {
        "format": FORMAT,
        "number": entry.number,
        "branch": entry.branch,
        "writer": entry.writer,
        "nonce": entry.nonce,
        "epoch": entry.epoch,
        "at": entry.at,
        "requires": _required(entry),
        "change": {"kind": _KIND_OF[type(entry.change)], **value_json.to_json(entry.change)},
    }
    if entry.state is not None:
        state = value_json.to_json(entry.state)
        if entry.number % STATE_EVERY == 0 or len(sealed_json.compact(state)) < STATE_BYTES:
            members["state"] = state
    return sealed_json.encode(members)


def _required(entry: LogEntry) -> list[str]:
    collecting = entry.state is not None and entry.state.collection != Collection()
    return [COLLECTION] if collecting or isinstance(entry.change, Mark | Collect) else []


def decode_entry(data: bytes, key: str) -> LogEntry:
    """The verified entry, which must be the one its key names; raises DamagedStore, UnknownFeature."""
    members = sealed_json.decode(data, key)
    if members.get("format") != FORMAT:
        raise UnknownFeature(key, f"log format {members.get('format')}")
    try:
        check_readable(key, value_json.from_json(_Requires, members).requires)
        plain = value_json.from_json(_Plain, members)
        state = members.get("state")
        entry = LogEntry(
            number=plain.number,
            branch=plain.branch,
            writer=plain.writer,
            nonce=plain.nonce,
            epoch=plain.epoch,
            at=plain.at,
            change=_decode_change(members.get("change"), key),
            state=None if state is None else value_json.from_json(BranchState, state),
        )
    except ValueError as error:
        raise DamagedStore(key, 0, str(error)) from error
    named = keys.parse_log_entry(key)
    if named is not None and named != (entry.branch, entry.number):
        raise DamagedStore(
            key, 0, f"expected this key's entry, found number {entry.number} of {entry.branch}"
        )
    return entry


def snapshot_to_json(snapshot: Snapshot) -> value_json.Json:
    """The snapshot as the log writes it (plans and mounts carry it along)."""
    return value_json.to_json(snapshot)


def snapshot_from_json(value: value_json.Json) -> Snapshot:
    """The snapshot; raises ValueError that says what was expected."""
    return value_json.from_json(Snapshot, value)


@dataclass(frozen=True, slots=True)
class _Requires:
    requires: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Plain:
    """The members of an entry whose types do not depend on its change."""

    number: int
    branch: str
    writer: str
    nonce: str
    epoch: int
    at: Micros


_CHANGES: dict[str, type[Change]] = {
    "claim_epoch": ClaimEpoch,
    "begin": Begin,
    "switch_tli": SwitchTli,
    "seal": Seal,
    "add_snapshot": AddSnapshot,
    "record_progress": RecordProgress,
    "cover": Cover,
    "record_gap": RecordGap,
    "drop_snapshots": DropSnapshots,
    "forget_wal": ForgetWal,
    "merge_sealed": MergeSealed,
    "mark": Mark,
    "collect": Collect,
}
_KIND_OF: dict[type[Change], str] = {change: kind for kind, change in _CHANGES.items()}


def _decode_change(value: object, key: str) -> Change:
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ValueError("change: expected an object with a kind")
    kind = _CHANGES.get(value["kind"])
    if kind is None:
        raise UnknownFeature(key, f"change {value['kind']}")
    return value_json.from_json(kind, value)


def check_began(state: BranchState, began: int | None) -> None:
    """Raises Superseded when a collection may have deleted, or be deleting, what a change names.

    ``began``: number of the log head that the writer had read before it created the first object that the
    change names; whatever else the change names was reachable from that head. ``None``: not known, as in
    changes of earlier versions. Every kind of change that names objects has it and calls this (SPEC.md,
    [COL-2]).
    """
    collected = state.collection.collected
    if collected and (began is None or began < collected):
        since = "an unknown entry" if began is None else f"entry {began}"
        raise Superseded(
            f"branch {state.branch}: what was begun at {since} of the log may be collected: garbage collection "
            f"has passed entry {collected}"
        )


def _known_tli(state: BranchState, number: int) -> Tli:
    tli = state.find_tli(number)
    if tli is None:
        raise LogConflict(f"branch {state.branch} has no tli {number}")
    return tli


@dataclass(frozen=True, slots=True)
class NeededWal:
    """WAL [start, end) of a tli that a snapshot needs ([LOG-8]); ``end`` ``None``: all there will be."""

    tli: int
    start: Lsn
    end: Lsn | None
    snapshot: str

    def overlaps(self, sealed: SealedRange) -> bool:
        """Whether a sealed range holds any of it."""
        return (
            sealed.tli == self.tli
            and sealed.end > self.start
            and (self.end is None or sealed.start < self.end)
        )


def needed_wal(state: BranchState) -> tuple[NeededWal, ...]:
    """What no change may take from the log while its snapshots stand ([LOG-8]).

    Of every snapshot the WAL of its line from the start of the segment of its ``lsn`` to its ``end``; of the
    oldest one on the line that leads to the current tli all of that line from there on.
    """
    needed: list[NeededWal] = []
    current = _spans(state, state.current_tli)
    oldest: Snapshot | None = None
    for snapshot in state.snapshots:
        start = _segment_of(state, snapshot.lsn)
        own = _spans(state, snapshot.tli)
        needed += _clip(own, start, snapshot.end, snapshot.id)
        if _is_on(current, snapshot) and (oldest is None or snapshot.lsn < oldest.lsn):
            oldest = snapshot
    if oldest is not None:
        needed += _clip(current, _segment_of(state, oldest.lsn), None, oldest.id)
    return tuple(needed)


_Spans = list[tuple[int, Lsn, Lsn | None]]
"""A line, youngest tli first: (tli, start, end)."""


def _spans(state: BranchState, number: int) -> _Spans:
    spans: _Spans = []
    end: Lsn | None = None
    known = state.find_tli(number)
    while known is not None and len(spans) <= len(state.tlis):
        spans.append((known.tli, known.start, end))
        end = known.start
        known = None if known.parent is None else state.find_tli(known.parent)
    return spans


def _is_on(spans: _Spans, snapshot: Snapshot) -> bool:
    return any(
        tli == snapshot.tli and start <= snapshot.lsn and (end is None or snapshot.end <= end)
        for tli, start, end in spans
    )


def _clip(spans: _Spans, start: Lsn, end: Lsn | None, snapshot: str) -> list[NeededWal]:
    clipped = []
    for tli, begin, left in spans:
        last = left if end is None else end if left is None else min(left, end)
        if last is None or max(begin, start) < last:
            clipped.append(NeededWal(tli, Lsn(max(begin, start)), last, snapshot))
    return clipped


def _segment_of(state: BranchState, lsn: Lsn) -> Lsn:
    """Where the WAL segment of an LSN starts; the LSN itself while no server is known."""
    wrote = [one for one in state.incarnations if one.from_lsn <= lsn] or list(state.incarnations[:1])
    return Lsn(lsn - lsn % wrote[-1].segment_bytes) if wrote else lsn


def _with_tli(state: BranchState, changed: Tli) -> BranchState:
    return replace(state, tlis=tuple(changed if tli.tli == changed.tli else tli for tli in state.tlis))


def _newer(known: Coverage | None, other: Coverage | None) -> Coverage | None:
    """The later one by the source's clock; its tli breaks no tie, for one server's clock made both."""
    if known is None or other is None:
        return known or other
    return other if (other.time, other.lsn) > (known.time, known.lsn) else known
