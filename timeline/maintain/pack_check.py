"""One whole pack against everything that is known of it. Pure; made for a thread: zstd and BLAKE3 release the GIL.

Checked are: every frame that a row names, by its length, its zstd frame and the digest of its raw bytes [PAC-3];
the pack's header; the whole object by its name; and, of relations of a cluster with checksums, every whole page
below the LSN that its row carries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from timeline.errors import DamagedStore
from timeline.format import zstd_frame
from timeline.format.digest import DIGEST_BYTES, digest_of, hex_digest_of
from timeline.format.extent import GROUP_BYTES
from timeline.format.pack import decode_pack_header
from timeline.maintain.verify_report import Fault
from timeline.pg.page import PAGE_BYTES, wrong_pages

ROW = np.dtype(
    [
        ("pack", "<i4"),
        ("offset", "<u4"),
        ("stored", "<u4"),
        ("raw", "<u4"),
        ("block", "<u4"),
        ("before", "<u8"),
        ("digest", f"V{DIGEST_BYTES}"),
    ]
)
"""A frame: number of its pack, place and lengths; for pages to be judged the number of the first block in its fork,
and the LSN below which they are (0: not pages, or not to be judged); digest of the raw bytes."""

Rows = npt.NDArray[np.void]

_BATCH_BYTES = 2 << 20
"""Pages whose checksums are computed at once."""


@dataclass(frozen=True, slots=True)
class FrameFault:
    """What is wrong at one place of a pack."""

    fault: Fault
    offset: int
    expected: str


@dataclass(frozen=True, slots=True)
class PackResult:
    """What the check of a pack gave."""

    faults: tuple[FrameFault, ...]
    pages: int
    """Pages whose checksum was computed."""


class _Pages:
    """Pages of many frames, judged together."""

    def __init__(self) -> None:
        self._data = memoryview(bytearray(_BATCH_BYTES + GROUP_BYTES))
        self._filled = 0
        self._blocks: list[npt.NDArray[np.uint32]] = []
        self._before: list[npt.NDArray[np.uint64]] = []
        self._offsets: list[npt.NDArray[np.uint32]] = []
        self.count = 0
        self.bad: dict[int, list[int]] = {}
        """By offset of the frame: blocks."""

    def add(self, raw: bytes, block: int, before: int, offset: int) -> None:
        """The whole pages of an extent."""
        count = len(raw) // PAGE_BYTES
        end = self._filled + count * PAGE_BYTES
        self._data[self._filled : end] = memoryview(raw)[: count * PAGE_BYTES]
        self._filled = end
        self._blocks.append(np.arange(block, block + count, dtype=np.uint64).astype(np.uint32))
        self._before.append(np.full(count, before, np.uint64))
        self._offsets.append(np.full(count, offset, np.uint32))
        self.count += count
        if end >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Judge what was added since the last time."""
        if not self._filled:
            return
        blocks = np.concatenate(self._blocks)
        offsets = np.concatenate(self._offsets)
        pages = self._data[: self._filled]
        for place in wrong_pages(pages, blocks, np.concatenate(self._before)).tolist():
            self.bad.setdefault(int(offsets[place]), []).append(int(blocks[place]))
        self._filled = 0
        self._blocks, self._before, self._offsets = [], [], []


def check_pack(data: bytes, pack_id: str, key: str, rows: Rows) -> PackResult:
    """``rows``: of this pack, by offset, each distinct."""
    view = memoryview(data)
    faults: dict[int, FrameFault] = {}
    pages = _Pages()
    last: tuple[object, ...] = ()
    raw = b""
    digests = rows["digest"].tobytes()
    for number, (_, offset, stored, raw_bytes, block, before, _) in enumerate(rows.tolist()):
        digest = digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
        wanted = (offset, stored, raw_bytes, digest)
        if wanted != last:
            last = wanted
            try:
                raw = _decode(view, wanted, key)
            except DamagedStore as error:
                faults.setdefault(offset, FrameFault(Fault.CORRUPT, error.offset, error.expectation))
                raw = b""
        if before and raw:
            pages.add(raw, block, before, offset)
    pages.flush()
    for offset, blocks in pages.bad.items():
        named = ", ".join(map(str, blocks[:16])) + (" …" if len(blocks) > 16 else "")
        faults.setdefault(
            offset,
            FrameFault(
                Fault.PAGE_CHECKSUM,
                offset,
                f"expected pages with good checksums; bad when they were archived: block {named} of the fork",
            ),
        )
    if not any(fault.fault is Fault.CORRUPT for fault in faults.values()):
        outside = _outside_frames(data, pack_id, key)
        if outside is not None:
            faults.setdefault(outside.offset, outside)
    return PackResult(tuple(faults[offset] for offset in sorted(faults)), pages.count)


def _decode(view: memoryview, wanted: tuple[int, int, int, bytes], key: str) -> bytes:
    offset, stored, raw_bytes, digest = wanted
    if offset + stored > len(view):
        raise DamagedStore(key, len(view), f"object ends here, {offset + stored} bytes expected")
    raw = zstd_frame.decompress(view[offset : offset + stored], raw_bytes, key, offset)
    if digest_of(raw) != digest:
        raise DamagedStore(key, offset, f"expected a frame with BLAKE3 {digest.hex()}")
    return raw


def _outside_frames(data: bytes, pack_id: str, key: str) -> FrameFault | None:
    """Damage that no row's frame has a part in."""
    if hex_digest_of(data) == pack_id:
        return None
    try:
        decode_pack_header(data, key)
    except DamagedStore as error:
        return FrameFault(Fault.CORRUPT, error.offset, error.expectation)
    return FrameFault(
        Fault.CORRUPT, 0, f"expected {len(data)} bytes with BLAKE3 {pack_id}; all frames in use are intact"
    )
