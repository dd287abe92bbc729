"""Pins: what a branch outside the store still reads, and until when (SPEC.md, chapter 9).

A pin is a sealed JSON object under a random name of its own, written once. It repeats the snapshot as the log
writes it, so that the collector keeps its objects even after the log has dropped it; a branch that lives longer
writes another one.
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.clock import Micros
from timeline.errors import DamagedStore
from timeline.format import keys
from timeline.format.branch_state import SealedRange, Snapshot
from timeline.format.sealed_value import decode_value, encode_value

PIN_ID_BYTES = 16
"""``Clock.token(PIN_ID_BYTES)`` makes the id of a pin: 32 hex digits."""
PIN_MARGIN_MICROS = 86_400 * 1_000_000
"""The collector honours a pin for so much longer than it says: clocks of hosts differ."""


@dataclass(frozen=True, slots=True)
class Pin:
    """One pin."""

    id: str
    """32 hex digits, random; its key is ``pins/<id>``."""
    branch: str
    """Branch of the store that the snapshot belongs to (``main``)."""
    snapshot: Snapshot
    """Complete: all that it names stays."""
    until: Micros
    """Not needed after this, by the clock of the host that wrote it."""
    created: Micros
    host: str
    """For people: who holds it, e.g. ``branch fix on db-tools-3``."""
    sealed: tuple[SealedRange, ...] = ()
    """WAL that is to stay, too: what a branch that may be reset replays from the snapshot on."""


def encode_pin(pin: Pin) -> bytes:
    """The object."""
    return encode_value(pin)


def decode_pin(data: bytes, key: str) -> Pin:
    """The verified pin, which must be the one its key names; raises DamagedStore, UnknownFeature."""
    pin = decode_value(Pin, "pin", data, key)
    if keys.parse_pin(key) != pin.id:
        raise DamagedStore(key, 0, f"expected this key's pin, found {pin.id}")
    return pin
