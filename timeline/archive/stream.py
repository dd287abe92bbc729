"""One tli streamed into the store: reading, cutting, committing and answering, in one task that never waits
for the store.

Back-pressure: when ``buffer_bytes`` of WAL are not durable yet, the socket is no longer read. Requests for a
reply are not seen then, so status updates go out unasked, often enough for ``wal_sender_timeout`` (EDGE 4,
9).

Acknowledgement: what is reported as written and flushed is the end of the contiguous durable prefix (P1), at
once when it moves, since a COMMIT may be waiting for it (EDGE 5).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from timeline.archive.budget import RequestBudget
from timeline.archive.chunker import ChunkBuffers, Chunker, RawChunk
from timeline.archive.committer import Committer, first_difference
from timeline.archive.protocol import Keepalive, ProtocolError, StreamState, XLogData
from timeline.archive.receiver import NextTli, ReplicationConnection
from timeline.archive.source import SourceProbe
from timeline.clock import Clock, Micros
from timeline.errors import SplitBrain, Unavailable
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn

MESSAGES_AT_ONCE = 32
"""Messages, of up to 128 KiB, handled before replies and cuts get their turn."""
DRAIN_SECONDS = 30.0
"""How long what was received is still uploaded after the connection broke."""


class Overlap:
    """Bytes that the store has already and that come again: they must be the same (EDGE 14, 19)."""

    def __init__(self, tli: int, start: Lsn, stored: bytes) -> None:
        self._tli = tli
        self._position = start
        self._left = memoryview(stored)

    def skip(self, data: memoryview) -> memoryview:
        """What of ``data`` is new; raises SplitBrain when what is not new differs."""
        count = min(len(data), len(self._left))
        if count:
            difference = first_difference(data[:count], self._left[:count])
            if difference is not None:
                raise SplitBrain(
                    f"tli {self._tli} has two histories: the source differs from the store at "
                    f"{Lsn(self._position + difference)}",
                    hint="another server was promoted to the same tli, the source was set back, or the "
                    "connection corrupts data; what is archived stays restorable",
                )
            self._position = Lsn(self._position + count)
            self._left = self._left[count:]
        return data[count:]


@dataclass(slots=True)
class StreamProgress:
    """Shared with whoever watches the stream."""

    received: Lsn
    source_end: Lsn
    source_time: Micros | None = None
    covered: Coverage | None = None
    """Newest coverage of what was received; durable once ``Committer.durable`` has passed it."""
    caught_up: bool = False
    """Whether the end of the source's WAL has been reached once."""
    synchronous: bool = False


class TliStream:
    """Streams one tli from ``connection``, on which START_REPLICATION has just succeeded."""

    def __init__(
        self,
        connection: ReplicationConnection,
        committer: Committer,
        state: StreamState,
        overlap: Overlap,
        *,
        tli: int,
        buffers: ChunkBuffers,
        clock: Clock,
        budget: RequestBudget,
        max_delay_seconds: float,
        buffer_bytes: int,
        stop_patience_seconds: float,
        primary: bool,
    ) -> None:
        """``primary``: the source itself makes the WAL, so the end of its WAL is the end of history; a
        standby's is only what it has received."""
        self._connection = connection
        self._committer = committer
        self._state = state
        self._overlap = overlap
        self._tli = tli
        self._clock = clock
        self._budget = budget
        self._max_delay = max_delay_seconds
        self._buffer_bytes = buffer_bytes
        self._stop_patience = stop_patience_seconds
        self._primary = primary
        self._chunker = Chunker(tli, committer.durable, buffers=buffers)
        self._candidate: Coverage | None = None
        self._hurry = False
        self.progress = StreamProgress(received=committer.durable, source_end=committer.durable)

    @property
    def buffered_bytes(self) -> int:
        """WAL received and not yet durable."""
        return self._committer.buffered_bytes + self._chunker.open_bytes

    def see(self, probe: SourceProbe, *, synchronous: bool) -> None:
        """What the source says of itself, from an ordinary connection to the same server."""
        self.progress.synchronous = synchronous
        self.progress.source_end = max(self.progress.source_end, probe.end)
        self.progress.source_time = probe.time
        if self._primary and not probe.in_recovery:
            self._consider(Coverage(self._tli, probe.end, probe.time))
        elif probe.upstream is not None and probe.upstream.tli == self._tli:
            self._consider(Coverage(self._tli, probe.upstream.end, probe.upstream.time))
        self._connection.wake()

    async def run(self, stop: asyncio.Event, check: Callable[[], None]) -> NextTli | None:
        """Stream until the tli ends (a row) or ``stop`` is set (``None``); then everything received is
        durable.

        ``check`` is called often and raises what must end the stream. Raises that, what ended the committer's
        run, Unavailable when the connection or the server went away, ServerError with what the server said.
        """
        try:
            await self._stream(stop, check)
            if self._connection.ended:
                following = await self._connection.finish()
                if following is None:
                    raise Unavailable("the source ended the stream: it is shutting down")
                await self._finish_tli(following)
                return following
        except Unavailable:
            if self._committer.failure is None:
                await self._save()
            raise
        await self._flush(self._stop_patience)
        self._reply()
        await self._connection.wait(read=False, timeout=0)
        return None

    async def _stream(self, stop: asyncio.Event, check: Callable[[], None]) -> None:
        connection, state = self._connection, self._state
        while not (connection.ended or stop.is_set()):
            if self._committer.failure is not None:
                raise self._committer.failure
            check()
            reading = self.buffered_bytes < self._buffer_bytes
            idle = not (reading and self._read())
            self._cut_if_due()
            state.advance(self._committer.durable)
            now = self._clock.monotonic()
            if state.due_in(now) <= 0:
                self._reply()
            if idle and not connection.ended:
                await connection.wait(read=reading, timeout=self._pause(now))
            else:
                await self._clock.sleep(0)

    def _read(self) -> bool:
        """Take what has arrived; whether there may be more."""
        for _ in range(MESSAGES_AT_ONCE):
            message = self._connection.take()
            if message is None:
                return False
            parsed = self._state.receive(message)
            if isinstance(parsed, Keepalive):
                self._hear(parsed)
            else:
                self._collect(parsed)
        return True

    def _hear(self, keepalive: Keepalive) -> None:
        # A server that shuts down asks again and again, and waits until all it sent is acknowledged.
        self._hurry |= keepalive.reply_requested
        self.progress.source_time = keepalive.sent_at

    def _collect(self, message: XLogData) -> None:
        for chunk in self._chunker.add(self._overlap.skip(message.data), self._clock.monotonic()):
            self._submit(chunk)
        progress = self.progress
        progress.received = self._chunker.position
        progress.source_end = max(progress.source_end, message.wal_end)
        progress.source_time = message.sent_at
        caught_up = self._state.caught_up
        progress.caught_up |= caught_up is not None
        if caught_up is not None and self._primary:
            self._consider(Coverage(self._tli, caught_up.lsn, caught_up.time))
        elif self._candidate is not None:
            self._consider(self._candidate)

    def _consider(self, coverage: Coverage) -> None:
        """Note coverage as soon as all WAL before it has been received."""
        if coverage.lsn > self._chunker.position:
            # The oldest one waits: were it replaced by each newer one, none might ever be reached.
            if self._candidate is None or self._candidate.lsn <= self._chunker.position:
                self._candidate = coverage
            return
        if self._candidate is not None and self._candidate.lsn <= coverage.lsn:
            self._candidate = None
        self.progress.caught_up = True
        if self.progress.covered is None or coverage.time >= self.progress.covered.time:
            self.progress.covered = coverage
        self._chunker.cover(coverage.lsn, coverage.time)

    def _cut_in(self, now: float) -> float | None:
        """Seconds until the open chunk is to be cut; ``None``: not before something else happens."""
        oldest = self._chunker.oldest
        if oldest is None or not self._committer.slot_free:
            return None
        hurry = self._hurry or self.progress.synchronous
        waited = 0.0 if hurry else oldest + self._max_delay - now
        return max(0.0, waited, self._budget.wait(now))

    def _cut_if_due(self) -> None:
        if self._chunker.oldest is None:
            self._hurry = False
        elif self._cut_in(self._clock.monotonic()) == 0.0:
            self._hurry = False
            self._cut()

    def _cut(self) -> None:
        chunk = self._chunker.cut()
        if chunk is not None:
            self._submit(chunk)

    def _submit(self, chunk: RawChunk) -> None:
        self._budget.spend(self._clock.monotonic())
        self._committer.submit(chunk)

    def _pause(self, now: float) -> float:
        due = self._state.due_in(now)
        cut = self._cut_in(now)
        return max(0.0, due if cut is None else min(due, cut))

    def _reply(self) -> None:
        self._state.advance(self._committer.durable)
        self._connection.send(self._state.status(self._clock.monotonic(), self._clock.now()))

    async def _finish_tli(self, following: NextTli) -> None:
        if following.start != self._chunker.position:
            raise ProtocolError(
                f"the source ended tli {self._tli} at {following.start}, and sent it up to "
                f"{self._chunker.position}"
            )
        self._cut()
        await self._committer.drain()

    async def _flush(self, patience_seconds: float) -> None:
        self._cut()
        try:
            async with asyncio.timeout(patience_seconds):
                await self._committer.drain()
        except TimeoutError:
            raise Unavailable(
                f"the store did not take what was received within {patience_seconds:.0f} s",
                hint="nothing acknowledged is lost: the source keeps the rest for the next run",
            ) from None

    async def _save(self) -> None:
        """After the connection broke: what was received is good WAL and need not be sent again.

        Closed first, because a source that shuts down waits for its walsender's end.
        """
        await self._connection.aclose()
        with contextlib.suppress(Unavailable):
            await self._flush(DRAIN_SECONDS)
