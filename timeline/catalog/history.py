"""The history of one branch as the store holds it: one consistent view, and everything asked of it.

Consistency: a view is one entry of the branch log with the tails found for it, and does not change by
itself; ``reload`` takes a newer one. What the log names exists for as long as the collector's grace period.
Should something be gone all the same (chunks sealed and collected behind a slow reader's back), the view is
reloaded and the question asked once more. What a fresh log still names and the store does not hold is missing: the
view goes on with what is whole, says so, and refuses the latest moment (partial.py).

Needs read and list permission only (P10). Everything read is verified (P5).

Requests, for the latest moment of a quiet branch: ``tl.json`` and the log's LIST at once, the head, the
tail's LIST, and one GET per chunk in it, all of these at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from timeline.catalog.branch_log import LogHead, read_head, read_whole_head
from timeline.catalog.index_reader import IndexReader
from timeline.catalog.line import Line, Run, Span, WalSpan, line_of, needed_tails, runs_on
from timeline.catalog.meta import read_meta
from timeline.catalog.parallel import in_parallel
from timeline.catalog.partial import describe_missing, find_whole_part
from timeline.catalog.resolve import Resolver
from timeline.catalog.tail import Tail, find_tail
from timeline.catalog.target import ReachableRange, Target
from timeline.catalog.wal_reader import WalBytes, WalPiece, plan_pieces, read_pieces
from timeline.catalog.when import AtLsn, AtTime, Latest, When
from timeline.clock import Clock, Micros
from timeline.errors import (
    DamagedStore,
    MissingObject,
    NotFound,
    TargetUnreachable,
    TimelineError,
    Unavailable,
    UsageError,
)
from timeline.format.branch_state import BranchState, SealedRange
from timeline.format.meta import StoreMeta
from timeline.ids import MAIN
from timeline.lsn import Lsn
from timeline.store.base import Store

T = TypeVar("T")

_POLL_SECONDS = 0.1
_LONGEST_POLL_SECONDS = 2.0


class History:
    """A view of one branch; make it with ``load``. For one task at a time."""

    def __init__(self, store: Store, meta: StoreMeta, head: LogHead) -> None:
        self.store = store
        self.meta = meta
        self._head = head
        self._tails: dict[int, Tail] = {}
        self._reader = IndexReader(store)
        self._missing: tuple[str, ...] = ()

    @classmethod
    async def load(cls, store: Store, branch: str = MAIN) -> History:
        """The branch as of now.

        Raises UsageError when there is no store or no such branch, UnknownFeature, DamagedStore.
        """
        meta, (head, missing) = await asyncio.gather(read_meta(store), _read_newest(store, branch))
        if head is None:
            raise UsageError(f"{store.url}: nothing was ever archived as {branch}", hint="start `tl archive`")
        history = cls(store, meta, head)
        if missing:
            await history._take_whole_part(missing)
        return history

    @property
    def state(self) -> BranchState:
        """What the log says."""
        return self._head.state

    @property
    def missing(self) -> tuple[str, ...]:
        """Keys that this view names and the store does not hold, as far as was noticed (EDGE 63)."""
        return self._missing

    @property
    def number(self) -> int:
        """Number of the log entry this view is of."""
        return self._head.number

    async def reload(self) -> None:
        """Take the newest view."""
        head, missing = await _read_newest(self.store, self.state.branch)
        if head is None:
            raise MissingObject(f"the log of branch {self.state.branch}")
        self._head = head
        self._tails = {}
        self._missing = ()
        if missing:
            await self._take_whole_part(missing)

    async def _take_whole_part(self, missing: tuple[str, ...] = ()) -> bool:
        """Go on with what the store holds of this view; whether anything is missing."""
        found = await find_whole_part(self.store, self.state)
        self._missing = tuple(dict.fromkeys((*self._missing, *missing, *found.missing)))
        self._head = LogHead(self._head.number, found.state)
        self._tails = {}
        return bool(self._missing)

    def lineage(self, tli: int | None = None) -> Line:
        """The line that leads to ``tli`` (the source's current one), oldest span first; UsageError for an
        unknown one."""
        return line_of(self.state, self.state.current_tli if tli is None else tli)

    async def tail(self, tli: int) -> Tail:
        """The unsealed WAL of a tli in this view."""
        return await self._retrying(lambda: self._tail(tli))

    async def resolve(
        self, when: When, *, tli: int | None = None, stock: bool = False, without: str | None = None
    ) -> Target:
        """The exact moment a WHEN means on the line that leads to ``tli``; the source's current one by
        default. ``stock``: to be replayed from a base backup, by a server that knows nothing of us; ``without``: not from
        the snapshot of that id.

        Never another line's moment (EDGE 40). Raises TargetUnreachable naming what can be reached (P7),
        UsageError, DamagedStore.
        """

        async def work() -> Target:
            try:
                return await resolve()
            except TargetUnreachable as error:
                if not self._missing or isinstance(when, Latest):
                    raise
                raise TargetUnreachable(
                    f"{error.message}; {describe_missing(self._missing)}", hint=error.hint
                ) from error

        async def resolve() -> Target:
            if self._missing and isinstance(when, Latest):
                reached = await self._reachable()
                told = "; ".join(f"{one.first} to {one.last} on tli {one.tli}" for one in reached)
                raise TargetUnreachable(
                    f"the latest moment cannot be told: {describe_missing(self._missing)}; reachable: "
                    f"{told or 'nothing'}",
                    hint="name a moment, or complete the copy" if told else "complete the copy",
                )
            line = self.lineage(tli)
            resolver, _ = await asyncio.gather(
                self._resolver(line, stock=stock, without=without), self._have_index_ready(line, when)
            )
            return await resolver.resolve(when)

        return await self._retrying(work)

    async def reachable(self) -> tuple[ReachableRange, ...]:
        """Every moment that can be had, tli by tli; a tli that the source left is told apart from the orphan
        tail that was archived of it beyond (EDGE 18), and an incomplete copy of a store is noticed (EDGE 63).

        Costs listings of the tails and of all manifests, and more: for people, not for loops.
        """
        if (await find_whole_part(self.store, self.state)).missing:
            # Merged or forgotten since, and collected? A fresh log tells.
            await self.reload()
            await self._take_whole_part()
        return await self._retrying(self._reachable)

    async def source_clock(self) -> Micros | None:
        """The newest time on the source's clock that the store knows; ``None`` while it knows none."""
        tail = await self.tail(self.state.current_tli)
        known = [one.time for one in (self.state.coverage, tail.coverage) if one is not None]
        return max(known, default=None)

    async def remarks(self, tli: int | None = None) -> tuple[str, ...]:
        """What an operator should hear about the end of a line (EDGE 63)."""
        tail = await self.tail(self.state.current_tli if tli is None else tli)
        partial = (describe_missing(self._missing),) if self._missing else ()
        if not tail.detached:
            return partial
        return (
            *partial,
            f"{len(tail.detached)} archived chunks of tli {tail.tli}, from {tail.detached[0]} on, are not "
            "connected "
            f"with the rest: no chunk starts at {tail.end}, where the known history ends (uploads under "
            "way, or an "
            "incomplete copy of the store)",
        )

    async def plan_wal(self, spans: Sequence[WalSpan]) -> tuple[WalPiece, ...]:
        """The frames and chunks that hold exactly these spans, in order; raises TargetUnreachable when the
        store does not hold all of them, DamagedStore."""
        return await self._retrying(lambda: self._plan(spans))

    async def wal(self, spans: Sequence[WalSpan]) -> AsyncGenerator[WalBytes, None]:
        """The WAL of the spans, verified, in order, read ahead in parallel within 64 MiB.

        Raises TargetUnreachable when the store does not hold all of them, DamagedStore. Close the iterator
        (``contextlib.aclosing``) when it is not read to its end.
        """
        left = [Span(span.tli, span.start, span.end) for span in spans if span.start < span.end]
        reloaded = False
        while left:
            try:
                async with aclosing(read_pieces(self.store, await self._plan(left))) as pieces:
                    async for found in pieces:
                        yield found
                        left = _after(left, found.piece)
            except NotFound as error:
                if reloaded:
                    raise MissingObject(error.key) from error
                reloaded = True
                await self.reload()

    async def _resolver(self, line: Line, *, stock: bool = False, without: str | None = None) -> Resolver:
        tlis = needed_tails(self.state, line)
        await in_parallel(tlis, self._tail, limit=4)
        runs = runs_on(self.state, line, {tli: self._tails[tli] for tli in tlis})
        coverages = [tail.coverage for tail in self._tails.values() if tail.coverage is not None]
        if self.state.coverage is not None:
            coverages.append(self.state.coverage)
        return Resolver(
            self.state,
            line,
            runs,
            coverages,
            self._reader,
            self._read_run,
            stock=stock,
            without=without,
        )

    async def _have_index_ready(self, line: Line, when: When) -> None:
        """Read what a moment in sealed WAL will be looked up in, while the tails are listed."""
        tlis = {span.tli for span in line}

        def wanted(sealed: SealedRange) -> bool:
            if isinstance(when, AtLsn):
                return sealed.start < when.lsn <= sealed.end
            latest = sealed.max_commit_time
            return isinstance(when, AtTime) and latest is not None and latest > when.time

        sealed = next((one for one in self.state.sealed if one.tli in tlis and wanted(one)), None)
        if sealed is not None:
            # A help: what fails is met again by whoever asks.
            with contextlib.suppress(TimelineError):
                await self._reader.have_ready(sealed, wanted)

    async def _reachable(self) -> tuple[ReachableRange, ...]:
        found: list[ReachableRange] = []
        for known in self.state.tlis:
            line = self.lineage(known.tli)
            if known.end is None:
                found += await self._ranges(line)
                continue
            left = (*line[:-1], replace(line[-1], end=known.end))
            found += await self._ranges(left)
            found += [
                replace(beyond, first=max(beyond.first, known.end), abandoned=True)
                for beyond in await self._ranges(line)
                if beyond.last > known.end
            ]
        return tuple(found)

    async def _ranges(self, line: Line) -> list[ReachableRange]:
        windows = await (await self._resolver(line)).windows()
        return [
            ReachableRange(
                tli=line[-1].tli,
                first=window.first.end,
                last=window.head.lsn,
                first_time=window.first_time,
                last_time=window.known_until,
                abandoned=False,
            )
            for _, window in windows
        ]

    async def _tail(self, tli: int) -> Tail:
        if tli not in self._tails:
            self._tails[tli] = await find_tail(self.store, self.state, tli)
        return self._tails[tli]

    async def _plan(self, spans: Sequence[WalSpan]) -> tuple[WalPiece, ...]:
        plan: list[WalPiece] = []
        for span in spans:
            if span.start >= span.end:
                continue
            known = self.state.find_tli(span.tli)
            if known is None:
                raise UsageError(f"branch {self.state.branch} has no tli {span.tli}")
            own: Line = (line_of(self.state, span.tli)[-1],)
            tails = {span.tli: await self._tail(span.tli)} if span.end > known.sealed else {}
            run = next(
                (
                    run
                    for run in runs_on(self.state, own, tails)
                    if run.start <= span.start and span.end <= run.end
                ),
                None,
            )
            if run is None:
                raise TargetUnreachable(
                    f"the WAL of tli {span.tli} from {span.start} to {span.end} is not all in the store"
                )
            plan += await plan_pieces(self._reader, run.clipped(span.start, span.end))
        return tuple(plan)

    async def _read_run(self, run: Run, start: int, end: int) -> bytes:
        """WAL across the tlis of a run; the caller bounds it."""
        plan = await plan_pieces(self._reader, run.clipped(start, end))
        async with aclosing(read_pieces(self.store, plan)) as pieces:
            return b"".join([bytes(found.data) async for found in pieces])

    async def _retrying(self, work: Callable[[], Awaitable[T]]) -> T:
        try:
            return await work()
        except NotFound:
            await self.reload()
        try:
            return await work()
        except NotFound as error:
            if self._missing or not await self._take_whole_part():
                raise MissingObject(error.key) from error
        try:
            return await work()
        except NotFound as error:
            raise MissingObject(error.key) from error


async def wait_for(
    store: Store, clock: Clock, lsn: Lsn, *, timeout_seconds: float, branch: str = MAIN
) -> History:
    """A view whose current tli is archived up to ``lsn`` at least, waiting for the archiver if need be.

    Raises Unavailable after ``timeout_seconds``; as ``History.load`` otherwise.
    """
    began = clock.monotonic()
    wait = _POLL_SECONDS
    while True:
        history = await History.load(store, branch)
        tail = await history.tail(history.state.current_tli)
        if tail.end >= lsn:
            return history
        left = timeout_seconds - (clock.monotonic() - began)
        if left <= 0:
            raise Unavailable(
                f"the store holds WAL up to {tail.end} and not yet {lsn}, after {timeout_seconds:g} s",
                hint="is `tl archive` running?",
            )
        await clock.sleep(min(wait, left))
        wait = min(wait * 1.5, _LONGEST_POLL_SECONDS)


async def _read_newest(store: Store, branch: str) -> tuple[LogHead | None, tuple[str, ...]]:
    """The newest head, and the log entries without which a newer one cannot be read."""
    try:
        return await read_head(store, branch), ()
    except MissingObject:
        head, missing = await read_whole_head(store, branch)
        if head is None:
            raise
        return head, missing


def _after(spans: Sequence[Span], done: WalPiece) -> list[Span]:
    """What is left of the spans once their next piece was handed over."""
    first = spans[0]
    if first.tli != done.tli or first.start != done.start:
        raise DamagedStore(done.key, 0, f"expected the WAL of tli {first.tli} at {first.start} next")
    rest = list(spans[1:])
    return [Span(first.tli, done.end, first.end), *rest] if done.end < first.end else rest
