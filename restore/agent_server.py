"""The mount agent's own process: forks mounts, reaps them, runs expiries, ends when nothing is left.

It must stay fork-safe: no event loop, no threads, no open connections to a store; one selector loop. Imports
that every mount needs are done before the first mount is forked and frozen out of the garbage collector, so that a mount
shares their memory. What S3 needs is imported when the first S3 store is asked for.

``kill -9`` of the agent leaves its mounts running; they end when unmounted. The next agent does not know
them, and ``agent.unmount`` unmounts them all the same.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import setproctitle

from restore import agent, mount_table
from restore.mount_spec import decode_spec
from timeline.clock import Clock, Micros, SystemClock
from timeline.errors import TimelineError

LINGER_SECONDS = 5.0
"""How long an agent without mounts and registrations waits for more."""
READY_SECONDS = 120.0
"""How long a mount may take to stand: a store may be slow."""
END_SECONDS = 30.0
"""How long a mount may take to end after SIGTERM."""
EXPIRY_SECONDS = 30.0
EXPIRY_RUN_SECONDS = 600.0
EXPIRY_GIVE_UP_MICROS = 3600 * 1_000_000
"""A registration that expired so long ago has a command that does not unregister it: forgotten."""

_MAX_LINE_BYTES = 1 << 20

Answer = dict[str, Any]


@dataclass(slots=True, eq=False)
class _Connection:
    socket: socket.socket
    received: bytes = b""


@dataclass(slots=True, eq=False)
class _Mount:
    mountpoint: str
    spec: str
    pid: int
    ready: bool
    reader: int | None
    """Pipe on which the mount tells that it stands."""
    deadline: float
    told: bytes = b""
    waiting: list[_Connection] = field(default_factory=list)
    """Who asked for it and has no answer yet."""
    ending: list[_Connection] = field(default_factory=list)
    """Who asked for its end."""


@dataclass(frozen=True, slots=True)
class _Expiry:
    expires: Micros
    command: tuple[str, ...]
    environment: dict[str, str]


class AgentServer:
    """One agent; ``run`` returns when it has nothing left to do."""

    def __init__(self, state: Path, clock: Clock) -> None:
        self._state = state
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._mounts: dict[str, _Mount] = {}
        self._expiries: dict[str, _Expiry] = {}
        self._expiry_pid: int | None = None
        self._expiry_started = 0.0
        self._next_expiry = 0.0
        self._idle_since = clock.monotonic()
        self._connections: set[_Connection] = set()
        self._stamp = agent.code_stamp()
        self._wakeup_reader, self._wakeup_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._terminated = False

    def listen(self) -> None:
        """Take the socket. The caller of ``agent`` holds the lock, so whatever lies there is dead."""
        listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        old_mask = os.umask(0o177)
        try:
            with agent.socket_address(self._state) as address:
                try:
                    os.unlink(address)
                except FileNotFoundError:
                    pass
                listener.bind(address)
        finally:
            os.umask(old_mask)
        listener.listen(64)
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wakeup_reader, selectors.EVENT_READ, self._woken)
        signal.set_wakeup_fd(self._wakeup_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._terminate)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def run(self) -> None:
        """Serve until idle for LINGER_SECONDS, or until SIGTERM, which ends the mounts too."""
        # Whatever was imported until now took its time: callers may wait already.
        self._idle_since = self._clock.monotonic()
        while not self._may_end():
            for key, _ in self._selector.select(self._pause()):
                key.data()
            self._reap()
            self._check_deadlines()
            self._expire()

    # Requests.

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            accepted, _ = self._listener.accept()
        except BlockingIOError:
            return
        accepted.setblocking(False)
        connection = _Connection(accepted)
        self._connections.add(connection)
        self._selector.register(accepted, selectors.EVENT_READ, lambda: self._receive(connection))

    def _receive(self, connection: _Connection) -> None:
        try:
            part = connection.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        connection.received += part
        if not part or len(connection.received) > _MAX_LINE_BYTES:
            self._hang_up(connection)
        elif connection.received.endswith(b"\n"):
            line, connection.received = connection.received, b""
            try:
                self._handle(connection, json.loads(line))
            except TimelineError as error:
                self._refuse(connection, error.message, hint=error.hint, exit_code=error.exit_code)
            except (ValueError, KeyError, TypeError, OSError) as error:
                self._refuse(connection, f"the agent cannot do that: {error!r}")

    def _handle(self, connection: _Connection, request: dict[str, Any]) -> None:
        if request.get("stamp", self._stamp) != self._stamp:
            self._retire()
            self._answer(connection, {"ok": False, "retired": True})
            return
        match request["do"]:
            case "ping":
                self._answer(connection, {"ok": True, "pid": os.getpid()})
                import_for(str(request.get("store_url", "")))
            case "list":
                found = [
                    {"mountpoint": m.mountpoint, "pid": m.pid, "spec": m.spec}
                    for m in self._mounts.values()
                    if m.ready
                ]
                self._answer(connection, {"ok": True, "mounts": found})
            case "mount":
                self._begin_mount(connection, str(request["spec"]), dict(request["environment"]))
            case "unmount":
                self._begin_unmount(connection, str(request["mountpoint"]))
            case "register":
                self._expiries[str(request["branch"])] = _Expiry(
                    int(request["expires"]),
                    tuple(str(word) for word in request["command"]),
                    dict(request["environment"]),
                )
                self._answer(connection, {"ok": True})
            case "unregister":
                self._expiries.pop(str(request["branch"]), None)
                self._answer(connection, {"ok": True})
            case other:
                self._refuse(connection, f"the agent does not know {other!r}")

    def _answer(self, connection: _Connection, answer: Answer) -> None:
        try:
            connection.socket.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            self._hang_up(connection)

    def _refuse(
        self, connection: _Connection, error: str, *, hint: str | None = None, exit_code: int = 1
    ) -> None:
        self._answer(connection, {"ok": False, "error": error, "hint": hint, "exit_code": exit_code})

    def _hang_up(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._selector.unregister(connection.socket)
            connection.socket.close()

    def _retire(self) -> None:
        """Another version of tl is installed: serve what is mounted, take nothing new, leave the name
        free."""
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
            with agent.socket_address(self._state) as address:
                try:
                    os.unlink(address)
                except FileNotFoundError:
                    pass

    # Mounts.

    def _begin_mount(self, connection: _Connection, spec_path: str, environment: dict[str, str]) -> None:
        spec = decode_spec(Path(spec_path).read_bytes(), spec_path)
        known = self._mounts.get(spec.mountpoint)
        if known is not None and known.ready:
            self._answer(connection, {"ok": True, "pid": known.pid})
            return
        if known is not None:
            known.waiting.append(connection)
            return
        import_for(spec.store_url)
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            self._become_mount(spec_path, writer, environment)
        os.close(writer)
        mount = _Mount(
            spec.mountpoint,
            spec_path,
            pid,
            False,
            reader,
            self._clock.monotonic() + READY_SECONDS,
            waiting=[connection],
        )
        self._mounts[spec.mountpoint] = mount
        self._selector.register(reader, selectors.EVENT_READ, lambda: self._hear(mount))

    def _become_mount(self, spec_path: str, writer: int, environment: dict[str, str]) -> NoReturn:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        self._selector.close()
        for inherited in (self._wakeup_reader, self._wakeup_writer):
            os.close(inherited)
        if self._listener is not None:
            self._listener.close()
        for connection in self._connections:
            connection.socket.close()
        for mount in self._mounts.values():
            if mount.reader is not None:
                os.close(mount.reader)
        _take_environment(environment)
        setproctitle.setproctitle(f"tl mount {Path(spec_path).parent}")
        from restore import mount_process

        mount_process.run(spec_path, writer)

    def _hear(self, mount: _Mount) -> None:
        if mount.reader is None:
            return
        part = os.read(mount.reader, 65536)
        mount.told += part
        if part and not mount.told.endswith(b"\n"):
            return
        self._selector.unregister(mount.reader)
        os.close(mount.reader)
        mount.reader = None
        told = json.loads(mount.told) if mount.told else {}
        if told.get("ready"):
            mount.ready = True
            self._tell_waiting(mount, {"ok": True, "pid": mount.pid})
        elif "error" in told:
            self._tell_waiting(mount, {"ok": False, **told})

    def _tell_waiting(self, mount: _Mount, answer: Answer) -> None:
        for connection in mount.waiting:
            if connection in self._connections:
                self._answer(connection, answer)
        mount.waiting = []

    def _begin_unmount(self, connection: _Connection, mountpoint: str) -> None:
        mount = self._mounts.get(mountpoint)
        if mount is None:
            self._answer(connection, {"ok": True})
            return
        mount.ending.append(connection)
        mount.deadline = self._clock.monotonic() + END_SECONDS
        os.kill(mount.pid, signal.SIGTERM)

    # Children.

    def _woken(self) -> None:
        try:
            while os.read(self._wakeup_reader, 4096):
                pass
        except BlockingIOError:
            pass

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._expiry_pid:
                self._expiry_pid = None
            for mount in list(self._mounts.values()):
                if mount.pid == pid:
                    self._bury(mount, status)

    def _bury(self, mount: _Mount, status: int) -> None:
        """A mount process has ended, as asked or not; nothing of it stays mounted."""
        if mount.reader is not None:
            self._hear(mount)
        how = os.waitstatus_to_exitcode(status)
        cause = f"signal {-how}" if how < 0 else f"status {how}"
        self._tell_waiting(
            mount,
            {
                "ok": False,
                "error": f"the mount process ended ({cause})",
                "hint": "see its log",
                "exit_code": 1,
            },
        )
        del self._mounts[mount.mountpoint]
        if not mount.ending:
            # A killed mount stays in place, dead, until it is mounted again or unmounted: Postgres gets
            # errors, and nobody finds an empty directory there instead.
            print(f"mount {mount.mountpoint} ended: {cause}", file=sys.stderr, flush=True)
            return
        try:
            mount_table.unmount(mount.mountpoint, detach=True)
            answer: Answer = {"ok": True}
        except TimelineError as error:
            answer = {"ok": False, "error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        for connection in mount.ending:
            if connection in self._connections:
                self._answer(connection, answer)

    def _check_deadlines(self) -> None:
        now = self._clock.monotonic()
        for mount in self._mounts.values():
            if (mount.ending or not mount.ready) and now >= mount.deadline:
                mount.deadline = now + END_SECONDS
                os.kill(mount.pid, signal.SIGKILL)

    # Expiry.

    def _expire(self) -> None:
        monotonic, now = self._clock.monotonic(), self._clock.now()
        if self._expiry_pid is not None:
            if monotonic - self._expiry_started > EXPIRY_RUN_SECONDS:
                os.kill(self._expiry_pid, signal.SIGKILL)
            return
        for branch in [b for b, e in self._expiries.items() if now - e.expires > EXPIRY_GIVE_UP_MICROS]:
            print(
                f"branch {branch} expired long ago and is still registered: forgotten",
                file=sys.stderr,
                flush=True,
            )
            del self._expiries[branch]
        due = next((e for e in self._expiries.values() if e.expires <= now), None)
        if due is None or monotonic < self._next_expiry:
            return
        self._next_expiry = monotonic + EXPIRY_SECONDS
        self._expiry_started = monotonic
        try:
            self._expiry_pid = os.posix_spawnp(
                due.command[0],
                due.command,
                {**os.environ, **due.environment},
                file_actions=[(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1)],
                setsigdef=(signal.SIGINT, signal.SIGHUP),
            )
        except OSError as error:
            print(f"cannot run {due.command[0]}: {error}", file=sys.stderr, flush=True)

    # The end.

    def _pause(self) -> float:
        now = self._clock.monotonic()
        moments = [now + EXPIRY_SECONDS]
        moments += [m.deadline for m in self._mounts.values() if m.ending or not m.ready]
        if self._expiries:
            soonest = min(e.expires for e in self._expiries.values()) - self._clock.now()
            moments.append(max(self._next_expiry, now + soonest / 1e6))
        if self._idle():
            moments.append(self._idle_since + LINGER_SECONDS)
        return max(0.0, min(moments) - now) + 0.01

    def _idle(self) -> bool:
        return not self._mounts and not self._expiries and not self._connections and self._expiry_pid is None

    def _may_end(self) -> bool:
        now = self._clock.monotonic()
        if not self._idle():
            self._idle_since = now
        elif self._terminated or now - self._idle_since >= LINGER_SECONDS:
            return self._let_go()
        return False

    def _let_go(self) -> bool:
        """Give the name back, unless somebody is just about to start or ask an agent."""
        import fcntl

        fd = os.open(self._state / agent.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._idle_since = self._clock.monotonic()
            os.close(fd)
            return False
        # A caller that connected a moment ago finds the connection closed, takes the lock and starts another.
        self._retire()
        os.close(fd)
        return True

    def _terminate(self, *_: object) -> None:
        self._terminated = True
        self._expiries.clear()
        for mount in self._mounts.values():
            os.kill(mount.pid, signal.SIGTERM)


def import_for(store_url: str) -> None:
    """What this kind of store needs, once, before the fork: the next mounts have it."""
    if store_url.startswith("s3:") and "timeline.store.s3" not in sys.modules:
        import timeline.store._s3_client
        import timeline.store.s3

        timeline.store._s3_client.preload()
        gc.freeze()


def _take_environment(environment: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(environment)


def serve(state: Path, ready: int, clock: Clock) -> None:
    """The life of an agent from its detached process on: listen, tell by the descriptor ``ready``, serve."""
    os.umask(0o077)
    setproctitle.setproctitle("tl agent")
    server = AgentServer(state, clock)
    server.listen()
    # Whoever waits for us asks the store meanwhile; what it asks of us waits until we have imported what mounts need.
    os.write(ready, b"r")
    os.close(ready)
    import restore.mount_process  # noqa: F401

    gc.collect()
    gc.freeze()
    server.run()


def main() -> NoReturn:
    """``agent_server STATE READY_FD``: detach and serve."""
    state, ready = Path(sys.argv[1]), int(sys.argv[2])
    if os.fork() != 0:
        os._exit(0)
    serve(state, ready, SystemClock())
    sys.exit(0)
