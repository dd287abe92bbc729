"""What one mount needs to know, as a file: ``mount.json`` in the branch's directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from timeline.clock import Micros
from timeline.errors import TimelineError
from timeline.format.branch_state import Snapshot
from timeline.format.value_json import from_json, to_json
from timeline.ids import MAIN

FORMAT = 1


@dataclass(frozen=True, slots=True)
class MountSpec:
    """One lazy data directory."""

    store_url: str
    snapshot: Snapshot
    overlay: str
    """Directory made by Overlay.create."""
    mountpoint: str
    """An existing, empty directory."""
    uid: int
    """Who owns the files shown, and alone may enter: the user that runs Postgres."""
    gid: int
    durable: bool
    """Whether fsync reaches the disk; if not, the overlay is void after a reboot."""
    log: str
    """File that the mount appends its log to."""
    stats: str
    """File that the mount replaces with its counters every second (see MountStats)."""
    cache: str | None = None
    """Directory of the host-wide cache; ``None``: none."""
    cache_bytes: int = 20 << 30
    """Bound of the cache."""
    endpoint_url: str | None = None
    region: str | None = None
    branch: str = MAIN
    """Branch of the store whose log names the snapshot."""
    expires: Micros | None = None
    """When the branch does; ``None``: never."""
    pin: str | None = None
    """File that tells of its pin in the store (see PinNote); ``None``: nothing is pinned."""
    name: str = ""
    """What people call the branch."""
    patience_seconds: int = 90
    """How long a read waits for a store that does not answer before it fails with EIO."""
    replay: str | None = None
    """File that says what Postgres is about to replay (restore/replay_task.py); it need not be there."""


@dataclass(frozen=True, slots=True)
class MountStats:
    """What a mount did since it started."""

    pid: int
    mounted: bool
    """False in the last one of a mount that ended in order."""
    requests: int
    fetched_bytes: int
    extents: int
    memory_hits: int
    disk_hits: int
    failures: int
    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    errors: int
    """Requests of the kernel that were answered EIO."""
    boot_extents: int
    """Extents of the boot set, once they are all here."""


def encode_spec(spec: MountSpec) -> bytes:
    """``mount.json``."""
    return json.dumps({"format": FORMAT, **to_json(spec)}, indent=1).encode() + b"\n"


def decode_spec(data: bytes, path: Path | str) -> MountSpec:
    """Read ``mount.json``; raises TimelineError naming the file."""
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        return from_json(MountSpec, value)
    except ValueError as error:
        raise TimelineError(
            f"{path} cannot be read: {error}", hint="another version of tl wrote it; make the branch again"
        ) from error


def read_stats(path: Path | str) -> MountStats | None:
    """The newest counters of a mount, ``None`` when it has written none yet."""
    try:
        return from_json(MountStats, json.loads(Path(path).read_bytes()))
    except (FileNotFoundError, ValueError):
        return None
