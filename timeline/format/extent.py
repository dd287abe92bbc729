"""Blocks, groups and extents: how files are cut (SPEC.md, chapter 4).

A file is cut in blocks of 8 KiB; 16 consecutive blocks, aligned, are a group of 128 KiB; an extent is a run
of blocks inside one group, compressed on its own and named by the BLAKE3 of its raw bytes. The last block of
a file may be short.
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.errors import DamagedStore
from timeline.format import zstd_frame
from timeline.format.digest import digest_of

BLOCK_BYTES = 8192
GROUP_BLOCKS = 16
GROUP_BYTES = BLOCK_BYTES * GROUP_BLOCKS


@dataclass(frozen=True, slots=True)
class ExtentRef:
    """Where one extent is and what it must be."""

    first_block: int
    """Block number inside the group, 0 to 15."""
    raw_bytes: int
    """Uncompressed length, 1 to 131,072."""
    pack: str
    """Pack id, 64 hex digits."""
    offset: int
    """Byte offset of the compressed frame inside the pack object."""
    stored_bytes: int
    """Length of the compressed frame."""
    digest: bytes
    """BLAKE3 of the raw bytes, 32 bytes."""

    @property
    def blocks(self) -> int:
        """How many blocks it covers; the last one may be short."""
        return -(-self.raw_bytes // BLOCK_BYTES)


def encode_extent(raw: bytes | memoryview) -> tuple[bytes, bytes]:
    """(stored frame, digest) of 1 to GROUP_BYTES bytes."""
    if not 0 < len(raw) <= GROUP_BYTES:
        raise ValueError(f"an extent cannot hold {len(raw)} bytes")
    return zstd_frame.compress(raw), digest_of(raw)


def decode_extent(stored: bytes | memoryview, ref: ExtentRef, key: str) -> bytes:
    """The raw bytes, verified against the reference; raises DamagedStore(key, ref.offset, …)."""
    if len(stored) != ref.stored_bytes:
        raise DamagedStore(
            key, ref.offset, f"expected {ref.stored_bytes} bytes of extent, found {len(stored)}"
        )
    raw = zstd_frame.decompress(stored, ref.raw_bytes, key, ref.offset)
    if digest_of(raw) != ref.digest:
        raise DamagedStore(key, ref.offset, f"expected an extent with BLAKE3 {ref.digest.hex()}")
    return raw
