"""What a snapshot holds, read lazily: file contents by range, out of verified extents.

The snapshot's page index says which extents hold a group, the fetcher brings them. An object that is missing
is a reason to ask once for the snapshot anew (collection may have rewritten packs since the plan was made);
missing again, it is damage (MissingObject). Nothing here depends on FUSE or on the overlay.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

from restore.fetcher import Fetcher
from restore.mount_control import BlockRange
from restore.page_index import GroupWanted, PageIndex, Piece
from timeline.errors import MissingObject, NotFound, TimelineError
from timeline.format import keys
from timeline.format.branch_state import Snapshot
from timeline.format.extent import BLOCK_BYTES, GROUP_BLOCKS, GROUP_BYTES, ExtentRef
from timeline.format.file_listing import FileListing, read_file_listing
from timeline.format.manifest import FileRow, ManifestRef
from timeline.format.page_manifest import read_page_rows
from timeline.lsn import Lsn

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

BOOT_GAP_BYTES = 512 << 10
BOOT_RUN_BYTES = 4 << 20
MAX_BOOT_EXTENTS = 2048
"""256 MiB: a boot set that claims more is cut, for it is only a help."""

Reload = Callable[[], Awaitable[Snapshot | None]]
"""Asks the branch log for the same snapshot again; ``None``: it is not there any more."""


class ExtentSource:
    """The contents of one snapshot's files."""

    def __init__(self, snapshot: Snapshot, fetcher: Fetcher, *, reload: Reload | None = None) -> None:
        self.snapshot = snapshot
        self.fetcher = fetcher
        self._reload = reload
        self._reloading: asyncio.Task[None] | None = None
        self._indexing: asyncio.Task[None] | None = None
        self.index = PageIndex(snapshot.pages, fetcher)

    async def listing(self) -> FileListing:
        """All files of the snapshot; raises Unavailable, DamagedStore, MissingObject."""
        ref = self.snapshot.files
        data = await self._read_manifest(ref)
        return await self.fetcher.in_thread(lambda: read_file_listing(data, ref))

    def content(self, row: FileRow) -> SourceFile:
        """The content of one of its files."""
        return SourceFile(self, row.path, row.size, row.content, row.born)

    async def open_index(self) -> None:
        """Read the footers of the page manifests."""
        await self.index.open()

    async def fetch_boot_set(self) -> int:
        """Bring the extents of the boot set into memory and cache, in few large requests; how many it has."""
        if self.snapshot.boot is None:
            return 0
        ref = self.snapshot.boot
        data = await self._read_manifest(ref)
        refs = await self.fetcher.in_thread(lambda: [row.extent for row in read_page_rows(data, ref)])
        refs = refs[:MAX_BOOT_EXTENTS]
        await self.fetcher.fetch_all(refs, max_gap_bytes=BOOT_GAP_BYTES, max_run_bytes=BOOT_RUN_BYTES)
        return len(refs)

    def index_ahead(self, path: str, group: int, blocks: int, born: Lsn) -> None:
        """Begin to read the part of the page index that knows this group; at most one such read at a time."""
        if self._indexing is not None and not self._indexing.done():
            return

        async def read() -> None:
            try:
                await self.index.pieces(path, group, blocks, born)
            except TimelineError as error:
                _log.info("read-ahead: %s", error.message)

        self._indexing = asyncio.get_running_loop().create_task(read())

    async def fetch_ahead(self, wanted: Sequence[tuple[FileRow, BlockRange]]) -> None:
        """Begin to bring blocks near that a replay will want (restore/frames_ahead.py); returns when it is known which extents
        those are. Raises Unavailable, DamagedStore, MissingObject."""
        groups = [group for row, blocks in wanted for group in _groups_wanted(row, blocks)]

        rank = {(group.path, group.group): number for number, group in reversed(list(enumerate(groups)))}

        async def attempt() -> None:
            refs: list[tuple[int, ExtentRef]] = []
            try:
                async for want, pieces in self.index.pieces_of_many(groups):
                    refs += [
                        (rank[want.path, want.group], piece.ref)
                        for piece in pieces
                        if piece.first_block < want.end and want.first < piece.first_block + piece.blocks
                    ]
            finally:
                # Also what was found in time when the rest was not.
                refs.sort(key=lambda one: one[0])
                self.fetcher.fetch_ahead([ref for _, ref in refs])

        await self.with_reload(attempt)

    async def with_reload(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """What ``attempt`` gives; when an object is missing, once more with the snapshot read anew."""
        try:
            return await attempt()
        except NotFound as error:
            if self._reload is None:
                raise MissingObject(error.key) from error
            _log.warning("%s; reading the branch log again", error.message)
            await self._renew()
        try:
            return await attempt()
        except NotFound as error:
            raise MissingObject(error.key) from error

    async def _renew(self) -> None:
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.get_running_loop().create_task(self._read_snapshot())
        await asyncio.shield(self._reloading)

    async def _read_snapshot(self) -> None:
        if self._reload is None:
            return
        snapshot = await self._reload()
        if snapshot is not None and snapshot.pages != self.snapshot.pages:
            self.index = PageIndex(snapshot.pages, self.fetcher)
            self.snapshot = snapshot

    async def _read_manifest(self, ref: ManifestRef) -> bytes:
        digest = bytes.fromhex(ref.digest)

        async def attempt() -> bytes:
            return await self.fetcher.read_part(keys.manifest(ref.digest), 0, ref.size, digest)

        return await self.with_reload(attempt)


class SourceFile:
    """The content of one file of a snapshot; immutable."""

    __slots__ = ("_born", "_content", "_path", "_size", "_source")

    def __init__(self, source: ExtentSource, path: str, size: int, content: bytes | None, born: Lsn) -> None:
        self._source = source
        self._path = path
        self._size = size
        self._content = content
        self._born = born

    def read_now(self, offset: int, length: int) -> bytes | None:
        """Exactly that range, if memory or the page cache holds it; ``None``: it must be waited for."""
        if self._content is not None:
            return self._content[offset : offset + length].ljust(length, b"\0")
        group, end = offset // GROUP_BYTES, offset + length
        if end <= (group + 1) * GROUP_BYTES:
            return self._part_now(group, offset, end)
        parts = []
        for group, start, stop in _groups(offset, end):
            part = self._part_now(group, start, stop)
            if part is None:
                return None
            parts.append(part)
        return b"".join(parts)

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly that range; raises Unavailable, DamagedStore, MissingObject."""
        if self._content is not None:
            return self._content[offset : offset + length].ljust(length, b"\0")
        spans = list(_groups(offset, offset + length))
        if len(spans) == 1:
            return await self._part(*spans[0])
        return b"".join(await asyncio.gather(*(self._part(*span) for span in spans)))

    def read_ahead(self, groups: range) -> int:
        """Begin to fetch these groups; the first one that was not taken on, for the time being."""
        source = self._source
        if self._content is not None:
            return groups.stop
        refs: list[ExtentRef] = []
        ends: list[tuple[int, int]] = []
        for group in groups:
            blocks = self._blocks(group)
            if blocks <= 0:
                break
            pieces = source.index.pieces_now(self._path, group, blocks, self._born)
            if pieces is None:
                source.index_ahead(self._path, group, blocks, self._born)
                break
            refs += [piece.ref for piece in pieces]
            ends.append((group, len(refs)))
        taken = source.fetcher.prefetch(refs)
        whole = [group for group, end in ends if end <= taken]
        return whole[-1] + 1 if whole else groups.start

    def _blocks(self, group: int) -> int:
        """How many blocks of the group lie inside the file."""
        return min(GROUP_BLOCKS, -(-(self._size - group * GROUP_BYTES) // BLOCK_BYTES))

    def _part_now(self, group: int, start: int, stop: int) -> bytes | None:
        source = self._source
        pieces = source.index.pieces_now(self._path, group, self._blocks(group), self._born)
        if pieces is None:
            return None
        fetcher = source.fetcher
        wanted = _inside(pieces, group, start, stop)
        parts, missing = [], []
        for place in wanted:
            piece, at, first, last = place
            part = fetcher.peek(piece.ref, first - at, last - at)
            if part is not None:
                parts.append((first, part))
            else:
                missing.append(place)
        if missing:
            raws = fetcher.read_near([piece.ref for piece, *_ in missing])
            if raws is None:
                return None
            for (_, at, first, last), raw in zip(missing, raws, strict=True):
                parts.append((first, raw[first - at : last - at]))
        return _joined(parts, start, stop)

    async def _part(self, group: int, start: int, stop: int) -> bytes:
        now = self._part_now(group, start, stop)
        if now is not None:
            return now

        async def attempt() -> bytes:
            pieces = await self._source.index.pieces(self._path, group, self._blocks(group), self._born)
            wanted = _inside(pieces, group, start, stop)
            raws = await asyncio.gather(*(self._source.fetcher.fetch(piece.ref) for piece, *_ in wanted))
            parts = [
                (first, raw[first - at : last - at])
                for (_, at, first, last), raw in zip(wanted, raws, strict=True)
            ]
            return _joined(parts, start, stop)

        return await self._source.with_reload(attempt)


def _groups_wanted(row: FileRow, wanted: BlockRange) -> Iterator[GroupWanted]:
    last = min(wanted.first_block + wanted.blocks, -(-row.size // BLOCK_BYTES))
    for group in range(wanted.first_block // GROUP_BLOCKS, -(-last // GROUP_BLOCKS)):
        origin = group * GROUP_BLOCKS
        yield GroupWanted(
            path=row.path,
            group=group,
            blocks=min(GROUP_BLOCKS, -(-(row.size - group * GROUP_BYTES) // BLOCK_BYTES)),
            born=row.born,
            first=max(wanted.first_block - origin, 0),
            end=min(last - origin, GROUP_BLOCKS),
        )


def _groups(offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(group, start, stop) of the parts of [offset, end), by group."""
    while offset < end:
        group = offset // GROUP_BYTES
        stop = min(end, (group + 1) * GROUP_BYTES)
        yield group, offset, stop
        offset = stop


def _inside(
    pieces: tuple[Piece, ...], group: int, start: int, stop: int
) -> list[tuple[Piece, int, int, int]]:
    """What of [start, stop) of the file the pieces give: (piece, where its extent begins, first, last)."""
    origin = group * GROUP_BYTES
    found = []
    for piece in pieces:
        first = max(start, origin + piece.first_block * BLOCK_BYTES)
        last = min(stop, origin + (piece.first_block + piece.blocks) * BLOCK_BYTES)
        if first < last:
            found.append((piece, origin + piece.ref.first_block * BLOCK_BYTES, first, last))
    return found


def _joined(parts: list[tuple[int, bytes]], start: int, stop: int) -> bytes:
    """[start, stop) out of its parts; what none of them holds is zeros."""
    if len(parts) == 1 and parts[0][0] == start and len(parts[0][1]) == stop - start:
        return parts[0][1]
    whole = bytearray(stop - start)
    for first, part in parts:
        whole[first - start : first - start + len(part)] = part
    return bytes(whole)
