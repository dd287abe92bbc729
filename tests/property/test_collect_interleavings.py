"""Garbage collection against everybody at once (P2, P3; EDGE 42): seeded schedules on the memory store.

After every write: nothing is missing that the log, a plan younger than the grace period, or a pin needs. At the end
nothing is left that nobody needs. A seed that fails reproduces: ``TL_SEEDS=1234:1235 pytest`` runs that one alone.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections import Counter

import pytest

from tests.support.collection_model import World
from tests.support.stage import inline
from timeline.archive import extent_writer
from timeline.catalog import branch_log
from timeline.format import keys, log, pack_column
from timeline.format.log import decode_entry
from timeline.maintain import garbage

STATE_EVERY = 8
"""Log entries are collected in short schedules, too."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No threads, small batches, log entries that grow old soon, and no object decoded twice."""
    monkeypatch.setattr(branch_log, "decode_entry", functools.lru_cache(2000)(decode_entry))
    monkeypatch.setattr(pack_column, "packs_named", functools.lru_cache(500)(pack_column.packs_named))
    monkeypatch.setattr(asyncio, "to_thread", inline)
    monkeypatch.setattr(extent_writer, "BATCH_BYTES", 1)
    monkeypatch.setattr(garbage, "_PACK_PREFIXES", tuple(f"{keys.PACKS}{digit:x}" for digit in range(16)))
    for module in (log, branch_log, garbage):
        monkeypatch.setattr(module, "STATE_EVERY", STATE_EVERY)


def play(seeds: range, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What was seen in all of them together."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        # In half of them a state is only where it must be.
        monkeypatch.setattr(log, "STATE_BYTES", 0 if seed % 2 else 64 << 10)
        world = World(seed)
        try:
            asyncio.run(world.run())
        except BaseException as error:
            error.add_note(
                f"seed {seed}, after {world.stage.steps} steps; reproduce with TL_SEEDS={seed}:{seed + 1}"
            )
            raise
        seen += world.seen
    return seen


def seeds(default: range) -> range:
    """``TL_SEEDS=first:end``, or the default."""
    first, _, end = os.environ.get("TL_SEEDS", "").partition(":")
    return range(int(first), int(end)) if first else default


def test_nothing_needed_is_ever_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = play(seeds(range(300)), monkeypatch)
    if "TL_SEEDS" not in os.environ:
        missing = [name for name in EVENTS if not seen[name]]
        assert missing == [], f"schedules that never meet {missing} prove nothing about it"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_needed_is_ever_deleted_in_ten_thousand_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    play(seeds(range(10_000)), monkeypatch)


EVENTS = (
    "crashed",
    "superseded",
    "superseded build",
    "superseded seal",
    "sealed",
    "backed up",
    "carried on",
    "began anew",
    "built",
    "dropped",
    "pinned",
    "pinned too late",
    "marked",
    "collected",
    "kept",
)
