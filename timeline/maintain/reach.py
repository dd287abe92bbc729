"""What keeps objects alive: the manifests that a state, a change or a pin names, and the packs that those name
(SPEC.md, [COL-3]).

Memory: at most READ_BYTES of manifests are on their way in at once, which an HTTP client may hold twice, and the
pack column of one row group for each; beside that about 0.2 KB for each pack, 6 MB for a TiB. A whole manifest is
read although one column is decoded: its digests cover no less.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass

from timeline.catalog.parallel import in_order
from timeline.errors import NotFound
from timeline.format import keys
from timeline.format.branch_state import BackupProgress, SealedRange, Snapshot
from timeline.format.manifest import ManifestRef
from timeline.store.base import Store

READ_BYTES = 48 << 20
"""Manifests read at once, unless a single one is longer (at most 64 MiB)."""
_READS = 16

FILES = "files"
PAGES = "pages"
WAL = "wal"


@dataclass(frozen=True, slots=True)
class Named:
    """A manifest that something names."""

    kind: str
    """FILES, PAGES or WAL."""
    ref: ManifestRef

    @property
    def key(self) -> str:
        """Its object."""
        return keys.manifest(self.ref.digest)


@dataclass(frozen=True, slots=True)
class Reach:
    """Objects that must stay."""

    manifests: frozenset[str]
    """Digests."""
    packs: frozenset[str]
    """Ids."""

    def holds(self, key: str) -> bool:
        """Whether that key is one of them."""
        return keys.parse_pack(key) in self.packs or keys.parse_manifest(key) in self.manifests

    def __or__(self, other: Reach) -> Reach:
        return Reach(self.manifests | other.manifests, self.packs | other.packs)


def named_in(value: object) -> Iterator[Named]:
    """Every manifest in a value of the log, however deep: a state, a change of whatever kind, a pin.

    Found by their holders and not by the kind of change, so that a new kind cannot be forgotten here. Raises
    TypeError for a manifest in a place of which it is not known what it is.
    """
    if isinstance(value, SealedRange):
        yield Named(WAL, value.manifest)
    elif isinstance(value, Snapshot):
        yield Named(FILES, value.files)
        for ref in (*value.pages, *(() if value.boot is None else (value.boot,))):
            yield Named(PAGES, ref)
    elif isinstance(value, BackupProgress):
        for ref in value.manifests:
            yield Named(PAGES, ref)
    elif isinstance(value, ManifestRef):
        raise TypeError(f"a manifest of an unknown kind is named: {value.digest}")
    elif isinstance(value, tuple):
        for item in value:
            yield from named_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from named_in(getattr(value, field.name))


async def reach_of(store: Store, named: Iterable[Named], *, missing_ok: bool = False) -> Reach:
    """All that these manifests keep alive, themselves included.

    ``missing_ok``: a manifest that is gone keeps nothing; else raises NotFound for it. Raises DamagedStore,
    UnknownFeature.
    """
    distinct = {one.ref.digest: one for one in named}
    packs: set[str] = set()
    reads = in_order(
        [one for one in distinct.values() if one.kind != FILES],
        lambda one: _packs_of(store, one, missing_ok),
        limit=_READS,
        cost=lambda one: one.ref.size,
        budget=READ_BYTES,
    )
    async with aclosing(reads) as results:
        async for found in results:
            packs |= found
    return Reach(frozenset(distinct), frozenset(packs))


async def _packs_of(store: Store, named: Named, missing_ok: bool) -> frozenset[str]:
    # Parquet takes a quarter of a second to import.
    from timeline.format.pack_column import packs_named

    try:
        data = await store.get(named.key)
    except NotFound:
        if missing_ok:
            return frozenset()
        raise
    return await asyncio.to_thread(packs_named, named.kind, named.ref, data)
