"""Start and stop vanilla Postgres on a branch's data directory.

The server is a process of its own in a session of its own: it outlives the caller. Ready is the word
``ready`` in ``postmaster.pid``, read from the file and never by connecting: a reader that arrives during
replay can cost committed rows (EDGE 56).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from restore.binaries import Binaries
from restore.host import Host
from restore.process import children, command_line, is_alive, send, start_time
from timeline.clock import Clock
from timeline.errors import TimelineError, Unavailable
from timeline.format.branch_state import Setting
from timeline.lsn import Lsn
from timeline.pg.control import CONTROL_FILE, ControlFile, parse_control
from timeline.pg.errors import FormatError
from timeline.pg.segment import history_name, parse_history

POLL_SECONDS = 0.005
LOG_BYTES = 16 << 20
"""A log larger than this is set aside (one old one is kept) at the next start."""
_FAILURE_LOG_BYTES = 64 << 10
_LOCK_FILE_BYTES = 8192
_STATUS_LINE = 7
_FAILURE = re.compile(r"(?:FATAL|PANIC):  (.*)")
_LOSS = re.compile(r"LOG:  (.* was terminated by signal .*)")
_BEGAN_ANEW = b"all server processes terminated; reinitializing"
"""src/backend/postmaster/postmaster.c"""
_DETAIL = re.compile(r"(?:DETAIL|HINT|CONTEXT):  (.*)")
_KILL_SECONDS = 10.0
_PROMOTE_FILE = "promote"
_ASK_SECONDS = 0.05
_CONTROL_READS = 100
"""A write of a few hundred bytes is over long before."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A data directory and what is needed to serve it."""

    host: Host
    binaries: Binaries
    data: Path
    log: Path


@dataclass(frozen=True, slots=True)
class Postmaster:
    """A server process."""

    pid: int
    started: str
    """When the process began (restore/process.py)."""


@dataclass(slots=True)
class Launch:
    """A server process of ours on its way to being ready."""

    instance: Instance
    postmaster: Postmaster
    _process: subprocess.Popen[bytes]
    _log_offset: int
    _promotes: bool
    _again: _Again | None

    async def wait(self, clock: Clock, *, ready_seconds: float) -> Postmaster:
        """Wait until it is ready, at most ``ready_seconds``; call once.

        Raises TimelineError with Postgres's own words when it ends instead, or when it recovered more often than allowed,
        Unavailable when the time is up.
        Nothing of it is left running then, nor when the wait is cancelled.
        """
        try:
            promotion = _Promotion(self.instance, self._process) if self._promotes else None
            await _wait_until_ready(self, self._process, self._log_offset, clock, ready_seconds, promotion)
        except BaseException:
            await asyncio.shield(kill(self.postmaster, clock))
            raise
        finally:
            # It outlives us: Popen must neither wait for it nor complain that we did not.
            self._process.returncode = 0
        return self.postmaster

    def check_once(self) -> None:
        """Raise TimelineError when it recovered more often than allowed."""
        if self._again is not None and self._again.happened():
            raise TimelineError(
                "Postgres lost a process during its recovery, and would begin anew on pages that may be half written",
                hint=f"out of memory? its log is {self.instance.log}; otherwise try again",
            )


def launch(
    instance: Instance, *, options: Sequence[Setting] = (), promotes: bool = False, once: bool = False
) -> Launch:
    """Start Postgres; raises TimelineError when it cannot be run at all.

    ``promotes``: it starts as a standby, and is to be a primary where its WAL ends. ``once``: having lost a process, it
    must not begin its recovery anew, on pages that may be half written (EDGE 57).
    """
    # A file left by a crash may name a pid that belongs to someone else by now, and Postgres would give way.
    (instance.data / "postmaster.pid").unlink(missing_ok=True)
    process, log_offset = _spawn(instance, options)
    postmaster = Postmaster(process.pid, start_time(process.pid) or "")
    again = _Again(instance.log, log_offset) if once else None
    return Launch(instance, postmaster, process, log_offset, promotes, again)


def find_postmaster(data: Path) -> Postmaster | None:
    """The server that runs on that directory, by what ``postmaster.pid`` says and the process itself
    confirms.

    For directories whose own record of it was lost; ``None`` when there is none or nobody can tell.
    """
    try:
        pid = int((data / "postmaster.pid").read_text().split("\n")[0])
    except (OSError, ValueError):
        return None
    started = start_time(pid)
    if pid <= 1 or started is None or str(data) not in command_line(pid):
        return None
    return Postmaster(pid, started)


def _spawn(instance: Instance, options: Sequence[Setting]) -> tuple[subprocess.Popen[bytes], int]:
    host = instance.host
    arguments = [str(instance.binaries.postgres), "-D", str(instance.data)]
    for option in options:
        arguments += ["-c", f"{option.name}={option.value}"]
    if instance.log.exists() and instance.log.stat().st_size > LOG_BYTES:
        instance.log.replace(instance.log.with_suffix(".log.old"))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(instance.log, flags, 0o600), "ab") as log:
        offset = log.tell()
        try:
            process = subprocess.Popen(
                arguments,
                cwd="/",
                env=instance.binaries.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                umask=0o077,
                user=host.account.uid if host.switches_user else None,
                group=host.account.gid if host.switches_user else None,
                extra_groups=list(host.account.groups) if host.switches_user else None,
            )
        except OSError as error:
            raise TimelineError(
                f"cannot run {instance.binaries.postgres} as user {host.account.name}: {error.strerror}"
            ) from error
    return process, offset


async def _wait_until_ready(
    starting: Launch,
    process: subprocess.Popen[bytes],
    log_offset: int,
    clock: Clock,
    ready_seconds: float,
    promotion: _Promotion | None,
) -> None:
    instance = starting.instance
    deadline = clock.monotonic() + ready_seconds
    with contextlib.closing(_LockFile(instance.data, process.pid)) as lock_file:
        while True:
            if process.poll() is not None:
                raise _explain(instance, log_offset, process.returncode)
            status = lock_file.status()
            starting.check_once()
            if status == "ready":
                return
            if promotion is not None and status:
                promotion.ask(clock)
            if clock.monotonic() >= deadline:
                raise Unavailable(
                    f"Postgres was not ready within {ready_seconds:.0f} s", hint=f"its log is {instance.log}"
                )
            await clock.sleep(POLL_SECONDS)


class _LockFile:
    """``postmaster.pid`` of a server that starts; opened once, so that looking at it asks nothing of a mount that has
    enough to do: the kernel answers from its cache."""

    def __init__(self, data: Path, pid: int) -> None:
        self._path = data / "postmaster.pid"
        self._pid = pid
        self._fd: int | None = None

    def status(self) -> str:
        """What this process wrote of itself (src/include/utils/pidfile.h), empty when it wrote nothing yet."""
        if self._fd is None:
            try:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return ""
        lines = os.pread(self._fd, _LOCK_FILE_BYTES, 0).decode(errors="replace").split("\n")
        if lines[0] != str(self._pid):
            # Not written yet, or another's, to be replaced.
            self.close()
            return ""
        return lines[_STATUS_LINE].strip() if len(lines) > _STATUS_LINE else ""

    def close(self) -> None:
        """Let it go; harmless when it is not open."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class _Promotion:
    """Asks a standby to be a primary where its WAL ends, as ``pg_ctl promote`` does.

    A standby looks at the request only when there is no more WAL, so it may be made as soon as the server can be
    asked: once its status is in ``postmaster.pid``.
    """

    def __init__(self, instance: Instance, process: subprocess.Popen[bytes]) -> None:
        self._instance = instance
        self._process = process
        self._next = 0.0

    def ask(self, clock: Clock) -> None:
        """Do so, and again after a while: a request made before there is a startup process is not passed on."""
        now = clock.monotonic()
        if now < self._next:
            return
        if not self._next:
            (self._instance.data / _PROMOTE_FILE).touch()
        self._next = now + _ASK_SECONDS
        self._process.send_signal(signal.SIGUSR1)


class _Again:
    """Whether Postgres lost a process and threw its memory away, to recover once more; its log tells."""

    def __init__(self, log: Path, offset: int) -> None:
        self._log = log
        self._read = offset
        self._last = b""
        """The end of what was read: the words may come in two pieces."""
        self._found = False

    def happened(self) -> bool:
        """Look at what was logged since the last look."""
        if not self._found and self._log.stat().st_size > self._read:
            with self._log.open("rb") as log:
                log.seek(self._read)
                while piece := log.read(_FAILURE_LOG_BYTES):
                    self._read += len(piece)
                    self._found = self._found or _BEGAN_ANEW in self._last + piece
                    self._last = (self._last + piece)[-len(_BEGAN_ANEW) :]
        return self._found


def _explain(instance: Instance, log_offset: int, code: int) -> TimelineError:
    """Why it ended, in its own words: the first FATAL or PANIC of this start, with its hint, or the process it lost, whichever
    came first: after a loss Postgres ends the others, and what they say of that is no cause."""
    with instance.log.open("rb") as log:
        log.seek(log_offset)
        said = log.read(_FAILURE_LOG_BYTES)
        # After a long recovery the end is far from the beginning.
        log.seek(max(log.tell(), log.seek(0, os.SEEK_END) - _FAILURE_LOG_BYTES))
        lines = [
            *said.decode(errors="replace").splitlines(),
            *log.read().decode(errors="replace").splitlines(),
        ]
    for number, line in enumerate(lines):
        failure = _FAILURE.search(line)
        if failure is None:
            lost = _LOSS.search(line)
            if lost is not None:
                return _ended(instance, code, lost[1])
            continue
        following = [_DETAIL.search(later) for later in lines[number + 1 : number + 4]]
        more = "; ".join(match[1] for match in following if match)
        return TimelineError(
            f"Postgres could not start: {failure[1]}" + (f" ({more})" if more else ""),
            hint=f"its log is {instance.log}",
        )
    return _ended(instance, code, lines[-1] if lines else "it said nothing")


def _ended(instance: Instance, code: int, why: str) -> TimelineError:
    return TimelineError(
        f"Postgres ended with {code} before it was ready: {why}", hint=f"its log is {instance.log}"
    )


async def stop(postmaster: Postmaster, clock: Clock, *, seconds: float) -> None:
    """Shut down in an orderly way (sessions are ended, a checkpoint is written); killed after ``seconds``."""
    if not send(postmaster.pid, postmaster.started, signal.SIGINT):
        return
    if not await _wait_until_gone(postmaster, clock, seconds):
        await kill(postmaster, clock)


async def kill(postmaster: Postmaster, clock: Clock) -> None:
    """End it now, as a crash would, with all its children. Raises TimelineError when even that fails."""
    family = children(postmaster.pid)
    if send(postmaster.pid, postmaster.started, signal.SIGQUIT):
        await _wait_until_gone(postmaster, clock, _KILL_SECONDS / 2)
    send(postmaster.pid, postmaster.started, signal.SIGKILL)
    for pid, started in family:
        send(pid, started, signal.SIGKILL)
    for pid, started in ((postmaster.pid, postmaster.started), *family):
        if not await _wait_until_gone(Postmaster(pid, started), clock, _KILL_SECONDS):
            raise TimelineError(f"process {pid} survives SIGKILL", hint="it hangs in the kernel: see dmesg")


async def _wait_until_gone(postmaster: Postmaster, clock: Clock, seconds: float) -> bool:
    deadline = clock.monotonic() + seconds
    while is_alive(postmaster.pid, postmaster.started):
        if clock.monotonic() >= deadline:
            return False
        await clock.sleep(POLL_SECONDS)
    return True


def read_control(data: Path) -> ControlFile:
    """pg_control of a server that may be writing it at this very moment (EDGE 31); raises FormatError."""
    for _ in range(_CONTROL_READS - 1):
        with contextlib.suppress(FormatError):
            return parse_control((data / CONTROL_FILE).read_bytes())
    return parse_control((data / CONTROL_FILE).read_bytes())


def promoted_at(data: Path, wal: Path) -> tuple[int, Lsn]:
    """The tli a branch is on after its first start, and where it left its parent's WAL; whether or not it has made a
    checkpoint there.

    Raises TimelineError when the server has not left its parent's tli.
    """
    control = read_control(data)
    tli = max(control.tli, control.min_recovery_point_tli)
    path = wal / history_name(tli)
    rows = parse_history(path.read_text()) if path.exists() else ()
    if not rows:
        raise TimelineError(f"the branch was not promoted: {path.name} is missing")
    return tli, rows[-1].end
