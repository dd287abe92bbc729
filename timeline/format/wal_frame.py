"""Sealed WAL frames: runs of WAL inside packs (SPEC.md, chapter 4)."""

from __future__ import annotations

from timeline.errors import DamagedStore
from timeline.format import zstd_frame
from timeline.format.digest import digest_of
from timeline.format.manifest import WalFrame

WAL_FRAME_MAX_BYTES = 32 << 20
"""Raw bytes of a sealed frame at most: the longest chunk; sealers aim at 1 to 4 MiB."""


def encode_wal_frame(raw: bytes | memoryview) -> tuple[bytes, bytes]:
    """(stored frame, digest) of 1 to WAL_FRAME_MAX_BYTES bytes of WAL."""
    if not 0 < len(raw) <= WAL_FRAME_MAX_BYTES:
        raise ValueError(f"a frame cannot hold {len(raw)} bytes of WAL")
    return zstd_frame.compress(raw), digest_of(raw)


def decode_wal_frame(stored: bytes | memoryview, frame: WalFrame, key: str) -> bytes:
    """The WAL from ``frame.start`` to ``frame.end``, verified; raises DamagedStore(key, frame.offset, …)."""
    if len(stored) != frame.stored_bytes:
        raise DamagedStore(key, frame.offset, f"expected {frame.stored_bytes} bytes, found {len(stored)}")
    raw_bytes = frame.end - frame.start
    if not 0 < raw_bytes <= WAL_FRAME_MAX_BYTES:
        raise DamagedStore(key, frame.offset, f"expected a frame of at most {WAL_FRAME_MAX_BYTES} bytes")
    raw = zstd_frame.decompress(stored, raw_bytes, key, frame.offset)
    if digest_of(raw) != frame.digest:
        raise DamagedStore(key, frame.offset, f"expected WAL with BLAKE3 {frame.digest.hex()}")
    return raw
