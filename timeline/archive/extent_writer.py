"""From groups of file bytes to extents in packs: hashing and compression in threads, uploads while it goes
on.

Order is kept: groups land in packs in the order they are put, so a file's extents lie side by side. A group
that is already in the store under its (path, group), or was met a moment ago in this backup, is not stored
again.

Memory: the pack under construction, its copy while it is closed, and MAX_UPLOADS packs on their way; MAX_JOBS
batches of about BATCH_BYTES; the rows of the open pack and of packs not yet uploaded (at most ROWS_PER_PACK
each, about 0.4 KB a row); RECENT_DIGESTS digests. Failure of an upload surfaces at the next call that waits
for one; cancelling cancels the uploads, and what was uploaded without being named by a log entry is litter
for the collector.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from timeline.archive.backup_compare import explained_by_lsn
from timeline.clock import Clock
from timeline.errors import DamagedStore
from timeline.format import keys
from timeline.format.digest import digest_of
from timeline.format.extent import BLOCK_BYTES, ExtentRef, encode_extent
from timeline.format.manifest import PageRow
from timeline.format.pack import EXTENTS, NONCE_BYTES, PackBuilder
from timeline.lsn import Lsn
from timeline.store.base import Store

MAX_UPLOADS = 2
"""Packs on their way to the store at once."""
MAX_JOBS = 4
"""Batches in the threads or waiting for one."""
BATCH_BYTES = 1 << 20
"""Raw bytes of a batch: small enough to keep all threads busy, large enough to make hand-overs cheap."""
ROWS_PER_PACK = 16_384
"""A pack of many tiny extents is closed at this many, which bounds the rows that wait for its name."""
RECENT_DIGESTS = 4096
"""Extents of this backup remembered by digest: databases made from one template lie close together in the
stream."""


@dataclass(frozen=True, slots=True)
class KnownGroup:
    """What the store already holds for one (path, group): extents by first block, without overlaps."""

    uploaded: tuple[ExtentRef, ...] = ()
    """By an interrupted try of this backup."""
    snapshot: tuple[ExtentRef, ...] = ()
    """In the newest snapshot."""
    in_snapshot: bool = False
    """Whether the snapshot has the group, and in a form that can be compared by digests."""


UNKNOWN = KnownGroup()


@dataclass(frozen=True, slots=True)
class Group:
    """One group of a file, or a run of its blocks, as read from the source."""

    path: str
    number: int
    raw: bytes
    known: KnownGroup
    since: Lsn | None
    """Position of the snapshot to compare with."""
    boot_database: int | None
    """Candidate for the boot set, on the budget of that database: compressed even when the store has it."""
    first_block: int = 0
    """Number of the block inside the group where ``raw`` begins."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A group after hashing, and compression where it was needed."""

    group: Group
    digest: bytes
    stored: bytes | None
    reuse: tuple[ExtentRef, ...]
    """Extents of the store that hold exactly these bytes; empty when there are none."""
    resumed: bool
    """``reuse`` is from an interrupted try."""
    equal: bool | None
    """Equal to the snapshot; ``None`` when there is nothing to compare with."""
    explained: bool
    """Not equal to the snapshot, and a page's LSN says why."""


def encode_group(group: Group) -> Encoded:
    """Hash, compare, compress when needed; pure, made for threads."""
    raw, known = group.raw, group.known
    digest = digest_of(raw)
    equal = _holds(known.snapshot, raw, digest) if known.in_snapshot else None
    reuse: tuple[ExtentRef, ...] = ()
    resumed = False
    if equal:
        reuse = known.snapshot
    elif known.uploaded and _holds(known.uploaded, raw, digest):
        reuse, resumed = known.uploaded, True
    stored = None if reuse and group.boot_database is None else encode_extent(raw)[0]
    explained = not equal and group.since is not None and explained_by_lsn(group.path, raw, group.since)
    return Encoded(group, digest, stored, reuse, resumed, equal, explained)


def _holds(extents: Sequence[ExtentRef], raw: bytes, digest: bytes) -> bool:
    if len(extents) == 1:
        return (
            extents[0].first_block == 0 and extents[0].raw_bytes == len(raw) and extents[0].digest == digest
        )
    view = memoryview(raw)
    at = 0
    for extent in extents:
        end = at + extent.raw_bytes
        if (
            extent.first_block * BLOCK_BYTES != at
            or end > len(raw)
            or digest_of(view[at:end]) != extent.digest
        ):
            return False
        at = end
    return at == len(raw)


class ExtentWriter:
    """Takes groups one after the other; gives rows whose packs are durable."""

    def __init__(
        self,
        store: Store,
        store_id: str,
        threads: Executor,
        clock: Clock,
        *,
        pack_bytes: int,
        divert: Callable[[Encoded], bool],
        finished: Callable[[Encoded], None],
    ) -> None:
        """``divert``: whether it takes the group over (boot set); ``finished``: told about every group, in
        order."""
        self._store = store
        self._store_id = store_id
        self._threads = threads
        self._clock = clock
        self._pack_bytes = pack_bytes
        self._divert = divert
        self._finished = finished
        self._batch: list[Group] = []
        self._batch_bytes = 0
        self._jobs: deque[asyncio.Future[list[Encoded]]] = deque()
        self._builder = self._new_pack()
        self._open: list[tuple[str, int, int, int, int, int, bytes]] = []
        self._uploads: deque[tuple[asyncio.Task[None], list[PageRow]]] = deque()
        self._recent: OrderedDict[bytes, ExtentRef | int] = OrderedDict()
        self._rows: list[PageRow] = []
        self.packs = 0
        """Packs uploaded."""
        self.uploaded_bytes = 0
        """Their bytes."""
        self.pack_boundary = False
        """Set when a pack was closed since the last ``take_rows``."""

    @property
    def rows(self) -> int:
        """How many rows wait for ``take_rows``, open packs not counted."""
        return len(self._rows) + sum(len(rows) for _, rows in self._uploads)

    async def put(self, group: Group) -> None:
        """Add a group. Waits while MAX_JOBS batches are under way or a pack cannot be uploaded yet."""
        self._batch.append(group)
        self._batch_bytes += len(group.raw)
        if self._batch_bytes >= BATCH_BYTES:
            await self._submit()

    async def take_rows(self) -> list[PageRow]:
        """All rows whose packs are closed, after waiting until those packs are durable."""
        while self._uploads:
            await self._uploaded()
        rows, self._rows = self._rows, []
        self.pack_boundary = False
        return rows

    async def finish(self) -> list[PageRow]:
        """Upload what is left; the last rows."""
        await self._submit()
        while self._jobs:
            await self._collect()
        if self._open:
            await self._close_pack()
        return await self.take_rows()

    def forget_stored(self) -> None:
        """Do not refer to packs uploaded so far for equal groups still to come; what known groups name is another
        matter."""
        for digest in [digest for digest, place in self._recent.items() if isinstance(place, ExtentRef)]:
            del self._recent[digest]

    async def abort(self) -> None:
        """Stop all uploads and wait until they have stopped."""
        for job in self._jobs:
            job.cancel()
        for task, _ in self._uploads:
            task.cancel()
        for task, _ in self._uploads:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        self._uploads.clear()

    async def _submit(self) -> None:
        if self._batch:
            batch, self._batch, self._batch_bytes = self._batch, [], 0
            loop = asyncio.get_running_loop()
            self._jobs.append(loop.run_in_executor(self._threads, _encode_groups, batch))
        while len(self._jobs) > MAX_JOBS or (self._jobs and self._jobs[0].done()):
            await self._collect()

    async def _collect(self) -> None:
        for encoded in await self._jobs.popleft():
            self._finished(encoded)
            if self._divert(encoded):
                continue
            group = encoded.group
            if encoded.reuse:
                self._rows += [PageRow(group.path, group.number, extent) for extent in encoded.reuse]
            elif not self._store_again(encoded):
                await self._add(encoded)

    def _store_again(self, encoded: Encoded) -> bool:
        """Whether the very same bytes were stored a moment ago; then this row refers to them."""
        recent = self._recent.get(encoded.digest)
        if recent is None:
            return False
        self._recent.move_to_end(encoded.digest)
        group = encoded.group
        if isinstance(recent, ExtentRef):
            extent = replace(recent, first_block=group.first_block)
            self._rows.append(PageRow(group.path, group.number, extent))
        else:
            self._open.append((group.path, group.number, group.first_block, *self._open[recent][3:]))
        return True

    async def _add(self, encoded: Encoded) -> None:
        if encoded.stored is None:
            raise ValueError("a group that is to be stored was not compressed")
        offset = self._builder.add(encoded.stored)
        group = encoded.group
        self._recent[encoded.digest] = len(self._open)
        if len(self._recent) > RECENT_DIGESTS:
            self._recent.popitem(last=False)
        self._open.append(
            (
                group.path,
                group.number,
                group.first_block,
                len(group.raw),
                offset,
                len(encoded.stored),
                encoded.digest,
            )
        )
        if self._builder.size >= self._pack_bytes or len(self._open) >= ROWS_PER_PACK:
            await self._close_pack()

    async def _close_pack(self) -> None:
        while len(self._uploads) >= MAX_UPLOADS:
            await self._uploaded()
        loop = asyncio.get_running_loop()
        pack, data = await loop.run_in_executor(self._threads, self._builder.finish)
        rows = [
            PageRow(path, group, ExtentRef(first_block, raw_bytes, pack, offset, stored_bytes, digest))
            for path, group, first_block, raw_bytes, offset, stored_bytes, digest in self._open
        ]
        for row in rows:
            if isinstance(self._recent.get(row.extent.digest), int):
                self._recent[row.extent.digest] = row.extent
        self._uploads.append((asyncio.create_task(self._upload(pack, data)), rows))
        self._builder = self._new_pack()
        self._open = []
        self.pack_boundary = True

    def _new_pack(self) -> PackBuilder:
        return PackBuilder(self._store_id, EXTENTS, nonce=self._clock.token(NONCE_BYTES))

    async def _upload(self, pack: str, data: bytes) -> None:
        await create_named(self._store, keys.pack(pack), data)
        self.packs += 1
        self.uploaded_bytes += len(data)

    async def _uploaded(self) -> None:
        task, rows = self._uploads.popleft()
        try:
            await task
        except BaseException:
            task.cancel()
            raise
        self._rows += rows


async def create_named(store: Store, key: str, data: bytes) -> None:
    """Create an object named by its content; raises DamagedStore when other bytes hold its key."""
    if not await store.create(key, data):
        raise DamagedStore(key, 0, "expected the content this key is named by")


def _encode_groups(batch: list[Group]) -> list[Encoded]:
    return [encode_group(group) for group in batch]
