"""The archiver's snapshots: built by a child process, when enough WAL has come.

Archiving never depends on them: the child has its own memory and its own end, a failure is said and tried again
later. On a busy server a build takes its time, and as much time passes before the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cli.config import Settings
from timeline.clock import Clock
from timeline.lsn import Lsn

DEFAULT_MIB = 64
"""A build is due when so much WAL has come since the last one …"""
IDLE_SECONDS = 300.0
"""… or after so long, if there is a sixteenth of it."""
RETRY_SECONDS = 300.0
LONGEST_RETRY_SECONDS = 3600.0
_POLL_SECONDS = 1.0
_STOP_SECONDS = 60.0
_USAGE = 2


@dataclass(frozen=True, slots=True)
class Pace:
    """When the next build is due; pure."""

    every_bytes: int
    built_lsn: Lsn
    """What the last build was asked to reach."""
    built_at: float
    not_before: float

    def is_due(self, durable: Lsn, now: float) -> bool:
        """Whether to build now."""
        beyond = durable - self.built_lsn
        waited = now - self.built_at >= IDLE_SECONDS
        return now >= self.not_before and (
            beyond >= self.every_bytes or (waited and beyond >= self.every_bytes // 16)
        )

    def after(self, durable: Lsn, began: float, now: float) -> Pace:
        """The pace after a build that took from ``began`` to ``now``."""
        return Pace(self.every_bytes, durable, now, now + (now - began))


class SnapshotSchedule:
    """Runs ``tl snapshot`` whenever it is due, until cancelled."""

    def __init__(
        self, settings: Settings, clock: Clock, every_mib: float, note: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._every_bytes = int(every_mib * (1 << 20))
        self._note = note

    async def run(self, durable: Callable[[], Lsn | None], based: asyncio.Event) -> None:
        """``durable``: how far the archive has come; ``based``: set when there is a base backup to build on."""
        await based.wait()
        # Nobody here knows how old the newest snapshot is: the first child finds out, and may do nothing.
        pace = Pace(self._every_bytes, Lsn(0), 0.0, 0.0)
        retry = RETRY_SECONDS
        while True:
            await self._clock.sleep(_POLL_SECONDS)
            reached = durable()
            began = self._clock.monotonic()
            if reached is None or not pace.is_due(reached, began):
                continue
            code, said = await self._build()
            pace = pace.after(reached, began, self._clock.monotonic())
            if code == 0:
                retry = RETRY_SECONDS
                continue
            self._note(f"tl: no snapshot: {said}")
            if code == _USAGE:
                self._note("tl: snapshots are left to another host (`tl snapshot` builds one)")
                return
            await self._clock.sleep(retry)
            retry = min(retry * 2, LONGEST_RETRY_SECONDS)

    async def _build(self) -> tuple[int, str]:
        """Exit code and error of one run."""
        root = os.fspath(Path(__file__).parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from cli.main import main; main()"
        command = ["snapshot", "--json", "--store", self._settings.need_store()]
        for option, value in (
            ("--endpoint-url", self._settings.endpoint_url),
            ("--region", self._settings.region),
        ):
            command += [option, value] if value is not None else []
        command += ["--at-least", str(self._every_bytes / 16 / (1 << 20))]
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code, *command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            # A Ctrl-C meant for the archiver is passed on by the archiver.
            start_new_session=True,
        )
        try:
            out, _ = await child.communicate()
        finally:
            await _end(child)
        try:
            said = str(json.loads(out.splitlines()[-1]).get("error", ""))
        except (ValueError, IndexError):
            said = f"`tl snapshot` ended with {child.returncode}"
        return child.returncode or 0, said


async def _end(child: asyncio.subprocess.Process) -> None:
    """It clears up after itself when told to stop."""
    if child.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await child.wait()
    except TimeoutError:
        child.kill()
        await child.wait()
