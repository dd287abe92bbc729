"""What the store already holds for a (path, group): lookups in page manifests of any size with bounded
memory.

The source sends files in the order of its directories, but all groups of a file one after the other, and a
row group covers a 1 GiB segment or some thousand small files of one directory: so a few row groups at hand
answer nearly all lookups. Memory: CACHED_ROW_GROUPS decoded row groups (about 0.6 MB each) and the footers
(about 0.2 KB for each 1 GiB).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor

from timeline.archive.page_runs import open_manifest, read_row_group
from timeline.format.extent import ExtentRef
from timeline.format.manifest import ManifestRef
from timeline.format.page_manifest import Footer, PageRowGroup
from timeline.store.base import Store

CACHED_ROW_GROUPS = 48


class KnownPages:
    """A chain of page manifests, oldest first, later ones overriding earlier ones block by block."""

    def __init__(self, store: Store, threads: Executor, footers: Sequence[Footer]) -> None:
        self._store = store
        self._threads = threads
        self._footers = footers
        self._cache: OrderedDict[tuple[int, int], PageRowGroup] = OrderedDict()

    async def visible(self, path: str, group: int) -> tuple[tuple[ExtentRef, ...], bool]:
        """As ``visible_extents``, for all the chain holds of that group."""
        layers = []
        for number, footer in enumerate(self._footers):
            at = footer.find(path, group)
            if at is not None:
                layers.append((await self._row_group(number, at)).lookup(path, group))
        return visible_extents(layers)

    async def _row_group(self, manifest: int, number: int) -> PageRowGroup:
        key = (manifest, number)
        found = self._cache.get(key)
        if found is None:
            found = await read_row_group(self._store, self._threads, self._footers[manifest], number)
            self._cache[key] = found
            if len(self._cache) > CACHED_ROW_GROUPS:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(key)
        return found


async def open_known(store: Store, threads: Executor, refs: Sequence[ManifestRef]) -> KnownPages:
    """Ready for lookups in these manifests, oldest first."""
    return KnownPages(store, threads, [await open_manifest(store, ref) for ref in refs])


def visible_extents(layers: Sequence[Sequence[ExtentRef]]) -> tuple[tuple[ExtentRef, ...], bool]:
    """The extents of a group of which something shows, by first block, and whether some of them hide a part
    of another.

    ``layers``: the group's extents in each manifest of a chain, oldest first.
    """
    covered = 0
    overlapped = False
    shown: list[ExtentRef] = []
    for layer in reversed(layers):
        below = covered
        for extent in layer:
            blocks = ((1 << extent.blocks) - 1) << extent.first_block
            if blocks & ~below:
                overlapped = overlapped or bool(blocks & below)
                shown.append(extent)
                covered |= blocks
    return tuple(sorted(shown, key=lambda extent: extent.first_block)), overlapped
