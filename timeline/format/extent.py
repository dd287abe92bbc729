"""Blocks, groups and extents: how files are cut (SPEC.md, chapter 4).

A file is cut in blocks of 8 KiB; 16 consecutive blocks, aligned, are a group of 128 KiB; an extent is a run of blocks
inside one group, compressed on its own and named by the BLAKE3 of its raw bytes. The last block of a file may be short.
"""

from __future__ import annotations

from dataclasses import dataclass

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
