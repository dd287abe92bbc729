"""The daemon's log."""

from __future__ import annotations

import io
import json

from cli.log_lines import BURST_LINES, LONGEST_LINE, Level, Log, Throttle, printable
from tests.support.manual_clock import ManualClock


def test_json_is_one_object_per_line_whatever_the_message() -> None:
    out = io.StringIO()
    log = Log(out, ManualClock(), as_json=True)
    log.emit(Level.ERROR, "said", 'two\nlines "quoted" \x1b[31mred', cluster="c", job="gc")
    (line,) = out.getvalue().splitlines()
    assert json.loads(line) == {
        "time": "2026-01-20T09:06:40Z",
        "level": "error",
        "cluster": "c",
        "job": "gc",
        "event": "said",
        "message": 'two lines "quoted"  [31mred',
    }


def test_for_people() -> None:
    out = io.StringIO()
    log = Log(out, ManualClock(), as_json=False)
    log.emit(Level.INFO, "x", "all is well")
    log.emit(Level.WARNING, "x", "look", cluster="c", job="gc")
    assert (
        out.getvalue()
        == "2026-01-20T09:06:40Z daemon: all is well\n2026-01-20T09:06:40Z c/gc: warning: look\n"
    )


def test_lines_are_bounded() -> None:
    assert len(printable("x" * 100_000)) == LONGEST_LINE + 2


def test_a_flood_is_throttled_and_counted() -> None:
    throttle = Throttle()
    assert sum(throttle.passes(0.0) for _ in range(10_000)) == BURST_LINES
    assert throttle.passes(1.0)
    assert throttle.take_left_out() == 10_000 - BURST_LINES
    assert not throttle.passes(1.0)
    assert sum(throttle.passes(1e6) for _ in range(10_000)) == BURST_LINES
