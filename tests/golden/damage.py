"""Ways to damage a golden store: one of its objects, changed in one place.

The damage file of a store holds, by kind of object and way, the errors that each must give, word for word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Damage:
    """What happens to one object."""

    key: str
    flip: int | None = None
    """Invert the byte at this offset (negative: from the end)."""
    cut: int | None = None
    """Keep only so many bytes."""
    delete: bool = False

    def apply(self, objects: Mapping[str, bytes]) -> dict[str, bytes]:
        """A damaged copy."""
        damaged = dict(objects)
        data = bytearray(damaged.pop(self.key))
        if self.delete:
            return damaged
        if self.flip is not None:
            data[self.flip] ^= 0xFF
        damaged[self.key] = bytes(data if self.cut is None else data[: self.cut])
        return damaged


Change = Callable[[str, bytes], Damage]

CHANGES: dict[str, Change] = {
    "first-byte": lambda key, data: Damage(key, flip=0),
    "middle-byte": lambda key, data: Damage(key, flip=len(data) // 2),
    "last-byte": lambda key, data: Damage(key, flip=-1),
    "cut": lambda key, data: Damage(key, cut=len(data) // 2),
    "emptied": lambda key, data: Damage(key, cut=0),
    "deleted": lambda key, data: Damage(key, delete=True),
}
