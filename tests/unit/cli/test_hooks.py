"""Hooks and heartbeats: real children, a real loopback server."""

from __future__ import annotations

import asyncio
import dataclasses
import http.server
import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.events import Event, EventKind
from cli.heartbeat import Heartbeat, knock, why_stale
from cli.hooks import Hooks, filled
from cli.log_lines import Log
from cli.operations import AlertPlan, HookPlan
from cli.supervise import NOTHING
from tests.support.fake_command import program
from tests.support.manual_clock import ManualClock
from timeline.clock import SystemClock
from timeline.errors import Unavailable
from timeline.lsn import Lsn

FAILURE = Event("2026-01-20T00:00:00Z", EventKind.FAILURE, "prod", "gc", "it {broke}; $(rm -rf /)", 1, 1)


def run_hook(plan: HookPlan, event: Event = FAILURE, *, patience: float = 30.0) -> str:
    out = io.StringIO()

    async def run() -> None:
        hooks = Hooks(SystemClock(), os.environ, Log(out, SystemClock(), as_json=False))
        hooks.fire(plan, event)
        await hooks.close(patience)

    asyncio.run(run())
    return out.getvalue()


def test_words_and_stdin(tmp_path: Path) -> None:
    told = tmp_path / "told"
    text = (
        f"import sys, json; open({str(told)!r}, 'w').write(json.dumps([sys.argv[1:], json.load(sys.stdin)]))"
    )
    said = run_hook(HookPlan(on_failure=(*program(text), "{cluster}/{job}", "{message}", "{else}")))
    assert said == ""
    words, event = json.loads(told.read_text())
    assert words == ["prod/gc", "it {broke}; $(rm -rf /)", "{else}"]
    assert event["kind"] == "failure"
    assert event["exit_code"] == 1


def test_values_are_not_expanded_again() -> None:
    tricky = dataclasses.replace(FAILURE, message="{job}")
    assert filled(("{message}{job}",), tricky) == ("{job}gc",)


def test_failing_hanging_missing_and_absent_hooks() -> None:
    assert "failed with 3: tell" in run_hook(
        HookPlan(on_failure=program("import sys; print('tell', file=sys.stderr); sys.exit(3)"))
    )
    assert "ended after 0.2 s" in run_hook(
        HookPlan(on_failure=program("import time; time.sleep(600)"), timeout_seconds=0.2)
    )
    assert "cannot be started" in run_hook(HookPlan(on_failure=("/nowhere",)))
    assert run_hook(HookPlan(on_failure=program("import time; time.sleep(600)")), patience=0.1) != ""
    recovery = dataclasses.replace(FAILURE, kind=EventKind.RECOVERY)
    assert run_hook(HookPlan(on_failure=("/nowhere",)), recovery) == ""


SECOND = 1_000_000
WELL = dataclasses.replace(
    NOTHING, pid=1, phase="streaming", reported_at=0, durable=Lsn(16), source_end=Lsn(16), coverage_time=0
)


@pytest.mark.parametrize(
    ("change", "seconds", "why"),
    [
        ({}, 10, None),
        ({"source_end": Lsn(17)}, 59, None),
        ({"source_end": Lsn(17), "coverage_time": -300 * SECOND}, 1, "complete only up to 301 s ago"),
        ({"source_end": Lsn(17), "coverage_time": None}, 1, "not known to be complete"),
        ({}, 61, "said nothing for 61 s"),
        ({"pid": None}, 1, "no archiver runs"),
        ({"phase": "waiting", "error": "no route"}, 1, "the archiver is waiting: no route"),
        ({"durable": None}, 1, "nothing is stored yet"),
    ],
)
def test_freshness(change: dict[str, object], seconds: int, why: str | None) -> None:
    found = why_stale(dataclasses.replace(WELL, **change), seconds * SECOND, 300.0)  # type: ignore[arg-type]
    assert found is None if why is None else found is not None and why in found


class Server(http.server.ThreadingHTTPServer):
    """Remembers who knocked; says yes to /yes."""

    def __init__(self) -> None:
        self.knocked: list[tuple[str, str]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.knocked.append((self.command, self.path))
                self.send_response(200 if self.path == "/yes" else 500)
                self.end_headers()

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                return

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_knocking(server: Server) -> None:
    knock(f"{server.url}/yes", "GET", 10)
    knock(f"{server.url}/yes", "POST", 10)
    assert server.knocked == [("GET", "/yes"), ("POST", "/yes")]
    with pytest.raises(Unavailable) as caught:
        knock(f"{server.url}/secret-token", "GET", 10)
    assert "500" in caught.value.message
    assert "secret-token" not in caught.value.message


def test_a_heartbeat_comes_with_freshness_only(server: Server) -> None:
    clock, out = ManualClock(now=0), io.StringIO()
    plan = AlertPlan(heartbeat_url=f"{server.url}/yes", heartbeat_every_seconds=60.0)

    async def run() -> None:
        heartbeat = Heartbeat("c", plan, clock, Log(out, clock, as_json=False))

        async def consider(phase: str) -> int:
            heartbeat.consider(dataclasses.replace(WELL, phase=phase, reported_at=clock.now()))
            await heartbeat.close()
            return len(server.knocked)

        assert await consider("streaming") == 1
        assert await consider("streaming") == 1
        clock.advance(60)
        assert await consider("waiting") == 1
        clock.advance(60)
        assert await consider("waiting") == 1
        assert "no heartbeat: the archiver is waiting" in out.getvalue()
        assert await consider("streaming") == 2

    asyncio.run(run())
