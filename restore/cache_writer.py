"""What a mount fetched, written to the host's disk cache: when, and how much of it at once.

A file for each extent costs a start more than the extent itself. So in a mount's first seconds, and while a replay is fed,
what was used is kept as it is stored (restore/frames_ahead.py) and written when both are over, slowly; or at the end, for
the next branch will want it.

Bounds: WRITING_BYTES handed to the disk at once, above which something is not written at all; what waits for later is
within the bound of the frames; whoever ends a mount waits FLUSH_SECONDS.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from restore.cache import DiskCache
from restore.frames_ahead import FramesAhead
from timeline.clock import Clock
from timeline.errors import DamagedStore
from timeline.format import keys
from timeline.format.extent import ExtentRef, decode_extent

WRITING_BYTES = 16 << 20
LATER_SECONDS = 1.0
"""How often it is looked whether it is later now."""
PAUSE_SECONDS = 0.002
"""Between two of those that were kept for later."""
FLUSH_SECONDS = 1.0


class CacheWriter:
    """Writes what one mount fetched to its host's cache, and what ``frames`` have for it; in no hurry for the first
    ``quiet_seconds``."""

    def __init__(
        self,
        cache: DiskCache,
        frames: FramesAhead,
        clock: Clock,
        pool: ThreadPoolExecutor,
        *,
        quiet_seconds: float,
    ) -> None:
        self._cache = cache
        self._frames = frames
        self._clock = clock
        self._pool = pool
        self._quiet_until = clock.monotonic() + quiet_seconds
        self._later: asyncio.Task[None] | None = None
        self._writing: set[asyncio.Task[None]] = set()
        self._writing_bytes = 0

    def write(self, digest: bytes, raw: bytes) -> None:
        """Begin to write verified bytes, if not too much is being written."""
        if not self._cache.usable or self._writing_bytes + len(raw) > WRITING_BYTES:
            return
        self._writing_bytes += len(raw)

        async def write() -> None:
            try:
                await self._in_thread(digest, raw)
            finally:
                self._writing_bytes -= len(raw)

        task = asyncio.get_running_loop().create_task(write())
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    def write_extent(self, ref: ExtentRef, frame: memoryview, raw: bytes) -> None:
        """The same for a verified extent that is stored as ``frame``: in quiet times it is kept for later."""
        quiet = self._clock.monotonic() < self._quiet_until
        if quiet and self._cache.usable and self._frames.keep(ref, bytes(frame)):
            self.write_frames_later()
        else:
            self.write(ref.digest, raw)

    def write_frames_later(self) -> None:
        """Have the frames that were used written once a start and its replay are over."""
        if not self._cache.usable or (self._later is not None and not self._later.done()):
            return

        async def write() -> None:
            while self._clock.monotonic() < self._quiet_until or self._frames.busy:
                await self._clock.sleep(LATER_SECONDS)
            loop = asyncio.get_running_loop()
            while (taken := self._frames.pop_taken()) is not None:
                await loop.run_in_executor(self._pool, self._write_frame, *taken)
                await self._clock.sleep(PAUSE_SECONDS)

        self._later = asyncio.get_running_loop().create_task(write())

    async def aclose(self) -> None:
        """Write what is left, as far as FLUSH_SECONDS allow."""
        if self._later is not None:
            self._later.cancel()
        if self._writing:
            await asyncio.wait(set(self._writing))
        left = list(iter(self._frames.pop_taken, None))
        deadline = self._clock.monotonic() + FLUSH_SECONDS

        def flush() -> None:
            for ref, frame in left:
                if self._clock.monotonic() >= deadline:
                    return
                self._write_frame(ref, frame)

        if left:
            await asyncio.get_running_loop().run_in_executor(self._pool, flush)

    async def _in_thread(self, digest: bytes, raw: bytes) -> None:
        await asyncio.get_running_loop().run_in_executor(self._pool, self._cache.store, digest, raw)

    def _write_frame(self, ref: ExtentRef, frame: bytes) -> None:
        """In whatever thread; a damaged one is dropped: whoever wants it fetches it again."""
        try:
            raw = decode_extent(frame, ref, keys.pack(ref.pack))
        except DamagedStore:
            return
        self._cache.store(ref.digest, raw)
