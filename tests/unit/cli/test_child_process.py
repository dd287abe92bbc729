"""Children that exit, hang, flood, fork, and cannot be started."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cli.child_process import KEPT_LINES, LONGEST_LINE_BYTES, STOPPED, Ended, run_child
from cli.said import failure_message
from tests.support.fake_command import program, until
from timeline.clock import SystemClock


async def child(code: str, stop: asyncio.Event | None = None, **options: Any) -> Ended:
    defaults: dict[str, Any] = {"timeout_seconds": 60.0, "grace_seconds": 30.0}
    return await run_child(
        program(code),
        environment=os.environ,
        clock=SystemClock(),
        stop=stop or asyncio.Event(),
        **(defaults | options),
    )


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_code_and_last_words() -> None:
    end = asyncio.run(
        child(
            'import sys; print(\'{"error": "no", "hint": "try"}\'); print(\'x\', file=sys.stderr); sys.exit(6)'
        )
    )
    assert (end.code, end.errors, end.timed_out, end.stopped) == (6, ("x",), False, False)
    assert failure_message(end, None) == "exit code 6: no (try)"


def test_stdin_reaches_it_and_need_not_be_read() -> None:
    assert asyncio.run(child("import sys; print(sys.stdin.read())", text=b"hello")).out == ("hello",)
    assert asyncio.run(child("pass", text=b"x" * 10_000_000)).code == 0


def test_a_flood_without_end_of_line_and_with_many() -> None:
    """Memory is bounded whatever a child prints (P9)."""
    longest: list[int] = []
    end = asyncio.run(
        child(
            "import sys\nsys.stderr.write('x' * 5_000_000 + '\\n')\nfor n in range(100_000): print(n, file=sys.stderr)",
            on_error=lambda line: longest.append(len(line)),
        )
    )
    assert max(longest) == LONGEST_LINE_BYTES
    assert len(longest) == 100_001
    assert len(end.errors) == KEPT_LINES
    assert end.errors[-1] == "99999"


def test_one_that_hangs_is_asked_then_killed_with_its_group(tmp_path: Path) -> None:
    """The grandchild is in the group, deaf, and holds the pipes open."""
    pids = tmp_path / "pids"
    text = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pid = os.fork()
if pid:
    open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{pid}}")
    os.rename({str(pids)!r}, {str(pids)!r} + ".done")
time.sleep(600)
"""

    async def run() -> Ended:
        stop = asyncio.Event()
        running = asyncio.create_task(child(text, stop, grace_seconds=0.2))
        await until(Path(f"{pids}.done").exists)
        stop.set()
        end = await running
        # A killed grandchild takes a moment; it is nobody's to wait for.
        found = [int(pid) for pid in Path(f"{pids}.done").read_text().split()]
        await until(lambda: all(gone(pid) for pid in found))
        return end

    end = asyncio.run(run())
    assert (end.code, end.stopped, end.timed_out) == (-signal.SIGKILL, True, False)


def test_a_time_limit_ends_it_kindly() -> None:
    text = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit('bye'))\ntime.sleep(600)"
    )
    end = asyncio.run(child(text, timeout_seconds=2.0))
    assert (end.code, end.timed_out, end.errors) == (1, True, ("bye",))
    assert failure_message(end, 2.0) == "ended after 2s, its time limit: bye"


def test_one_that_cannot_be_started() -> None:
    end = asyncio.run(
        run_child(
            ["/nowhere/at/all"],
            environment={},
            clock=SystemClock(),
            stop=asyncio.Event(),
            timeout_seconds=1,
            grace_seconds=1,
        )
    )
    assert end.code == STOPPED
    assert failure_message(end, None).startswith("could not be run: cannot be started:")


@pytest.mark.parametrize(
    ("code", "said"), [(-9, "killed by SIGKILL"), (-200, "killed by signal 200"), (3, "exit code 3")]
)
def test_how_it_ended_in_words(code: int, said: str) -> None:
    assert failure_message(Ended(code, (), (), 1.0, False, False), None) == said
