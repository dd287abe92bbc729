"""What people write for a moment."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timeline.catalog.when import (
    AtLsn,
    AtTime,
    BeforeRestorePoint,
    BeforeXid,
    Latest,
    Now,
    describe_time,
    parse_when,
    zone_named,
)
from timeline.errors import UsageError
from timeline.lsn import Lsn

BERLIN = ZoneInfo("Europe/Berlin")
KATHMANDU = ZoneInfo("Asia/Kathmandu")
NOW = 1_768_910_400_000_000
TEN_UTC = 1_768_903_200_000_000
"""2026-01-20 10:00:00 UTC."""
HOUR = 3600 * 1_000_000


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-01-20 10:00", TEN_UTC - HOUR),
        (" 2026-01-20 10:00:00 ", TEN_UTC - HOUR),
        ("2026-01-20T10:00", TEN_UTC - HOUR),
        ("2026-01-20t10:00:00z", TEN_UTC),
        ("2026-01-20 10:00:00+00", TEN_UTC),
        ("2026-01-20 10:00:00.5+01:00", TEN_UTC - HOUR + 500_000),
        ("2026-01-20 10:00:00.000001Z", TEN_UTC + 1),
        ("2026-01-20 10:00 +0100", TEN_UTC - HOUR),
        ("2026-01-20 10:00:00-01:30", TEN_UTC + 3 * HOUR // 2),
        ("2026-01-20 10:00 UTC", TEN_UTC),
        ("2026-01-20 10:00 utc", TEN_UTC),
        ("2026-01-20 10:00 Asia/Kathmandu", TEN_UTC - 23 * HOUR // 4),
        ("2026-07-20 10:00", 1_784_541_600_000_000 - 2 * HOUR),
        # The end of summer time: times outside the repeated hour, and inside it with their offset.
        ("2026-10-25 01:59:59", 1_792_886_399_000_000),
        ("2026-10-25 03:00", 1_792_893_600_000_000),
        ("2026-10-25 02:30+02:00", 1_792_888_200_000_000),
        ("2026-10-25 02:30+01:00", 1_792_891_800_000_000),
    ],
)
def test_times(text: str, time: int) -> None:
    assert parse_when(text, BERLIN, NOW) == AtTime(time)


def test_an_ambiguous_time_is_refused_with_both_readings() -> None:
    """EDGE 38."""
    with pytest.raises(UsageError, match="happened twice in Europe/Berlin") as raised:
        parse_when("2026-10-25 02:30", BERLIN, NOW)
    hint = raised.value.hint or ""
    assert "'2026-10-25 02:30:00+02:00'" in hint and "'2026-10-25 02:30:00+01:00'" in hint
    readings = [parse_when(reading, BERLIN, NOW) for reading in hint.split("'")[1::2]]
    assert readings == [AtTime(1_792_888_200_000_000), AtTime(1_792_891_800_000_000)]


def test_a_time_that_was_skipped_is_refused() -> None:
    """EDGE 38."""
    with pytest.raises(UsageError, match="never happened in Europe/Berlin") as raised:
        parse_when("2026-03-29 02:30", BERLIN, NOW)
    hint = raised.value.hint or ""
    assert "01:30:00+01:00" in hint and "03:30:00+02:00" in hint


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5 minutes ago", 300),
        ("1 minute ago", 60),
        ("2h ago", 7200),
        ("1h30m ago", 5400),
        ("1 hour, 30 minutes ago", 5400),
        ("90 SECONDS AGO", 90),
        ("1.5 days ago", 129_600),
        ("2 weeks ago", 1_209_600),
        ("0s ago", 0),
    ],
)
def test_ago_counts_from_the_source_s_clock(text: str, seconds: int) -> None:
    """EDGE 55."""
    assert parse_when(text, BERLIN, NOW) == AtTime(NOW - seconds * 1_000_000)


def test_ago_needs_to_know_the_source_s_clock() -> None:
    with pytest.raises(UsageError, match="source's clock"):
        parse_when("5 minutes ago", BERLIN, None)


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("latest", Latest()),
        ("Latest", Latest()),
        ("now", Now()),
        ("1/5A0003F8", AtLsn(Lsn(0x15A0003F8))),
        ("0/0", AtLsn(Lsn(0))),
        ("xid:4711", BeforeXid(4711)),
        ("xid: 4294971963", BeforeXid(4294971963)),
        ("name:before-release", BeforeRestorePoint("before-release")),
        ("name:Before 2026-01-20", BeforeRestorePoint("Before 2026-01-20")),
        ("name:latest", BeforeRestorePoint("latest")),
    ],
)
def test_other_moments(text: str, when: object) -> None:
    assert parse_when(text, BERLIN, None) == when


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot tell"),
        ("yesterday", "cannot tell"),
        ("10:00", "cannot tell"),
        ("20.01.2026 10:00", "cannot tell"),
        ("2026-01-20", "no time of day"),
        ("2026-01-20Z", "no time of day"),
        ("2026-02-30 10:00", "no such time"),
        ("2026-01-20 24:00", "no such time"),
        ("2026-01-20 10:60", "no such time"),
        ("2026-01-20 10:00:60", "no such time"),
        ("2026-01-20 10:00:00.1234567", "finer than a microsecond"),
        ("2026-01-20 10:00 CET", "several zones"),
        ("2026-01-20 10:00 Europe/Atlantis", "unknown time zone"),
        ("2026-01-20 10:00 ../etc/passwd", "cannot tell"),
        ("2026-01-20 10:00 Europe/../../etc/passwd", "unknown time zone|cannot tell"),
        ("2026-01-20 10:00+25:00", "no zone"),
        ("2026-01-20 10:00+01:99", "no zone"),
        ("0001-01-01 00:00", "not in the years"),
        ("9999-12-31 23:59", "not in the years"),
        ("900000000 weeks ago", "not in the years"),
        ("ago", "say how much|how long ago"),
        ("some time ago", "how long ago"),
        ("5 ago", "how long ago"),
        ("5 months ago", "how long ago"),
        ("-5 minutes ago", "how long ago"),
        ("1/", "cannot tell"),
        ("1/123456789", "cannot tell"),
        ("xid:", "not a transaction id"),
        ("xid:-1", "not a transaction id"),
        ("xid:0", "not a transaction id"),
        ("xid:2", "no transaction ever"),
        ("xid:4294967297", "no transaction ever"),
        ("xid:18446744073709551616", "not a transaction id"),
        ("name:", "not the name"),
        (f"name:{'x' * 64}", "not the name"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_when(text, BERLIN, NOW)


@given(text=st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse_when(text, KATHMANDU, NOW)
    except UsageError:
        pass


@given(
    time=st.integers(31_536_000_000_001, 253_370_000_000_000_000),
    zone=st.sampled_from([BERLIN, KATHMANDU, UTC, ZoneInfo("America/St_Johns"), ZoneInfo("Pacific/Apia")]),
)
def test_what_is_told_can_be_said_again(time: int, zone: ZoneInfo) -> None:
    assert parse_when(describe_time(time, zone), BERLIN, None) == AtTime(time)


@given(
    wall=st.datetimes(min_value=datetime(1990, 1, 1), max_value=datetime(2037, 1, 1)),
    zone=st.sampled_from([BERLIN, KATHMANDU, ZoneInfo("Australia/Lord_Howe"), ZoneInfo("Pacific/Apia")]),
)
def test_a_local_time_is_read_only_when_it_happened_exactly_once(wall: datetime, zone: ZoneInfo) -> None:
    instants = {
        aware.timestamp()
        for fold in (0, 1)
        for aware in [wall.replace(tzinfo=zone, fold=fold)]
        if aware.astimezone(UTC).astimezone(zone).replace(tzinfo=None) == wall
    }
    try:
        when = parse_when(wall.isoformat(sep=" "), zone, None)
    except UsageError:
        assert len(instants) != 1
    else:
        assert isinstance(when, AtTime)
        assert [round(instant * 1e6) for instant in instants] == [pytest.approx(when.time, abs=1)]


def test_zones_by_name() -> None:
    assert zone_named("Europe/Berlin") == BERLIN
    for name in ("Mars/Olympus", "", "/etc/passwd", "Europe"):
        with pytest.raises(UsageError, match="unknown time zone"):
            zone_named(name)
