"""The pin of a lazy branch: what keeps the collector from its snapshot for as long as the branch lives (P10).

The mount writes it, in the background: nobody waits for it. A branch with a time to live gets one pin for all of it, any
other one for PIN_SECONDS, and another well before that ends. Nothing is ever deleted by us (P2): a pin expires.

Where the store refuses (a reader's credentials, a store mounted read-only) the branch lives on what the collector's
grace period leaves it, and says so: ``pin.json`` beside the branch's record tells what became of it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from timeline.catalog.branch_log import read_head
from timeline.clock import Clock, Micros
from timeline.errors import TimelineError
from timeline.format import keys
from timeline.format.branch_state import Snapshot
from timeline.format.pin import PIN_ID_BYTES, Pin, encode_pin
from timeline.format.value_json import from_json, to_json
from timeline.store.base import Store

_log = logging.getLogger(__name__)

PIN_SECONDS = 30 * 86_400
"""For how long a branch without a time to live is pinned at a time."""
RENEW_SECONDS = PIN_SECONDS // 2
"""It gets another pin when its last one ends so soon."""
SHORT_SECONDS = 3600
"""A branch that ends so soon gets none: the collector's grace period is longer, and CI makes many."""
MARGIN_SECONDS = 3600
"""A pin outlives its branch by so much: the host may be busy when its time is over."""
_LONGEST_SLEEP_SECONDS = 3600.0
_PATIENCE_SECONDS = 60.0
"""A store that does not answer for so long is asked again after _LONGEST_SLEEP_SECONDS."""
_MICROS = 1_000_000


@dataclass(frozen=True, slots=True)
class PinNote:
    """``pin.json``: how long a branch's snapshot is kept for it."""

    id: str | None
    """Of the newest pin; ``None`` while there is none."""
    until: Micros | None
    """Its end."""
    warning: str | None
    """Why it may not be kept for longer."""


def read_note(path: Path | str) -> PinNote | None:
    """The note; ``None`` for a branch that has none (yet)."""
    try:
        return from_json(PinNote, json.loads(Path(path).read_bytes()))
    except (FileNotFoundError, ValueError):
        return None


async def keep_pinned(
    store: Store,
    clock: Clock,
    *,
    branch: str,
    snapshot: Snapshot,
    expires: Micros | None,
    note: str,
    named: str,
) -> None:
    """See to it that a pin stands, until cancelled; failures are noted, and tried again.

    ``branch``: of the store, whose log names the snapshot. ``expires``: when the branch of this host does.
    ``note``: where ``pin.json`` is. ``named``: what people call the branch.
    """
    if expires is not None and expires - clock.now() <= SHORT_SECONDS * _MICROS:
        return
    while True:
        known = read_note(note)
        until = known.until if known is not None else None
        if is_due(until, expires, clock.now()):
            _write(note, await _renew(store, clock, branch, snapshot, expires, until, named))
        await clock.sleep(_LONGEST_SLEEP_SECONDS)


def is_due(until: Micros | None, expires: Micros | None, now: Micros) -> bool:
    """Whether another pin is needed. Pure."""
    if until is None:
        return True
    if expires is not None:
        return until < expires
    return until - now < RENEW_SECONDS * _MICROS


async def _renew(
    store: Store,
    clock: Clock,
    branch: str,
    snapshot: Snapshot,
    expires: Micros | None,
    before: Micros | None,
    named: str,
) -> PinNote:
    now = clock.now()
    until = now + PIN_SECONDS * _MICROS if expires is None else expires + MARGIN_SECONDS * _MICROS
    pin = Pin(
        id=clock.token(PIN_ID_BYTES),
        branch=branch,
        snapshot=snapshot,
        until=until,
        created=now,
        host=f"branch {named} on {socket.gethostname()}",
    )
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await store.create(keys.pin(pin.id), encode_pin(pin))
            # A pin came in time if what it keeps was not garbage when it came [PIN-2].
            head = await read_head(store, branch)
    except (TimelineError, TimeoutError) as error:
        reason = error.message if isinstance(error, TimelineError) else "the store does not answer"
        _log.warning("no pin: %s", reason)
        if before is not None and before > now:
            return PinNote(None, before, f"its pin ends and cannot be renewed: {reason}")
        return PinNote(
            None,
            None,
            f"nothing pins its snapshot in the store ({reason}): once retention drops the snapshot, the branch "
            "outlives it only by the grace period of `tl gc`",
        )
    kept = before is not None and before > now
    is_named = head is not None and any(one.id == snapshot.id for one in head.state.snapshots)
    warning = None
    if not kept and not is_named:
        warning = (
            f"snapshot {snapshot.id} had left the log before it was pinned: what the branch has not read yet may be "
            "collected"
        )
    return PinNote(pin.id, until, warning)


def _write(path: str, note: PinNote) -> None:
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(to_json(note), file)
        os.replace(temporary, path)
    except OSError as error:
        _log.warning("%s: %s", path, error)
