"""The archiver's snapshots: built by a child process, when enough WAL has come.

Archiving never depends on them: the child has its own memory and its own end, a failure is said and tried again
later. On a busy server a build takes its time, and as much time passes before the next one, within a bound: a child
that caught up with a long backlog ran for long, and what came meanwhile must not wait for as long again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cli.config import Settings
from cli.own_command import own_command
from timeline.clock import Clock
from timeline.lsn import Lsn

DEFAULT_MIB = 64
"""A build is due when so much WAL has come since the last one …"""
DEFAULT_AFTER_SECONDS = 300.0
"""… or after so long, if there is at least a sixteenth of it: a branch replays less than that in no time."""
RETRY_SECONDS = 300.0
LONGEST_RETRY_SECONDS = 3600.0
LONGEST_PAUSE_SECONDS = 30.0
"""Between the end of one build and the next."""
BUSY_SECONDS = 5.0
"""After a failure that may pass, such as another build on this host: well below its pause, to get a turn."""
_POLL_SECONDS = 1.0
_STOP_SECONDS = 60.0
_DRAIN_SECONDS = 2.0
_KEPT_BYTES = 8192
_KEPT_LINES = 5
_USAGE, _UNAVAILABLE = 2, 7
_ELSEWHERE = "; it is tried again, at last every hour, and `tl snapshot` on another host builds them, too"
"""Binaries or FUSE may come yet, and a mistake in tl.toml be mended."""


@dataclass(frozen=True, slots=True)
class Pace:
    """When the next build is due; pure."""

    every_bytes: int
    after_seconds: float
    built_lsn: Lsn
    """What the last build was asked to reach."""
    built_at: float
    not_before: float

    def is_due(self, durable: Lsn, now: float) -> bool:
        """Whether to build now."""
        beyond = durable - self.built_lsn
        waited = now - self.built_at >= self.after_seconds
        return now >= self.not_before and (
            beyond >= self.every_bytes or (waited and beyond >= self.every_bytes // 16)
        )

    def after(self, durable: Lsn, began: float, now: float) -> Pace:
        """The pace after a build that took from ``began`` to ``now``."""
        pause = min(now - began, LONGEST_PAUSE_SECONDS)
        return Pace(self.every_bytes, self.after_seconds, durable, now, now + pause)


class SnapshotSchedule:
    """Runs ``tl snapshot`` whenever it is due, until cancelled."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        *,
        every_mib: float,
        after_seconds: float,
        note: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._every_bytes = int(every_mib * (1 << 20))
        self._after_seconds = after_seconds
        self._note = note

    async def run(self, durable: Callable[[], Lsn | None], based: asyncio.Event) -> None:
        """``durable``: how far the archive has come; ``based``: set when there is a base backup to build on."""
        await based.wait()
        # Nobody here knows how old the newest snapshot is: the first child finds out, and may do nothing.
        pace = Pace(self._every_bytes, self._after_seconds, Lsn(0), 0.0, 0.0)
        retry, told = RETRY_SECONDS, ""
        while True:
            await self._clock.sleep(_POLL_SECONDS)
            reached = durable()
            began = self._clock.monotonic()
            if reached is None or not pace.is_due(reached, began):
                continue
            code, said = await self._build()
            if code == 0:
                if said not in ("", told):
                    self._note(f"tl: snapshot: {said}")
                    told = said
                pace = pace.after(reached, began, self._clock.monotonic())
                retry, told = RETRY_SECONDS, said
                continue
            if said != told:
                self._note(f"tl: no snapshot: {said}" + (_ELSEWHERE if code == _USAGE else ""))
                told = said
            if code == _UNAVAILABLE:
                # Most often another cluster's build, which this host does one at a time.
                await self._clock.sleep(BUSY_SECONDS)
                continue
            await self._clock.sleep(retry)
            retry = min(retry * 2, LONGEST_RETRY_SECONDS)

    def command(self) -> tuple[str, ...]:
        """Arguments of one run."""
        command = ["snapshot", "--json"]
        command += ["--store", self._settings.need_store()]
        for option, value in (
            # With its name come its rules for older snapshots.
            ("--cluster", self._settings.cluster),
            ("--endpoint-url", self._settings.endpoint_url),
            ("--region", self._settings.region),
        ):
            command += [option, value] if value is not None else []
        every_mib = self._every_bytes / (1 << 20)
        command += ["--at-least", str(every_mib / 16), "--spacing", str(max(1.0, every_mib))]
        return tuple(command)

    async def _build(self) -> tuple[int, str]:
        """Exit code of one run, and its error or, where there is none, what it warns of."""
        child = await asyncio.create_subprocess_exec(
            *own_command(*self.command()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # A Ctrl-C meant for the archiver is passed on by the archiver.
            start_new_session=True,
        )
        if child.stdout is None or child.stderr is None:
            raise AssertionError("both were asked for as pipes")
        reading = asyncio.gather(last_lines(child.stdout), last_lines(child.stderr))
        try:
            await child.wait()
            # Whoever inherited the pipes and lives on (a server that lingers) is not waited for.
            await asyncio.wait((reading,), timeout=_DRAIN_SECONDS)
        finally:
            await _end(child)
            if not reading.done():
                reading.cancel()
        out, errors = reading.result() if reading.done() and not reading.cancelled() else ((), ())
        code = child.returncode or 0
        return code, said_by(code, out, errors) if code else warned_by(out)


async def last_lines(stream: asyncio.StreamReader) -> tuple[str, ...]:
    """The last ``_KEPT_LINES`` lines of a stream, read to its end; no more than ``_KEPT_BYTES`` are held."""
    kept = b""
    while piece := await stream.read(_KEPT_BYTES):
        kept = (kept + piece)[-_KEPT_BYTES:]
    return tuple(kept.decode(errors="replace").splitlines()[-_KEPT_LINES:])


def warned_by(out: Sequence[str]) -> str:
    """What a build that succeeded warns of."""
    try:
        return "; ".join(json.loads(out[-1])["warnings"])
    except (ValueError, IndexError, KeyError, TypeError):
        return ""


def said_by(code: int, out: Sequence[str], errors: Sequence[str]) -> str:
    """Why a build failed: its own words, which are JSON on stdout, and what else it left on stderr."""
    try:
        document = json.loads(out[-1])
        said = str(document["error"]) + (f" ({document['hint']})" if document.get("hint") else "")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError):
        said = f"`tl snapshot` ended with {code}"
    others = [line.strip() for line in errors if line.strip()]
    return "; ".join(
        [said, *(each for each in others if each.removeprefix("tl: ").removeprefix("hint: ") not in said)]
    )


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
