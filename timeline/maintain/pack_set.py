"""All packs of a store, and what manifests say is in each: some 50 bytes a pack.

A million packs are about 32 TiB of compressed data.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from timeline.catalog.parallel import in_order
from timeline.format import keys
from timeline.store.base import Store

_LISTINGS = 4
"""Listings under way at once, of sixteen: together they hold a quarter of the keys in memory."""
_KEY = re.compile(r"packs/[0-9a-f]{2}/([0-9a-f]{64})")

Indexes = npt.NDArray[np.int64]


class PackSet:
    """Packs by number, 0 to ``len`` - 1, ascending by id; -1 stands for one that is not there."""

    def __init__(self, ids: npt.NDArray[np.bytes_], sizes: npt.NDArray[np.int64]) -> None:
        """``ids``: raw digests, sorted; ``sizes``: of the objects, in bytes."""
        self.ids = ids
        self.sizes = sizes
        self.needed = np.zeros(len(ids), np.int64)
        """Where the last frame ends that a manifest says is in it; 0: nobody names it."""
        self.rows = np.zeros(len(ids), np.int64)
        """Rows of manifests that name it."""
        self.missing: dict[str, int] = {}
        """Ids that manifests name and the store does not hold, and the rows that do."""

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, number: int) -> str:
        """Id of a pack, 64 hex digits."""
        return bytes(self.ids[number]).ljust(32, b"\0").hex()

    def key(self, number: int) -> str:
        """Its key."""
        return keys.pack(self.name(number))

    def find(self, names: Sequence[str]) -> Indexes:
        """Their numbers; -1 for those that are not there."""
        wanted = np.array([bytes.fromhex(name) for name in names], "S32")
        if not len(self.ids):
            return np.full(len(wanted), -1, np.int64)
        places = np.minimum(np.searchsorted(self.ids, wanted), len(self.ids) - 1)
        return np.where(self.ids[places] == wanted, places, -1).astype(np.int64)

    def add_rows(
        self,
        names: Sequence[str],
        codes: npt.NDArray[Any],
        offsets: npt.NDArray[Any],
        stored: npt.NDArray[Any],
    ) -> None:
        """Rows of a manifest: row *n* is a frame of ``stored[n]`` bytes at ``offsets[n]`` of pack ``names[codes[n]]``."""
        numbers = self.find(names)
        for code in np.flatnonzero(numbers < 0).tolist():
            rows = int((codes == code).sum())
            if rows:
                self.missing[names[code]] = self.missing.get(names[code], 0) + rows
        places = numbers[codes]
        there = places >= 0
        places = places[there]
        np.maximum.at(self.needed, places, offsets[there].astype(np.int64) + stored[there].astype(np.int64))
        np.add.at(self.rows, places, 1)

    @property
    def named(self) -> Indexes:
        """Numbers of the packs that manifests name."""
        return np.flatnonzero(self.rows)

    @property
    def short(self) -> Indexes:
        """Numbers of the packs that end before what is said to be in them."""
        return np.flatnonzero(self.sizes < self.needed)


async def list_packs(store: Store) -> PackSet:
    """What the store holds now; sixteen LISTs, more where a listing has pages."""

    async def part(digit: str) -> tuple[bytes, npt.NDArray[np.int64]]:
        listed = [
            (match[1], item.size)
            for item in await store.list(f"packs/{digit}")
            if (match := _KEY.fullmatch(item.key)) and item.key == keys.pack(match[1])
        ]
        ids = b"".join(bytes.fromhex(name) for name, _ in listed)
        return ids, np.array([size for _, size in listed], np.int64)

    parts = [found async for found in in_order("0123456789abcdef", part, limit=_LISTINGS)]
    ids = np.frombuffer(b"".join(ids for ids, _ in parts), "S32")
    sizes = np.concatenate([sizes for _, sizes in parts])
    order = np.argsort(ids, kind="stable")
    return PackSet(ids[order], sizes[order])
