"""BLAKE3, the digest of the format (SPEC.md, [DIG-1])."""

from __future__ import annotations

from typing import Any

from blake3 import blake3

DIGEST_KIND = "blake3"
DIGEST_BYTES = 32


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    """BLAKE3 of the bytes, 32 bytes."""
    return bytes(blake3(data).digest())


def hex_digest_of(data: bytes | bytearray | memoryview) -> str:
    """BLAKE3 of the bytes, 64 hex digits."""
    return str(blake3(data).hexdigest())


def hasher() -> Any:
    """The digest of bytes that come in pieces: ``update(data)``, at last ``hexdigest()``."""
    return blake3()


def parse_digest(text: str) -> bytes:
    """The 32 bytes behind 64 hex digits; raises ValueError for anything else."""
    digest = bytes.fromhex(text)
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"expected a digest of {DIGEST_BYTES} bytes, found {len(digest)}")
    return digest
