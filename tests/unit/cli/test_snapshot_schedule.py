"""When the archiver builds snapshots."""

from __future__ import annotations

import asyncio

from cli.snapshot_schedule import DEFAULT_AFTER_SECONDS, LONGEST_PAUSE_SECONDS, Pace, last_lines, said_by
from timeline.lsn import Lsn

MIB = 1 << 20


def pace(*, built_at: float = 1000.0, not_before: float = 0.0) -> Pace:
    return Pace(64 * MIB, DEFAULT_AFTER_SECONDS, Lsn(100 * MIB), built_at, not_before)


def test_enough_wal_is_due_at_once() -> None:
    assert pace().is_due(Lsn(164 * MIB), 1000.5)
    assert not pace().is_due(Lsn(164 * MIB - 1), 1000.5)


def test_a_little_wal_is_due_after_a_while_and_none_never_is() -> None:
    later = 1000.0 + DEFAULT_AFTER_SECONDS
    assert pace().is_due(Lsn(104 * MIB), later)
    assert not pace().is_due(Lsn(104 * MIB), later - 1)
    assert not pace().is_due(Lsn(104 * MIB - 1), later + 1e6)


def test_a_build_is_followed_by_as_long_a_pause() -> None:
    """A busy server does not spend all its time on snapshots."""
    after = pace().after(Lsn(200 * MIB), 1000.0, 1020.0)
    assert not after.is_due(Lsn(400 * MIB), 1039.0)
    assert after.is_due(Lsn(400 * MIB), 1040.0)
    assert not after.is_due(Lsn(263 * MIB), 1040.0)


def test_the_pause_is_bounded() -> None:
    """A child that caught up for minutes must not leave what came meanwhile for as long."""
    after = pace().after(Lsn(200 * MIB), 1000.0, 1600.0)
    assert after.is_due(Lsn(264 * MIB), 1600.0 + LONGEST_PAUSE_SECONDS)


def test_why_a_build_failed_is_said_in_full() -> None:
    """The JSON has the error and its hint; what else stands on stderr (a traceback, Postgres's words) is said too."""
    out = ('{"error": "no room", "hint": "delete something", "kind": "TimelineError", "exit_code": 1}',)
    errors = ("warning: slow disk", "tl: no room", "hint: delete something")
    assert said_by(1, out, errors) == "no room (delete something); warning: slow disk"
    assert said_by(-9, (), ()) == "`tl snapshot` ended with -9"
    assert (
        said_by(1, (), ("Traceback", "ValueError: x"))
        == "`tl snapshot` ended with 1; Traceback; ValueError: x"
    )


def test_only_the_last_lines_of_a_flood_are_kept() -> None:
    async def run() -> tuple[str, ...]:
        stream = asyncio.StreamReader()
        stream.feed_data(b"x" * 1_000_000 + b"\n")
        stream.feed_data(b"".join(b"line %d\n" % number for number in range(100_000)))
        stream.feed_eof()
        return await last_lines(stream)

    assert asyncio.run(run()) == tuple(f"line {number}" for number in range(99_995, 100_000))
