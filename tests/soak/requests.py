"""Whether the cost model says what the S3 server counted: the archiver's part of a soak, run through the model.

Compared is what ``timeline/archive`` asked for. Jobs, snapshots, drills and branches read what their data asks for; their
requests are in the report, by command, and in no model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.cost import MeteredStore, Stretch, archive_stretch

AGENT = "timeline/archive"
MOST_OFF = 0.1
"""What the model may be off by, relative to what was counted."""
LONG_MINUTES = 10.0
"""Judged so in a soak this long. In three minutes on a busy machine a session's start, a stall, or seconds of sealing that
the model does not have are more than that; what holds there, ``tests/integration/test_soak.py`` says."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One verb."""

    verb: str
    counted: int
    modelled: float

    @property
    def off_by(self) -> float:
        """Relative to what was counted."""
        return abs(self.modelled - self.counted) / max(1, self.counted)


def compare(
    requests: Mapping[str, Mapping[str, int]], *, seconds: float, wal_bytes: int, starts: int
) -> tuple[Compared, ...]:
    """PUT, GET and LIST of the archiver; ``starts``: sessions with the source, of however many processes.

    The numbers of chunks and of seals are parameters and are taken from what was counted: they depend on how busy the
    machine is, for a synchronous archiver cuts as soon as it can, and while one seal is at work the next one grows.
    """
    counted = requests.get(AGENT, {})
    chunks = counted.get("PUT wal", 0)
    # So little WAL makes one pack a seal.
    seals = counted.get("PUT packs", 0)
    stretch = Stretch(seconds, chunks, max(1, wal_bytes // max(1, chunks)), starts, seals)
    model = asyncio.run(archive_stretch(MeteredStore(), stretch))
    verbs: dict[str, int] = {}
    for name, count in counted.items():
        verb = name.split()[0]
        verbs[verb] = verbs.get(verb, 0) + count
    return tuple(
        Compared(verb, verbs.get(verb, 0), modelled)
        for verb, modelled in (("PUT", model.put), ("GET", model.get), ("LIST", model.list))
    )
