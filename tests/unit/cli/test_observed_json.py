"""What the daemon writes down is what is read, and what is not its own is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.observed import ArchiverState, ClusterState, DaemonState, JobState, SlotState
from cli.observed_json import decode, encode, jobs_before, read_state, state_file, write_state
from timeline.lsn import Lsn

FULL = DaemonState(
    1,
    2,
    3,
    (
        ClusterState(
            "c",
            "file:///c",
            ArchiverState(
                *(
                    7,
                    1,
                    5,
                    "streaming",
                    1,
                    Lsn(16),
                    Lsn(17),
                    None,
                    4,
                    None,
                    SlotState("tl_x", "reserved", None),
                ),
                *(False, 1, 2, 3, 4, 0.5, 0, "é"),
            ),
            (JobState("gc", 1, 0, None, 5, 1.0, 0, 6, "", 7),),
        ),
        ClusterState("d", "file:///d", None, ()),
    ),
    (JobState("expire", 1, 0, None, 5, 1.0, 0, 6, "", 7),),
)


def test_there_and_back(tmp_path: Path) -> None:
    path = state_file(tmp_path)
    path.parent.mkdir()
    assert read_state(path) is None
    write_state(path, FULL)
    assert read_state(path) == FULL
    assert [each.name for each in path.parent.iterdir()] == ["state.json"]
    assert set(jobs_before(FULL)) == {("c", "gc"), ("", "expire")}


def test_other_versions(tmp_path: Path) -> None:
    document = json.loads(encode(FULL))
    document["news"] = 1
    del document["host_jobs"]
    assert decode(DaemonState, json.dumps(document)).clusters == FULL.clusters
    del document["pid"]
    with pytest.raises(ValueError, match="pid"):
        decode(DaemonState, json.dumps(document))


@given(st.integers(0, 10_000), st.sampled_from(["", "[]", "null", '"x"', "-1", "{}", "\udcff"]))
def test_damage_is_a_value_error_or_a_state(place: int, piece: str) -> None:
    text = encode(FULL)
    place %= len(text)
    damaged = text[:place] + piece + text[place + 1 :]
    try:
        assert isinstance(decode(DaemonState, damaged), DaemonState)
    except ValueError:
        pass
