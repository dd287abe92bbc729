"""What lies in a damaged place of the store: which blocks of which files, which WAL.

For the evidence of a drill, once the damage is known. Bounds: MAX_PLACES named, SCANNED_BYTES of manifests
read, one row group of them in memory at a time.
"""

from __future__ import annotations

import asyncio

from timeline.catalog.history import History
from timeline.catalog.tail import TailChunk
from timeline.catalog.target import Target
from timeline.errors import DamagedStore, MissingObject
from timeline.format import keys
from timeline.format.branch_state import Snapshot
from timeline.format.evidence import Damage
from timeline.format.extent import GROUP_BLOCKS
from timeline.format.manifest import ManifestRef, PageRow
from timeline.format.page_manifest import Footer, PageRowGroup, open_footer
from timeline.store.base import Store

MAX_PLACES = 8
SCANNED_BYTES = 512 << 20


async def describe_damage(error: DamagedStore, history: History, target: Target) -> Damage:
    """The damage with its range and what it holds, as far as the target's snapshot and WAL tell.

    Raises what reading a store raises, for instance where the manifests are damaged too.
    """
    length, holds = None, list[str]()
    for piece in await history.plan_wal(target.spans):
        # A chunk is damaged as a whole: its digests are of all its frames.
        whole = isinstance(error, MissingObject) or isinstance(piece.source, TailChunk)
        if piece.key == error.key and (whole or getattr(piece.source, "offset", None) == error.offset):
            holds.append(f"WAL of tli {piece.tli} from {piece.start} to {piece.end}")
            length = piece.stored_bytes
    if not holds and error.key.startswith("packs/"):
        rows = await _rows_at(history.store, target.snapshot, error)
        holds += [_place(row) for row in rows[:MAX_PLACES]]
        if not isinstance(error, MissingObject) and rows:
            length = rows[0].extent.stored_bytes
    if isinstance(error, MissingObject):
        length = None
    return Damage(error.key, error.offset, length, error.expectation, tuple(holds[:MAX_PLACES]))


def undescribed(error: DamagedStore) -> Damage:
    """The damage as it was met."""
    return Damage(error.key, error.offset, None, error.expectation)


def _place(row: PageRow) -> str:
    first = row.group * GROUP_BLOCKS + row.extent.first_block
    return f"{row.path}, blocks {first} to {first + row.extent.blocks - 1}"


async def _rows_at(store: Store, snapshot: Snapshot, error: DamagedStore) -> list[PageRow]:
    """Rows of the snapshot whose extents lie there, newest manifest first."""
    pack = error.key.rpartition("/")[2]
    offset = None if isinstance(error, MissingObject) else error.offset
    rows: list[PageRow] = []
    left = SCANNED_BYTES
    for ref in reversed(snapshot.pages):
        footer = await _footer(store, ref)
        for number, entry in enumerate(footer.entries):
            left -= entry.length
            if left < 0 or len(rows) >= MAX_PLACES:
                return rows
            data = await store.get(keys.manifest(ref.digest), entry.offset, entry.length)
            group: PageRowGroup = await asyncio.to_thread(footer.decode, number, data)
            rows += group.holding(pack, offset)
    return rows


async def _footer(store: Store, ref: ManifestRef) -> Footer:
    data = await store.get(keys.manifest(ref.digest), ref.size - ref.footer_bytes, ref.footer_bytes)
    return open_footer(ref, data)
