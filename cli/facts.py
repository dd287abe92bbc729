"""What can be told of one cluster by asking its store, its source and this host: values only.

Instants are micros; whose clock is said. Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from timeline.clock import Micros
from timeline.lsn import Lsn


@dataclass(frozen=True, slots=True)
class RangeFacts:
    """One stretch of reachable history."""

    tli: int
    first: Lsn
    last: Lsn
    first_time: Micros
    """Source's clock."""
    last_time: Micros | None
    """Source's clock: the history is known completely up to then."""
    abandoned: bool


@dataclass(frozen=True, slots=True)
class SnapshotFacts:
    """A place where replay can begin."""

    id: str
    kind: str
    """``base`` (a base backup) or ``built`` (from WAL)."""
    tli: int
    lsn: Lsn
    time: Micros
    """Source's clock."""
    bytes: int
    """Of the files it lists."""


@dataclass(frozen=True, slots=True)
class GapFacts:
    """WAL that is lost for good."""

    tli: int
    start: Lsn
    end: Lsn


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """What the store alone tells, with a handful of requests."""

    url: str
    store_id: str
    current_tli: int
    durable: Lsn
    """All WAL of that tli before it is in the store."""
    ranges: tuple[RangeFacts, ...]
    snapshots: tuple[SnapshotFacts, ...]
    """Oldest first."""
    gaps: tuple[GapFacts, ...]
    unsealed_bytes: int
    """WAL in chunks, not yet in packs."""
    backup_under_way: bool
    remarks: tuple[str, ...]

    @property
    def current(self) -> RangeFacts | None:
        """Where the source is now; ``None``: nothing of its line can be had."""
        found = [one for one in self.ranges if one.tli == self.current_tli and not one.abandoned]
        return found[-1] if found else None

    @property
    def newest(self) -> SnapshotFacts | None:
        """The newest place where replay can begin."""
        return self.snapshots[-1] if self.snapshots else None

    @property
    def newest_base(self) -> SnapshotFacts | None:
        """The newest base backup."""
        return next((one for one in reversed(self.snapshots) if one.kind == "base"), None)

    @property
    def replay_bytes(self) -> int | None:
        """WAL between the newest snapshot and the head."""
        head, newest = self.current, self.newest
        return max(0, head.last - newest.lsn) if head is not None and newest is not None else None


@dataclass(frozen=True, slots=True)
class KindSize:
    """The objects of one kind."""

    kind: str
    """``chunks``, ``packs``, ``manifests``, ``log`` or ``other``."""
    objects: int
    bytes: int


@dataclass(frozen=True, slots=True)
class StoreSize:
    """What lies in the store: asked for seldom, for it costs a LIST request per thousand objects."""

    kinds: tuple[KindSize, ...]
    complete: bool
    """False: there were more objects than are counted at a time."""
    wal_stored_ratio: float | None
    """Bytes stored per byte of WAL, in the newest sealed range."""
    snapshot_stored_ratio: float | None
    """Bytes stored per byte of content, in what the newest snapshot names; ``None``: its manifests are too long
    to be read for this, as in the next one."""
    snapshot_distinct_ratio: float | None
    """Bytes of content that are stored, once each, per byte of files that all snapshots list."""


@dataclass(frozen=True, slots=True)
class SlotFacts:
    """The slot as the source told it just now."""

    name: str
    wal_status: str | None
    """Postgres's word: reserved, extended, unreserved, lost."""
    active: bool
    safe_bytes: int | None
    """WAL that may still be written before the slot is lost; ``None``: no limit."""
    warning: str | None


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What the source told."""

    end: Lsn
    """Of its WAL."""
    time: Micros
    """Its clock."""
    keep_limit_bytes: int | None
    """``max_slot_wal_keep_size``; ``None``: unlimited."""
    slot: SlotFacts | None
    """``None``: there is none of ours."""


@dataclass(frozen=True, slots=True)
class BranchFacts:
    """One branch of this host."""

    name: str
    store_url: str
    """Where it comes from."""
    mode: str
    created: Micros
    """Host's clock."""
    expires: Micros | None
    own_bytes: int
    """On this host's disk: what it has written, or all of it if it is a copy."""
    own_complete: bool
    """False: it has more files than are looked at."""
    requests: int
    fetched_bytes: int
    """From the store since its last start; 0 for a copy."""
    store_extents: int
    memory_hits: int
    disk_hits: int
    """Extents by where they came from, since its last start."""


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """The extents that this host keeps for all branches."""

    bytes: int
    exact: bool
    """False: reckoned from a part of it."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """This host's branches."""

    branches: tuple[BranchFacts, ...]
    cache: CacheFacts | None
    """``None``: nothing is cached."""


@dataclass(frozen=True, slots=True)
class Facts:
    """One round of asking. Whoever did not answer is ``None``, with the reason."""

    gathered_at: Micros
    """Host's clock, at the end."""
    store: StoreFacts | None
    store_error: str | None
    size: StoreSize | None
    """``None`` unless asked for."""
    size_error: str | None
    source: SourceFacts | None
    source_error: str | None
    """``None`` as well where no source is known."""
    host: HostFacts | None
    host_error: str | None


@dataclass(frozen=True, slots=True)
class Part:
    """How old what is known of one part is."""

    at: Micros | None = None
    """When it last answered, host's clock; ``None``: never."""
    error: str | None = None
    """Why it did not, the last time; ``None``: it did, or was not asked."""

    def heard(self, at: Micros, *, answered: bool, error: str | None) -> Part:
        """After another round of asking."""
        if answered:
            return Part(at, None)
        return Part(self.at, error if error is not None else self.error)


@dataclass(frozen=True, slots=True)
class KeptFacts:
    """The last answer of each part of one cluster, however old."""

    cluster: str
    """Name in tl.toml; the store's URL where it has none."""
    since: Micros
    """When the asking began, host's clock."""
    store: StoreFacts | None = None
    store_part: Part = Part()
    size: StoreSize | None = None
    size_part: Part = Part()
    source: SourceFacts | None = None
    source_part: Part = Part()
    host: HostFacts | None = None
    host_part: Part = Part()

    def with_round(self, new: Facts) -> KeptFacts:
        """After a round: what answered is replaced, the rest stays and ages."""
        at = new.gathered_at
        return KeptFacts(
            self.cluster,
            self.since,
            store=new.store or self.store,
            store_part=self.store_part.heard(at, answered=new.store is not None, error=new.store_error),
            size=new.size or self.size,
            size_part=self.size_part.heard(at, answered=new.size is not None, error=new.size_error),
            source=new.source or self.source,
            source_part=self.source_part.heard(at, answered=new.source is not None, error=new.source_error),
            host=new.host or self.host,
            host_part=self.host_part.heard(at, answered=new.host is not None, error=new.host_error),
        )

    def without_answer(self, error: str) -> KeptFacts:
        """After a round that told nothing at all."""
        return replace(
            self,
            store_part=replace(self.store_part, error=error),
            source_part=replace(self.source_part, error=error)
            if self.source is not None
            else self.source_part,
            host_part=replace(self.host_part, error=error),
        )
