"""The golden stores of format 1 stay readable, and each way to damage them gives one exact error ([COM-1])."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from restore import rescue
from tests.golden.damage import CHANGES
from tests.golden.reading import GoldenReader
from tests.golden.store import NEVER_READ_BY_RESCUE, STORES, V1B, GoldenStore, choose, rescue_error
from tests.support.manual_clock import ManualClock
from timeline.errors import DamagedStore
from timeline.format import branch_state, keys, log, log_change, value_json
from timeline.format.mark import decode_mark
from timeline.maintain.garbage import find_garbage
from timeline.store.memory import MemoryStore

UNNOTICED = {"log entry/deleted", "chunk/deleted", "pin/deleted", "evidence/deleted"}
"""Without its newest entry or chunk a store is what it was a moment before, and nothing names pins and evidence:
only who remembers could tell."""

DEFAULTS: dict[str, Any] = {"merged": {}, "marks": {}, "pins": {}, "drills": {}, "nonces": {}}
"""What GoldenReader finds of kinds that a store is older than."""
NOTHING_COLLECTED = {"mark": None, "collected": 0, "last": None}

each_store = pytest.mark.parametrize("golden", STORES, ids=lambda golden: golden.name)


@each_store
def test_golden_store_reads_as_it_did(golden: GoldenStore) -> None:
    """[COM-1], [JSN-4]: log, state, files, WAL and indexes, down to the last byte; members that are younger than the
    store have their defaults."""
    found, expected = GoldenReader(golden.objects).read(), DEFAULTS | golden.expected
    expected["state"] = {"collection": NOTHING_COLLECTED} | expected["state"]
    for now, then in zip(found["entries"], expected["entries"], strict=True):
        if "began" in now["change"]:
            then["change"].setdefault("began", None)
    assert found == expected
    assert rescue_error(golden.objects) is None


@each_store
def test_the_second_reader_makes_the_same_state_of_all_changes(golden: GoldenStore) -> None:
    """[LOG-4], P12: as if no entry but the first had one."""
    state: Any = value_json.to_json(branch_state.BranchState.empty("main"))
    for key in sorted(filter(keys.parse_log_entry, golden.objects), reverse=True):
        rescue.apply_change(state, rescue.unseal(golden.objects[key], key)["change"])
    assert _useful(state) == _useful(golden.expected["state"])


def _useful(state: Any) -> Any:
    """A state without what the second reader has no use for, sealed ranges in order."""
    unused = ("branch", "coverage", "progress", "collection")
    ranges = sorted(state["sealed"], key=lambda one: (one["tli"], one["start"]))
    return {name: value for name, value in state.items() if name not in unused} | {"sealed": ranges}


def test_golden_stores_hold_every_kind_of_change_and_object() -> None:
    """A kind that is in none of them could become unreadable unseen."""
    changes: set[type] = set()
    with_state: set[bool] = set()
    events: set[str] = set()
    kinds: set[str] = set()
    for golden in STORES:
        _, entries = GoldenReader(golden.objects).read_log()
        names = filter(keys.parse_log_entry, golden.objects)
        changes |= {type(log.decode_entry(golden.objects[key], key).change) for key in names}
        with_state |= {entry["state"] for entry in entries}
        events |= {event[0] for runs in golden.expected["wal"].values() for run in runs for event in run[5]}
        kinds |= {case.split("/")[0] for case in golden.cases}
        assert kinds <= set(choose(golden.objects))
        assert {case.split("/")[1] for case in golden.cases} == set(CHANGES)
    assert changes == set(log_change.Change.__args__)
    assert with_state == {True, False}
    assert kinds == set(choose(V1B.objects)) and kinds > NEVER_READ_BY_RESCUE
    assert {"restore_point", "tablespace_create", "checkpoint", "backup_end"} <= events


def test_every_object_of_the_newest_is_written_as_today() -> None:
    """[PAC-4], [COL-2], [MAN-3], [PAG-7]: nonces, ``began``, bounds of row groups, LSNs of deltas."""
    objects, expected = V1B.objects, V1B.expected
    named = {key for key in objects if key.startswith((keys.PACKS, keys.MANIFESTS))}
    assert expected["nonces"].keys() == named and len(set(expected["nonces"].values())) == len(named)
    changes = [log.decode_entry(objects[key], key).change for key in objects if keys.parse_log_entry(key)]
    began = [change.began for change in changes if hasattr(change, "began")]
    assert None not in began and len(began) >= 10
    assert max(len(groups) for groups in expected["merged"].values()) > 1
    state, _ = GoldenReader(objects).read_log()
    base, built = state.snapshots
    assert (base.kind, built.kind, built.parent) == (branch_state.BASE, branch_state.BUILT, "built-2")
    assert [ref.lsn for ref in built.pages] == [base.lsn, built.lsn]
    assert state.collection.mark is not None and state.collection.collected


def test_the_open_mark_lists_what_is_garbage() -> None:
    """[COL-3], [COL-4]: as the reader of the golden store and as the collector find it."""
    objects = V1B.objects
    (key,) = (key for key in objects if keys.parse_mark(key))
    mark = decode_mark(objects[key], key)
    listed = {one.key for one in mark.garbage}
    named = {name for name in objects if name.startswith((keys.PACKS, keys.MANIFESTS))}
    assert listed == named - GoldenReader(objects).reachable() and listed

    async def work() -> None:
        store = MemoryStore()
        for name, data in objects.items():
            await store.create(name, data)
        found = await find_garbage(store, "main", ManualClock(now=mark.at), lambda *_: None)
        assert (set(found.garbage), found.chunks, found.entries) == (
            set(mark.garbage),
            mark.chunks,
            mark.entries,
        )
        assert found.pins == 1

    asyncio.run(work())


@pytest.mark.parametrize(
    ("golden", "case"),
    [pytest.param(golden, case, id=f"{golden.name}-{case}") for golden in STORES for case in golden.cases],
)
def test_damage(golden: GoldenStore, case: str) -> None:
    """P5, [GEN-6]: word for word, of the codecs and of rescue.py."""
    kind, change = case.split("/")
    objects, expected = golden.objects, golden.cases[case]
    key = choose(objects)[kind]
    damaged = CHANGES[change](key, objects[key]).apply(objects)
    assert expected["key"] == key
    assert rescue_error(damaged) == expected["rescue"]
    assert (expected["rescue"] is None) == (case in UNNOTICED or kind in NEVER_READ_BY_RESCUE)
    if case in UNNOTICED:
        assert expected["codecs"] is None
        GoldenReader(damaged).read()
        return
    with pytest.raises(DamagedStore) as caught:
        GoldenReader(damaged).read()
    assert f"{type(caught.value).__name__}: {caught.value}" == expected["codecs"]
    assert caught.value.key == key
