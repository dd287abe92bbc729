"""The archiver: streams a server's WAL into a store until it is told to stop.

Start and reconnect are one path: look at the log and the store's tail, meet the server's line of history,
stream from the end of what is durable. Nothing is carried over in memory, so a crash at any instant is just
a reconnect (P1).

Order on the first run: the slot (it holds WAL from then on), then the log's first entry, then the stream; a
base backup may begin once ``begun`` is set (EDGE 2). The epoch is claimed when the server has given us the
slot, so that an archiver started by mistake beside a healthy one does not fence it (P4, EDGE 11).

What may pass (connection, store, a busy slot) is tried again with growing, jittered pauses; what cannot
(Fenced, SplitBrain, WalLost, UsageError, …) ends ``run`` with that error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from timeline.archive.budget import RequestBudget
from timeline.archive.committer import Recut
from timeline.archive.connect import ConnectionRefused, ServerError
from timeline.archive.run_state import RunState
from timeline.archive.session import Session
from timeline.archive.slot import SlotBusy, drop_slot, find_slots, slot_name
from timeline.archive.source import Source
from timeline.archive.status import ArchiverConfig, ArchiverStatus, Phase
from timeline.catalog.branch_log import BranchLog
from timeline.catalog.meta import read_meta
from timeline.clock import Clock, sleep_unless
from timeline.errors import NotFound, TimelineError, Unavailable
from timeline.ids import MAIN
from timeline.lsn import Lsn
from timeline.store.base import Store

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
LONGEST_BUSY_PAUSE_SECONDS = 5.0
"""While another connection uses the slot: a take-over should not have to wait long for us."""
RECUTS = 100
"""Starting again over chunks of an earlier run, without anything durable in between, is given up after so
many."""
WORKERS = 3
"""Threads for the scan and for compression."""


class Archiver:
    """One run of `tl archive`. ``run`` may be called once."""

    def __init__(
        self,
        store: Store,
        config: ArchiverConfig,
        clock: Clock,
        *,
        branch: str = MAIN,
        on_status: Callable[[ArchiverStatus], None] = lambda status: None,
    ) -> None:
        """``on_status`` is called at every change of phase and every ``probe_seconds``; it must return at
        once."""
        self._store = store
        self._config = config
        self._clock = clock
        self._branch = branch
        self._on_status = on_status
        self.begun = asyncio.Event()
        """Set when the slot holds WAL and the log has begun: from then on a base backup may start."""
        self.status = ArchiverStatus()
        self._state: RunState | None = None

    @property
    def durable(self) -> Lsn | None:
        """Everything before it is in the store, as of this moment; ``None`` before anything was streamed."""
        committer = self._state.committer if self._state is not None else None
        return committer.durable if committer is not None else None

    async def run(self, stop: asyncio.Event) -> None:
        """Archive until ``stop`` is set; then what was received is made durable and reported, and ``run``
        returns.

        Raises Fenced, SplitBrain, WalLost, UsageError, SlotMissing, SlotBusy (after
        ``slot_patience_seconds``), ProtocolError, DamagedStore, WalFormatError. Unavailable only when the
        last flush before a stop failed.
        """
        meta = await read_meta(self._store, writing=True)
        config = self._config
        slot = None if config.slotless else (config.slot or slot_name(meta.store_id, self._branch))
        writer = self._clock.token(8)
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="archive") as executor:
            run = RunState(
                store=self._store,
                meta=meta,
                log=BranchLog(self._store, self._branch, self._clock, writer),
                branch=self._branch,
                writer=writer,
                config=config,
                clock=self._clock,
                executor=executor,
                budget=RequestBudget(config.requests_per_second),
                publish=self._publish,
                status=replace(self.status, slot_name=slot),
                slot=slot,
                begun=self.begun.set,
            )
            self._state = run
            try:
                await self._run(run, stop)
            except TimelineError as error:
                run.tell(phase=Phase.STOPPED, error=error.message, hint=error.hint)
                raise
            run.tell(phase=Phase.STOPPED, error=None, hint=None)

    async def _run(self, run: RunState, stop: asyncio.Event) -> None:
        pause = FIRST_PAUSE_SECONDS
        busy_since: float | None = None
        recuts = 0
        while not stop.is_set():
            run.moved = False
            if run.status.phase is not Phase.WAITING:
                run.tell(phase=Phase.CONNECTING)
            try:
                async with Session.open(run) as session:
                    await session.stream(stop)
                continue
            except Recut as recut:
                recuts = 0 if run.moved else recuts + 1
                if recuts > RECUTS:
                    raise Unavailable(f"the chain of chunks cannot be followed at {recut.end}") from recut
                continue
            except TimelineError as error:
                if stop.is_set() or not _may_pass(error, run):
                    raise
                now = self._clock.monotonic()
                if not isinstance(error, SlotBusy):
                    busy_since = None
                elif busy_since is None:
                    busy_since = now
                elif now - busy_since > self._config.slot_patience_seconds:
                    raise
                run.tell(phase=Phase.WAITING, error=error.message, hint=error.hint)
                longest = LONGEST_BUSY_PAUSE_SECONDS if busy_since is not None else LONGEST_PAUSE_SECONDS
                pause = FIRST_PAUSE_SECONDS if run.moved else min(pause * 2, longest)
            await sleep_unless(self._clock, pause * (0.5 + self._clock.random() / 2), stop)

    def _publish(self, status: ArchiverStatus) -> None:
        self.status = status
        self._on_status(status)


def _may_pass(error: TimelineError, run: RunState) -> bool:
    if isinstance(error, Unavailable | NotFound | ServerError):
        return True
    # Passwords are rotated and pg_hba.conf is edited while we run: what once worked may work again.
    return isinstance(error, ConnectionRefused) and run.streamed


@dataclass(frozen=True, slots=True)
class Detached:
    """What `tl detach` removed."""

    dropped: tuple[str, ...]
    """Names of slots."""


async def detach(conninfo: str, store_id: str) -> Detached:
    """Remove every slot that was made for the store; raises SlotBusy while an archiver uses one, and then
    none of the others is touched."""
    source = await Source.open(conninfo)
    try:
        slots = await find_slots(source.connection, store_id)
        for slot in slots:
            if slot.active:
                raise SlotBusy(slot.name, slot.active_pid)
        return Detached(tuple([slot.name for slot in slots if await drop_slot(source.connection, slot.name)]))
    finally:
        await source.aclose()
