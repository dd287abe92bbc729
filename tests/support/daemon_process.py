"""``tl daemon`` in the background, with its state, its log, and every process that came of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cli.observed import ArchiverState, DaemonState, JobState
from cli.observed_json import read_state, state_file
from tests.support.tl_host import TL, Host


class DaemonProcess:
    """One daemon of a host; ended at the latest with ``running_daemon``."""

    def __init__(self, host: Host, config: Path, notify: socket.socket | None = None) -> None:
        self.host = host
        self.config = config
        self.log = host.directory / "daemon.log"
        environment = dict(host.environment)
        if notify is not None:
            environment |= {"NOTIFY_SOCKET": notify.getsockname(), "WATCHDOG_USEC": "500000"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [TL, "daemon", "--config", str(config), "--log", "human"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def state(self) -> DaemonState | None:
        """As it last wrote it."""
        found = read_state(state_file(Path(self.host.environment["TL_STATE"])))
        return found if found is not None and found.pid == self.process.pid else None

    def archiver(self, cluster: str) -> ArchiverState | None:
        """Of the state."""
        state = self.state()
        found = [each for each in state.clusters if each.cluster == cluster] if state is not None else []
        return found[0].archiver if found else None

    def job(self, cluster: str, name: str) -> JobState | None:
        """Of the state."""
        state = self.state()
        jobs = (
            [job for each in state.clusters if each.cluster == cluster for job in each.jobs] if state else []
        )
        return next((job for job in jobs if job.job == name), None)

    def wait_for(self, what: str, condition: Callable[[], object], seconds: float = 90.0) -> None:
        """Until it holds; fails with the log when it does not, or when the daemon ends first."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = self.process.poll()
            if ended is not None or time.monotonic() > deadline:
                raise AssertionError(f"{what} did not come (daemon: {ended}):\n{self.said()}")
            time.sleep(0.05)

    def said(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self, seconds: float = 120.0) -> int:
        """SIGTERM; its exit code."""
        self.process.terminate()
        return self.process.wait(seconds)

    def relatives(self) -> list[int]:
        """Every living process that has this host's configuration in its environment, the daemon excepted."""
        mark = f"TL_STATE={self.host.environment['TL_STATE']}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != self.process.pid:
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found


@contextlib.contextmanager
def running_daemon(host: Host, config: Path, notify: socket.socket | None = None) -> Iterator[DaemonProcess]:
    """A daemon that is gone afterwards, with all that came of it, whatever happens."""
    daemon = DaemonProcess(host, config, notify)
    try:
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()
        for pid in daemon.relatives():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
