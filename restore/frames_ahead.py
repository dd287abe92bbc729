"""Extents that a replay is known to want, fetched many to a request and kept as they are stored until they are asked for.

A replay reads single pages of groups all over a database. Which ones is known beforehand (restore/prefetch.py), and an
extent is a tenth of its group while it is compressed; so hundreds of them are fetched with few requests that read over
the gaps in between, and decoded and verified (P5) only when somebody wants them.

Bounds: FRAMES_BYTES held or on their way, and what a single run that somebody waits for brings besides; WORKERS runs at a
time, RUN_BYTES each. What nobody asked for within KEPT_SECONDS makes room for others; a run that finds no room for so long
is given up. Failures are left to whoever needs the bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from restore.extent_runs import MAX_GAP_BYTES, coalesce, frame_of, range_of
from timeline.clock import Clock
from timeline.errors import TimelineError
from timeline.format.extent import ExtentRef

FRAMES_BYTES = 64 << 20
WORKERS = 24
RUN_BYTES = 1 << 20
LONGEST_GAP_BYTES = 256 << 10
REQUEST_COST_SECONDS = 0.002
"""What a request costs whoever makes and whoever answers it, besides its bytes and the wait for the first of them: a gap that
is read over in less is no loss."""
KEPT_SECONDS = 3.0
LONGEST_WAIT_SECONDS = 40.0
"""Nobody waits longer for a run: a request and the wait for room before it are over by then."""
_POLL_SECONDS = 0.01
_SMALL_BYTES, _LARGE_BYTES = 32 << 10, 256 << 10

_log = logging.getLogger(__name__)

GetRange = Callable[[str, int, int], Awaitable[bytes]]


class Pace:
    """How fast a store gives its bytes, by what requests took: the small ones tell the wait for the first byte."""

    def __init__(self) -> None:
        self._wait: float | None = None
        self._best: tuple[int, float] | None = None
        """Bytes and seconds of the large request that was fastest: others are slower because the processor was busy."""

    def note(self, length: int, seconds: float, together: int) -> None:
        """A request of that length took so long; ``together``: the bytes of all that were on their way meanwhile."""
        if length <= _SMALL_BYTES:
            self._wait = seconds if self._wait is None else min(self._wait, seconds)
        elif length >= _LARGE_BYTES and (
            self._best is None or together / seconds > self._best[0] / self._best[1]
        ):
            self._best = together, seconds

    @property
    def gap_bytes(self) -> int:
        """What is read over rather than making another request."""
        if self._best is None or self._wait is None:
            return MAX_GAP_BYTES
        together, seconds = self._best
        worth = int(together / max(seconds - self._wait, seconds / 10) * REQUEST_COST_SECONDS)
        return min(max(worth, MAX_GAP_BYTES), LONGEST_GAP_BYTES)


@dataclass(slots=True, eq=False)
class _Run:
    """Extents of one request."""

    refs: list[ExtentRef]
    done: asyncio.Future[None]
    """Set when they are here, or could not be had."""
    awaited: bool = False
    """Somebody cannot go on without it."""


class FramesAhead:
    """The frames of one mount; ``get`` reads a range of an object of the store."""

    def __init__(self, get: GetRange, pace: Pace, clock: Clock) -> None:
        self._get = get
        self._pace = pace
        self._clock = clock
        self._queue: deque[_Run] = deque()
        """Not begun yet, the one to be fetched next first."""
        self._coming: dict[bytes, _Run] = {}
        """By digest of the extent: queued or being fetched."""
        self._workers: set[asyncio.Task[None]] = set()
        self._frames: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        """By digest: the frame, and since when."""
        self._taken: OrderedDict[bytes, tuple[ExtentRef, bytes]] = OrderedDict()
        """Frames that were asked for, until the disk cache has their extents."""
        self._bytes = 0
        """Of all those, and of what is being fetched."""
        self._asked = clock.monotonic()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._frames or digest in self._taken or digest in self._coming

    @property
    def busy(self) -> bool:
        """Whether somebody has asked for more within the last KEPT_SECONDS."""
        return self._clock.monotonic() - self._asked < KEPT_SECONDS

    def begin(self, refs: Sequence[ExtentRef]) -> None:
        """Begin to bring them here, those that come first in ``refs`` first."""
        self._asked = self._clock.monotonic()
        runs = coalesce(refs, max_gap_bytes=self._pace.gap_bytes, max_run_bytes=RUN_BYTES)
        rank = {ref.digest: number for number, ref in enumerate(refs)}
        runs.sort(key=lambda run: min(rank[ref.digest] for ref in run))
        loop = asyncio.get_running_loop()
        for extents in runs:
            run = _Run(extents, loop.create_future())
            self._queue.append(run)
            self._coming.update((ref.digest, run) for ref in extents)
        for _ in range(min(len(runs), WORKERS - len(self._workers))):
            self._workers.add(loop.create_task(self._work()))

    async def wait(self, digest: bytes) -> bool:
        """Wait for an extent that is on its way, which makes it the next to be fetched; whether it was."""
        run = self._coming.get(digest)
        if run is None:
            return False
        run.awaited = True
        if run in self._queue:
            self._queue.remove(run)
            self._queue.appendleft(run)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_WAIT_SECONDS):
                await asyncio.shield(run.done)
        return True

    def take(self, ref: ExtentRef, *, keep: bool) -> bytes | None:
        """The frame of an extent, not verified; ``keep``: it will also be had by ``pop_taken``."""
        kept = self._frames.pop(ref.digest, None)
        if kept is None:
            taken = self._taken.get(ref.digest)
            return None if taken is None else taken[1]
        frame, _ = kept
        if keep:
            self._taken[ref.digest] = (ref, frame)
        else:
            self._bytes -= len(frame)
        return frame

    def keep(self, ref: ExtentRef, frame: bytes) -> bool:
        """Have the frame of an extent that came otherwise for ``pop_taken``; whether there was room."""
        if ref.digest in self._taken:
            return True
        if ref.digest in self._frames:
            self.take(ref, keep=True)
            return True
        if self._bytes + len(frame) > FRAMES_BYTES:
            return False
        self._taken[ref.digest] = (ref, frame)
        self._bytes += len(frame)
        return True

    def pop_taken(self) -> tuple[ExtentRef, bytes] | None:
        """One of the frames that were asked for, to be kept somewhere else."""
        if not self._taken:
            return None
        _, (ref, frame) = self._taken.popitem(last=False)
        self._bytes -= len(frame)
        return ref, frame

    def clear(self) -> None:
        """Keep nothing that nobody asked for."""
        self._bytes -= sum(len(frame) for frame, _ in self._frames.values())
        self._frames.clear()

    async def aclose(self) -> None:
        """Give up what is under way."""
        while self._queue:
            self._land(self._queue.popleft())
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def _work(self) -> None:
        try:
            await self._work_off()
        finally:
            # In the same step: whoever begins more must not count a worker that looks at the queue no more.
            self._workers.discard(asyncio.current_task())

    async def _work_off(self) -> None:
        while self._queue:
            run = self._queue.popleft()
            try:
                await self._fetch(run)
            except TimelineError as error:
                _log.info("fetching ahead: %s", error.message)
            except Exception:  # noqa: BLE001 - whoever waits for the rest of the queue needs this worker
                _log.exception("fetching ahead")
            finally:
                self._land(run)

    def _land(self, run: _Run) -> None:
        for ref in run.refs:
            self._coming.pop(ref.digest, None)
        if not run.done.done():
            run.done.set_result(None)

    async def _fetch(self, run: _Run) -> None:
        refs = run.refs
        size = sum(ref.stored_bytes for ref in refs)
        if not await self._make_room(size, run):
            return
        self._bytes += size
        try:
            key, start, length = range_of(refs)
            data = memoryview(await self._get(key, start, length))
        finally:
            self._bytes -= size
        now = self._clock.monotonic()
        for ref in refs:
            if ref.digest in self._frames or ref.digest in self._taken:
                continue
            # A copy: the gaps beside it are not to be kept with it.
            frame = bytes(frame_of(data, start, ref))
            self._frames[ref.digest] = (frame, now)
            self._bytes += len(frame)

    async def _make_room(self, size: int, run: _Run) -> bool:
        deadline = self._clock.monotonic() + KEPT_SECONDS
        while self._bytes + size > FRAMES_BYTES:
            if self._taken:
                # The last ones: the first were what Postgres starts with, which every branch wants.
                _, (_, frame) = self._taken.popitem()
                self._bytes -= len(frame)
                continue
            now = self._clock.monotonic()
            if run.awaited and self._frames:
                # Of those that came, the ones that came last are wanted last.
                _, (frame, _) = self._frames.popitem()
                self._bytes -= len(frame)
            elif run.awaited:
                return True
            elif self._frames and now - next(iter(self._frames.values()))[1] >= KEPT_SECONDS:
                _, (frame, _) = self._frames.popitem(last=False)
                self._bytes -= len(frame)
            elif now >= deadline:
                return False
            else:
                await self._clock.sleep(_POLL_SECONDS)
        return True
