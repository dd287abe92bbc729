"""Which extents hold a block group of a snapshot: its page manifests, newest over oldest, block by block.

Only footers and the row groups that are asked for are read, each verified against the digest that names it
(P5) and kept in the host's disk cache under that digest. Bounds: ROWS_BYTES of decoded row groups and
MAX_ANSWERS answers in memory.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from restore.fetcher import Fetcher
from timeline.format import keys
from timeline.format.extent import GROUP_BLOCKS, ExtentRef
from timeline.format.manifest import ManifestRef
from timeline.format.page_manifest import Footer, PageRowGroup, open_footer
from timeline.lsn import Lsn

ROWS_BYTES = 24 << 20
MAX_ANSWERS = 4096
ROW_GROUPS_AT_ONCE = 32
"""Read together for many groups; half of ROWS_BYTES when all are full."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of blocks of one group that one extent gives."""

    first_block: int
    blocks: int
    ref: ExtentRef


@dataclass(frozen=True, slots=True)
class GroupWanted:
    """A group of a file of the snapshot, of which some blocks are wanted."""

    path: str
    group: int
    blocks: int
    """How many blocks of the group lie inside the file."""
    born: Lsn
    first: int
    """The wanted ones, as blocks of the group."""
    end: int


class PageIndex:
    """Look-ups in the page manifests of one snapshot."""

    def __init__(self, manifests: tuple[ManifestRef, ...], fetcher: Fetcher) -> None:
        self._manifests = manifests
        self._fetcher = fetcher
        self._footers: tuple[Footer, ...] | None = None
        self._opening: asyncio.Task[tuple[Footer, ...]] | None = None
        self._rows: OrderedDict[tuple[int, int], PageRowGroup] = OrderedDict()
        self._rows_bytes = 0
        self._loading: dict[tuple[int, int], asyncio.Task[PageRowGroup]] = {}
        self._answers: OrderedDict[tuple[str, int], tuple[Piece, ...]] = OrderedDict()

    async def open(self) -> None:
        """Read all footers, at once; harmless twice. Raises Unavailable, NotFound, DamagedStore."""
        if self._footers is not None:
            return
        if self._opening is None or self._opening.done():
            self._opening = asyncio.get_running_loop().create_task(self._read_footers())
        self._footers = await asyncio.shield(self._opening)

    def pieces_now(self, path: str, group: int, blocks: int, born: Lsn) -> tuple[Piece, ...] | None:
        """The pieces of the group's first ``blocks`` blocks, ascending; ``None``: reading must come first.

        Blocks that no piece covers are zeros. Manifests of before ``born`` are left out.
        """
        known = self._answers.get((path, group))
        if known is not None:
            self._answers.move_to_end((path, group))
            return known
        if self._footers is None:
            return None
        answer = self._resolve(self._footers, path, group, blocks, born)
        return answer if isinstance(answer, tuple) else None

    async def pieces_of_many(
        self, wanted: Iterable[GroupWanted]
    ) -> AsyncIterator[tuple[GroupWanted, tuple[Piece, ...]]]:
        """The pieces of many groups, in the order of files; what has to be read for them is read at once, as far as it stays
        in memory together. Raises as ``pieces``."""
        await self.open()
        footers = self._footers
        if footers is None:
            raise RuntimeError("the index was not opened")
        part: list[GroupWanted] = []
        places: set[_Missing] = set()
        for want in sorted(wanted, key=lambda one: (one.path, one.group)):
            # Of every manifest, whether or not a newer one will turn out to tell all: one wait for the store instead of many.
            of_want = set(self._places(footers, want))
            if part and len(places | of_want) > ROW_GROUPS_AT_ONCE:
                async for found in self._resolve_loaded(footers, part, places):
                    yield found
                part, places = [], set(self._places(footers, want))
            part.append(want)
            places |= of_want
        async for found in self._resolve_loaded(footers, part, places):
            yield found

    async def pieces(self, path: str, group: int, blocks: int, born: Lsn) -> tuple[Piece, ...]:
        """The same, after reading what is needed; raises Unavailable, NotFound, DamagedStore."""
        await self.open()
        while True:
            footers = self._footers
            if footers is None:
                raise RuntimeError("the index was not opened")
            known = self._answers.get((path, group))
            answer = known if known is not None else self._resolve(footers, path, group, blocks, born)
            if isinstance(answer, tuple):
                return answer
            # Kept from eviction by being asked for again at once; a row group is larger than none of the
            # bounds.
            if self._fetcher.is_near:
                await self._load(footers, answer.manifest, answer.row_group)
                continue
            # Of every manifest at once, though a newer one may turn out to tell all: one wait for the store instead of
            # several. Those that are not needed may fail.
            for place in self._places(footers, GroupWanted(path, group, blocks, born, 0, blocks)):
                self._begin_load(footers, place.manifest, place.row_group)
            await self._load(footers, answer.manifest, answer.row_group)

    def _resolve(
        self, footers: tuple[Footer, ...], path: str, group: int, blocks: int, born: Lsn
    ) -> tuple[Piece, ...] | _Missing:
        owners: list[ExtentRef | None] = [None] * GROUP_BLOCKS
        left = blocks
        for number in range(len(footers) - 1, -1, -1):
            lsn = self._manifests[number].lsn
            if lsn is not None and lsn < born:
                continue
            row_group = footers[number].find(path, group)
            if row_group is None:
                continue
            rows = self._rows.get((number, row_group))
            if rows is None:
                return _Missing(number, row_group)
            self._rows.move_to_end((number, row_group))
            for ref in rows.lookup(path, group):
                for block in range(ref.first_block, min(ref.first_block + ref.blocks, blocks)):
                    if owners[block] is None:
                        owners[block] = ref
                        left -= 1
            if left <= 0:
                break
        answer = runs_of(owners)
        self._answers[(path, group)] = answer
        if len(self._answers) > MAX_ANSWERS:
            self._answers.popitem(last=False)
        return answer

    async def _resolve_loaded(
        self, footers: tuple[Footer, ...], wanted: list[GroupWanted], places: set[_Missing]
    ) -> AsyncIterator[tuple[GroupWanted, tuple[Piece, ...]]]:
        await asyncio.gather(*(self._load(footers, each.manifest, each.row_group) for each in places))
        for want in wanted:
            known = self._answers.get((want.path, want.group))
            if known is None:
                answer = self._resolve(footers, want.path, want.group, want.blocks, want.born)
                # Evicted already, by others that were asked for meanwhile: left out.
                known = answer if isinstance(answer, tuple) else None
            if known is not None:
                yield want, known

    def _places(self, footers: tuple[Footer, ...], want: GroupWanted) -> Iterator[_Missing]:
        for number, footer in enumerate(footers):
            lsn = self._manifests[number].lsn
            if lsn is not None and lsn < want.born:
                continue
            row_group = footer.find(want.path, want.group)
            if row_group is not None and (number, row_group) not in self._rows:
                yield _Missing(number, row_group)

    async def _load(self, footers: tuple[Footer, ...], manifest: int, row_group: int) -> None:
        rows = await asyncio.shield(self._begin_load(footers, manifest, row_group))
        # Evicted already, perhaps, by others that came meanwhile.
        self._keep((manifest, row_group), rows)

    def _begin_load(
        self, footers: tuple[Footer, ...], manifest: int, row_group: int
    ) -> asyncio.Task[PageRowGroup]:
        place = (manifest, row_group)
        task = self._loading.get(place)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._read_rows(footers[manifest], row_group))
            self._loading[place] = task
            task.add_done_callback(lambda done: self._loaded(place, done))
        return task

    def _loaded(self, place: tuple[int, int], done: asyncio.Task[PageRowGroup]) -> None:
        self._loading.pop(place, None)
        # A failure is told to whoever waits; perhaps nobody does.
        if not done.cancelled() and done.exception() is None:
            self._keep(place, done.result())

    def _keep(self, place: tuple[int, int], rows: PageRowGroup) -> None:
        if place not in self._rows:
            self._rows[place] = rows
            self._rows_bytes += rows.nbytes
        self._rows.move_to_end(place)
        while self._rows_bytes > ROWS_BYTES and len(self._rows) > len(self._manifests):
            _, oldest = self._rows.popitem(last=False)
            self._rows_bytes -= oldest.nbytes

    async def _read_rows(self, footer: Footer, row_group: int) -> PageRowGroup:
        entry = footer.entries[row_group]
        data = await self._fetcher.read_part(
            keys.manifest(footer.ref.digest), entry.offset, entry.length, bytes.fromhex(entry.digest)
        )
        return await self._fetcher.in_thread(lambda: footer.decode(row_group, data))

    async def _read_footers(self) -> tuple[Footer, ...]:
        return tuple(await asyncio.gather(*(self._read_footer(ref) for ref in self._manifests)))

    async def _read_footer(self, ref: ManifestRef) -> Footer:
        start = ref.size - ref.footer_bytes
        digest = bytes.fromhex(ref.footer_digest)
        data = await self._fetcher.read_part(keys.manifest(ref.digest), start, ref.footer_bytes, digest)
        return await self._fetcher.in_thread(lambda: open_footer(ref, data))


@dataclass(frozen=True, slots=True)
class _Missing:
    manifest: int
    row_group: int


def runs_of(owners: Sequence[ExtentRef | None]) -> tuple[Piece, ...]:
    """The pieces of a group by the extent that gives each of its blocks."""
    pieces = []
    start = 0
    for block in range(1, len(owners) + 1):
        if block < len(owners) and owners[block] is owners[start]:
            continue
        owner = owners[start]
        if owner is not None:
            pieces.append(Piece(start, block - start, owner))
        start = block
    return tuple(pieces)
