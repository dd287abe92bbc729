"""Tasks on the workers of a Dask cluster: each runs the ``tl`` that is installed beside it.

Only values of ``cli/executor.py`` and the names of two functions go over the wire. The scheduler gives what a lost worker had
to another one, as often as its own setting ``allowed-failures`` says; after that we ask anew until MAX_ATTEMPTS
beginnings have been told. A cluster without workers is waited for NO_WORKER_SECONDS, then the rest is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from cli.executor import LOST, MAX_ATTEMPTS, Outcome, Task, not_run
from cli.task_worker import run_on_worker, stop_on_worker, topic_of
from timeline.clock import Clock
from timeline.errors import Unavailable, UsageError

CONNECT_SECONDS = 15.0
"""For the scheduler to answer."""
NO_WORKER_SECONDS = 60.0
"""So long a cluster may be without any worker."""
_LOOK_SECONDS = 2.0
_STOP_SECONDS = 10.0
"""For the workers to hear that they are to end their tasks."""


async def connect(address: str, clock: Clock) -> DaskExecutor:
    """To a scheduler with at least one worker. Raises UsageError without the package, Unavailable."""
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError(
            f"--executor {address} needs Dask: {error}", hint="pip install 'timeline-postgres[dask]'"
        ) from error
    client: Any = Client(address, asynchronous=True, timeout=CONNECT_SECONDS, set_as_default=False)
    try:
        try:
            await client
        except (OSError, TimeoutError) as error:
            raise Unavailable(
                f"no Dask scheduler answers at {address}", hint="start one: dask scheduler"
            ) from error
        try:
            await client.wait_for_workers(1, timeout=NO_WORKER_SECONDS)
        except TimeoutError as error:
            raise Unavailable(
                f"the Dask scheduler at {address} has no workers",
                hint=f"start some beside tl: dask worker {address} --nthreads 1",
            ) from error
    except BaseException:
        await client.close()
        raise
    return DaskExecutor(client, clock)


class DaskExecutor:
    """``tcp://HOST:PORT``."""

    def __init__(self, client: Any, clock: Clock) -> None:
        """``client``: a connected asynchronous Client; closed with this."""
        self._client = client
        self._clock = clock

    async def width(self) -> int:
        threads: dict[str, int] = await self._client.nthreads()
        return max(1, sum(threads.values()))

    async def outcomes(self, tasks: Sequence[Task], stop: asyncio.Event) -> AsyncGenerator[Outcome, None]:
        run = _Run(self._client, self._clock, self._clock.token(8), stop)
        running = {asyncio.create_task(run.one(task)) for task in tasks}
        watching = asyncio.create_task(run.watch())
        try:
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for ended in done:
                    yield ended.result()
            if watching.done():
                watching.result()
        finally:
            for each in (*running, watching):
                each.cancel()
            await asyncio.gather(*running, watching, return_exceptions=True)
            if running:
                await run.end_on_workers()

    async def aclose(self) -> None:
        await self._client.close()


class _Run:
    """The tasks of one call."""

    def __init__(self, client: Any, clock: Clock, name: str, stop: asyncio.Event) -> None:
        self._client = client
        self._clock = clock
        self._name = name
        self._stop = stop
        self._given_up = asyncio.Event()
        self._why = "the watch over the Dask cluster ended"

    async def one(self, task: Task) -> Outcome:
        """Until it has an outcome."""
        submitted = 0
        while True:
            if self._given_up.is_set():
                return not_run(task, self._why, attempts=await self._begun(task, submitted))
            submitted += 1
            key = f"{topic_of(self._name)}-{task.key}-{submitted}"
            future = self._client.submit(run_on_worker, task, self._name, key=key, pure=False)
            try:
                await self._ended(future)
                outcome = await self._outcome(task, future)
            finally:
                # The scheduler forgets the result with the last one who wants it.
                future.release()
            begun = await self._begun(task, submitted)
            if outcome is None:
                continue
            if not outcome.lost or begun >= MAX_ATTEMPTS or submitted >= MAX_ATTEMPTS:
                return dataclasses.replace(outcome, attempts=begun)

    async def _ended(self, future: Any) -> None:
        """Until it is finished, failed or cancelled, or everything is given up."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        # It is called in another thread.
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
        waits = [asyncio.create_task(ended.wait()), asyncio.create_task(self._given_up.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _outcome(self, task: Task, future: Any) -> Outcome | None:
        """``None``: everything was given up meanwhile."""
        if future.status == "finished":
            found = await self._client.gather(future, errors="raise")
            assert isinstance(found, Outcome)
            return found
        if future.status == "error":
            return self._failed(task, await future.exception())
        return None if self._given_up.is_set() else not_run(task, "the Dask scheduler let go of it")

    def _failed(self, task: Task, error: BaseException) -> Outcome:
        from distributed import KilledWorker

        if isinstance(error, KilledWorker):
            outcome = not_run(task, "its worker was lost again and again", code=LOST)
            return dataclasses.replace(outcome, lost=True)
        # Most often another version of tl over there, or none.
        return not_run(task, f"the worker could not run it: {type(error).__name__}: {error}", code=LOST)

    async def _begun(self, task: Task, submitted: int) -> int:
        """How many times a worker has begun it, as far as is known."""
        if self._client.status != "running":
            return submitted
        events = await self._client.get_events(topic_of(self._name))
        return sum(1 for _, key in events if key == task.key)

    async def watch(self) -> None:
        """Give up when told to, or when nobody is left to work; also when this itself fails."""
        alone_since: float | None = None
        stopping = asyncio.create_task(self._stop.wait())
        try:
            while True:
                await asyncio.wait((stopping,), timeout=_LOOK_SECONDS)
                if stopping.done():
                    await self.end_on_workers()
                    self._give_up("stopped before it came to its end")
                    return
                now = self._clock.monotonic()
                if await self._anybody():
                    alone_since = None
                elif alone_since is None:
                    alone_since = now
                elif now - alone_since > NO_WORKER_SECONDS:
                    self._give_up("the Dask cluster has had no worker for a minute")
                    return
        finally:
            stopping.cancel()
            self._given_up.set()

    async def _anybody(self) -> bool:
        if self._client.status != "running":
            return False
        try:
            return bool(await self._client.nthreads())
        except OSError:
            return False

    async def end_on_workers(self) -> None:
        """Tell the workers to end what they run for us; one that does not hear it ends by the task's time limit."""
        if self._client.status != "running":
            return
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(
                self._client.run(stop_on_worker, self._name, on_error="ignore"), _STOP_SECONDS
            )

    def _give_up(self, why: str) -> None:
        self._why = why
        self._given_up.set()
