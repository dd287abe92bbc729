"""The archiver is restarted, more and more slowly, and not at all once it is fenced. Real child processes."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import Callable

from cli.archiver_report import KEY
from cli.events import EventKind
from cli.log_lines import Log
from cli.observed_json import encode
from cli.supervise import (
    HEALTHY_SECONDS,
    LONGEST_PAUSE_SECONDS,
    NOTHING,
    SILENCE_SECONDS,
    USAGE_PAUSE_SECONDS,
    ArchiverSupervisor,
    Backoff,
)
from tests.support.fake_command import program, until
from timeline.clock import SystemClock


def test_pauses_double_up_to_a_bound_and_begin_again_after_a_healthy_time() -> None:
    backoff, pauses = Backoff(), []
    for _ in range(12):
        backoff, pause = backoff.after(1, 0.0, 1.0)
        pauses.append(pause)
    assert pauses[:4] == [1, 2, 4, 8]
    assert pauses[-1] == LONGEST_PAUSE_SECONDS
    assert backoff.after(1, HEALTHY_SECONDS, 1.0)[1] == 1
    assert backoff.after(-9, 0.0, 0.0)[1] == LONGEST_PAUSE_SECONDS / 2


def test_fenced_stays_down_and_usage_is_slow() -> None:
    """P4, EDGE 11: taking the branch back would fence the other one, and so on."""
    assert Backoff().after(5, 1e6, 0.5)[1] is None
    assert Backoff().after(2, 0.0, 0.5)[1] == USAGE_PAUSE_SECONDS


class Clock(SystemClock):
    """Pauses take no time, but are remembered."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


def streaming(then: str, *, first: str = "") -> str:
    line = json.dumps({KEY: json.loads(encode(NOTHING)) | {"phase": "streaming", "durable": "0/10"}})
    return f"import os, sys, time, signal\n{first}\nprint({line!r}, flush=True)\n{then}"


class Supervised:
    """A supervisor of a fake archiver."""

    def __init__(self, text: str) -> None:
        self.clock = Clock()
        self.out = io.StringIO()
        self.told: list[tuple[EventKind, int | None, int]] = []
        self.text = text
        self.supervisor = ArchiverSupervisor(
            "c",
            ("archive",),
            environment=os.environ,
            clock=self.clock,
            log=Log(self.out, self.clock, as_json=False),
            grace_seconds=20,
            tell=lambda kind, message, code, failures: self.told.append((kind, code, failures)),
            command=lambda *arguments: program(self.text),
        )

    async def run(self, condition: Callable[[], object]) -> None:
        self.supervisor.start()
        await until(condition)
        await self.supervisor.stop()
        assert self.supervisor.failed() is None


def test_one_that_dies_is_started_again_and_told_once_well() -> None:
    one = Supervised("import sys; sys.exit('no route')")

    async def run() -> None:
        one.supervisor.start()
        await until(lambda: one.supervisor.state.restarts >= 3)
        one.text = streaming("time.sleep(600)")
        await until(lambda: one.supervisor.state.phase == "streaming")
        assert one.supervisor.state.durable == 16
        assert one.supervisor.state.error is None
        await one.supervisor.stop()

    asyncio.run(run())
    assert one.told[0] == (EventKind.FAILURE, 1, 1)
    assert one.told[-1][0] is EventKind.RECOVERY
    assert one.clock.slept[:3] == sorted(one.clock.slept[:3])
    assert "exit code 1: no route; starting again in" in one.out.getvalue()
    assert one.supervisor.state.pid is None


def test_a_silent_one_is_killed_and_started_again() -> None:
    one = Supervised(streaming("time.sleep(600)"))

    async def run() -> None:
        one.supervisor.start()
        await until(lambda: one.supervisor.state.phase == "streaming")
        one.supervisor.look()
        first = one.supervisor.state.pid
        one.clock.ahead = SILENCE_SECONDS
        one.supervisor.look()
        await until(lambda: one.supervisor.state.restarts == 1 and one.supervisor.state.phase == "streaming")
        assert one.supervisor.state.pid != first
        await one.supervisor.stop()

    asyncio.run(run())
    assert one.told[0] == (EventKind.FAILURE, -9, 1)


def test_a_fenced_one_waits_for_a_word() -> None:
    """A word from before, when nothing was wrong, does not count."""
    one = Supervised(streaming("time.sleep(0.5); sys.exit(5)"))

    async def run() -> None:
        one.supervisor.start()
        await until(lambda: one.supervisor.state.phase == "streaming")
        one.supervisor.wake()
        await until(lambda: one.told)
        await asyncio.sleep(0.2)
        assert one.supervisor.state.restarts == 0
        assert one.clock.slept == []
        assert "another archiver has taken over" in (one.supervisor.state.error or "")
        assert one.supervisor.state.phase == "fenced"
        one.text = streaming("time.sleep(600)")
        one.supervisor.wake()
        await until(lambda: one.supervisor.state.phase == "streaming")
        await one.supervisor.stop()

    asyncio.run(run())


def test_a_stop_waits_for_what_is_in_flight() -> None:
    # Before it tells of itself: until the handler is there, SIGTERM would simply end it. It may come while that is being
    # printed, which print does not bear.
    handler = "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'flushed\\n'), sys.exit(0)))"
    one = Supervised(streaming("time.sleep(600)", first=handler))
    asyncio.run(one.run(lambda: one.supervisor.state.phase == "streaming"))
    assert "flushed" in one.out.getvalue()
    assert "in flight is durable" in one.out.getvalue()


def test_broken_reports_are_said_and_survived() -> None:
    one = Supervised(f"import time\nprint('{{\"{KEY}\": 1}}', flush=True)\n" + streaming("time.sleep(600)"))
    asyncio.run(one.run(lambda: one.supervisor.state.phase == "streaming"))
    assert "its state is unreadable" in one.out.getvalue()
