"""The numbers in what a job printed: ``tl drill --json`` and its like tell more than an exit code."""

from __future__ import annotations

import json
import math

from cli.observed import Figure

MOST_FIGURES = 32
_NAME_LENGTH = 64


def read_figures(printed: str) -> tuple[Figure, ...]:
    """Numbers and truth values (1 and 0) of the JSON object on the last line; none where there is no such line.

    Those of an object in it are named with a dot: ``data.oldest_age_seconds``.
    """
    lines = printed.strip().splitlines()
    try:
        told = json.loads(lines[-1]) if lines else None
    except ValueError:
        return ()
    if not isinstance(told, dict):
        return ()
    pairs = list(told.items())
    pairs += [
        (f"{outer}.{name}", value)
        for outer, inner in told.items()
        if isinstance(inner, dict)
        for name, value in inner.items()
    ]
    found = [
        Figure(name, float(value))
        for name, value in pairs
        if isinstance(value, bool | int | float) and len(name) <= _NAME_LENGTH and _finite(value)
    ]
    return tuple(found[:MOST_FIGURES])


def _finite(value: float) -> bool:
    return math.isfinite(value) and abs(value) < 2**63
