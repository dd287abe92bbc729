"""From target and snapshot to a plan: WAL files, recovery target, limits."""

from __future__ import annotations

import dataclasses

import pytest

from restore.plan import BranchPlan, SegmentFile, WalSpan, bounds_as_of, make_plan, parameters_as_of
from timeline.errors import TargetUnreachable, TimelineError
from timeline.format.branch_state import Incarnation, Snapshot, Tli
from timeline.format.manifest import ManifestRef
from timeline.format.wal_index import EventKind, WalEvent
from timeline.lsn import Lsn
from timeline.pg.control import Checkpoint, ClusterState, ControlFile

MIB = 1 << 20
REF = ManifestRef(digest="0" * 64, size=0, rows=0, footer_bytes=0, footer_digest="0" * 64)
INCARNATION = Incarnation(
    system_identifier=1, major=15, version_num=150000, architecture="x86_64", block_bytes=8192,
    segment_bytes=MIB, relation_segment_bytes=1 << 30, catalog_version=1, control_version=1300,
    libc_version=None, icu_version=None, superuser="postgres", data_checksums=False,
    from_lsn=Lsn(0), to_lsn=None,
)  # fmt: skip
SNAPSHOT = Snapshot(
    id="s", kind="base", tli=1, lsn=Lsn(5 * MIB + 40), checkpoint=Lsn(5 * MIB + 100),
    end=Lsn(5 * MIB + 400), time=0, files=REF, pages=(REF,), boot=None, backup_label="START\n",
    tablespaces=(), settings=(), parent=None, bytes=0,
)  # fmt: skip
CONTROL = ControlFile(
    system_identifier=1, control_version=1300, catalog_version=1, major=15,
    state=ClusterState.IN_PRODUCTION, time=0, checkpoint_lsn=Lsn(1),
    checkpoint=Checkpoint(
        redo=Lsn(1), tli=1, prev_tli=1, full_page_writes=True, wal_level=None, next_xid=3, next_oid=1,
        next_multi=1, next_multi_offset=0, oldest_xid=3, oldest_xid_db=1, oldest_multi=1, oldest_multi_db=1,
        time=0, oldest_commit_ts_xid=0, newest_commit_ts_xid=0, oldest_active_xid=0,
    ),
    unlogged_lsn=Lsn(0), min_recovery_point=Lsn(0), min_recovery_point_tli=0, backup_start_point=Lsn(0),
    backup_end_point=Lsn(0), backup_end_required=False, wal_level=1, wal_log_hints=False,
    max_connections=100, max_worker_processes=8, max_wal_senders=10, max_prepared_transactions=5,
    max_locks_per_transaction=64, track_commit_timestamp=False, max_align=8, block_bytes=8192,
    relation_segment_blocks=131072, wal_block_bytes=8192, segment_bytes=MIB, name_bytes=64,
    index_max_keys=32, toast_chunk_bytes=1996, large_object_chunk_bytes=2048, float8_by_value=True,
    data_checksum_version=0, default_char_signed=None,
)  # fmt: skip
HISTORY_3 = f"1\t0/{7 * MIB + 512:X}\tx\n2\t0/{9 * MIB:X}\ty\n"


def tli(number: int, parent: int | None = None, history: str | None = None) -> Tli:
    return Tli(number, parent, Lsn(0), Lsn(0), None, history)


def plan(
    lsn: int,
    *,
    on: int = 1,
    tlis: tuple[Tli, ...] = (tli(1),),
    snapshot: Snapshot = SNAPSHOT,
    last_record: int | None = None,
    events: tuple[WalEvent, ...] = (),
) -> BranchPlan:
    return make_plan(
        snapshot=snapshot, incarnation=INCARNATION, tlis=tlis, tli=on, lsn=Lsn(lsn),
        last_record=Lsn(lsn - 64 if last_record is None else last_record), events=events,
    )  # fmt: skip


def setting(made: BranchPlan, name: str) -> str | None:
    return next((each.value for each in made.recovery if each.name == name), None)


def test_segments_from_the_start_of_the_redo_points_to_t() -> None:
    """EDGE 25: the segment that holds the redo point is needed from its first byte."""
    made = plan(7 * MIB + 24)
    assert made.spans == (WalSpan(1, Lsn(5 * MIB), Lsn(7 * MIB + 24)),)
    assert made.segments == (
        SegmentFile("000000010000000000000005", Lsn(5 * MIB), Lsn(6 * MIB)),
        SegmentFile("000000010000000000000006", Lsn(6 * MIB), Lsn(7 * MIB)),
        SegmentFile("000000010000000000000007", Lsn(7 * MIB), Lsn(7 * MIB + 24)),
    )
    assert made.replayed_bytes == 2 * MIB - 16


def test_t_at_a_segment_boundary_needs_no_empty_segment() -> None:
    assert [each.name[-2:] for each in plan(6 * MIB).segments] == ["05"]


def test_a_forks_segment_belongs_to_the_child_and_begins_with_the_parents_bytes() -> None:
    """EDGE 16, 17, 20: three tlis, one of which takes over inside a segment, one at a boundary."""
    made = plan(9 * MIB + 100, on=3, tlis=(tli(1), tli(2, 1, "1\t0/7\tx\n"), tli(3, 2, HISTORY_3)))
    assert made.spans == (
        WalSpan(1, Lsn(5 * MIB), Lsn(7 * MIB + 512)),
        WalSpan(2, Lsn(7 * MIB + 512), Lsn(9 * MIB)),
        WalSpan(3, Lsn(9 * MIB), Lsn(9 * MIB + 100)),
    )
    assert [(each.name[:8], each.name[-2:]) for each in made.segments] == [
        ("00000001", "05"), ("00000001", "06"), ("00000002", "07"), ("00000002", "08"), ("00000003", "09"),
    ]  # fmt: skip
    assert [each.name for each in made.histories] == ["00000002.history", "00000003.history"]
    assert setting(made, "recovery_target_timeline") == "3"


def test_target_is_the_last_record_inclusive() -> None:
    """EDGE 35, 39: a target with no record at or after it would be fatal."""
    made = plan(6 * MIB, last_record=5 * MIB + 4000)
    assert setting(made, "recovery_target_lsn") == str(Lsn(5 * MIB + 4000))
    assert setting(made, "recovery_target_inclusive") == "on"
    assert setting(made, "recovery_target_action") == "promote"


def test_no_target_when_there_is_nothing_to_replay() -> None:
    """EDGE 58: T equals a built snapshot's S."""
    built = dataclasses.replace(SNAPSHOT, kind="built", end=SNAPSHOT.lsn, backup_label=None)
    made = plan(SNAPSHOT.lsn, snapshot=built, last_record=SNAPSHOT.lsn - 120)
    assert setting(made, "recovery_target_lsn") is None
    assert "backup_label" in made.hidden and made.replayed_bytes == 0


def test_a_target_before_the_snapshot_is_refused() -> None:
    """P7, EDGE 36, 37: Postgres would promote newer data instead."""
    with pytest.raises(TargetUnreachable, match="becomes consistent"):
        plan(SNAPSHOT.end - 8)


def test_a_snapshot_of_another_line_is_refused() -> None:
    """EDGE 40."""
    foreign = dataclasses.replace(SNAPSHOT, tli=4)
    with pytest.raises(TargetUnreachable, match="not on the line"):
        plan(6 * MIB, snapshot=foreign)


def test_histories_of_other_lines_are_there_too() -> None:
    """EDGE 19: so that Postgres gives the new line a tli of its own."""
    made = plan(6 * MIB, tlis=(tli(1), tli(2, 1, "1\t0/7\tx\n"), tli(3, 2, HISTORY_3)))
    assert [each.name for each in made.histories] == ["00000002.history", "00000003.history"]


def test_a_missing_history_file_is_an_error() -> None:
    with pytest.raises(TimelineError, match="history file of tli 2"):
        plan(8 * MIB, on=2, tlis=(tli(1), tli(2, 1)))


def test_limits_follow_parameter_changes() -> None:
    """EDGE 46: limits are the highest ever in force, switches the last."""
    names = (
        "max_connections", "max_worker_processes", "max_wal_senders", "max_prepared_transactions",
        "max_locks_per_transaction", "wal_level", "wal_log_hints", "track_commit_timestamp",
    )  # fmt: skip

    def change(at: int, *values: int) -> WalEvent:
        event_values = tuple(zip(names, values, strict=True))
        return WalEvent(EventKind.PARAMETER_CHANGE, Lsn(at), Lsn(at + 8), values=event_values)

    made = plan(
        6 * MIB, events=(change(1, 50, 8, 10, 90, 64, 2, 1, 1), change(2, 300, 4, 10, 1, 64, 1, 0, 1))
    )
    bounds = bounds_as_of(CONTROL, made.events)
    assert bounds.max_prepared_transactions == 90
    assert bounds.max_connections == 300
    assert (bounds.wal_level, bounds.wal_log_hints) == (1, False)
    assert bounds.track_commit_timestamp is True
    last = parameters_as_of(CONTROL, made.events)
    assert (last.max_connections, last.max_prepared_transactions, last.wal_level) == (300, 1, 1)
    assert parameters_as_of(CONTROL, ()) == CONTROL.parameters


def test_what_must_not_show() -> None:
    """P8, EDGE 49: nothing that would make it a standby, link tablespaces or hold a slot."""
    hidden = plan(6 * MIB).hidden
    assert {"standby.signal", "tablespace_map", "postmaster.pid"} <= set(hidden)
    assert "backup_label" not in hidden
