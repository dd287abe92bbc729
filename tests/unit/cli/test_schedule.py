"""When jobs are due."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.quantities import parse_duration, parse_size, write_duration, write_size
from cli.schedule import Cron, Every, host_zone, next_after, parse_schedule, with_jitter

BERLIN = ZoneInfo("Europe/Berlin")
SECOND = 1_000_000
DAY = 86_400 * SECOND


def at(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * SECOND)


def following(expression: str, start: str, count: int) -> list[str]:
    moment = at(start)
    found = []
    for _ in range(count):
        moment = next_after(Cron(expression), moment, BERLIN)
        found.append(datetime.fromtimestamp(moment / SECOND, UTC).strftime("%dT%H:%M"))
    return found


def test_spellings() -> None:
    assert parse_schedule("off") is None
    assert parse_schedule(" every  6h ") == parse_schedule("6h") == Every(21_600)
    assert parse_schedule("15  3 * * sun") == Cron("15 3 * * sun")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "a schedule is expected"),
        ("daily", "a schedule is expected"),
        ("* * * *", "a schedule is expected"),
        ("every 0s", "at least 1s"),
        ("61 * * * *", "not a cron expression"),
        ("a b c d e", "not a cron expression"),
        ("0 0 30 2 *", "Bad day-of-month"),
        ("0 0 31 4,6 *", "day"),
    ],
)
def test_wrong_ones_say_what_is_expected(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_schedule(text)


def test_a_time_that_summer_time_skips_comes_after_the_gap_and_a_repeated_one_once() -> None:
    """EDGE 38: in Berlin 2026 the hour from 2:00 is missing on 29 March, and there twice on 25 October."""
    assert following("30 2 * * *", "2026-03-28T00:00+00:00", 3) == ["28T01:30", "29T01:00", "30T00:30"]
    assert following("30 2 * * *", "2026-10-24T00:00+00:00", 3) == ["24T00:30", "25T00:30", "26T01:30"]
    assert following("0 * * * *", "2026-10-24T23:30+00:00", 4) == [
        "25T00:00",
        "25T01:00",
        "25T02:00",
        "25T03:00",
    ]


@given(
    st.sampled_from(["* * * * *", "*/7 * * * *", "30 2 * * *", "0 0 1 * *", "15 3 * * sun", "59 23 31 12 *"]),
    st.integers(0, 4_000_000_000 * SECOND),
)
def test_the_next_time_is_later_and_whole_minutes(expression: str, moment: int) -> None:
    found = next_after(Cron(expression), moment, BERLIN)
    assert found > moment
    assert found % (60 * SECOND) == 0


@given(st.floats(1, 1e7), st.floats(0, 1e5), st.floats(0, 1, exclude_max=True), st.integers(0, 10**16))
def test_jitter_puts_off_by_less_than_its_bounds(
    seconds: float, jitter: float, chance: float, due: int
) -> None:
    moved = with_jitter(Every(seconds), due, jitter, chance) - due
    assert 0 <= moved <= min(jitter, seconds / 10) * SECOND
    assert 0 <= with_jitter(Cron("* * * * *"), due, jitter, chance) - due <= jitter * SECOND


def test_the_host_zone_has_rules(tmp_path: Path) -> None:
    """An offset would be an hour off after the next change."""
    missing = tmp_path / "none"
    assert host_zone({"TZ": ":Europe/Berlin"}, missing) == BERLIN
    assert host_zone({}, missing) is UTC
    assert host_zone({"TZ": "no/such"}, missing) is UTC


@given(st.integers(0, 10**8))
def test_durations_and_sizes_read_back(count: int) -> None:
    assert parse_duration(write_duration(count)) == count
    assert parse_size(write_size(count)) == count
    assert parse_size(write_size(count << 20)) == count << 20


@pytest.mark.parametrize("text", ["", "5", "h", "-1h", "1 year", "nan", "1e3s", "6H"])
def test_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="a duration is expected"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "MiB", "1i", "-1", "1x", "1e3"])
def test_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="a size is expected"):
        parse_size(text)
