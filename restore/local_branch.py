"""A branch that lives on this host: what is written down about it in ``branch.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from timeline.clock import Micros
from timeline.errors import TimelineError
from timeline.format.value_json import from_json, to_json
from timeline.lsn import Lsn

FORMAT = 1

MAKING = "making"
"""Phase: not yet offered. Found without a live maker it is debris."""
READY = "ready"
"""Phase: promoted and offered."""
DELETING = "deleting"
"""Phase: going away; whoever finds it finishes the job."""

LAZY = "lazy"
"""Mode: data directory is a mount, pages come on first touch."""
COPY = "copy"
"""Mode: data directory is an ordinary directory, restored eagerly."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The moment of recorded history that a branch shows."""

    store_url: str
    endpoint_url: str | None
    region: str | None
    parent: str
    """Name of the branch it was made from."""
    tli: int
    lsn: Lsn
    """T: records that start before it are in (P6)."""
    last_record: Lsn
    """Start of the last record that is in."""
    time: Micros | None
    """The moment asked for, or of T as far as known, on the source's clock."""
    last_commit_time: Micros | None
    next_commit_time: Micros | None
    snapshot_id: str
    snapshot_lsn: Lsn


@dataclass(frozen=True, slots=True)
class Server:
    """How its Postgres is run and reached."""

    major: int
    bin_directory: str
    superuser: str
    sockets: str
    """Directory of the Unix socket, 0700."""
    port: int
    listen: str | None
    """Address of the TCP listener, if one was asked for."""
    pid: int | None = None
    """Postmaster, when last started."""
    pid_started: str | None = None
    """When that process began, as the system tells it: pids are used again."""


@dataclass(frozen=True, slots=True)
class ScriptRecord:
    """A script that was run before the branch was offered."""

    path: str
    """Where it was read from."""
    digest: str
    """BLAKE3 of its content, 64 hex digits."""
    bytes: int


@dataclass(frozen=True, slots=True)
class ScriptRun:
    """All scripts of a branch, in the order they were run."""

    scripts: tuple[ScriptRecord, ...]
    database: str
    timeout_seconds: int


@dataclass(frozen=True, slots=True)
class IdleStop:
    """A branch that is stopped when nobody has been connected to it for some time (restore/idle.py)."""

    after_seconds: int
    since: Micros
    """Nobody was seen since then."""
    looked: Micros
    """When that was last asked."""
    sessions: int | None
    """What Postgres had counted by then; ``None`` before the first look, and while somebody is connected."""


@dataclass(frozen=True, slots=True)
class LocalBranch:
    """Everything known about one branch of this host."""

    id: str
    name: str
    phase: str
    mode: str
    created: Micros
    expires: Micros | None
    durable: bool
    """Whether fsync reaches the disk; if not, the overlay is void after a reboot."""
    boot_id: str
    """Of the boot in which it was made."""
    protected: bool = False
    origin: Origin | None = None
    """``None`` until WHEN is resolved."""
    server: Server | None = None
    """``None`` until planned."""
    replayed_bytes: int = 0
    preload: tuple[str, ...] = ()
    """Libraries asked for by name."""
    run: ScriptRun | None = None
    """Scripts it was made with; their contents are kept beside it."""
    idle: IdleStop | None = None
    warnings: tuple[str, ...] = ()

    def is_void(self, boot_id: str) -> bool:
        """Whether a reboot took from it what was never on disk."""
        return not self.durable and self.boot_id != boot_id

    def has_expired(self, now: Micros) -> bool:
        """Whether its time to live is over."""
        return self.expires is not None and self.expires <= now


def encode_branch(branch: LocalBranch) -> bytes:
    """``branch.json``."""
    return json.dumps({"format": FORMAT, **to_json(branch)}, indent=1).encode() + b"\n"


def decode_branch(data: bytes, path: Path) -> LocalBranch:
    """Read ``branch.json``; raises TimelineError naming the file."""
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        return from_json(LocalBranch, value)
    except ValueError as error:
        raise TimelineError(
            f"{path} cannot be read: {error}",
            hint="another version of tl wrote it; use that version, or remove the directory",
        ) from error
