"""The boot set of a base backup, collected as its extents go by and stored side by side in one pack of its
own.

One pack, so that a branch gets all of it with one request. When nothing in it changed since the newest
snapshot, that snapshot's boot extents are named again and nothing is uploaded; else all of it is, even what
did not change: at most BOOT_BYTES. Memory: BOOT_BYTES, twice while the pack is closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from timeline.archive.boot_set import BootBudget
from timeline.archive.extent_writer import Encoded, create_named
from timeline.clock import Clock
from timeline.format import keys
from timeline.format.extent import ExtentRef
from timeline.format.manifest import ManifestRef, PageRow
from timeline.format.pack import EXTENTS, NONCE_BYTES, PackBuilder
from timeline.format.page_manifest import write_page_manifest
from timeline.store.base import Store


@dataclass(frozen=True, slots=True)
class _Taken:
    raw_bytes: int
    digest: bytes
    stored: bytes


class BootPack:
    """Takes extents until its budget is spent."""

    def __init__(self, store_id: str, clock: Clock, previous: Mapping[tuple[str, int], ExtentRef]) -> None:
        """``previous``: (path, group) → extent of the newest snapshot's boot set."""
        self._store_id = store_id
        self._clock = clock
        self._previous = previous
        self._budget = BootBudget()
        self._taken: dict[tuple[str, int], _Taken] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, encoded: Encoded) -> bool:
        """Whether the extent belongs here; then nobody else stores it."""
        group = encoded.group
        if group.boot_database is None or encoded.stored is None:
            return False
        if not self._budget.admit(group.boot_database, len(encoded.stored)):
            return False
        self._taken[group.path, group.number] = _Taken(len(group.raw), encoded.digest, encoded.stored)
        return True

    async def finish(self, store: Store) -> tuple[list[PageRow], ManifestRef | None, int]:
        """Upload: the rows by (path, group), the boot manifest (``None`` for an empty set), bytes uploaded
        for the pack."""
        if not self._taken:
            return [], None, 0
        rows, uploaded = self._reused(), 0
        if rows is None:
            rows, uploaded = await self._store(store)
        data, ref = write_page_manifest(rows, nonce=self._clock.token(NONCE_BYTES))
        await create_named(store, keys.manifest(ref.digest), data)
        return rows, ref, uploaded

    def _reused(self) -> list[PageRow] | None:
        rows = []
        for (path, number), taken in sorted(self._taken.items(), key=_place):
            extent = self._previous.get((path, number))
            if extent is None or extent.digest != taken.digest or extent.raw_bytes != taken.raw_bytes:
                return None
            rows.append(PageRow(path, number, extent))
        return rows

    async def _store(self, store: Store) -> tuple[list[PageRow], int]:
        builder = PackBuilder(self._store_id, EXTENTS, nonce=self._clock.token(NONCE_BYTES))
        # Databases made from one template share most of their catalogs' bytes.
        offsets: dict[bytes, int] = {}
        for _, taken in sorted(self._taken.items(), key=_place):
            if taken.digest not in offsets:
                offsets[taken.digest] = builder.add(taken.stored)
        pack, data = builder.finish()
        await create_named(store, keys.pack(pack), data)
        rows = []
        for (path, number), taken in sorted(self._taken.items(), key=_place):
            extent = ExtentRef(
                0, taken.raw_bytes, pack, offsets[taken.digest], len(taken.stored), taken.digest
            )
            rows.append(PageRow(path, number, extent))
        return rows, len(data)


def _place(item: tuple[tuple[str, int], _Taken]) -> tuple[str, int]:
    return item[0]
