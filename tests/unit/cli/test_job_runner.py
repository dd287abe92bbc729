"""Jobs as child processes: failing, hanging, flooding, and what reloads and stops do to them."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Callable
from pathlib import Path

from cli.daemon_config import Configuration
from cli.events import EventKind
from cli.job_runner import JobRunner
from cli.log_lines import BURST_LINES, Log
from cli.observed import JobState
from cli.tl_toml import parse_document
from tests.support.fake_command import program, until
from timeline.clock import SystemClock

HEAD = '[daemon]\njitter = "0s"\nexpire = "off"\nstop_grace = "20s"\n'
HEAD += '[cluster.c]\nstore = "x"\n[cluster.c.archive]\nenabled = false\n'
OFTEN = '[cluster.c.verify]\nstructure = "every 1s"\ndata = "every 1s"\n'


def configuration(tables: str) -> Configuration:
    document = parse_document(HEAD + tables, "tl.toml")
    return Configuration(HEAD + tables, document, document.clusters)


class Runner:
    """A job runner whose every command is ``text``; its clock's wall can be moved."""

    def __init__(self, tables: str, text: str) -> None:
        self.text = text
        self.out = io.StringIO()
        self.events: list[tuple[EventKind, str, int]] = []
        clock = SystemClock()
        self.runner = JobRunner(
            configuration(tables),
            {},
            environment={},
            children=os.environ,
            clock=clock,
            log=Log(self.out, clock, as_json=False),
            tell=lambda plan, kind, cluster, job, message, code, failures: self.events.append(
                (kind, job, failures)
            ),
            command=lambda *arguments: (*program(self.text), *arguments),
        )

    def state(self, job: str) -> JobState:
        return next(state for state in self.runner.states("c") if state.job == job)

    async def until(self, condition: Callable[[], object]) -> None:
        def turned() -> object:
            self.runner.raise_defect()
            self.runner.start_due()
            return condition()

        await until(turned)


def test_one_heavy_job_at_a_time_and_none_beside_itself(tmp_path: Path) -> None:
    """Each leaves a mark while it runs, and fails where it finds another's."""
    mark = tmp_path / "mark"
    one = Runner(OFTEN, f"import os, time; os.mkdir({str(mark)!r}); time.sleep(0.3); os.rmdir({str(mark)!r})")

    async def run() -> None:
        await one.until(lambda: one.state("verify").runs >= 2 and one.state("verify-data").runs >= 2)
        await one.runner.stop()

    asyncio.run(run())
    assert one.runner.failing() == ()
    assert one.events == []


def test_failure_and_recovery_are_told_once() -> None:
    one = Runner('[cluster.c.verify]\nstructure = "every 1s"\ndata = "off"\n', "import sys; sys.exit(6)")

    async def run() -> None:
        await one.until(lambda: one.state("verify").failures_in_a_row >= 2)
        one.text = "pass"
        await one.until(lambda: one.state("verify").last_success)
        await one.runner.stop()

    asyncio.run(run())
    assert [kind for kind, _, _ in one.events] == [EventKind.FAILURE, EventKind.RECOVERY]
    assert one.events[1][2] >= 2


def test_a_flood_is_bounded_and_a_limit_ends_what_hangs() -> None:
    one = Runner(
        '[cluster.c.verify]\nstructure = "every 1s"\ndata = "off"\ntimeout = "2s"\n',
        "import sys, time\nfor n in range(20_000): print('line', n, file=sys.stderr)\ntime.sleep(600)",
    )

    async def run() -> None:
        await one.until(lambda: one.state("verify").runs)
        await one.runner.stop()

    asyncio.run(run())
    assert "its time limit" in one.state("verify").last_message
    assert BURST_LINES <= one.out.getvalue().count(": line ") <= BURST_LINES + 60
    assert "lines were left out" in one.out.getvalue()


def test_a_stop_is_no_failure_and_a_reload_lets_what_runs_finish(tmp_path: Path) -> None:
    go = tmp_path / "go"
    one = Runner(
        '[cluster.c.verify]\nstructure = "every 1s"\ndata = "off"\n',
        f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)",
    )

    async def run() -> None:
        await one.until(lambda: one.runner.running() == ("c/verify",))
        one.runner.reload(configuration('[cluster.c.verify]\nstructure = "off"\ndata = "off"\n'))
        assert one.runner.running() == ("c/verify",)
        go.touch()
        await one.until(lambda: one.runner.running() == ())
        assert one.runner.states("c") == ()
        go.unlink()
        one.runner.reload(configuration(OFTEN))
        await one.until(one.runner.running)
        await one.runner.stop()

    asyncio.run(run())
    assert one.runner.failing() == ()
    assert "stopped with the daemon" in one.out.getvalue()
