"""The heartbeat: a URL that is asked for while archiving is fresh, and whose silence somebody else watches."""

from __future__ import annotations

import asyncio
import http.client
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from cli.log_lines import Level, Log
from cli.observed import ArchiverState
from cli.operations import AlertPlan
from timeline.clock import Clock, Micros
from timeline.errors import Unavailable

SILENCE_SECONDS = 60.0
"""An archiver that has said nothing for so long is stuck."""
_SECOND = 1_000_000
_ANSWER_BYTES = 4096
"""What is read of an answer."""


def why_stale(archiver: ArchiverState, now: Micros, within_seconds: float) -> str | None:
    """Why archiving does not count as fresh; ``None``: it does.

    Fresh is: the archiver runs and speaks, and either everything the source is known to have is stored, or the
    newest moment that is certainly complete is young enough.
    """
    if archiver.pid is None or archiver.reported_at is None:
        return "no archiver runs"
    silent = (now - archiver.reported_at) / _SECOND
    if silent > SILENCE_SECONDS:
        return f"the archiver has said nothing for {silent:.0f} s"
    if archiver.phase not in ("streaming", "catching up"):
        return f"the archiver is {archiver.phase}" + (f": {archiver.error}" if archiver.error else "")
    if archiver.durable is None or archiver.source_end is None:
        return "nothing is stored yet"
    if archiver.durable >= archiver.source_end:
        return None
    if archiver.coverage_time is None:
        return "the history is not known to be complete up to any moment"
    age = (now - archiver.coverage_time) / _SECOND
    return f"complete only up to {age:.0f} s ago" if age > within_seconds else None


def knock(url: str, method: str, timeout_seconds: float) -> None:
    """Ask for the URL, in the calling thread. Raises Unavailable for anything but an answer that says yes."""
    try:
        request = urllib.request.Request(url, method=method, data=b"" if method == "POST" else None)
        with urllib.request.urlopen(request, timeout=timeout_seconds) as answer:
            answer.read(_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        # It is the answer, too, and holds its connection.
        error.close()
        raise Unavailable(f"heartbeat to {urlsplit(url).hostname}: it answered {error.code}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        # An address is often the secret itself: the message names the host only.
        raise Unavailable(f"heartbeat to {urlsplit(url).hostname}: {error}") from error


class Heartbeat:
    """One cluster's heartbeat: never two requests at a time, never one that anything waits for."""

    def __init__(self, cluster: str, plan: AlertPlan, clock: Clock, log: Log) -> None:
        self.plan = plan
        self._cluster = cluster
        self._clock = clock
        self._log = log
        self._next = clock.monotonic()
        self._running: asyncio.Task[None] | None = None
        self._trouble = ""

    def consider(self, archiver: ArchiverState) -> None:
        """Knock if it is time and archiving is fresh; returns at once. A stale archiver is looked at again with
        the next call: the heartbeat comes back as soon as there is reason."""
        now = self._clock.monotonic()
        if self.plan.heartbeat_url is None or now < self._next:
            return
        if self._running is not None and not self._running.done():
            return
        stale = why_stale(archiver, self._clock.now(), self.plan.fresh_within_seconds)
        if stale is not None:
            # Only once it would have been sent anyway: a start takes its time.
            if now >= self._next + self.plan.heartbeat_every_seconds:
                self._say(Level.WARNING, "heartbeat_withheld", f"no heartbeat: {stale}")
            return
        self._next = now + self.plan.heartbeat_every_seconds
        self._running = asyncio.create_task(self._knock(self.plan.heartbeat_url))

    async def close(self) -> None:
        """Wait for the request under way; its own time limit bounds that."""
        if self._running is not None:
            await self._running

    async def _knock(self, url: str) -> None:
        plan = self.plan
        try:
            await asyncio.to_thread(knock, url, plan.heartbeat_method, plan.heartbeat_timeout_seconds)
        except Unavailable as error:
            self._say(Level.WARNING, "heartbeat_failed", error.message)
            return
        if self._trouble:
            self._trouble = ""
            self._log.emit(Level.INFO, "heartbeat_sent", "heartbeat sent again", cluster=self._cluster)

    def _say(self, level: Level, event: str, message: str) -> None:
        """Once per kind of trouble."""
        if self._trouble != event:
            self._trouble = event
            self._log.emit(level, event, message, cluster=self._cluster)
