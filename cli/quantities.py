"""Durations and sizes as people write them in tl.toml: ``90s``, ``15m``, ``6h``, ``7d``; ``64MiB``, ``10GB``. Pure."""

from __future__ import annotations

import math
import re

_SECONDS = {
    "ms": 0.001,
    "s": 1.0,
    "sec": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86_400.0,
    "w": 7 * 86_400.0,
}
_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_duration(text: str) -> float:
    """Seconds; raises ValueError saying how one is written. A bare ``0`` needs no unit."""
    found = _QUANTITY.fullmatch(text)
    if found is not None and (found[2] in _SECONDS or (found[2] == "" and float(found[1]) == 0)):
        seconds = float(found[1]) * _SECONDS.get(found[2], 1.0)
        if math.isfinite(seconds):
            return seconds
    raise ValueError("a duration is expected: 90s, 15m, 6h or 7d")


def parse_size(text: str) -> int:
    """Bytes, by powers of 1024 whatever the spelling; raises ValueError saying how one is written."""
    found = _QUANTITY.fullmatch(text)
    if found is not None:
        unit = found[2].lower().removesuffix("b").removesuffix("i")
        if unit in _BYTES and found[2].lower() != "i":
            return int(float(found[1]) * _BYTES[unit])
    raise ValueError("a size is expected: 512KiB, 64MiB or 10GiB")


def write_duration(seconds: float) -> str:
    """The shortest spelling that ``parse_duration`` reads back exactly (to the millisecond)."""
    for unit in ("d", "h", "m", "s"):
        if seconds >= _SECONDS[unit] and seconds % _SECONDS[unit] == 0:
            return f"{int(seconds / _SECONDS[unit])}{unit}"
    return "0s" if seconds == 0 else f"{round(seconds * 1000)}ms"


def write_size(count: int) -> str:
    """A spelling that ``parse_size`` reads back exactly."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor and count % factor == 0:
            return f"{count // factor}{unit}"
    return str(count)
