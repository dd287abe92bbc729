"""Marking and collecting: what garbage.py finds is published, waited for, and deleted (SPEC.md, chapter 9).

Safety does not rest on clocks: a writer that began before a mark cannot commit once its collection has begun
(``check_began``), what was committed before that is read from the log, and no name is ever used twice. The grace
period is for readers, who hold plans and no entries. ``timeline/decisions/2026-11-26-collection.md`` has the
argument.

Crash: a mark object whose entry was never written is garbage for the next mark. From the ``collect`` entry on
the deletion is resumed by whoever comes next, from the same mark and the same entries, until the mark object,
which goes last, is gone. Any number of collectors at once do the same thing, and each stops when it finds the
mark object gone.
Bounds: one page of keys and one batch of deletions at a time; one reason of refusal for each kind of object.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from timeline.catalog.branch_log import BranchLog, LogHead, read_changes
from timeline.catalog.meta import read_meta
from timeline.catalog.pins import read_pins
from timeline.clock import Clock, Micros
from timeline.errors import DamagedStore, LogConflict, MissingObject, NotFound, Unavailable
from timeline.format import keys
from timeline.format.branch_state import OpenMark
from timeline.format.log_change import Collect, Mark
from timeline.format.mark import MARK_ID_BYTES, MarkObject, decode_mark, encode_mark
from timeline.maintain.garbage import (
    KINDS,
    Found,
    Progress,
    Tally,
    find_garbage,
    kind_of,
    list_chunks,
    list_entries,
    refuse_others,
)
from timeline.maintain.reach import Named, Reach, named_in, reach_of
from timeline.store.base import Listed, Store

GRACE_SECONDS = 86_400.0
"""What a reader has, unless told otherwise, between reading the log and its last read of the store."""
BATCH_KEYS = 1000
"""Deleted at once."""
_NAMED_AT_ONCE = 1000
"""Manifests named since the mark that are read together."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Objects of one kind that the store refused to delete."""

    kind: str
    objects: int
    reason: str
    """Of the first of them."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collecting run did."""

    mark: str
    """Id of the mark."""
    deleted: tuple[Tally, ...]
    """By kind; objects that another collector had deleted already are counted, too."""
    kept: int
    """Objects of the mark that something names again, by the log or by a pin."""
    refused: tuple[Refusal, ...]
    finished: bool
    """Whether the mark object is gone, too."""


@dataclass(frozen=True, slots=True)
class Marked:
    """What a marking run did."""

    found: Found
    mark: OpenMark | None
    """``None``: there was nothing to mark."""


def due_at(mark: OpenMark, grace_seconds: float) -> Micros:
    """When a mark may be collected, by the clock of whoever made it."""
    return mark.at + round(grace_seconds * 1_000_000)


async def unfinished(store: Store, head: LogHead) -> str | None:
    """Id of the mark whose collection has begun and is not finished; anybody may go on with it."""
    last = head.state.collection.last
    if last is None:
        return None
    key = keys.mark(last)
    return last if any(one.key == key for one in await store.list(key, limit=1)) else None


async def read_mark(store: Store, mark_id: str) -> MarkObject | None:
    """What a mark lists; ``None`` when it was collected already. Raises DamagedStore, UnknownFeature."""
    key = keys.mark(mark_id)
    try:
        return decode_mark(await store.get(key), key)
    except NotFound:
        return None


async def mark(store: Store, log: BranchLog, clock: Clock, progress: Progress) -> Marked:
    """Find all garbage and publish it as a mark.

    Raises Unavailable when another mark is open, not finished, or was faster; UsageError, DamagedStore,
    UnknownFeature.
    """
    await read_meta(store, writing=True)
    head = await log.load()
    if head is not None and head.state.collection.mark is not None:
        raise Unavailable("a mark is open already", hint="collect it first, when its grace period is over")
    found = await find_garbage(store, log.branch, clock, progress)
    # Asked of this very head: the entry is refused when another one was collected since [COL-7].
    if await unfinished(store, found.head) is not None:
        raise Unavailable("the last collection is not finished", hint="run it again")
    if not found.tallies:
        return Marked(found, None)
    made = MarkObject(
        id=clock.token(MARK_ID_BYTES),
        branch=log.branch,
        head=found.head.number,
        at=clock.now(),
        garbage=found.garbage,
        chunks=found.chunks,
        entries=found.entries,
    )
    key = keys.mark(made.id)
    if not await store.create(key, encode_mark(made)):
        raise DamagedStore(key, 0, "expected nobody else to have this random name")
    published = OpenMark(made.id, made.head, made.at)
    try:
        await log.append(Mark(made.id, made.head, made.at, found.head.state.collection.last))
    except LogConflict as error:
        # Another collector was faster, unless an answer was lost and the mark that is open is this very one.
        head = await log.load()
        if head is None or head.state.collection.mark != published:
            raise Unavailable(
                "another collector has marked at the same time",
                hint="nothing is lost; its mark will be collected",
            ) from error
    return Marked(found, published)


async def collect(
    store: Store, log: BranchLog, clock: Clock, grace_seconds: float, progress: Progress
) -> Collected | None:
    """Delete what the open mark lists, when it is due, or go on with a collection that was interrupted.

    ``None``: nothing is due, or somebody else has finished it. Raises DamagedStore, UnknownFeature, Unavailable,
    UsageError where nothing may be deleted at all.
    """
    await read_meta(store, writing=True)
    await refuse_others(store, log.branch)
    head = await log.load()
    if head is None:
        return None
    started = await unfinished(store, head)
    if started is None:
        opened = head.state.collection.mark
        if opened is None or clock.now() < due_at(opened, grace_seconds):
            # Also clears up what killed writers left behind in a directory's `.tmp/`.
            await store.delete(())
            return None
        started = opened.id
        try:
            head = await log.append(Collect(opened.id))
        except LogConflict:
            # Somebody else has begun it.
            head = await log.load()
        if head is None or head.state.collection.last != started:
            return None
    return await _sweep(store, log, clock, head, started, progress)


async def _sweep(
    store: Store, log: BranchLog, clock: Clock, head: LogHead, mark_id: str, progress: Progress
) -> Collected | None:
    """[COL-6] from after the append. ``head`` was read after it, and ``mark_id`` was collected last in it."""
    since = range(head.state.collection.collected, head.number + 1)
    try:
        reach = await _named_since(store, log.branch, since, progress)
    except NotFound as error:
        # These entries go only after the mark object; so somebody else has finished, and has collected more since.
        if await unfinished(store, head) is None:
            return None
        raise MissingObject(error.key) from error
    pins = await read_pins(store, clock.now())
    reach |= await reach_of(store, named_in(pins.live), missing_ok=True)
    made = await read_mark(store, mark_id)
    if made is None:
        return None
    # The mark object is there: so were all entries since the mark when they were read [COL-7].
    sweep = _Sweep(store, progress, made)
    await sweep.run(log.branch, reach)
    finished = not await store.delete([keys.mark(mark_id)])
    return Collected(
        mark=mark_id,
        deleted=sweep.tallies,
        kept=sweep.kept,
        refused=sweep.refusals,
        finished=finished,
    )


async def _named_since(store: Store, branch: str, since: range, progress: Progress) -> Reach:
    """All that the changes of these entries name."""
    reach = Reach(frozenset(), frozenset())
    waiting: list[Named] = []
    async with aclosing(read_changes(store, branch, since)) as changes:
        number = 0
        async for change in changes:
            number += 1
            progress("reading what was named since", number, len(since))
            waiting += named_in(change)
            if len(waiting) >= _NAMED_AT_ONCE:
                reach |= await reach_of(store, waiting)
                waiting = []
    return reach | await reach_of(store, waiting)


class _Sweep:
    """Deletes what one mark lists, and counts."""

    def __init__(self, store: Store, progress: Progress, made: MarkObject) -> None:
        self._store = store
        self._progress = progress
        self._made = made
        self._objects = dict.fromkeys(KINDS, 0)
        self._bytes = dict.fromkeys(KINDS, 0)
        self._refused: dict[str, Refusal] = {}
        self._total = len(made.garbage) + sum(one.objects for one in made.chunks) + made.entries.objects
        self._done = 0
        self.kept = 0

    @property
    def tallies(self) -> tuple[Tally, ...]:
        return tuple(
            Tally(kind, self._objects[kind], self._bytes[kind]) for kind in KINDS if self._objects[kind]
        )

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(self._refused.values())

    async def run(self, branch: str, reach: Reach) -> None:
        for one in self._made.garbage:
            kind_of(one.key)  # raises for a key that must never be deleted, before anything is
        wanted = [Listed(one.key, one.size) for one in self._made.garbage if not reach.holds(one.key)]
        self.kept = len(self._made.garbage) - len(wanted)
        await self._delete(wanted)
        async with aclosing(self._void(branch)) as pages:
            async for page in pages:
                await self._delete(page)

    async def _void(self, branch: str) -> AsyncGenerator[list[Listed], None]:
        for chunks in self._made.chunks:
            at = ""
            while True:
                page, at = await list_chunks(self._store, branch, chunks.tli, chunks.below, at)
                yield page
                if not at:
                    break
        at = ""
        while True:
            page, at = await list_entries(self._store, branch, self._made.entries.below, at)
            yield page
            if not at:
                break

    async def _delete(self, listed: Sequence[Listed]) -> None:
        for first in range(0, len(listed), BATCH_KEYS):
            batch = listed[first : first + BATCH_KEYS]
            refused = {one.key: one.reason for one in await self._store.delete([one.key for one in batch])}
            for one in batch:
                kind = kind_of(one.key)
                if one.key in refused:
                    self._refuse(kind, refused[one.key])
                else:
                    self._objects[kind] += 1
                    self._bytes[kind] += one.size
            self._done += len(batch)
            self._progress("deleting", self._done, max(self._done, self._total))

    def _refuse(self, kind: str, reason: str) -> None:
        before = self._refused.get(kind)
        self._refused[kind] = (
            Refusal(kind, before.objects + 1, before.reason)
            if before is not None
            else Refusal(kind, 1, reason)
        )
