"""Tasks in child processes of this host, a bounded number at a time."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from cli.executor import MAX_ATTEMPTS, Outcome, Task, not_run
from cli.own_command import attached_command
from cli.task_run import run_task
from timeline.clock import Clock


class LocalExecutor:
    """``local:N``."""

    def __init__(
        self,
        width: int,
        *,
        environment: Mapping[str, str],
        clock: Clock,
        command: Callable[..., tuple[str, ...]] = attached_command,
    ) -> None:
        """``width``: processes at a time; ``command`` makes an argv of a task's arguments."""
        self._width = width
        self._environment = environment
        self._clock = clock
        self._command = command

    async def width(self) -> int:
        return self._width

    async def outcomes(self, tasks: Sequence[Task], stop: asyncio.Event) -> AsyncGenerator[Outcome, None]:
        waiting = deque(tasks)
        running: set[asyncio.Task[Outcome]] = set()
        try:
            while waiting or running:
                while waiting and len(running) < self._width:
                    running.add(asyncio.create_task(self._run(waiting.popleft(), stop)))
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for ended in done:
                    yield ended.result()
        finally:
            for left in running:
                left.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def aclose(self) -> None:
        """Nothing: processes end with the tasks."""

    async def _run(self, task: Task, stop: asyncio.Event) -> Outcome:
        if stop.is_set():
            return not_run(task, "not begun: stopped before")
        attempt = 1
        while True:
            outcome = await run_task(
                task,
                environment=self._environment,
                clock=self._clock,
                stop=stop,
                attempt=attempt,
                command=self._command,
            )
            outcome = dataclasses.replace(outcome, worker="local")
            if not outcome.lost or attempt == MAX_ATTEMPTS or stop.is_set():
                return outcome
            attempt += 1
