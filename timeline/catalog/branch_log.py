"""The branch log: reading its head, and committing the next change to it.

Consistency: creating the next number *is* the commit, and of any number of writers who try one number
exactly one creates it. So every entry was computed from the entry before it, and a change is checked
(``Change.apply``) against exactly the state it lands on.

Crash and cancellation: an append that is interrupted has either happened as a whole or not at all; the caller
finds out by loading the log again. ``Unavailable`` out of ``append`` means the same: unknown until read back.

Zombies: a writer that slept between reading the head and creating its number may find that number free
again, because the collector removed it long after it was superseded. So after creating, a writer lists once
more. When the newest entry is not its own, then either others have built on it in the meantime, or it was
never part of the log; ``_stands_in`` tells which by replaying the entries since.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import reduce

from timeline.catalog.parallel import in_parallel
from timeline.clock import Clock
from timeline.errors import DamagedStore, Fenced, LogConflict, MissingObject, NotFound, Unavailable
from timeline.format import keys
from timeline.format.branch_state import BranchState
from timeline.format.log import STATE_EVERY, STATE_OFTEN, LogEntry, decode_entry, encode_entry
from timeline.format.log_change import Change, ClaimEpoch
from timeline.store.base import Store

ATTEMPTS = 24
"""An append is given up after losing so many races."""
_WAIT_SECONDS = 0.02
"""Upper bound of the random wait after the first lost race; doubles up to _LONGEST_WAIT_SECONDS."""
_LONGEST_WAIT_SECONDS = 2.0
_GETS = 32
"""Entries fetched at once."""


@dataclass(frozen=True, slots=True)
class LogHead:
    """The newest entry's number and the state after it."""

    number: int
    state: BranchState


async def read_head(store: Store, branch: str, *, known: LogHead | None = None) -> LogHead | None:
    """The head of a branch's log; ``None`` for a branch that was never begun. ``known``: a head of before.

    Costs one LIST and one GET while states are shorter than 64 KiB, up to 10 while they are shorter than 1 MiB, else
    up to 100; with a known head one for each entry since, as long as it is of the same hundred. Raises DamagedStore,
    MissingObject.
    """
    try:
        return await _read_head_once(store, branch, known)
    except NotFound:
        # The collector may have removed what an already superseded head was built on.
        pass
    try:
        return await _read_head_once(store, branch)
    except NotFound as error:
        raise MissingObject(error.key) from error


async def read_changes(store: Store, branch: str, numbers: range) -> AsyncGenerator[Change, None]:
    """The changes of these entries, in order; raises NotFound when one of them was collected, DamagedStore."""
    for first in range(numbers.start, numbers.stop, _GETS):
        for entry in await _read_entries(store, branch, range(first, min(first + _GETS, numbers.stop))):
            yield entry.change


async def read_whole_head(store: Store, branch: str) -> tuple[LogHead | None, tuple[str, ...]]:
    """The newest head that can be read at all, and the entries that are missing from what is newer.

    For incomplete copies of a store; nobody may append to such a head. ``None`` when no head can be read. Costs a
    listing of the log, and a few GETs for each missing entry. Raises DamagedStore.
    """
    missing: list[str] = []
    parsed = [keys.parse_log_entry(listed.key) for listed in await store.list(keys.log_prefix(branch))]
    numbers = [named[1] for named in parsed if named is not None]
    below = max(numbers, default=-1) + 1
    while newest := [number for number in numbers if number < below]:
        try:
            return await _head_at(store, branch, max(newest)), tuple(missing)
        except NotFound as error:
            missing.append(error.key)
            absent = keys.parse_log_entry(error.key)
            below = min(max(newest), absent[1]) if absent is not None else max(newest)
    return None, tuple(missing)


class BranchLog:
    """The log of one branch; reading needs read and list permission only (P10)."""

    def __init__(self, store: Store, branch: str, clock: Clock, writer: str) -> None:
        """``writer``: random id of this process's run, written into every entry."""
        self._store = store
        self._clock = clock
        self._writer = writer
        self._known: LogHead | None = None
        self.branch = branch

    async def load(self) -> LogHead | None:
        """The head; as ``read_head``, from what this object has read or written before."""
        self._known = await read_head(self._store, self.branch, known=self._known)
        return self._known

    async def append(
        self, change: Change, *, epoch: int = 0, check: Callable[[BranchState], None] | None = None
    ) -> LogHead:
        """Commit a change; the newest head, which includes it and perhaps later changes of others.

        ``epoch``: the archiver's own, 0 for everybody else (P4). ``check``: is given the very state that the change is made
        to, and raises whatever shall stop it. Raises Fenced when the branch has a higher
        one, LogConflict when the change does not fit the state (any more), Unavailable after ATTEMPTS lost
        races.
        """
        for attempt in range(ATTEMPTS):
            head = await self.load()
            state = head.state if head is not None else BranchState.empty(self.branch)
            _check_epoch(state, change, epoch)
            if check is not None:
                check(state)
            entry = LogEntry(
                number=head.number + 1 if head is not None else 0,
                branch=self.branch,
                writer=self._writer,
                nonce=self._clock.token(16),
                epoch=epoch,
                at=self._clock.now(),
                change=change,
                state=change.apply(state),
            )
            if await self._store.create(keys.log_entry(self.branch, entry.number), encode_entry(entry)):
                newest = await self._confirm(entry)
                if newest is not None:
                    self._known = newest
                    if newest.state.epoch > epoch > 0:
                        raise _fenced(self.branch, newest.state, epoch)
                    return newest
            await self._clock.sleep(
                self._clock.random() * min(_LONGEST_WAIT_SECONDS, _WAIT_SECONDS * 2.0**attempt)
            )
        raise Unavailable(
            f"branch {self.branch}: lost the race for the next log entry {ATTEMPTS} times",
            hint="many writers at once; try again",
        )

    async def claim_epoch(self) -> tuple[int, LogHead]:
        """Take the branch over as its archiver: the new epoch, and the head with it.

        From then on every archiver of an earlier epoch is fenced. Raises Fenced when another one claimed a
        still higher epoch at the same moment, Unavailable after ATTEMPTS lost races.
        """
        for _ in range(ATTEMPTS):
            head = await self.load()
            epoch = (head.state.epoch if head is not None else 0) + 1
            try:
                return epoch, await self.append(ClaimEpoch(epoch), epoch=epoch)
            except LogConflict:
                # Somebody else took this very epoch between load and append; the next one may still be free.
                await self._clock.sleep(self._clock.random() * _WAIT_SECONDS)
        raise Unavailable(f"branch {self.branch}: lost the race for an epoch {ATTEMPTS} times")

    async def _confirm(self, mine: LogEntry) -> LogHead | None:
        """The newest head if my entry is part of the log, ``None`` if it never was (see Zombies above)."""
        newest = await _newest_number(self._store, self.branch)
        if newest == mine.number and mine.state is not None:
            return LogHead(mine.number, mine.state)
        if newest is None or newest < mine.number:
            raise DamagedStore(
                keys.log_entry(self.branch, mine.number), 0, "expected the entry just created in a listing"
            )
        try:
            head = await _head_at(self._store, self.branch, newest)
            return head if await self._stands_in(mine, newest) else None
        except NotFound:
            return None

    async def _stands_in(self, mine: LogEntry, newest: int) -> bool:
        """Whether the entries up to ``newest`` were built on mine.

        A state written after mine must be what my state becomes through the changes in between; entries
        without a state are read through mine anyway. Raises NotFound when entries after mine are gone: then
        mine is void.
        """
        if mine.state is None:
            raise ValueError("an entry of one's own has its state")
        state = mine.state
        for first in range(mine.number + 1, newest + 1, _GETS):
            for entry in await _read_entries(
                self._store, self.branch, range(first, min(first + _GETS, newest + 1))
            ):
                try:
                    state = entry.change.apply(state)
                except LogConflict:
                    return False
                if entry.state is not None:
                    return entry.state == state
        return True


async def _read_head_once(store: Store, branch: str, known: LogHead | None = None) -> LogHead | None:
    newest = await _newest_number(store, branch)
    return None if newest is None else await _head_at(store, branch, newest, known)


async def _newest_number(store: Store, branch: str) -> int | None:
    listed = await store.list(keys.log_prefix(branch), limit=1)
    if not listed:
        return None
    parsed = keys.parse_log_entry(listed[0].key)
    if parsed is None:
        raise DamagedStore(listed[0].key, 0, "expected nothing but log entries here")
    return parsed[1]


async def _head_at(store: Store, branch: str, newest: int, known: LogHead | None = None) -> LogHead:
    """The head at that number. Entries are read back to the nearest with a state; to a known head, where that is
    nearer and of the same hundred: then whoever knows nothing would read the very same entries.

    In three goes at most: the newest, which holds the state while states are short; back to the nearest tenth, which
    holds it while they are not very long; the rest. Raises NotFound when one of those that are needed is missing.
    """
    first = newest - newest % STATE_EVERY
    if known is not None and not first <= known.number <= newest:
        known = None
    if known is not None:
        if known.number == newest:
            return known
        first = known.number + 1
    near = max(first, newest - 1 - (newest - 1) % STATE_OFTEN)
    since: list[Change] = []
    for numbers in (range(newest, newest + 1), range(near, newest), range(first, near)):
        for entry in reversed(await _read_those_there(store, branch, numbers)):
            if isinstance(entry, NotFound):
                raise entry
            if entry.state is not None:
                return LogHead(newest, _replay(entry.state, since[::-1], branch, newest))
            since.append(entry.change)
    if known is None:
        raise DamagedStore(keys.log_entry(branch, first), 0, "expected a state in this entry")
    return LogHead(newest, _replay(known.state, since[::-1], branch, newest))


async def _read_those_there(store: Store, branch: str, numbers: range) -> list[LogEntry | NotFound]:
    """All of them at once. One that is missing need not be one that is needed: a copy of a store may be whole from
    the nearest state on (EDGE 63)."""

    async def read(number: int) -> LogEntry | NotFound:
        try:
            return await _read_entry(store, branch, number)
        except NotFound as error:
            return error

    return await in_parallel(numbers, read, limit=_GETS)


async def _read_entries(store: Store, branch: str, numbers: range) -> list[LogEntry]:
    async def read(number: int) -> LogEntry:
        return await _read_entry(store, branch, number)

    return await in_parallel(numbers, read, limit=_GETS)


async def _read_entry(store: Store, branch: str, number: int) -> LogEntry:
    key = keys.log_entry(branch, number)
    return decode_entry(await store.get(key), key)


def _replay(state: BranchState, changes: list[Change], branch: str, newest: int) -> BranchState:
    try:
        return reduce(lambda before, change: change.apply(before), changes, state)
    except LogConflict as error:
        raise DamagedStore(
            keys.log_entry(branch, newest), 0, f"expected changes that follow: {error}"
        ) from error


def _check_epoch(state: BranchState, change: Change, epoch: int) -> None:
    if epoch == 0:
        return
    if state.epoch > epoch:
        raise _fenced(state.branch, state, epoch)
    if state.epoch < epoch and not isinstance(change, ClaimEpoch):
        raise LogConflict(f"epoch {epoch} of branch {state.branch} was never claimed")


def _fenced(branch: str, state: BranchState, epoch: int) -> Fenced:
    return Fenced(
        f"branch {branch}: another archiver took over (its epoch is {state.epoch}, mine {epoch})",
        hint="stop one of the two archivers",
    )
