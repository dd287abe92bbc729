"""The mount agent as its callers see it: one per user and state directory, started when first needed.

The agent (agent_server.py) has the imports done and forks a mount process per branch in milliseconds. It
listens on ``<state>/agent.sock`` (0600), is started detached from the caller's session under
``<state>/agent.lock``, so that two callers start only one (forked from the caller where that is possible:
agent_fork.py), and ends a moment after the last mount and the
last registered branch.

Protocol: one JSON object per line each way, ``{"do": …}`` and ``{"ok": true, …}`` or ``{"ok": false, "error",
"hint", "exit_code"}``. Every wait is bounded. Calls block; the async twins run them in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restore import mount_table
from timeline.clock import Micros, SystemClock
from timeline.errors import TimelineError, Unavailable

SOCKET = "agent.sock"
LOCK = "agent.lock"
LOG = "agent.log"

START_SECONDS = 30.0
"""How long a new agent may take until it listens."""
MOUNT_SECONDS = 150.0
"""Longer than the agent itself waits for a mount."""
UNMOUNT_SECONDS = 60.0
ANSWER_SECONDS = 20.0

_LOCK_PAUSE_SECONDS = 0.02
_MAX_SOCKET_PATH = 100
_ENVIRONMENT_PREFIXES = (
    "AWS_",
    "TL_",
    "SSL_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
)
"""What of the caller's environment a mount or an expiry gets: how the store is reached, nothing else."""
LIBRARY_ENVIRONMENT = {
    # One mount has four threads and small objects: separate arenas and pools would only hold memory back.
    "MALLOC_ARENA_MAX": "2",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}


class AgentError(TimelineError):
    """The agent refused, with its own reason."""

    def __init__(self, message: str, *, hint: str | None, exit_code: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


class NoAgent(Unavailable):
    """No agent answers."""


@dataclass(frozen=True, slots=True)
class AgentMount:
    """One mount of the agent."""

    mountpoint: str
    pid: int
    spec: str


def mount(state: Path, spec: Path) -> int:
    """Mount what ``spec`` (mount.json) says, starting an agent if there is none; pid of the mount process.

    Returns when the mount stands; harmless when it already does. Raises TimelineError.
    """
    request = {"do": "mount", "spec": os.path.abspath(spec), "environment": _environment()}
    return int(_ask_started(state, request, MOUNT_SECONDS)["pid"])


def unmount(state: Path, mountpoint: Path) -> None:
    """Unmount, whoever serves it, and wait until its process has ended; no error when nothing is mounted.

    What still has files open there gets errors. Raises TimelineError.
    """
    with contextlib.suppress(NoAgent):
        _ask(state, {"do": "unmount", "mountpoint": os.path.abspath(mountpoint)}, UNMOUNT_SECONDS)
    mount_table.unmount(mountpoint)


def mounts(state: Path) -> tuple[AgentMount, ...]:
    """What the agent has mounted; nothing when there is no agent, and none is started."""
    try:
        answer = _ask(state, {"do": "list"}, ANSWER_SECONDS)
    except NoAgent:
        return ()
    return tuple(AgentMount(m["mountpoint"], int(m["pid"]), m["spec"]) for m in answer["mounts"])


def register(
    state: Path,
    branch_id: str,
    expires: Micros,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Have ``command`` run when the branch has expired, at most every 30 s until ``unregister``.

    Starts an agent if there is none, and keeps it alive, so it works for branches without a mount too.
    """
    request = {
        "do": "register",
        "branch": branch_id,
        "expires": expires,
        "command": list(command),
        "environment": {**_environment(), **(environment or {})},
    }
    _ask_started(state, request, ANSWER_SECONDS)


def unregister(state: Path, branch_id: str) -> None:
    """Forget a branch's expiry; no error when it was not registered or there is no agent."""
    with contextlib.suppress(NoAgent):
        _ask(state, {"do": "unregister", "branch": branch_id}, ANSWER_SECONDS)


def answers(state: Path, store_url: str) -> bool:
    """Whether an agent of this very code is there; one that is begins to import what that store needs."""
    try:
        _ask(state, {"do": "ping", "store_url": store_url, "stamp": code_stamp()}, ANSWER_SECONDS)
    except NoAgent:
        return False
    return True


def ping(state: Path) -> int | None:
    """Pid of the agent, ``None`` when there is none."""
    try:
        return int(_ask(state, {"do": "ping"}, ANSWER_SECONDS)["pid"])
    except NoAgent:
        return None


async def mount_async(state: Path, spec: Path) -> int:
    """As ``mount``."""
    return await asyncio.to_thread(mount, state, spec)


async def unmount_async(state: Path, mountpoint: Path) -> None:
    """As ``unmount``."""
    await asyncio.to_thread(unmount, state, mountpoint)


@contextlib.contextmanager
def socket_address(state: Path) -> Iterator[str]:
    """A path of the agent's socket that fits the kernel's bound, valid inside the block."""
    path = os.fspath(state.absolute() / SOCKET)
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        yield path
        return
    directory = os.open(state, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{SOCKET}"
    finally:
        os.close(directory)


def code_stamp() -> int:
    """Changes when this installation is replaced: an agent of older code must not serve newer callers."""
    here = Path(__file__).parent
    return max(
        (here / name).stat().st_mtime_ns for name in ("agent_server.py", "mount_process.py", "tree.py")
    )


def _ask_started(state: Path, request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Ask, starting an agent if none answers or the one that does is of other code."""
    request = {**request, "stamp": code_stamp()}
    with contextlib.suppress(NoAgent):
        return _ask(state, request, seconds)
    with starting(state):
        with contextlib.suppress(NoAgent):
            return _ask(state, request, seconds)
        _start(state)
    return _ask(state, request, seconds)


def _ask(state: Path, request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The agent's answer; raises NoAgent, AgentError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(seconds)
        try:
            with socket_address(state) as address:
                connection.connect(address)
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = _read_line(connection)
        except TimeoutError:
            raise Unavailable(f"the mount agent did not answer within {seconds:.0f} s") from None
        except OSError as error:
            raise NoAgent(f"no mount agent: {error.strerror}") from error
    if answer is None:
        raise NoAgent("the mount agent ended")
    if not answer["ok"]:
        if answer.get("retired"):
            raise NoAgent("the mount agent was of an older version")
        raise AgentError(answer["error"], hint=answer.get("hint"), exit_code=int(answer.get("exit_code", 1)))
    return answer


def _read_line(connection: socket.socket) -> dict[str, Any] | None:
    received = b""
    while not received.endswith(b"\n"):
        part = connection.recv(65536)
        if not part:
            return None
        received += part
    answer: dict[str, Any] = json.loads(received)
    return answer


@contextlib.contextmanager
def starting(state: Path) -> Iterator[None]:
    """The right to start an agent; raises Unavailable when somebody else keeps it too long."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    clock = SystemClock()
    fd = os.open(state / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = clock.monotonic() + START_SECONDS
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if clock.monotonic() >= deadline:
                    raise Unavailable(f"{state / LOCK} is held by another process") from None
                clock.pause(_LOCK_PAUSE_SECONDS)
        yield
    finally:
        os.close(fd)


def _start(state: Path) -> None:
    """Start an agent outside the caller's session; returns when it listens. The caller holds the lock."""
    root = os.fspath(Path(__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {root!r}); from restore.agent_server import main; main()"
    reader, writer = os.pipe()
    try:
        with open(state / LOG, "ab") as log:
            starter = subprocess.Popen(
                [sys.executable, "-c", code, os.fspath(state.absolute()), str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd="/",
                env={**os.environ, **LIBRARY_ENVIRONMENT},
                pass_fds=(writer,),
                start_new_session=True,
            )
        os.close(writer)
        writer = -1
        starter.wait(timeout=START_SECONDS)
        if not _wait_readable(reader, START_SECONDS) or os.read(reader, 1) != b"r":
            raise Unavailable("the mount agent did not start", hint=f"see {state / LOG}")
    except subprocess.TimeoutExpired:
        starter.kill()
        raise Unavailable("the mount agent did not start", hint=f"see {state / LOG}") from None
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


def _wait_readable(fd: int, seconds: float) -> bool:
    import select

    return bool(select.select([fd], [], [], seconds)[0])


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT_PREFIXES)}
