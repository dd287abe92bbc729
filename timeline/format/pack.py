"""Packs: many compressed frames in one immutable object, named by its content (SPEC.md, chapter 4).

Layout: magic ``TLPACK\\0\\x01`` (8), header length (u32 LE), CRC-32 of the header (u32 LE), header (JSON,
UTF-8), then the frames back to back. Where a frame is, and what it must be, stands in the manifests that
refer to it.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass

from timeline.errors import DamagedStore
from timeline.format import value_json
from timeline.format.digest import DIGEST_KIND, hex_digest_of
from timeline.format.features import check_envelope

PACK_TARGET_BYTES = 32 << 20
"""A builder is full at this size; one more frame may stand above it."""
NONCE_BYTES = 16
"""``Clock.token(NONCE_BYTES)`` makes the nonce of a pack or manifest."""
HEADER_READ_BYTES = 4096
"""A prefix of this length always holds the whole header."""

EXTENTS = "extents"
WAL = "wal"
_KINDS = (EXTENTS, WAL)

_MAGIC = b"TLPACK\x00\x01"
_PREFIX = struct.Struct("<8sII")


@dataclass(frozen=True, slots=True)
class PackHeader:
    """What a pack says about itself."""

    store_id: str
    kind: str
    """``extents`` or ``wal``."""
    digest_kind: str = DIGEST_KIND
    key_id: str | None = None
    """Reserved."""
    cipher: str | None = None
    """Reserved: cipher of the frames."""
    nonce: str | None = None
    """Random hex: no two runs ever make the same object, so no name comes back after it was collected [PAC-4].
    ``None`` in packs of earlier versions."""


class PackBuilder:
    """Collects frames until it is full; holds at most PACK_TARGET_BYTES and one frame."""

    def __init__(self, store_id: str, kind: str, *, nonce: str | None = None) -> None:
        """``kind``: EXTENTS or WAL. ``nonce``: whatever writes into a store must give one, new for each pack."""
        if kind not in _KINDS:
            raise ValueError(f"no kind of pack: {kind}")
        members = value_json.to_json(PackHeader(store_id, kind, nonce=nonce))
        text = json.dumps(members, separators=(",", ":")).encode()
        self._data = bytearray(_PREFIX.pack(_MAGIC, len(text), zlib.crc32(text)) + text)
        self.frames = 0
        """How many frames were added."""

    def add(self, stored_frame: bytes | memoryview) -> int:
        """Append a frame; its byte offset inside the object."""
        offset = len(self._data)
        self._data += stored_frame
        self.frames += 1
        return offset

    @property
    def size(self) -> int:
        """Bytes of the object so far."""
        return len(self._data)

    @property
    def full(self) -> bool:
        """Whether it is time to finish it."""
        return len(self._data) >= PACK_TARGET_BYTES

    def finish(self) -> tuple[str, bytes]:
        """The pack's id and the whole object; the builder cannot be used afterwards."""
        data = bytes(self._data)
        self._data.clear()
        return hex_digest_of(data), data


def decode_pack_header(data: bytes | memoryview, key: str) -> tuple[PackHeader, int]:
    """The header and where the first frame starts, from at least HEADER_READ_BYTES; DamagedStore,
    UnknownFeature."""
    if len(data) < _PREFIX.size:
        raise DamagedStore(key, 0, f"expected a pack, found {len(data)} bytes")
    magic, text_bytes, crc = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise DamagedStore(key, 0, "expected the magic of a pack")
    header_bytes = _PREFIX.size + text_bytes
    if header_bytes > min(len(data), HEADER_READ_BYTES):
        raise DamagedStore(key, 8, f"expected {header_bytes} bytes of header")
    text = bytes(data[_PREFIX.size : header_bytes])
    if zlib.crc32(text) != crc:
        raise DamagedStore(key, _PREFIX.size, f"expected a header with CRC-32 {crc:08x}")
    try:
        header = value_json.from_json(PackHeader, json.loads(text))
    except ValueError as error:
        raise DamagedStore(key, _PREFIX.size, f"expected a pack header: {error}") from error
    check_envelope(key, digest_kind=header.digest_kind, key_id=header.key_id, cipher=header.cipher)
    return header, header_bytes


def verify_pack(data: bytes | memoryview, pack_id: str, key: str) -> PackHeader:
    """The header of a whole pack whose bytes have the BLAKE3 that names it; raises DamagedStore,
    UnknownFeature."""
    if hex_digest_of(data) != pack_id:
        raise DamagedStore(key, 0, f"expected {len(data)} bytes with BLAKE3 {pack_id}")
    return decode_pack_header(data, key)[0]
