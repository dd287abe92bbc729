"""Verified extents from packs: one request for each, adjacent ones in one ranged read.

Promises: every extent returned had its BLAKE3 checked (P5); of any number of callers that want one extent at
once, one request is made; what is asked for within one step of the event loop and lies close together in one
pack is one request. Bounds: MAX_REQUESTS requests in flight for what somebody waits for, MAX_BACKGROUND for what nobody
waits for yet, MAX_RUN_BYTES each; what is kept is bounded by restore/extent_memory.py, frames_ahead.py and cache_writer.py.
Failures: a store that does not answer is asked again until ``patience_seconds`` are over, then Unavailable; a damaged extent
is fetched once more, then DamagedStore; NotFound at once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from restore.cache import DiskCache, WouldBlock
from restore.cache_writer import CacheWriter
from restore.extent_memory import ExtentMemory
from restore.extent_runs import MAX_GAP_BYTES, coalesce, frame_of, range_of
from restore.frames_ahead import FramesAhead, Pace
from timeline.clock import Clock
from timeline.errors import DamagedStore, TimelineError, Unavailable
from timeline.format import keys
from timeline.format.digest import digest_of
from timeline.format.extent import ExtentRef, decode_extent
from timeline.store.base import NearStore, Store

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

MAX_REQUESTS = 32
MAX_BACKGROUND = 24
MAX_RUN_BYTES = 1 << 20
REQUEST_SECONDS = 30.0
"""A request without an answer for this long counts as failed."""

_INLINE_EXTENTS = 2
_BOOT_WORKERS = 8
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0


@dataclass(slots=True)
class Counters:
    """What a mount did so far; all since its start."""

    requests: int = 0
    """Ranged reads of the store."""
    fetched_bytes: int = 0
    """Bytes those returned."""
    extents: int = 0
    """Extents taken from them."""
    memory_hits: int = 0
    disk_hits: int = 0
    failures: int = 0
    """Requests that failed, retried ones included."""


@dataclass(slots=True)
class _Flight:
    ref: ExtentRef
    background: bool
    """Nobody waits for it yet."""
    future: asyncio.Future[bytes]
    announced: bool = False
    """Its bytes are, to Fetcher._memory."""


class Fetcher:
    """Extents of one store, through memory, the host's disk cache and ranged reads."""

    def __init__(
        self,
        store: Store,
        cache: DiskCache,
        clock: Clock,
        pool: ThreadPoolExecutor,
        counters: Counters,
        *,
        patience_seconds: float = 90.0,
        quiet_seconds: float = 0.0,
    ) -> None:
        """``quiet_seconds``: for so long extents are not written to the disk cache, but kept to be written afterwards."""
        self._store = store
        self._near = store if isinstance(store, NearStore) else None
        self._cache = cache
        self._clock = clock
        self._pool = pool
        self.counters = counters
        self._patience_seconds = patience_seconds
        self._memory = ExtentMemory(clock)
        self._flights: dict[bytes, _Flight] = {}
        self._queue: list[_Flight] = []
        self._dispatching = False
        self._requests = asyncio.Semaphore(MAX_REQUESTS)
        self._background = asyncio.Semaphore(MAX_BACKGROUND)
        self._pace = Pace()
        self._on_their_way: list[int] = []
        """Lengths of the requests that were made and not answered yet; not many."""
        self._frames = FramesAhead(self._get_in_background, self._pace, clock)
        self._writer = CacheWriter(cache, self._frames, clock, pool, quiet_seconds=quiet_seconds)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_near(self) -> bool:
        """Whether the store is on this host, where requests cost next to nothing."""
        return self._near is not None

    def peek(self, ref: ExtentRef, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of the extent, fewer at its end, if they can be had without waiting."""
        raw = self._memory.get(ref.digest)
        if raw is not None:
            self.counters.memory_hits += 1
            return raw if start == 0 and stop >= len(raw) else raw[start:stop]
        raw = self._from_frame(ref)
        if raw is not None:
            return raw[start:stop]
        try:
            part = self._cache.load_part(ref.digest, start, stop)
        except WouldBlock:
            return None
        self.counters.disk_hits += part is not None
        return part

    def read_near(self, refs: Sequence[ExtentRef]) -> list[bytes] | None:
        """The extents, if the store is on this host and has them in memory; ``None``: they must be fetched.

        A damaged or missing one is left to ``fetch``, which tries again and tells.
        """
        store = self._near
        if store is None:
            return None
        found: dict[bytes, bytes] = {}
        unique = {ref.digest: ref for ref in refs}
        runs = coalesce(list(unique.values()), max_gap_bytes=MAX_GAP_BYTES, max_run_bytes=MAX_RUN_BYTES)
        try:
            for run in runs:
                key, start, length = range_of(run)
                data = store.get_now(key, start, length)
                if data is None:
                    return None
                self.counters.requests += 1
                self.counters.fetched_bytes += length
                view = memoryview(data)
                for ref in run:
                    found[ref.digest] = decode_extent(frame_of(view, start, ref), ref, key)
        except TimelineError:
            return None
        self.counters.extents += len(found)
        for digest, raw in found.items():
            self._memory.keep(digest, raw)
        return [found[ref.digest] for ref in refs]

    async def fetch(self, ref: ExtentRef) -> bytes:
        """The extent; raises Unavailable, DamagedStore, NotFound."""
        deadline = self._clock.monotonic() + self._patience_seconds
        pause = _FIRST_PAUSE_SECONDS
        damaged = False
        while True:
            raw = self.peek(ref, 0, ref.raw_bytes)
            if raw is None and await self._frames.wait(ref.digest):
                raw = self.peek(ref, 0, ref.raw_bytes)
            if raw is not None:
                return raw
            try:
                return await asyncio.shield(self._flight(ref, background=False).future)
            except DamagedStore:
                if damaged:
                    raise
                damaged = True
            except Unavailable as error:
                pause = await self._wait(error, pause, deadline)

    def prefetch(self, refs: Sequence[ExtentRef]) -> int:
        """Begin to fetch with nobody waiting; how many of them, from the first, are here or taken on.

        What fails is left for whoever needs it.
        """
        for number, ref in enumerate(refs):
            digest = ref.digest
            if self._is_here(digest):
                continue
            if not self._memory.has_room_ahead(ref.raw_bytes):
                return number
            self._flight(ref, background=True)
        return len(refs)

    def fetch_ahead(self, refs: Sequence[ExtentRef]) -> None:
        """Begin to bring near what a replay is known to want, in few requests; what fails is left for whoever needs it."""
        missing = {ref.digest: ref for ref in refs if not self._is_here(ref.digest)}
        self._frames.begin(list(missing.values()))

    async def fetch_all(self, refs: Sequence[ExtentRef], *, max_gap_bytes: int, max_run_bytes: int) -> None:
        """Bring all of them into memory and cache in few large requests; raises what a request raised."""
        unique = {ref.digest: ref for ref in refs}
        missing = [ref for digest, ref in unique.items() if not self._is_here(digest)]
        flights = [self._register(ref, background=True) for ref in missing]
        runs = _runs(flights, max_gap_bytes=max_gap_bytes, max_run_bytes=max_run_bytes)
        errors: list[BaseException | None] = []
        for flight in flights:
            # The bytes go where they are kept; a future that is held would keep all of them in memory.
            flight.future.add_done_callback(lambda future: errors.append(future.exception()))
        del missing, flights

        async def work() -> None:
            while runs:
                await self._run(runs.pop())

        try:
            await asyncio.gather(*(work() for _ in range(_BOOT_WORKERS)))
        finally:
            for flight in itertools.chain.from_iterable(runs):
                self._land(flight, Unavailable("the fetch was given up"))
        for error in errors:
            if error is not None:
                raise error

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        """Run blocking or long work in the bounded pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def read_part(self, key: str, start: int, length: int, digest: bytes) -> bytes:
        """A range of an object with that BLAKE3, through the disk cache, as patient as for extents.

        Raises Unavailable, NotFound, DamagedStore.
        """
        if self._cache.has(digest):
            cached = await self.in_thread(lambda: self._cache.load(digest))
            if cached is not None:
                self.counters.disk_hits += 1
                return cached
        deadline = self._clock.monotonic() + self._patience_seconds
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                async with self._requests:
                    data = await self._get(key, start, length)
                break
            except Unavailable as error:
                pause = await self._wait(error, pause, deadline)
        if await self.in_thread(lambda: digest_of(data)) != digest:
            raise DamagedStore(key, start, f"expected {length} bytes with BLAKE3 {digest.hex()}")
        self._writer.write(digest, data)
        return data

    def let_go(self) -> None:
        """Give up what is in memory, but for what is still to be written to the disk cache."""
        self._memory.clear()
        self._frames.clear()

    async def aclose(self) -> None:
        """Wait for what is under way, and for the writing of what is to be kept on disk, as far as its bound allows."""
        await self._frames.aclose()
        while self._queue or self._tasks:
            self._dispatch()
            await asyncio.wait(set(self._tasks))
        await self._writer.aclose()

    def _is_here(self, digest: bytes) -> bool:
        """Whether the extent is here or on its way."""
        near = digest in self._memory or digest in self._frames
        return near or digest in self._flights or self._cache.has(digest)

    def _from_frame(self, ref: ExtentRef) -> bytes | None:
        """The extent out of a frame fetched ahead; a damaged one is left to be fetched again."""
        frame = self._frames.take(ref, keep=self._cache.usable)
        if frame is None:
            return None
        raw = _decode(memoryview(frame), ref.offset, ref, keys.pack(ref.pack))
        if not isinstance(raw, bytes):
            return None
        self.counters.extents += 1
        self._memory.keep(ref.digest, raw)
        self._writer.write_frames_later()
        return raw

    async def _wait(self, error: Unavailable, pause: float, deadline: float) -> float:
        """Sleep before another try; the next pause. Raises the error when the deadline would pass."""
        jittered = pause * (0.5 + self._clock.random())
        if self._clock.monotonic() + jittered >= deadline:
            raise error
        _log.warning("waiting for the store: %s", error.message)
        await self._clock.sleep(jittered)
        return min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _flight(self, ref: ExtentRef, *, background: bool) -> _Flight:
        flight = self._flights.get(ref.digest)
        if flight is None:
            flight = self._register(ref, background=background)
            if background:
                flight.announced = True
                self._memory.announce(ref.raw_bytes)
            self._queue.append(flight)
            if not self._dispatching:
                self._dispatching = True
                asyncio.get_running_loop().call_soon(self._dispatch)
        elif not background:
            flight.background = False
        return flight

    def _register(self, ref: ExtentRef, *, background: bool) -> _Flight:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_retrieve)
        flight = _Flight(ref, background, future)
        self._flights[ref.digest] = flight
        return flight

    def _dispatch(self) -> None:
        self._dispatching = False
        queue, self._queue = self._queue, []
        for background in (False, True):
            flights = [flight for flight in queue if flight.background is background]
            for run in _runs(flights, max_gap_bytes=MAX_GAP_BYTES, max_run_bytes=MAX_RUN_BYTES):
                task = asyncio.get_running_loop().create_task(self._run(run))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _run(self, run: list[_Flight]) -> None:
        """Resolve the flights of one run; every one of them is resolved, whatever happens."""
        try:
            run = await self._from_disk(run)
            if not run:
                return
            if all(flight.background for flight in run):
                async with self._background, self._requests:
                    await self._read_run(run)
            else:
                async with self._requests:
                    await self._read_run(run)
        except TimelineError as error:
            for flight in run:
                self._land(flight, error)
        finally:
            for flight in run:
                if not flight.future.done():
                    self._land(flight, Unavailable("the fetch was given up"))

    async def _from_disk(self, run: list[_Flight]) -> list[_Flight]:
        """Land what the disk cache holds; the rest of the run."""
        held = [flight for flight in run if self._cache.has(flight.ref.digest)]
        if not held:
            return run
        loaded = await self.in_thread(lambda: [self._cache.load(flight.ref.digest) for flight in held])
        for flight, raw in zip(held, loaded, strict=True):
            if raw is not None:
                self.counters.disk_hits += 1
                self._land(flight, raw)
        return [flight for flight in run if not flight.future.done()]

    async def _read_run(self, run: list[_Flight]) -> None:
        key, start, length = range_of([flight.ref for flight in run])
        data = memoryview(await self._get(key, start, length))

        def decode() -> list[bytes | DamagedStore]:
            return [_decode(data, start, flight.ref, key) for flight in run]

        outcomes = decode() if len(run) <= _INLINE_EXTENTS else await self.in_thread(decode)
        for flight, outcome in zip(run, outcomes, strict=True):
            if isinstance(outcome, bytes):
                self.counters.extents += 1
                self._writer.write_extent(flight.ref, frame_of(data, start, flight.ref), outcome)
            self._land(flight, outcome)

    async def _get_in_background(self, key: str, start: int, length: int) -> bytes:
        async with self._background:
            return await self._get(key, start, length)

    async def _get(self, key: str, start: int, length: int) -> bytes:
        began = self._clock.monotonic()
        self._on_their_way.append(length)
        together = self._together(length)
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                data = await self._store.get(key, start, length)
        except TimeoutError:
            self.counters.failures += 1
            raise Unavailable(f"{key}: no answer from the store within {REQUEST_SECONDS:.0f} s") from None
        except TimelineError:
            self.counters.failures += 1
            raise
        finally:
            together = min(together, self._together(length))
            self._on_their_way.remove(length)
        self._pace.note(length, self._clock.monotonic() - began, together)
        self.counters.requests += 1
        self.counters.fetched_bytes += len(data)
        return data

    def _together(self, length: int) -> int:
        """What all requests on their way bring while one of that length is answered, if they share the line."""
        return sum(min(length, each) for each in self._on_their_way)

    def _land(self, flight: _Flight, outcome: bytes | TimelineError) -> None:
        digest = flight.ref.digest
        if self._flights.pop(digest, None) is None:
            return
        if flight.announced:
            self._memory.withdraw(flight.ref.raw_bytes)
        if not isinstance(outcome, bytes):
            flight.future.set_exception(outcome)
            return
        if flight.background:
            self._memory.keep_ahead(digest, outcome)
        else:
            self._memory.keep(digest, outcome)
        flight.future.set_result(outcome)


def _runs(flights: Sequence[_Flight], *, max_gap_bytes: int, max_run_bytes: int) -> list[list[_Flight]]:
    flight_of = {flight.ref.digest: flight for flight in flights}
    refs = [flight.ref for flight in flights]
    runs = coalesce(refs, max_gap_bytes=max_gap_bytes, max_run_bytes=max_run_bytes)
    return [[flight_of[ref.digest] for ref in run] for run in runs]


def _decode(data: memoryview, start: int, ref: ExtentRef, key: str) -> bytes | DamagedStore:
    try:
        return decode_extent(frame_of(data, start, ref), ref, key)
    except DamagedStore as error:
        return error


def _retrieve(future: asyncio.Future[bytes]) -> None:
    """Nobody may wait for a read-ahead: its failure is met again, and told, when the bytes are needed."""
    if not future.cancelled():
        future.exception()
