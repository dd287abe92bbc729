"""pg_control: layouts and refusals. Values read from real servers are compared in the integration tests."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.control_file import FIELDS, VERSIONS, build_control
from timeline.lsn import Lsn
from timeline.pg.control import (
    ClusterState,
    Parameters,
    format_checkpoint,
    parse_checkpoint,
    parse_control,
    rewrite_control,
)
from timeline.pg.errors import FormatError


@pytest.mark.parametrize("major", VERSIONS)
def test_layout_of_each_major(major: int) -> None:
    control = parse_control(build_control(major))
    assert control.major == major
    assert control.segment_bytes == 16 << 20
    assert control.checkpoint.wal_level == (2 if major >= 17 else None)
    assert control.default_char_signed == (True if major == 18 else None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"control_version": 1201}, "control version 1201"),
        ({"control_version": 1900}, "control version 1900"),
        ({"catalog_version": 202007201}, "catalog version"),
        ({"catalog_version": 202406281}, "catalog version"),  # of 17, in a file of 15's layout
        ({"state": 9}, "cluster state 9"),
        ({"max_align": 4}, "alignment"),
    ],
)
def test_unknown_layouts_are_refused_by_name(change: dict[str, int], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        parse_control(build_control(15, **change))


@pytest.mark.parametrize("offset", [0, 17, 41, 250, 287, 289])
def test_torn_reads_are_noticed(offset: int) -> None:
    """EDGE 31."""
    data = bytearray(build_control(15))
    data[offset] ^= 0x10
    with pytest.raises(FormatError, match="checksum"):
        parse_control(bytes(data))


def test_short_files_are_refused() -> None:
    with pytest.raises(FormatError, match="296"):
        parse_control(build_control(15)[:200])


# --- written back --------------------------------------------------------------------------------


@pytest.mark.parametrize("major", VERSIONS)
@given(data=st.data())
def test_rewriting_what_was_read_changes_nothing(major: int, data: st.DataObject) -> None:
    settable = [name for name in FIELDS if name not in ("control_version", "catalog_version", "max_align")]
    values = data.draw(st.fixed_dictionaries({name: FIELDS[name].values for name in settable}))
    if major < 17:
        values["checkpoint_wal_level"] = 0  # padding then, and always zero
    file = build_control(major, **values)
    control = parse_control(file)
    assert rewrite_control(file, control) == file
    assert parse_checkpoint(format_checkpoint(control.checkpoint), major) == control.checkpoint


@pytest.mark.parametrize("major", VERSIONS)
def test_rewriting_reaches_every_value_and_nothing_else(major: int) -> None:
    file = build_control(major, nonce=0x5A)
    control = parse_control(file)
    changed = dataclasses.replace(
        control,
        state=ClusterState.SHUT_DOWN_IN_RECOVERY,
        checkpoint_lsn=Lsn(0x1_02030408),
        checkpoint=dataclasses.replace(control.checkpoint, redo=Lsn(0x1_02030408), tli=3, next_multi=99),
        min_recovery_point=Lsn(0x1_02030480),
        min_recovery_point_tli=3,
        wal_log_hints=True,
        track_commit_timestamp=True,
        max_prepared_transactions=77,
    )
    rewritten = rewrite_control(file, changed)
    assert parse_control(rewritten) == changed
    touched = {n for n, (a, b) in enumerate(zip(file, rewritten, strict=True)) if a != b}
    named = {
        offset
        for name in (
            "state",
            "checkpoint_lsn",
            "redo",
            "tli",
            "next_multi",
            "min_recovery_point",
            "min_recovery_point_tli",
            "wal_log_hints",
            "track_commit_timestamp",
            "max_prepared_transactions",
        )
        for offset in FIELDS[name].places
    }
    crc = 292 if major == 18 else 288
    assert touched <= named | set(range(crc, crc + 4))
    assert changed.parameters == Parameters(
        wal_level=control.wal_level,
        wal_log_hints=True,
        track_commit_timestamp=True,
        max_connections=control.max_connections,
        max_worker_processes=control.max_worker_processes,
        max_wal_senders=control.max_wal_senders,
        max_prepared_transactions=77,
        max_locks_per_transaction=control.max_locks_per_transaction,
    )


def test_a_file_is_not_rewritten_as_another_s() -> None:
    with pytest.raises(FormatError, match="same cluster"):
        rewrite_control(build_control(15), parse_control(build_control(16)))
    with pytest.raises(FormatError, match="same cluster"):
        rewrite_control(build_control(15), parse_control(build_control(15, system_identifier=5)))
