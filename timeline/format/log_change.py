"""The changes of a branch log, and when each of them is allowed (SPEC.md, chapter 6).

Pure: ``apply(state) -> state``. A change that does not fit the state raises LogConflict; one that names objects which
may have been collected meanwhile, Superseded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from timeline.clock import Micros
from timeline.errors import LogConflict, Superseded
from timeline.format.branch_state import (
    BASE,
    BEGINNING,
    BUILT,
    BackupProgress,
    BranchState,
    Collection,
    Gap,
    Incarnation,
    OpenMark,
    SealedRange,
    Snapshot,
    Tli,
)
from timeline.format.manifest import ManifestRef
from timeline.format.needed_wal import needed_wal
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn


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


def _with_tli(state: BranchState, changed: Tli) -> BranchState:
    return replace(state, tlis=tuple(changed if tli.tli == changed.tli else tli for tli in state.tlis))


def _newer(known: Coverage | None, other: Coverage | None) -> Coverage | None:
    """The later one by the source's clock; its tli breaks no tie, for one server's clock made both."""
    if known is None or other is None:
        return known or other
    return other if (other.time, other.lsn) > (known.time, known.lsn) else known
