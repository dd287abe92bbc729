"""Pins in the store: who outside of it still reads something (SPEC.md, [PIN-1] to [PIN-3])."""

from __future__ import annotations

from dataclasses import dataclass

from timeline.catalog.parallel import in_parallel
from timeline.clock import Micros
from timeline.errors import NotFound
from timeline.format import keys
from timeline.format.pin import PIN_MARGIN_MICROS, Pin, decode_pin
from timeline.store.base import Listed, Store

_READS = 16


@dataclass(frozen=True, slots=True)
class Pins:
    """All pins of a store at one moment."""

    live: tuple[Pin, ...]
    expired: tuple[Listed, ...]
    """Their objects: garbage."""


async def read_pins(store: Store, now: Micros) -> Pins:
    """The pins, told apart by ``now`` and the margin that they are given.

    Raises DamagedStore, UnknownFeature for one that cannot be read: then nothing may be deleted, for nobody knows
    what it keeps.
    """

    async def read(listed: Listed) -> tuple[Listed, Pin] | None:
        try:
            return listed, decode_pin(await store.get(listed.key), listed.key)
        except NotFound:
            # Expired, and collected by somebody else since the listing.
            return None

    listed = [one for one in await store.list(keys.PINS) if keys.parse_pin(one.key) is not None]
    found = [one for one in await in_parallel(listed, read, limit=_READS) if one is not None]
    return Pins(
        live=tuple(pin for _, pin in found if pin.until + PIN_MARGIN_MICROS >= now),
        expired=tuple(one for one, pin in found if pin.until + PIN_MARGIN_MICROS < now),
    )
