"""When the archiver builds snapshots."""

from __future__ import annotations

from cli.snapshot_schedule import IDLE_SECONDS, Pace
from timeline.lsn import Lsn

MIB = 1 << 20


def pace(*, built_at: float = 1000.0, not_before: float = 0.0) -> Pace:
    return Pace(64 * MIB, Lsn(100 * MIB), built_at, not_before)


def test_enough_wal_is_due_at_once() -> None:
    assert pace().is_due(Lsn(164 * MIB), 1000.5)
    assert not pace().is_due(Lsn(164 * MIB - 1), 1000.5)


def test_a_little_wal_is_due_after_a_while_and_none_never_is() -> None:
    later = 1000.0 + IDLE_SECONDS
    assert pace().is_due(Lsn(104 * MIB), later)
    assert not pace().is_due(Lsn(104 * MIB), later - 1)
    assert not pace().is_due(Lsn(104 * MIB - 1), later + 1e6)


def test_a_build_is_followed_by_as_long_a_pause() -> None:
    """A busy server does not spend all its time on snapshots."""
    after = pace().after(Lsn(200 * MIB), 1000.0, 1040.0)
    assert not after.is_due(Lsn(400 * MIB), 1079.0)
    assert after.is_due(Lsn(400 * MIB), 1080.0)
    assert not after.is_due(Lsn(263 * MIB), 1080.0)
