"""What each change does to the state of a branch, and what it refuses (SPEC.md, chapter 6)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from timeline.errors import DamagedStore, LogConflict, UnknownFeature
from timeline.format import branch_state, keys, log, log_change, sealed_json
from timeline.format.manifest import ManifestRef
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn

REF = ManifestRef("ab" * 32, 100, 1, 50, "cd" * 32)
INCARNATION = branch_state.Incarnation(
    7,
    15,
    150018,
    "x86_64",
    8192,
    1 << 20,
    1 << 30,
    202209061,
    1300,
    None,
    None,
    "postgres",
    False,
    Lsn(100),
    None,
)
TLI = branch_state.Tli(1, None, Lsn(100), Lsn(100), None, None)
SNAPSHOT = branch_state.Snapshot(
    "s1", branch_state.BASE, 1, Lsn(110), Lsn(115), Lsn(130), 5, REF, (REF,), None, "LABEL", (), (), None, 1
)


def begun() -> branch_state.BranchState:
    return log_change.Begin(INCARNATION, TLI).apply(branch_state.BranchState.empty("main"))


def seal(start: int, end: int, tli: int = 1) -> log_change.Seal:
    return log_change.Seal(branch_state.SealedRange(tli, Lsn(start), Lsn(end), REF, None, None, 0), None)


def test_dropped_snapshots_are_gone_and_must_have_been_there() -> None:
    state = log_change.AddSnapshot(SNAPSHOT).apply(begun())
    assert log_change.DropSnapshots((SNAPSHOT.id,)).apply(state).snapshots == ()
    with pytest.raises(LogConflict):
        log_change.DropSnapshots(("other",)).apply(state)


def gap(start: int, end: int, tli: int = 1) -> log_change.RecordGap:
    return log_change.RecordGap(branch_state.Gap(tli, Lsn(start), Lsn(end), "slot lost"))


def switch(closed: int, end: int, opened: int) -> log_change.SwitchTli:
    return log_change.SwitchTli(
        closed, Lsn(end), branch_state.Tli(opened, closed, Lsn(end), Lsn(end), None, "1\t0/1\tx\n")
    )


def test_begin() -> None:
    state = begun()
    assert (state.current_tli, state.tlis, state.incarnations) == (1, (TLI,), (INCARNATION,))
    with pytest.raises(LogConflict, match="tli 1 is in the branch already"):
        log_change.Begin(INCARNATION, TLI).apply(state)


def test_begin_ends_the_incarnation_before() -> None:
    """EDGE 34: a major upgrade goes on in the same branch."""
    upgraded = replace(INCARNATION, major=18, system_identifier=8, from_lsn=Lsn(500))
    state = log_change.Begin(upgraded, replace(TLI, tli=2, start=Lsn(500), sealed=Lsn(500))).apply(begun())
    assert [known.to_lsn for known in state.incarnations] == [Lsn(500), None]
    assert state.current_tli == 2


def test_claim_epoch() -> None:
    """P4: epochs go up by one, so two claims of one epoch cannot both be written."""
    state = log_change.ClaimEpoch(1).apply(begun())
    assert state.epoch == 1
    for epoch in (0, 1, 3):
        with pytest.raises(LogConflict):
            log_change.ClaimEpoch(epoch).apply(state)


def test_switch_tli() -> None:
    """EDGE 15, 16: the next tli need not be the next number."""
    state = switch(1, 200, 4).apply(begun())
    assert state.current_tli == 4
    assert state.find_tli(1) == replace(TLI, end=Lsn(200))
    for change in (switch(9, 200, 5), switch(1, 200, 4), switch(1, 99, 5)):
        with pytest.raises(LogConflict):
            change.apply(state)
    with pytest.raises(LogConflict, match="forks from 2"):
        log_change.SwitchTli(1, Lsn(200), branch_state.Tli(5, 2, Lsn(200), Lsn(200), None, None)).apply(state)


def test_second_fork_leaves_the_first_end() -> None:
    """[LOG-6]: a server restored from an earlier moment of tli 1 forks from it again."""
    state = switch(1, 150, 3).apply(switch(1, 200, 2).apply(begun()))
    closed, opened = state.find_tli(1), state.find_tli(3)
    assert closed is not None and opened is not None
    assert (closed.end, opened.start, state.current_tli) == (Lsn(200), Lsn(150), 3)


def test_seal() -> None:
    state = seal(100, 150).apply(begun())
    state = switch(1, 200, 2).apply(state)
    state = seal(200, 220, tli=2).apply(state)
    state = seal(150, 200).apply(state)
    assert [(s.tli, s.start) for s in state.sealed] == [(1, 100), (1, 150), (2, 200)]
    first = state.find_tli(1)
    assert first is not None and first.sealed == 200
    for change in (seal(150, 210), seal(201, 210), seal(200, 200), seal(1, 2, tli=7)):
        with pytest.raises(LogConflict):
            change.apply(state)


def test_gap() -> None:
    """[GAP-1], EDGE 8: the chain goes on behind a gap; no sealed range crosses one."""
    state = gap(150, 180).apply(begun())
    with pytest.raises(LogConflict, match="cross the gap"):
        seal(100, 190).apply(state)
    state = seal(100, 150).apply(state)
    assert state.after_gap(1, 150) == 180
    assert state.after_gap(1, 140) == 140
    assert state.after_gap(2, 150) == 150
    with pytest.raises(LogConflict, match="sealed up to 0/000000B4"):
        seal(150, 190).apply(state)
    state = seal(180, 190).apply(state)
    for change in (gap(170, 200), gap(160, 160), gap(300, 200), gap(189, 200), gap(190, 200, tli=5)):
        with pytest.raises(LogConflict):
            change.apply(state)
    state = gap(210, 220).apply(gap(200, 210).apply(state))
    assert state.after_gap(1, 200) == 220


def test_add_snapshot() -> None:
    progress = log_change.RecordProgress(branch_state.BackupProgress("p", (REF,), 5, 6))
    state = log_change.AddSnapshot(SNAPSHOT).apply(progress.apply(begun()))
    assert (state.snapshots, state.progress) == ((SNAPSHOT,), None)
    for bad in (
        SNAPSHOT,
        replace(SNAPSHOT, id="s2", tli=2),
        replace(SNAPSHOT, id="s2", end=Lsn(109)),
        replace(SNAPSHOT, id="s2", backup_label=None),
        replace(SNAPSHOT, id="s2", kind=branch_state.BUILT),
        replace(SNAPSHOT, id="s2", kind="full"),
    ):
        with pytest.raises(LogConflict):
            log_change.AddSnapshot(bad).apply(state)


def test_coverage_never_goes_back() -> None:
    """[COV-1]"""
    newer, older = Coverage(1, Lsn(150), 20), Coverage(1, Lsn(160), 10)
    state = log_change.Cover(newer).apply(begun())
    assert log_change.Cover(older).apply(state).coverage == newer
    assert replace(seal(100, 150), coverage=older).apply(state).coverage == newer
    assert log_change.Cover(Coverage(1, Lsn(151), 20)).apply(state).coverage == Coverage(1, Lsn(151), 20)
    with pytest.raises(LogConflict):
        log_change.Cover(replace(newer, tli=3)).apply(state)


def entry(number: int, state: branch_state.BranchState | None) -> log.LogEntry:
    return log.LogEntry(number, "main", "w", "n", 1, 5, log_change.ClaimEpoch(1), state)


def large_state() -> branch_state.BranchState:
    state = begun()
    for at in range(100, 400):
        state = seal(at, at + 1).apply(state)
    return state


def test_state_is_left_out_when_large() -> None:
    """[LOG-3]: but never of every hundredth entry."""
    state = large_state()
    for number, expected in ((101, None), (200, state), (0, state)):
        data = log.encode_entry(entry(number, state))
        assert log.decode_entry(data, keys.log_entry("main", number)).state == expected
    assert log.decode_entry(log.encode_entry(entry(101, begun())), "k").state == begun()
    with pytest.raises(ValueError, match="must hold the state"):
        log.encode_entry(entry(300, None))


def reseal(data: bytes, **changed: object) -> bytes:
    return sealed_json.encode({**sealed_json.decode(data, "k"), **changed})


def test_unknown_features_are_named() -> None:
    """[FEA-1]"""
    data = log.encode_entry(entry(1, begun()))
    for changed, name in (
        ({"requires": ["page-deltas"]}, "page-deltas"),
        ({"format": 2}, "log format 2"),
        ({"change": {"kind": "teleport"}}, "change teleport"),
    ):
        with pytest.raises(UnknownFeature) as caught:
            log.decode_entry(reseal(data, **changed), "k")
        assert caught.value.feature == name
        assert name in str(caught.value)


def test_unknown_members_are_ignored_and_missing_ones_are_damage() -> None:
    """[JSN-4]"""
    data = log.encode_entry(entry(1, begun()))
    assert log.decode_entry(reseal(data, note="new"), "k") == entry(1, begun())
    with pytest.raises(DamagedStore, match=r"ClaimEpoch\.epoch: missing"):
        log.decode_entry(reseal(data, change={"kind": "claim_epoch"}), "k")
    with pytest.raises(DamagedStore, match="expected int"):
        log.decode_entry(reseal(data, change={"kind": "claim_epoch", "epoch": 1.0}), "k")
    with pytest.raises(DamagedStore, match="expected an LSN"):
        log.decode_entry(
            reseal(data, change={"kind": "switch_tli", "closed": 1, "end": -1, "opened": {}}), "k"
        )


def forget(*ranges: tuple[int, int, int]) -> log_change.ForgetWal:
    return log_change.ForgetWal(
        tuple(log_change.Forgotten(tli, Lsn(below), Lsn(start)) for tli, start, below in ranges)
    )


def sealed_state(*ends: int) -> branch_state.BranchState:
    state = begun()
    for start, end in zip((100, *ends), ends, strict=False):
        state = seal(start, end).apply(state)
    return state


def test_forgotten_wal_is_gone_and_the_tli_stays_as_it_is() -> None:
    """[LOG-9]: only ranges that lie wholly in it."""
    state = sealed_state(200, 300, 400)
    after = forget((1, 0, 299)).apply(state)
    assert [one.start for one in after.sealed] == [200, 300]
    assert after.tlis == state.tlis
    assert [one.start for one in forget((1, 150, 400)).apply(state).sealed] == [100]
    again = seal(400, 500).apply(after)
    assert [one.end for one in again.sealed] == [300, 400, 500]


def test_what_cannot_be_forgotten() -> None:
    state = sealed_state(200, 300)
    with pytest.raises(LogConflict, match="has no tli 2"):
        forget((2, 0, 200)).apply(state)
    with pytest.raises(LogConflict, match="is sealed up to"):
        forget((1, 0, 301)).apply(state)
    with pytest.raises(LogConflict, match="has forgotten that WAL already"):
        forget((1, 0, 199)).apply(state)


MIB = 1 << 20


def forked() -> branch_state.BranchState:
    """tli 1 sealed MiB by MiB from 1 to 9 MiB, left for tli 2 at 6 MiB, that up to 8 MiB."""
    first = branch_state.Tli(1, None, Lsn(MIB), Lsn(MIB), None, None)
    state = log_change.Begin(replace(INCARNATION, from_lsn=Lsn(MIB)), first).apply(
        branch_state.BranchState.empty("main")
    )
    for number in range(1, 9):
        state = seal(number * MIB, (number + 1) * MIB).apply(state)
    state = switch(1, 6 * MIB, 2).apply(state)
    return seal(7 * MIB, 8 * MIB, 2).apply(seal(6 * MIB, 7 * MIB, 2).apply(state))


def with_snapshot(state: branch_state.BranchState, tli: int, lsn: int, end: int) -> branch_state.BranchState:
    added = replace(SNAPSHOT, id=f"{tli}-{lsn}", tli=tli, lsn=Lsn(lsn), checkpoint=Lsn(lsn), end=Lsn(end))
    return log_change.AddSnapshot(added).apply(state)


def test_wal_that_a_snapshot_needs_stays() -> None:
    """[LOG-8]: from the start of its segment on, along the line that leads to the current tli."""
    state = with_snapshot(forked(), 1, 4 * MIB + 9, 5 * MIB)
    assert len(forget((1, 0, 4 * MIB)).apply(state).sealed) == 7
    for needed in ((1, 0, 5 * MIB), (1, 5 * MIB, 6 * MIB), (2, 0, 7 * MIB), (2, 7 * MIB, 8 * MIB)):
        with pytest.raises(LogConflict, match=r"snapshot 1-\d+ needs the WAL"):
            forget(needed).apply(state)
    # Beyond the fork tli 1 is an orphan tail, which the snapshot does not need.
    assert len(forget((1, 6 * MIB, 9 * MIB)).apply(state).sealed) == 7


def test_a_snapshot_on_an_orphan_tail_keeps_what_it_is_made_of() -> None:
    """[LOG-8]: up to its end."""
    state = with_snapshot(forked(), 1, 7 * MIB + 9, 8 * MIB)
    with pytest.raises(LogConflict, match="needs the WAL of tli 1"):
        forget((1, 7 * MIB, 8 * MIB)).apply(state)
    assert len(forget((1, 0, 7 * MIB), (1, 8 * MIB, 9 * MIB)).apply(state).sealed) == 3


def test_a_segment_that_began_on_the_parent_is_needed_there() -> None:
    state = with_snapshot(forked(), 2, 6 * MIB + 9, 7 * MIB)
    state = replace(state, incarnations=(replace(state.incarnations[0], segment_bytes=4 * MIB),))
    with pytest.raises(LogConflict, match="needs the WAL of tli 1 from 0/00400000"):
        forget((1, 0, 6 * MIB)).apply(state)
    assert len(forget((1, 0, 4 * MIB)).apply(state).sealed) == 7


def merged(state: branch_state.BranchState, first: int, last: int) -> branch_state.SealedRange:
    parts = state.sealed[first:last]
    return log_change.merge_ranges(parts, replace(REF, rows=sum(part.manifest.rows for part in parts)))


def test_merged_ranges_stand_for_what_they_were() -> None:
    state = sealed_state(200, 300, 400, 500)
    one = merged(state, 1, 3)
    after = log_change.MergeSealed(one).apply(state)
    assert [(part.start, part.end) for part in after.sealed] == [(100, 200), (200, 400), (400, 500)]
    assert after.sealed[1].manifest.rows == 2
    assert after.tlis == state.tlis


def test_what_cannot_be_merged() -> None:
    state = sealed_state(200, 300, 400)
    whole = merged(state, 0, 3)
    for wrong in (
        merged(state, 0, 1),
        replace(whole, tli=1, end=Lsn(350)),
        replace(whole, start=Lsn(90)),
        replace(whole, tli=2),
        replace(whole, commits=1),
        replace(whole, manifest=REF),
        replace(whole, max_commit_time=7),
    ):
        with pytest.raises(LogConflict):
            log_change.MergeSealed(wrong).apply(state)
    done = log_change.MergeSealed(whole).apply(state)
    with pytest.raises(LogConflict):
        log_change.MergeSealed(whole).apply(done)


def test_what_a_merge_names_may_have_been_collected() -> None:
    """[COL-2]."""
    state = replace(sealed_state(200, 300), collection=branch_state.Collection(collected=5))
    with pytest.raises(LogConflict, match="may be collected"):
        log_change.MergeSealed(merged(state, 0, 2), 4).apply(state)
    assert log_change.MergeSealed(merged(state, 0, 2), 5).apply(state).sealed[0].end == 300
