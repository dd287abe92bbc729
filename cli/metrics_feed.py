"""Keeps the facts fresh that the metrics show, and serves them: what a daemon starts in its event loop.

The facts of store, source and host are gathered by a child process (``tl status --facts``) for each cluster in
turn: the daemon stays small, and whatever hangs in a store's or a database's client ends with the child. A scrape
reads what is there; when nothing answers any more it reads the last facts, and their age.

Intervals: FACTS_SECONDS between rounds, SIZE_SECONDS between two measurements of a store's size (a LIST request
for each thousand objects). Bounds: one child at a time, CHILD_SECONDS for a round and CHILD_SIZE_SECONDS for one
that measures; CHILD_BYTES of what it says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cli.facts import Facts, KeptFacts
from cli.metrics import CONTENT_TYPE, Observed, exposition, is_up, lag_seconds
from cli.metrics_server import Address, MetricsServer, Pages, Verdict, parse_address
from cli.observed import ClusterState, DaemonState
from cli.observed_json import decode
from cli.own_command import own_command
from timeline.clock import Clock, SystemClock

FACTS_SECONDS = 60.0
SIZE_SECONDS = 3600.0
CHILD_SECONDS = 180.0
CHILD_SIZE_SECONDS = 600.0
CHILD_BYTES = 16 << 20
STOP_SECONDS = 5.0
BEAT_SECONDS = 1.0
HEALTHY_SECONDS = 30.0
"""An event loop that did nothing for so long hangs."""
READY_LAG_SECONDS = 60.0
"""An archiver further behind than this is not ready."""


@dataclass(frozen=True, slots=True)
class Paces:
    """Intervals and limits, in seconds; shorter ones are for tests."""

    facts: float = FACTS_SECONDS
    size: float = SIZE_SECONDS
    child: float = CHILD_SECONDS
    child_size: float = CHILD_SIZE_SECONDS
    ready_lag: float = READY_LAG_SECONDS


def facts_command(cluster: ClusterState, *, size: bool, store_id: str | None) -> list[str]:
    """The child that asks about a cluster of tl.toml."""
    command = [*own_command("status", "--facts", "--cluster", cluster.cluster)]
    command += ["--size"] if size else []
    return command + (["--store-id", store_id] if store_id is not None else [])


class MetricsFeed:
    """Facts on a timer, and the server that shows them. ``start`` in a running event loop; then ``aclose``."""

    def __init__(
        self,
        address: Address,
        state: Callable[[], DaemonState | None],
        clock: Clock,
        *,
        paces: Paces | None = None,
        command: Callable[..., Sequence[str]] = facts_command,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``state`` returns at once and may be called from any thread; ``environment``: of the children."""
        self._state = state
        self._clock = clock
        self._paces = paces or Paces()
        self._command = command
        self._environment = environment
        self._kept: tuple[KeptFacts, ...] = ()
        self._sized: dict[str, float] = {}
        """When each cluster's size was last asked for, monotonic."""
        self._beat = clock.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        pages = Pages(metrics=lambda: exposition(self.observe), health=self.health, readiness=self.readiness)
        self.server = MetricsServer(address, pages, content_type=CONTENT_TYPE)

    def start(self) -> None:
        """Listen and begin to gather; raises TimelineError when the address cannot be had."""
        self.server.start()
        self._tasks = [asyncio.create_task(self._beat_regularly()), asyncio.create_task(self._gather())]

    async def aclose(self) -> None:
        """Stop gathering, then listening; a child at work is ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.server.stop)

    def observe(self) -> Observed:
        """What is known now."""
        return Observed(self._clock.now(), self._state(), self._kept)

    def health(self) -> Verdict:
        """Whether the event loop turns."""
        silent = self._clock.monotonic() - self._beat
        if silent > HEALTHY_SECONDS:
            return Verdict(False, (f"the event loop has not turned for {silent:.0f} s",))
        return Verdict(True, ("ok",))

    def readiness(self) -> Verdict:
        """Whether everything that is to be archived is, and hardly behind."""
        state, now = self._state(), self._clock.now()
        if state is None:
            return Verdict(False, ("the daemon has not said anything yet",))
        wrong = []
        for cluster in state.clusters:
            archiver = cluster.archiver
            if archiver is None:
                continue
            behind = lag_seconds(archiver, now)
            if not is_up(archiver, now) or archiver.phase != "streaming":
                wrong.append(f"{cluster.cluster}: the archiver is not streaming ({archiver.phase})")
            elif behind is None or behind > self._paces.ready_lag:
                wrong.append(f"{cluster.cluster}: {behind or 0:.0f} s behind")
        return Verdict(not wrong, tuple(wrong) or ("ok",))

    async def _beat_regularly(self) -> None:
        while True:
            self._beat = self._clock.monotonic()
            await self._clock.sleep(BEAT_SECONDS)

    async def _gather(self) -> None:
        while True:
            state = self._state()
            clusters = state.clusters if state is not None else ()
            known = {kept.cluster: kept for kept in self._kept}
            for cluster in clusters:
                kept = known.get(cluster.cluster) or KeptFacts(cluster.cluster, self._clock.now())
                known[cluster.cluster] = await self._round(cluster, kept)
                # Shown as soon as it is known; a cluster that left the configuration is forgotten.
                names = {one.cluster for one in clusters}
                self._kept = tuple(one for name, one in known.items() if name in names)
            await self._clock.sleep(self._paces.facts if clusters else BEAT_SECONDS)

    async def _round(self, cluster: ClusterState, kept: KeptFacts) -> KeptFacts:
        now = self._clock.monotonic()
        last = self._sized.get(cluster.cluster)
        # The first round is to tell something soon: a size takes its time.
        size = kept.store is not None and (last is None or now - last >= self._paces.size)
        if size:
            # Also when it fails: a store that cannot be listed is not listed again at once.
            self._sized[cluster.cluster] = now
        identity = kept.store.store_id if kept.store is not None else None
        command = self._command(cluster, size=size, store_id=identity)
        limit = self._paces.child_size if size else self._paces.child
        try:
            return kept.with_round(await _run(command, limit, self._environment))
        except (OSError, ValueError, TimeoutError) as error:
            return kept.without_answer(str(error) or type(error).__name__)


async def start_metrics(
    address: str,
    facts: Callable[[], DaemonState | None],
    clock: Clock | None = None,
    environment: Mapping[str, str] | None = None,
) -> MetricsFeed:
    """Serve what a daemon knows at ``ADDR:PORT``; call ``aclose`` at the end. Raises UsageError, TimelineError."""
    feed = MetricsFeed(parse_address(address), facts, clock or SystemClock(), environment=environment)
    feed.start()
    return feed


async def _run(command: Sequence[str], limit_seconds: float, environment: Mapping[str, str] | None) -> Facts:
    """What the child says; raises TimeoutError, OSError, ValueError with the reason in one line."""
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        limit=CHILD_BYTES,
        env=environment,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(limit_seconds):
            if child.stdout is None:
                raise ValueError("the child has no output")
            line = await child.stdout.readline()
            code = await child.wait()
    except TimeoutError as error:
        raise TimeoutError(f"no facts within {limit_seconds:g} s") from error
    finally:
        await _end(child)
    try:
        told = json.loads(line)
    except ValueError as error:
        raise ValueError(f"`tl status --facts` said nothing and ended with {code}") from error
    if isinstance(told, dict) and "error" in told and "gathered_at" not in told:
        raise ValueError(str(told["error"]))
    return decode(Facts, line)


async def _end(child: asyncio.subprocess.Process) -> None:
    if child.returncode is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await child.wait()
                return
