"""The golden store of format 1 stays readable, and each way to damage it gives one exact error ([COM-1])."""

from __future__ import annotations

import json

import pytest

from tests.golden.damage import CHANGES
from tests.golden.reading import GoldenReader
from tests.golden.store import DAMAGE, EXPECTED, STORE, choose, load, rescue_error
from timeline.errors import DamagedStore
from timeline.format import keys, log

OBJECTS = load(STORE)
CASES = json.loads(DAMAGE.read_text())
UNNOTICED = {"log entry/deleted", "chunk/deleted"}
"""Without its newest entry or chunk a store is what it was a moment before: only who remembers could tell."""

ADDED_SINCE = {log.DropSnapshots, log.ForgetWal, log.MergeSealed, log.Mark, log.Collect}
"""Kinds of change that are younger than this golden store, which stays as it was committed."""


def test_golden_store_reads_as_it_did() -> None:
    """[COM-1]: log, state, files, WAL and indexes, down to the last byte."""
    found = GoldenReader(OBJECTS).read()
    # Members that are younger than this store have their defaults.
    assert found["state"].pop("collection") == {"mark": None, "collected": 0, "last": None}
    assert {entry["change"].pop("began", None) for entry in found["entries"]} == {None}
    assert found == json.loads(EXPECTED.read_text())
    assert rescue_error(OBJECTS) is None


def test_golden_store_holds_every_kind_of_change_and_object() -> None:
    """A kind that is not in it could become unreadable unseen."""
    _, entries = GoldenReader(OBJECTS).read_log()
    changes = [log.decode_entry(OBJECTS[key], key).change for key in OBJECTS if keys.parse_log_entry(key)]
    assert {type(change) for change in changes} == set(log.Change.__args__) - ADDED_SINCE
    assert {entry["state"] for entry in entries} == {True, False}
    assert {case.split("/")[0] for case in CASES} == set(choose(OBJECTS))
    assert {case.split("/")[1] for case in CASES} == set(CHANGES)
    events = {
        event[0]
        for runs in json.loads(EXPECTED.read_text())["wal"].values()
        for run in runs
        for event in run[5]
    }
    assert {"restore_point", "tablespace_create", "checkpoint", "backup_end"} <= events


@pytest.mark.parametrize("case", CASES)
def test_damage(case: str) -> None:
    """P5, [GEN-6]: word for word, of the codecs and of rescue.py."""
    kind, change = case.split("/")
    key = choose(OBJECTS)[kind]
    damaged = CHANGES[change](key, OBJECTS[key]).apply(OBJECTS)
    expected = CASES[case]
    assert expected["key"] == key
    assert rescue_error(damaged) == expected["rescue"]
    if case in UNNOTICED:
        assert expected["codecs"] is expected["rescue"] is None
        GoldenReader(damaged).read()
        return
    with pytest.raises(DamagedStore) as caught:
        GoldenReader(damaged).read()
    assert f"{type(caught.value).__name__}: {caught.value}" == expected["codecs"]
    assert caught.value.key == key
    assert expected["rescue"] is not None
