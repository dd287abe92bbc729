"""When an archiver asks whether something is to be sealed: seldom, and never too late."""

from __future__ import annotations

from timeline.lsn import Lsn
from timeline.maintain.seal import SEAL_BYTES, SEAL_CHUNKS, SEAL_SECONDS
from timeline.maintain.seal_pace import SealPace

START = Lsn(1 << 30)


def asked() -> SealPace:
    return SealPace().seen(START, 3, 0.0).asked(0.0)


def test_the_first_question_comes_at_once() -> None:
    """What an earlier archiver left is unknown."""
    assert SealPace().is_due(0.0)


def test_a_source_at_rest_is_not_asked_for_ever() -> None:
    pace, questions = asked(), 0
    for second in range(5, 86_400, 5):
        pace = pace.seen(START, 3, float(second))
        if pace.is_due(second):
            pace, questions = pace.asked(second), questions + 1
            last = second
    assert 1 <= questions <= 6
    assert last >= SEAL_SECONDS, "what came last is old enough to be sealed by age then"


def test_bytes_and_chunks_bring_it_on() -> None:
    pace = asked()
    assert not pace.seen(Lsn(START + 1), 4, 5.0).is_due(5.0)
    assert pace.seen(Lsn(START + SEAL_BYTES // 4), 4, 5.0).is_due(5.0)
    assert pace.seen(Lsn(START + 1), 3 + SEAL_CHUNKS // 4, 5.0).is_due(5.0)


def test_a_switch_to_another_tli_brings_it_on() -> None:
    """Its position may be lower."""
    assert asked().seen(Lsn(START - SEAL_BYTES), 3, 5.0).is_due(5.0)


def test_new_wal_after_a_rest_is_asked_for() -> None:
    pace = SealPace().seen(START, 3, 0.0).asked(1000.0).seen(Lsn(START + 8), 4, 2000.0)
    assert pace.is_due(2000.0)
