"""What an archiver is told to do, and what it says of itself while it does it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from timeline.archive.slot import SlotStatus
from timeline.clock import Micros
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn

BUFFER_BYTES = 24 << 20
"""WAL held in memory at most; beyond it the source is not read from. Six chunks: those being uploaded, one
being scanned and one being received; more would only wait."""
REQUESTS_PER_SECOND = 20.0


@dataclass(frozen=True, slots=True)
class ArchiverConfig:
    """Settings of one archiver."""

    conninfo: str
    """libpq's; may name several hosts (with ``target_session_attrs``)."""
    slot: str | None = None
    """``None``: named after the store."""
    slotless: bool = False
    """Stream without a slot; the source keeps what ``wal_keep_size`` says."""
    allow_unbounded_slot: bool = False
    """Make a slot though ``max_slot_wal_keep_size`` is unlimited."""
    allow_gap: bool = False
    """Where the source has removed WAL, record a gap and go on after it; a new base backup is needed then."""
    application_name: str = "tl"
    """The name that may stand in ``synchronous_standby_names``."""
    standbys: tuple[str, ...] = ()
    """Conninfos of standbys on which a slot of the same name is made and advanced, so that they have the WAL
    that is missing after a failover (slots do not follow one)."""
    max_delay_seconds: float = 1.0
    """How old the oldest byte of a chunk may get; 0 as soon as an upload slot is free. A synchronous standby
    has 0."""
    uploads_in_flight: int = 4
    buffer_bytes: int = BUFFER_BYTES
    requests_per_second: float = REQUESTS_PER_SECOND
    """Budget of small chunks; full ones are always made."""
    heartbeat_seconds: float = 300.0
    """How often an idle source's coverage is written to the log."""
    probe_seconds: float = 5.0
    """How often the source is asked for its position and its slot."""
    fence_check_seconds: float = 60.0
    """How often the log is asked whether another archiver has taken over."""
    store_patience_seconds: float = 300.0
    """How long one chunk's upload is tried."""
    slot_patience_seconds: float = 120.0
    """How long a slot that another connection uses is waited for."""
    shutdown_patience_seconds: float = 30.0
    """A source that shuts down waits until we acknowledge everything. While the store stalls that would be
    for ever, so after this long we leave: its slot keeps the WAL."""
    stop_patience_seconds: float = 30.0
    """How long a stop waits for what is in flight."""


class Phase(StrEnum):
    """What the archiver is doing."""

    CONNECTING = "connecting"
    CATCHING_UP = "catching up"
    STREAMING = "streaming"
    WAITING = "waiting"
    """Something failed and may pass; see ``error``."""
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ArchiverStatus:
    """The archiver at one moment."""

    phase: Phase = Phase.CONNECTING
    epoch: int = 0
    """0: nothing claimed yet."""
    tli: int = 0
    durable: Lsn | None = None
    """Everything before it is in the store."""
    received: Lsn | None = None
    source_end: Lsn | None = None
    """End of the source's WAL, as last heard."""
    source_time: Micros | None = None
    """Its clock then."""
    coverage: Coverage | None = None
    """Up to when the history in the store is known to be complete, as far as the archiver knows."""
    last_commit_time: Micros | None = None
    """Latest transaction end in the store, source's clock."""
    committed_at: Micros | None = None
    """When ``durable`` last moved, our clock."""
    slot_name: str | None = None
    slot: SlotStatus | None = None
    """As last seen; ``None`` before that, and without a slot."""
    synchronous: bool = False
    """Whether COMMIT on the source may wait for us."""
    sync_state: str | None = None
    buffered_bytes: int = 0
    chunks: int = 0
    wal_bytes: int = 0
    stored_bytes: int = 0
    """Of this run: chunks made, WAL in them, bytes stored for them."""
    uploads: int = 0
    upload_seconds: float = 0.0
    upload_errors: int = 0
    """Of this run: chunks that the store took, the seconds that took in all, and calls that it did not answer (after
    the store's own retries)."""
    behind_since: Micros | None = None
    """Since when the source is known to have had WAL that the store has not, our clock; ``None``: it has all."""
    needs_base: bool = False
    """A gap was recorded: nothing after it can be restored before there is a new base backup."""
    error: str | None = None
    """Why it is waiting."""
    hint: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def lag_bytes(self) -> int | None:
        """WAL that the source has and the store has not."""
        if self.source_end is None or self.durable is None:
            return None
        return max(0, self.source_end - self.durable)

    @property
    def bytes_until_lost(self) -> int | None:
        """WAL that may be written before the slot is in danger; ``None``: no limit, or no slot."""
        return self.slot.safe_bytes if self.slot is not None else None
