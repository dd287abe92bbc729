"""What a verification found: values only.

Every list that grows with the damage is bounded (MAX_PROBLEMS, MAX_FILES) and has a count beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from timeline.clock import Micros
from timeline.lsn import Lsn

MAX_PROBLEMS = 1000
"""Problems reported one by one; further ones are counted."""
MAX_FILES = 100
"""Runs of blocks named for one problem; further ones are counted."""


class Fault(StrEnum):
    """What is wrong with an object."""

    MISSING = "missing"
    """The log names it, and it is not there."""
    SHORT = "short"
    """It ends before what is said to be in it."""
    CORRUPT = "corrupt"
    """Its bytes are not what was written."""
    CONTRADICTION = "contradiction"
    """Intact, but it says what the format forbids."""
    PAGE_CHECKSUM = "page-checksum"
    """Intact, but it holds a page that was bad already when the source handed it over."""


@dataclass(frozen=True, slots=True)
class LsnRange:
    """WAL, or moments, [start, end) of one tli."""

    tli: int
    start: Lsn
    end: Lsn


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Blocks of one file."""

    path: str
    first_block: int
    """Counted from the start of this file (8 KiB each)."""
    blocks: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and what it endangers."""

    fault: Fault
    key: str
    offset: int
    """In the object, in bytes."""
    expected: str
    holes: tuple[LsnRange, ...] = ()
    """WAL that cannot be read because of it."""
    snapshots: tuple[str, ...] = ()
    """Ids of the snapshots that name the affected blocks."""
    snapshots_unusable: bool = False
    """Whether nothing can start from these snapshots any more (else: only the blocks below are gone)."""
    files: tuple[BlockRun, ...] = ()
    """Blocks that these snapshots have from here; at most MAX_FILES runs."""
    file_runs: int = 0
    """How many runs there are in all."""


@dataclass(frozen=True, slots=True)
class Checked:
    """How much was looked at."""

    log_entries: int = 0
    manifests: int = 0
    manifest_bytes: int = 0
    page_rows: int = 0
    snapshots: int = 0
    packs: int = 0
    """Named by manifests and found."""
    pack_bytes: int = 0
    sealed_ranges: int = 0
    chunks: int = 0
    wal_bytes: int = 0
    """Raw WAL that the store holds, sealed or not."""


@dataclass(frozen=True, slots=True)
class DataChecked:
    """What was read to the last byte."""

    packs: int
    chunks: int
    bytes: int
    """Read in this run."""
    pages: int
    """Postgres pages whose checksum was computed."""
    packs_total: int
    bytes_total: int
    """Of all packs that the log reaches."""
    never: int
    """Packs never read whole by this host."""
    oldest: Micros | None
    """When the pack that was not read for longest was read, by this host's clock; ``None``: some never were."""
    complete: bool
    """Whether this run read all there is."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Everything found."""

    store: str
    store_id: str | None
    """``None``: tl.json cannot be read."""
    branch: str
    log_number: int | None
    checked: Checked
    data: DataChecked | None
    """``None``: only the structure was checked."""
    problems: tuple[Problem, ...]
    problem_count: int
    unrestorable: tuple[LsnRange, ...]
    """Moments that could be had, were it not for the problems."""
    restorable: tuple[LsnRange, ...]
    """Moments that can be had."""
    gaps: tuple[LsnRange, ...]
    """WAL that the log says was lost: no damage, but nothing in it can be had."""
    remarks: tuple[str, ...]

    @property
    def damaged(self) -> bool:
        """Whether anything is wrong."""
        return self.problem_count > 0
