"""Command hooks: an argv list of tl.toml, run when something fails or works again. Never a shell.

The event stands as one JSON object on the hook's stdin, and ``{job}``, ``{cluster}``, ``{event}`` and ``{message}`` are
replaced in its words. Hooks run beside everything else, a few at a time, each with a time limit; one that fails is
said in the log and not repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from cli.child_process import run_child
from cli.events import Event, EventKind
from cli.log_lines import Level, Log
from cli.observed_json import encode
from cli.operations import HookPlan
from timeline.clock import Clock

AT_ONCE = 4
"""Hooks that run at the same time."""
WAITING = 100
"""Hooks that wait for their turn; more are left out, and said."""
_GRACE_SECONDS = 5.0


def filled(words: tuple[str, ...], event: Event) -> tuple[str, ...]:
    """The words with the event's values in place; what a value holds is never looked at again."""
    values = {
        "{job}": event.job,
        "{cluster}": event.cluster,
        "{event}": str(event.kind),
        "{message}": event.message,
    }
    return tuple(_fill(word, values).replace("\0", " ") for word in words)


def _fill(word: str, values: Mapping[str, str]) -> str:
    done = ""
    while word:
        mark = next((mark for mark in values if word.startswith(mark)), None)
        if mark is None:
            done, word = done + word[0], word[1:]
        else:
            done, word = done + values[mark], word[len(mark) :]
    return done


class Hooks:
    """Runs hooks until closed."""

    def __init__(self, clock: Clock, environment: Mapping[str, str], log: Log) -> None:
        self._clock = clock
        self._environment = environment
        self._log = log
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._running: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()

    def fire(self, plan: HookPlan, event: Event) -> None:
        """Start the hook for this event, if there is one; returns at once."""
        words = plan.on_failure if event.kind is EventKind.FAILURE else plan.on_recovery
        if not words:
            return
        if len(self._running) >= AT_ONCE + WAITING:
            self._say(event, f"too many hooks are waiting; this one is left out: {words[0]}")
            return
        task = asyncio.create_task(self._run(plan, words, event))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self, seconds: float) -> None:
        """Let those that run finish for so long; then they are ended."""
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)
        self._stop.set()
        if self._running:
            await asyncio.wait(self._running)

    async def _run(self, plan: HookPlan, words: tuple[str, ...], event: Event) -> None:
        async with self._slots:
            ended = await run_child(
                filled(words, event),
                environment=self._environment,
                clock=self._clock,
                stop=self._stop,
                timeout_seconds=plan.timeout_seconds,
                grace_seconds=_GRACE_SECONDS,
                text=encode(event).encode() + b"\n",
            )
        if ended.timed_out:
            self._say(event, f"hook {words[0]} was ended after {plan.timeout_seconds:g} s")
        elif ended.code != 0:
            why = f": {ended.errors[-1]}" if ended.errors else ""
            self._say(event, f"hook {words[0]} failed with {ended.code}{why}")

    def _say(self, event: Event, message: str) -> None:
        self._log.emit(Level.ERROR, "hook_failed", message, cluster=event.cluster or None, job=event.job)
