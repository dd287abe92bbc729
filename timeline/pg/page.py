"""8 KiB data pages: their LSNs and checksums, many at a time.

Sources: src/include/storage/bufpage.h (header), src/include/storage/checksum_impl.h (the algorithm: 32
interleaved FNV-1a sums, folded and mixed with the block number).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from timeline.lsn import Lsn

PAGE_BYTES = 8192

_SUMS = 32
_PRIME = np.uint32(16777619)
# Taken so many pages at a time, all intermediate values stay in the processor's cache.
_BATCH_PAGES = 256
_BASE = np.array(
    [
        0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
        0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
        0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
        0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
    ],
    np.uint32,
)  # fmt: skip

Buffer = bytes | bytearray | memoryview
Words = npt.NDArray[np.uint32]


def page_lsn(page: Buffer) -> Lsn:
    """LSN just after the record that changed the page last; 0 for new pages."""
    return Lsn(int.from_bytes(page[0:4], "little") << 32 | int.from_bytes(page[4:8], "little"))


def page_lsns(data: Buffer) -> npt.NDArray[np.uint64]:
    """``page_lsn`` of each page; ``data`` must be whole pages (ValueError)."""
    words = _pages(data)
    return words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1]


def page_checksums(data: Buffer, first_block: int) -> npt.NDArray[np.uint16]:
    """The checksum each page should carry as block ``first_block``, and so on, of its fork.

    Blocks count through all segment files of the fork. ``data`` must be whole pages (ValueError).
    """
    words = _pages(data)
    return _checksums(
        words, np.arange(first_block, first_block + len(words), dtype=np.uint64).astype(np.uint32)
    )


def bad_pages(data: Buffer, first_block: int, *, before: Lsn | None = None) -> npt.NDArray[np.int64]:
    """Numbers of the blocks whose checksum does not match, as a server with checksums on would judge them.

    New pages (no free space pointer) are fine when wholly zero. ``before``: judge only pages whose LSN is
    below it; later ones may be torn in a base backup, and WAL mends them (EDGE 30). ``data`` must be whole
    pages (ValueError).
    """
    words = _pages(data)
    blocks = np.arange(first_block, first_block + len(words), dtype=np.uint64).astype(np.uint32)
    limits = None if before is None else np.full(len(words), before, np.uint64)
    return wrong_pages(data, blocks, limits).astype(np.int64) + first_block


def wrong_pages(
    data: Buffer, blocks: npt.NDArray[np.uint32], before: npt.NDArray[np.uint64] | None
) -> npt.NDArray[np.int64]:
    """As ``bad_pages`` for pages from anywhere: positions in ``data`` of those that are bad.

    ``blocks``: number of each page in its fork; ``before``: for each page. ValueError as above.
    """
    words = _pages(data)
    stored = (words[:, 2] & np.uint32(0xFFFF)).astype(np.uint16)
    new = words[:, 3] >> np.uint32(16) == 0
    wrong = stored != _checksums(words, blocks)
    wrong[new] = words[new].any(axis=1)
    if before is not None:
        wrong &= page_lsns(data) < before
    return np.flatnonzero(wrong)


def _pages(data: Buffer) -> Words:
    if len(data) % PAGE_BYTES:
        raise ValueError(f"{len(data)} bytes are not whole pages of {PAGE_BYTES}")
    return np.frombuffer(data, "<u4").reshape(-1, PAGE_BYTES // 4)


def _checksums(words: Words, blocks: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
    count = len(words)
    folded = np.empty(count, np.uint32)
    for begin in range(0, count, _BATCH_PAGES):
        folded[begin : begin + _BATCH_PAGES] = _fold(words[begin : begin + _BATCH_PAGES])
    folded ^= blocks
    return (folded % np.uint32(65535) + np.uint32(1)).astype(np.uint16)


def _fold(pages: Words) -> Words:
    rounds = pages.reshape(len(pages), PAGE_BYTES // 4 // _SUMS, _SUMS)
    head = rounds[:, 0, :].copy()
    head[:, 2] &= np.uint32(0xFFFF0000)  # the checksum field itself counts as zero
    sums = np.broadcast_to(_BASE, head.shape).copy()
    mixed = np.empty_like(sums)
    for index in range(rounds.shape[1] + 2):
        if index == 0:
            np.bitwise_xor(sums, head, out=mixed)
        elif index < rounds.shape[1]:
            np.bitwise_xor(sums, rounds[:, index, :], out=mixed)
        else:
            mixed[:] = sums
        np.multiply(mixed, _PRIME, out=sums)
        np.right_shift(mixed, np.uint32(17), out=mixed)
        np.bitwise_xor(sums, mixed, out=sums)
    folded: Words = np.bitwise_xor.reduce(sums, axis=1)
    return folded
