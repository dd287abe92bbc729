"""The functions that a Dask worker runs for us. They come to it by name: it imports its own installation."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque

from cli.executor import Outcome, Task, not_run
from cli.task_run import run_task
from timeline.clock import SystemClock

_HELD = threading.Lock()
_RUNNING: dict[tuple[str, str], tuple[asyncio.AbstractEventLoop, asyncio.Event]] = {}
"""What runs in this process, by run and key: how it is told to end."""
_ENDED: deque[str] = deque(maxlen=1000)
"""The last runs that were told to end: tasks that are still on their way here do not begin."""


def topic_of(run: str) -> str:
    """Where a run's beginnings are told: the scheduler may give a lost task to another worker by itself."""
    return f"tl-{run}"


def run_on_worker(task: Task, run: str) -> Outcome:
    """Run the task in a child process of this worker's host; blocks one of the worker's threads."""
    from distributed import get_worker

    get_worker().log_event(topic_of(run), task.key)
    return asyncio.run(_run(task, run))


async def _run(task: Task, run: str) -> Outcome:
    stop = asyncio.Event()
    with _HELD:
        if run in _ENDED:
            return not_run(task, "not begun: stopped before")
        _RUNNING[run, task.key] = (asyncio.get_running_loop(), stop)
    try:
        return await run_task(task, environment=os.environ, clock=SystemClock(), stop=stop)
    finally:
        with _HELD:
            del _RUNNING[run, task.key]


def stop_on_worker(run: str) -> int:
    """Tell all tasks of the run in this process to end; how many there were. Returns at once."""
    with _HELD:
        _ENDED.append(run)
        found = [held for (of, _), held in _RUNNING.items() if of == run]
        for loop, stop in found:
            loop.call_soon_threadsafe(stop.set)
    return len(found)
