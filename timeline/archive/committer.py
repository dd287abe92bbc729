"""Stores chunks, several at a time, and says how far the history is durable.

Consistency: a chunk is committed by its creation (DESIGN §5). ``durable`` is the end of the contiguous
prefix of chunks that the store confirmed, so nothing behind a hole is ever acknowledged (P1), in whatever
order uploads finish.

Crash: uploads that landed behind a hole stay as orphans; the next run meets them under its own keys.

Meeting another chunk where mine should go: a higher epoch in it means I am fenced (P4); different bytes are
a split brain; equal bytes are adopted. When the adopted chunk is cut elsewhere than mine, the chain goes on
at *its* end and everything behind must be cut anew: ``Recut``, and the runner starts again from the store's
tail.

Bounds: ``uploads_in_flight`` chunks are encoded and uploaded at a time; what is submitted and not yet
durable is counted in ``buffered_bytes``, and the runner stops reading from the source when that exceeds its
limit (P9). A store that does not answer is tried again, with growing pauses, for ``patience_seconds``; then
``Unavailable`` ends the run.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

from timeline.archive.chunker import RawChunk
from timeline.clock import Clock, Micros
from timeline.errors import Fenced, SplitBrain, TimelineError, Unavailable
from timeline.format import keys
from timeline.format.chunk import Chunk, ChunkHeader, decode_chunk, encode_chunk
from timeline.format.wal_index import Coverage, WalIndex
from timeline.lsn import Lsn
from timeline.store.base import Store

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 10.0


class Indexer(Protocol):
    """What the WAL scan offers: fed with the WAL of one tli, run after run, without holes."""

    def feed(self, wal: bytes | bytearray | memoryview) -> WalIndex:
        """The index of this run."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkIdentity:
    """What all chunks of a run have in common."""

    store_id: str
    branch: str
    system_identifier: int
    tli: int
    writer: str
    epoch: int


class Recut(TimelineError):
    """The chain in the store goes on at ``end``, where no chunk of mine begins: start again from there.

    Internal to the archiver. ``known`` is the end of the bytes that were compared with the source's.
    """

    def __init__(self, end: Lsn, known: Lsn) -> None:
        super().__init__(f"the chain of chunks goes on at {end}")
        self.end = end
        self.known = known


@dataclass(slots=True)
class _Item:
    chunk: RawChunk
    done: bool = False
    max_commit_time: Micros | None = None


@dataclass(slots=True)
class CommitterStats:
    """Counted since the committer was made."""

    chunks: int = 0
    adopted: int = 0
    wal_bytes: int = 0
    stored_bytes: int = 0
    uploads: int = 0
    upload_seconds: float = 0.0
    """Sum over uploads that the store answered."""
    upload_errors: int = 0
    """Calls that it did not answer."""
    last_commit_time: Micros | None = None
    """Latest commit or abort in what is durable, source's clock."""
    committed_at: Micros | None = None
    """When something last became durable, our clock."""
    stalled_since: float | None = None
    """Since when the store does not answer (monotonic)."""
    coverage: Coverage | None = field(default=None)
    """Newest that went into a durable chunk."""


class Committer:
    """Commits one tli's chunks, in order, from ``position`` on. Must be closed with ``aclose``."""

    def __init__(
        self,
        store: Store,
        identity: ChunkIdentity,
        position: Lsn,
        indexer: Indexer,
        *,
        clock: Clock,
        executor: Executor,
        uploads_in_flight: int,
        patience_seconds: float,
        on_change: Callable[[], None] = lambda: None,
        on_stored: Callable[[RawChunk], None] = lambda chunk: None,
    ) -> None:
        """``executor`` runs scan and compression. ``on_change`` is called when something became durable, a
        slot became free or the run failed; ``on_stored`` with each chunk that is durable and no longer looked
        at."""
        self._store = store
        self._identity = identity
        self._indexer = indexer
        self._clock = clock
        self._executor = executor
        self._limit = uploads_in_flight
        self._patience = patience_seconds
        self._on_change = on_change
        self._on_stored = on_stored
        self._submitted = position
        self._durable = position
        self._waiting: collections.deque[_Item] = collections.deque()
        self._pending: collections.deque[_Item] = collections.deque()
        self._buffered = 0
        self._uploads: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()
        self._pump = asyncio.create_task(self._run())
        self._pump.add_done_callback(self._finished)
        self.stats = CommitterStats()

    @property
    def durable(self) -> Lsn:
        """End of the contiguous durable prefix."""
        return self._durable

    @property
    def buffered_bytes(self) -> int:
        """WAL submitted and not yet durable."""
        return self._buffered

    @property
    def slot_free(self) -> bool:
        """Whether a chunk submitted now would be worked on at once."""
        return len(self._uploads) + len(self._waiting) < self._limit

    @property
    def failure(self) -> BaseException | None:
        """What ended the run: Fenced, SplitBrain, Recut, DamagedStore, Unavailable, or an error of the WAL
        scan."""
        return self._failure

    def submit(self, chunk: RawChunk) -> None:
        """Take a chunk, which must begin where the last one ended; returns at once."""
        if chunk.start != self._submitted:
            raise ValueError(f"chunk at {chunk.start} submitted where {self._submitted} should follow")
        item = _Item(chunk)
        self._submitted = chunk.end
        self._buffered += len(chunk.wal)
        self._waiting.append(item)
        self._pending.append(item)
        self._changed.set()

    async def drain(self) -> None:
        """Wait until everything submitted is durable; raises what ended the run otherwise."""
        while self._failure is None and self._pending:
            self._changed.clear()
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure

    async def aclose(self) -> None:
        """Stop: uploads under way are abandoned, and may or may not have landed."""
        tasks = [self._pump, *self._uploads]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting or len(self._uploads) >= self._limit:
                self._changed.clear()
                await self._changed.wait()
            item = self._waiting[0]
            # In order and one at a time: the scan carries its state from run to run.
            index = await loop.run_in_executor(self._executor, self._indexer.feed, item.chunk.wal)
            self._waiting.popleft()
            task = asyncio.create_task(self._commit(item, index))
            self._uploads.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._uploads.discard(task)
        if not task.cancelled():
            error = task.exception()
            if error is not None:
                self._fail(error)
        self._notify()

    def _fail(self, error: BaseException) -> None:
        # The gravest wins: a rival that fences us must not be hidden behind a mere time-out of another
        # upload.
        if self._failure is None or (isinstance(error, Fenced) and not isinstance(self._failure, Fenced)):
            self._failure = error
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._on_change()

    async def _commit(self, item: _Item, index: WalIndex) -> None:
        loop = asyncio.get_running_loop()
        chunk, who = item.chunk, self._identity
        header = ChunkHeader(
            store_id=who.store_id,
            branch=who.branch,
            system_identifier=who.system_identifier,
            tli=who.tli,
            start=chunk.start,
            end=chunk.end,
            writer=who.writer,
            epoch=who.epoch,
            created=self._clock.now(),
            coverage=chunk.coverage,
            digest="",
        )
        item.max_commit_time = index.max_commit_time
        data = await loop.run_in_executor(self._executor, encode_chunk, header, chunk.wal, index)
        key = keys.chunk(who.branch, who.tli, chunk.start)
        if await self._create(key, data):
            self.stats.stored_bytes += len(data)
        else:
            await self._meet(item, key)
            self.stats.adopted += 1
        item.done = True
        self._settle()

    def _settle(self) -> None:
        while self._pending and self._pending[0].done:
            item = self._pending.popleft()
            size = len(item.chunk.wal)
            self._buffered -= size
            self._durable = item.chunk.end
            self._on_stored(item.chunk)
            self.stats.chunks += 1
            self.stats.wal_bytes += size
            self.stats.committed_at = self._clock.now()
            if item.max_commit_time is not None:
                self.stats.last_commit_time = item.max_commit_time
            if item.chunk.coverage is not None:
                self.stats.coverage = item.chunk.coverage
        self._notify()

    async def _create(self, key: str, data: bytes) -> bool:
        began = self._clock.monotonic()
        pause = FIRST_PAUSE_SECONDS
        while True:
            tried = self._clock.monotonic()
            try:
                created = await self._store.create(key, data)
            except Unavailable:
                self.stats.upload_errors += 1
                if self.stats.stalled_since is None:
                    self.stats.stalled_since = began
                if self._clock.monotonic() - began + pause > self._patience:
                    raise
                await self._clock.sleep(pause * (0.5 + self._clock.random()))
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            else:
                self.stats.stalled_since = None
                self.stats.uploads += 1
                self.stats.upload_seconds += self._clock.monotonic() - tried
                return created

    async def _meet(self, item: _Item, key: str) -> None:
        """Judge the chunk that holds my key; returns when it says exactly what mine would have said."""
        loop = asyncio.get_running_loop()
        data = await self._store.get(key)
        theirs: Chunk = await loop.run_in_executor(self._executor, decode_chunk, data, key)
        header, who = theirs.header, self._identity
        if header.epoch > who.epoch:
            raise Fenced(
                f"another archiver has taken over branch {who.branch}: {key} was written under epoch "
                f"{header.epoch}, this run has epoch {who.epoch}",
                hint="this archiver stops; start it again only if the other one is gone for good",
            )
        if (header.store_id, header.system_identifier) != (who.store_id, who.system_identifier):
            raise SplitBrain(
                f"{key} belongs to another cluster: system identifier {header.system_identifier}, this "
                "source "
                f"has {who.system_identifier}",
                hint="each source needs a store of its own",
            )
        compared = self._compare(item, theirs.wal)
        if compared is not None:
            raise SplitBrain(
                f"tli {who.tli} has two histories: the store and the source differ at {compared} ({key})",
                hint="two servers were promoted to the same tli, or the source was set back; archive it into "
                "a new store",
            )
        if header.end != item.chunk.end:
            raise Recut(header.end, min(header.end, self._submitted))

    def _compare(self, item: _Item, theirs: bytes) -> Lsn | None:
        """The first LSN where the stored bytes differ from what the source sent, as far as it is here."""
        at = item.chunk.start
        end = at + len(theirs)
        for other in self._pending:
            if other.chunk.end <= at:
                continue
            if at >= end:
                break
            mine = memoryview(other.chunk.wal)[: end - at]
            stored = memoryview(theirs)[at - item.chunk.start :][: len(mine)]
            difference = first_difference(mine, stored)
            if difference is not None:
                return Lsn(at + difference)
            at = other.chunk.end
        return None


def first_difference(left: memoryview, right: memoryview) -> int | None:
    """Offset of the first byte that differs in two views of one length; ``None`` when they are equal."""
    if bytes(left) == bytes(right):
        return None
    low, high = 0, len(left)
    while high - low > 1:
        middle = (low + high) // 2
        if bytes(left[low:middle]) == bytes(right[low:middle]):
            low = middle
        else:
            high = middle
    return low
