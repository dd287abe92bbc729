"""How far apart snapshots are built."""

from __future__ import annotations

from restore.snapshot_pace import PATIENT_BYTES, SPACING_BYTES, STEP_BYTES, Stand, step_bytes
from timeline.lsn import Lsn

MIB = 1 << 20


def stand(newest: int, head: int) -> Stand:
    return Stand(Lsn(newest * MIB), Lsn(head * MIB))


def test_a_backlog_that_shrinks_is_worked_off_in_small_steps() -> None:
    """Branches of all its moments replay little, and not only those of the newest."""
    assert step_bytes(stand(0, 4096), None) == SPACING_BYTES
    assert step_bytes(stand(64, 4110), stand(0, 4096)) == SPACING_BYTES
    assert step_bytes(stand(64, 1000 + 48), stand(0, 1000)) == SPACING_BYTES


def test_what_is_asked_for_holds() -> None:
    assert step_bytes(stand(0, 4096), None, 128 * MIB) == 128 * MIB
    assert step_bytes(stand(0, 4096), None, 4 * MIB) == SPACING_BYTES
    assert step_bytes(stand(0, 4096), None, 1 << 40) == STEP_BYTES


def test_steps_grow_while_more_comes_than_they_take_away() -> None:
    assert step_bytes(stand(64, 1049), stand(0, 1000)) == (1049 - 64) * MIB // 4
    assert step_bytes(stand(64, 4200), stand(0, 4096)) == STEP_BYTES
    assert step_bytes(stand(64, 200), stand(0, 64)) == SPACING_BYTES


def test_a_day_is_not_worked_off_in_small_steps() -> None:
    behind = PATIENT_BYTES // MIB
    assert step_bytes(stand(0, behind), None) == SPACING_BYTES
    assert step_bytes(stand(0, behind + 1), None) == STEP_BYTES
