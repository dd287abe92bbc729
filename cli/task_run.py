"""One task in a child process of this host: what both executors do in the end."""

from __future__ import annotations

import asyncio
import json
import os
import platform
from collections.abc import Callable, Mapping

from cli.child_process import STOPPED as NOT_STARTED
from cli.child_process import run_child
from cli.executor import LOST, STOPPED, Outcome, Task
from cli.own_command import attached_command
from cli.said import failure_message
from timeline.clock import Clock

DOCUMENT_BYTES = 16 << 20
"""Of the one line that a task's document is; a longer one is none."""
GRACE_SECONDS = 60.0
"""How long a task may take to end when told to: a snapshot build stops a server and takes a mount away."""
_OURS = ("TL_STORE", "TL_CLUSTER", "TL_SOURCE")
"""Variables that would say again, and otherwise, what a task's words say."""


async def run_task(
    task: Task,
    *,
    environment: Mapping[str, str],
    clock: Clock,
    stop: asyncio.Event,
    attempt: int = 1,
    command: Callable[..., tuple[str, ...]] = attached_command,
) -> Outcome:
    """Run it to its end, the end of its time, or until ``stop`` is set. Never raises for what the command does."""
    end = await run_child(
        command(*task.argv),
        environment={key: value for key, value in environment.items() if key not in _OURS},
        clock=clock,
        stop=stop,
        timeout_seconds=task.timeout_seconds,
        grace_seconds=GRACE_SECONDS,
        out_lines=1,
        out_line_bytes=DOCUMENT_BYTES,
    )
    code, message = end.code, ""
    if end.stopped:
        code, message = STOPPED, "stopped before it came to its end"
    elif code != 0:
        message = failure_message(end, task.timeout_seconds)
    return Outcome(
        key=task.key,
        exit_code=code if code >= 0 else LOST,
        message=message,
        lines=end.errors,
        document=_document(end.out),
        worker=f"{platform.node()}/{os.getpid()}",
        seconds=end.seconds,
        attempts=attempt,
        lost=NOT_STARTED < end.code < 0 and not end.stopped and not end.timed_out,
    )


def _document(out: tuple[str, ...]) -> str | None:
    if not out:
        return None
    try:
        found = json.loads(out[-1])
    except (ValueError, RecursionError):
        return None
    return out[-1] if isinstance(found, dict) else None
