"""Object keys: the only place where they are built and parsed (SPEC.md, chapter 2)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from timeline.lsn import Lsn

META = "tl.json"
LOG_SPAN = 10**20 - 1
"""Log keys are numbered descending, LOG_SPAN − n, so that the newest comes first in a listing."""

_CHUNK = re.compile(r"wal/([a-z0-9._-]+)/([0-9]+)/([0-9a-f]{16})")
_DRILL = re.compile(r"drills/([0-9]{16}-[0-9a-f]{8})/evidence\.(json|html|junit\.xml)")
_LOG = re.compile(r"branches/([a-z0-9._-]+)/log/([0-9]{20})\.json")
_PACK = re.compile(r"packs/([0-9a-f]{2})/(\1[0-9a-f]{62})")
_MANIFEST = re.compile(r"manifests/([0-9a-f]{64})\.parquet")
_PIN = re.compile(r"pins/([0-9a-f]{32})")
_MARK = re.compile(r"marks/([0-9a-f]{32})")

PACKS = "packs/"
MANIFESTS = "manifests/"
CHUNKS = "wal/"
BRANCHES = "branches/"
CATALOG = "catalog/"
PINS = "pins/"
MARKS = "marks/"
"""Prefixes of all keys of one kind."""


@dataclass(frozen=True, slots=True)
class ChunkKey:
    """The parts of a chunk's key."""

    branch: str
    tli: int
    start: Lsn


def chunk(branch: str, tli: int, start: int) -> str:
    """Key of the chunk that starts at ``start``."""
    return f"wal/{branch}/{tli}/{int(start):016x}"


def chunk_prefix(branch: str, tli: int) -> str:
    """Prefix of all chunks of a tli."""
    return f"wal/{branch}/{tli}/"


def parse_chunk(key: str) -> ChunkKey | None:
    """The parts, or ``None`` when the key is no chunk's."""
    match = _CHUNK.fullmatch(key)
    return ChunkKey(match[1], int(match[2]), Lsn(int(match[3], 16))) if match else None


def pack(digest: str) -> str:
    """Key of a pack."""
    return f"packs/{digest[:2]}/{digest}"


def parse_pack(key: str) -> str | None:
    """The pack's id, or ``None`` when the key is no pack's."""
    match = _PACK.fullmatch(key)
    return match[2] if match else None


def manifest(digest: str) -> str:
    """Key of a manifest."""
    return f"manifests/{digest}.parquet"


def parse_manifest(key: str) -> str | None:
    """The manifest's digest, or ``None`` when the key is no manifest's."""
    match = _MANIFEST.fullmatch(key)
    return match[1] if match else None


def log_prefix(branch: str) -> str:
    """Prefix of a branch's log."""
    return f"branches/{branch}/log/"


def log_entry(branch: str, number: int) -> str:
    """Key of entry ``number`` (0 is the first)."""
    return f"branches/{branch}/log/{LOG_SPAN - number:020d}.json"


def parse_log_entry(key: str) -> tuple[str, int] | None:
    """(branch, number), or ``None`` when the key is no log entry's."""
    match = _LOG.fullmatch(key)
    return (match[1], LOG_SPAN - int(match[2])) if match else None


def pin(pin_id: str) -> str:
    """Key of a host-local branch's pin."""
    return f"pins/{pin_id}"


DRILLS = "drills/"
"""Prefix of all evidence of drills."""


def drill_evidence(drill_id: str, form: str) -> str:
    """Key of a drill's evidence; ``form`` is ``json``, ``html`` or ``junit.xml``."""
    return f"drills/{drill_id}/evidence.{form}"


def parse_drill_evidence(key: str) -> tuple[str, str] | None:
    """(drill id, form), or ``None`` when the key is no evidence's."""
    match = _DRILL.fullmatch(key)
    return (match[1], match[2]) if match else None


def parse_pin(key: str) -> str | None:
    """The pin's id, or ``None`` when the key is no pin's."""
    match = _PIN.fullmatch(key)
    return match[1] if match else None


def mark(mark_id: str) -> str:
    """Key of what a marking run found to be garbage."""
    return f"marks/{mark_id}"


def parse_mark(key: str) -> str | None:
    """The mark's id, or ``None`` when the key is no mark's."""
    match = _MARK.fullmatch(key)
    return match[1] if match else None
