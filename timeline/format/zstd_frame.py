"""zstd frames as the format uses them: one frame, with content size and content checksum (SPEC.md, [ZST-1]).

The checksum lets a reader without BLAKE3 (restore/rescue.py) verify what it unpacks; the size lets every
reader bound what it allocates before it unpacks.
"""

from __future__ import annotations

import threading

import zstandard

from timeline.errors import DamagedStore

LEVEL = 1
"""0.75 GB/s on WAL with two cores; higher levels cost the archiver its head start."""


class _Contexts(threading.local):
    """One compressor and decompressor per thread: they must not be shared and cost more to make than a small
    frame."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(raw: bytes | bytearray | memoryview) -> bytes:
    """The bytes as one frame."""
    return _contexts.compressor.compress(raw)


def decompress(stored: bytes | memoryview, raw_bytes: int, key: str, offset: int) -> bytes:
    """The ``raw_bytes`` bytes of one frame that spans all of ``stored``.

    Raises DamagedStore(key, offset, …) for anything else: another length, a wrong checksum, none at all,
    bytes left over. The caller bounds ``raw_bytes``.
    """
    check(stored, raw_bytes, key, offset)
    try:
        raw = _contexts.decompressor.decompress(stored, max_output_size=raw_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedStore(key, offset, f"expected an intact zstd frame of {raw_bytes} bytes") from error
    if len(raw) != raw_bytes:
        raise DamagedStore(key, offset, f"expected {raw_bytes} bytes, the frame holds {len(raw)}")
    return raw


def check(stored: bytes | memoryview, raw_bytes: int, key: str, offset: int) -> None:
    """Raise DamagedStore(key, offset, …) unless the frame says that it holds ``raw_bytes`` bytes and a
    checksum. What follows its header is not looked at."""
    try:
        parameters = zstandard.get_frame_parameters(stored)
    except zstandard.ZstdError as error:
        raise DamagedStore(key, offset, "expected a zstd frame") from error
    if parameters.content_size != raw_bytes or not parameters.has_checksum:
        raise DamagedStore(key, offset, f"expected a zstd frame of {raw_bytes} bytes with a checksum")
