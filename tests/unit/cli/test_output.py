"""What people and machines get to read."""

from __future__ import annotations

import json
from dataclasses import dataclass

import click
import pytest

from cli.archive import _Rate
from cli.branch import not_main
from cli.duration import Duration
from cli.estimate import estimate_month
from cli.output import duration_text, emit_json, fail, iso
from timeline.errors import DamagedStore, TargetUnreachable, UsageError
from timeline.lsn import Lsn
from timeline.size_text import size_text


@dataclass(frozen=True, slots=True)
class _Value:
    lsn: Lsn
    parts: tuple[Lsn, ...]
    none: None = None


def test_json_shows_lsns_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json(_Value(Lsn(0x1_5A0003F8), (Lsn(1),)))
    assert json.loads(capsys.readouterr().out) == {"lsn": "1/5A0003F8", "parts": ["0/00000001"], "none": None}


@pytest.mark.parametrize(
    ("micros", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_000_000_000_123_456, "2001-09-09T01:46:40.123456Z"),
        (-1, "1969-12-31T23:59:59.999999Z"),
        (None, None),
    ],
)
def test_iso_keeps_every_microsecond(micros: int | None, text: str | None) -> None:
    assert iso(micros) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text


def test_durations() -> None:
    assert [duration_text(value) for value in (0.25, 120, 7200, 864000)] == [
        "0.2 s",
        "2 min",
        "2.0 h",
        "10.0 days",
    ]


def test_errors_say_cause_cure_and_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(TargetUnreachable("too late", hint="try earlier"), as_json=True) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "error": "too late",
        "hint": "try earlier",
        "kind": "TargetUnreachable",
        "exit_code": 3,
    }
    assert captured.err == "tl: too late\nhint: try earlier\n"
    assert fail(DamagedStore("packs/aa/b", 12, "expected a frame"), as_json=False) == 4
    assert capsys.readouterr().err == "tl: packs/aa/b: at byte 12: expected a frame\n"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5h", 5400), ("2d", 172800), ("30 min", 1800)]
)
def test_duration_option(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1h", "0", "5y"])
def test_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Duration().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "rate"), [("50MB", 50 << 20), ("200k", 200 << 10), ("1g/s", 1 << 30), ("4096", 4096)]
)
def test_rate_option(text: str, rate: int) -> None:
    assert _Rate().convert(text, None, None) == rate


def test_main_is_refused() -> None:
    assert not_main("fix") == "fix"
    with pytest.raises(UsageError):
        not_main("main")


def test_the_estimate_grows_with_what_is_stored_and_asked() -> None:
    idle = estimate_month(10**9, 0.0)
    busy = estimate_month(10**9, 1e6)
    assert idle.put_requests == 12 * 24 * 30
    assert busy.dollars > idle.dollars
    assert busy.stored_gb == pytest.approx(0.3 + 1e6 * 86400 * 30 * 0.35 / 1e9)
    assert estimate_month(10**9, None).wal_gb_per_day is None
