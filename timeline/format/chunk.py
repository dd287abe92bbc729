"""WAL chunk: a run of WAL bytes as received, with its index, as one immutable object (SPEC.md, chapter 3).

Layout: magic ``TLCHUNK\\x01`` (8), header length (u32 LE), CRC-32 of the header (u32 LE), header (JSON,
UTF-8), then the frames (zstd with content checksum) back to back, then one zstd frame holding the index.
Every stored byte is covered by a checksum or digest of the header, so each single flipped byte is found, not
only those that change the WAL.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any

from timeline.clock import Micros
from timeline.errors import DamagedStore
from timeline.format import keys, value_json, zstd_frame
from timeline.format.digest import hex_digest_of, parse_digest
from timeline.format.features import check_envelope
from timeline.format.wal_index import Coverage, WalIndex
from timeline.format.wal_index_codec import decode_index, encode_index
from timeline.lsn import Lsn

HEADER_READ_BYTES = 4096
"""A prefix of this length always holds the whole header [CHK-4]."""
CHUNK_MAX_BYTES = 32 << 20
"""Raw bytes of a chunk at most (archivers cut at 4 MiB); bounds what a reader allocates."""
INDEX_MAX_BYTES = 32 << 20
"""Raw bytes of an index at most."""

_MAGIC = b"TLCHUNK\x01"
_PREFIX = struct.Struct("<8sII")


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """What the header says; enough to judge a chunk without its payload."""

    store_id: str
    branch: str
    system_identifier: int
    tli: int
    start: Lsn
    end: Lsn
    """Exclusive."""
    writer: str
    """Random id of the archiver run that made it."""
    epoch: int
    """Fencing epoch of that run (P4)."""
    created: Micros
    coverage: Coverage | None
    """Set when the source had no more WAL than this chunk's end at that time on its clock."""
    digest: str
    """BLAKE3 of the raw WAL bytes, hex."""
    digest_kind: str = "blake3"
    key_id: str | None = None
    """Reserved: id of the data key that keys the digest and cipher."""
    cipher: str | None = None
    """Reserved: payload cipher."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A decoded, verified chunk."""

    header: ChunkHeader
    wal: bytes
    """Raw WAL, ``end - start`` bytes."""
    index: WalIndex


@dataclass(frozen=True, slots=True)
class PackedChunk:
    """A chunk whose WAL is not unpacked: its stored bytes are verified, its index is decoded."""

    layout: ChunkLayout
    key: str
    frames: memoryview
    """The stored frames, back to back."""
    index: WalIndex

    @property
    def header(self) -> ChunkHeader:
        """What the chunk says about itself."""
        return self.layout.header

    def unpack(self) -> bytes:
        """The WAL, verified; raises DamagedStore."""
        at = self.layout.header_bytes
        parts = [
            zstd_frame.decompress(
                self.frames[frame.offset - at :][: frame.stored_bytes],
                frame.raw_bytes,
                self.key,
                frame.offset,
            )
            for frame in self.layout.frames
        ]
        wal = parts[0] if len(parts) == 1 else b"".join(parts)
        if hex_digest_of(wal) != self.header.digest:
            raise DamagedStore(self.key, at, f"expected WAL with BLAKE3 {self.header.digest}")
        return wal


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """One zstd frame inside a chunk."""

    offset: int
    """From the start of the object."""
    stored_bytes: int
    raw_bytes: int


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """The header and where everything is: enough for ranged reads of parts."""

    header: ChunkHeader
    header_bytes: int
    """Where the first frame starts."""
    frames: tuple[StoredFrame, ...]
    frames_digest: str
    """BLAKE3 of all stored frames, hex."""
    index: StoredFrame
    index_digest: str
    """BLAKE3 of the stored index frame, hex."""

    @property
    def size(self) -> int:
        """Bytes of the whole object."""
        return self.index.offset + self.index.stored_bytes


def encode_chunk(header: ChunkHeader, wal: bytes | bytearray | memoryview, index: WalIndex) -> bytes:
    """The object. ``header.digest`` is computed here, whatever the caller put there.

    Raises ValueError when the WAL is empty, longer than CHUNK_MAX_BYTES or not what start and end say.
    """
    view = memoryview(wal)
    if not 0 < len(view) <= CHUNK_MAX_BYTES or len(view) != header.end - header.start:
        raise ValueError(f"chunk {header.start} to {header.end} cannot hold {len(view)} bytes of WAL")
    # One frame, because sealing can then take it over as it is.
    payload = zstd_frame.compress(view)
    raw_index = encode_index(index)
    if len(raw_index) > INDEX_MAX_BYTES:
        raise ValueError(f"the index of a chunk cannot take {len(raw_index)} bytes")
    stored_index = zstd_frame.compress(raw_index)
    members = value_json.to_json(replace(header, digest=hex_digest_of(view)))
    members["frames"] = [[len(payload), len(view)]]
    members["frames_digest"] = hex_digest_of(payload)
    members["index"] = [len(stored_index), len(raw_index)]
    members["index_digest"] = hex_digest_of(stored_index)
    text = json.dumps(members, separators=(",", ":")).encode()
    if _PREFIX.size + len(text) > HEADER_READ_BYTES:
        raise ValueError(f"the header of a chunk cannot take {len(text)} bytes")
    return b"".join((_PREFIX.pack(_MAGIC, len(text), zlib.crc32(text)), text, payload, stored_index))


def decode_header(data: bytes | memoryview, key: str) -> tuple[ChunkHeader, int]:
    """The header, and its length including everything before the first frame.

    ``data``: the object, or at least its first HEADER_READ_BYTES. When ``key`` is a chunk's key, the header
    must agree with it. Raises DamagedStore, UnknownFeature.
    """
    layout = decode_layout(data, key)
    return layout.header, layout.header_bytes


def decode_layout(data: bytes | memoryview, key: str) -> ChunkLayout:
    """As ``decode_header``, with the places of all frames."""
    if len(data) < _PREFIX.size:
        raise DamagedStore(key, 0, f"expected a chunk, found {len(data)} bytes")
    magic, text_bytes, crc = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise DamagedStore(key, 0, "expected the magic of a WAL chunk")
    header_bytes = _PREFIX.size + text_bytes
    if header_bytes > HEADER_READ_BYTES:
        raise DamagedStore(key, 8, f"expected a header of at most {HEADER_READ_BYTES} bytes")
    if header_bytes > len(data):
        raise DamagedStore(key, len(data), f"expected {header_bytes} bytes of header")
    text = bytes(data[_PREFIX.size : header_bytes])
    if zlib.crc32(text) != crc:
        raise DamagedStore(key, _PREFIX.size, f"expected a header with CRC-32 {crc:08x}")
    try:
        members = json.loads(text)
        check_envelope(
            key,
            digest_kind=members.get("digest_kind"),
            key_id=members.get("key_id"),
            cipher=members.get("cipher"),
        )
        layout = _layout(members, header_bytes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStore(key, _PREFIX.size, f"expected a chunk header: {error!r}") from error
    _check_name(layout.header, key)
    return layout


def decode_chunk(data: bytes | memoryview, key: str) -> Chunk:
    """The chunk, every byte verified; raises DamagedStore, UnknownFeature."""
    packed = decode_packed(data, key)
    return Chunk(header=packed.header, wal=packed.unpack(), index=packed.index)


def decode_packed(data: bytes | memoryview, key: str) -> PackedChunk:
    """The chunk with its WAL still compressed, every stored byte verified; raises DamagedStore,
    UnknownFeature."""
    layout = decode_layout(data, key)
    if len(data) != layout.size:
        raise DamagedStore(key, min(len(data), layout.size), f"expected an object of {layout.size} bytes")
    view = memoryview(data)
    frames = view[layout.header_bytes : layout.index.offset]
    if hex_digest_of(frames) != layout.frames_digest:
        raise DamagedStore(
            key,
            layout.header_bytes,
            f"expected {len(frames)} bytes of frames with BLAKE3 {layout.frames_digest}",
        )
    return PackedChunk(layout, key, frames, decode_index_frame(view[layout.index.offset :], layout, key))


def decode_index_frame(stored: bytes | memoryview, layout: ChunkLayout, key: str) -> WalIndex:
    """The index out of its stored frame (``layout.index``), verified."""
    frame = layout.index
    if len(stored) != frame.stored_bytes or hex_digest_of(stored) != layout.index_digest:
        raise DamagedStore(
            key,
            frame.offset,
            f"expected {frame.stored_bytes} bytes of index with BLAKE3 {layout.index_digest}",
        )
    raw = zstd_frame.decompress(stored, frame.raw_bytes, key, frame.offset)
    return decode_index(raw, key, frame.offset)


def _layout(members: dict[str, Any], header_bytes: int) -> ChunkLayout:
    header = value_json.from_json(ChunkHeader, members)
    parse_digest(header.digest)
    frames = []
    at = header_bytes
    for stored_bytes, raw_bytes in members["frames"]:
        frames.append(StoredFrame(at, _size(stored_bytes), _size(raw_bytes)))
        at += stored_bytes
    index_stored, index_raw = members["index"]
    if _size(index_raw) > INDEX_MAX_BYTES:
        raise ValueError(f"an index of {index_raw} bytes")
    raw_total = sum(frame.raw_bytes for frame in frames)
    if not 0 < raw_total <= CHUNK_MAX_BYTES or raw_total != header.end - header.start:
        raise ValueError(f"frames of {raw_total} bytes for {header.start} to {header.end}")
    return ChunkLayout(
        header=header,
        header_bytes=header_bytes,
        frames=tuple(frames),
        frames_digest=str(members["frames_digest"]),
        index=StoredFrame(at, _size(index_stored), index_raw),
        index_digest=str(members["index_digest"]),
    )


def _size(value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise ValueError(f"expected a length, found {value!r}")
    return value


def _check_name(header: ChunkHeader, key: str) -> None:
    named = keys.parse_chunk(key)
    if named is not None and (named.branch, named.tli, named.start) != (
        header.branch,
        header.tli,
        header.start,
    ):
        raise DamagedStore(
            key,
            _PREFIX.size,
            f"expected this key's chunk, found {header.branch}, tli {header.tli}, {header.start}",
        )
