"""A real Dask scheduler and real workers on loopback, each a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.child import die_with_parent
from tests.support.postgres import free_port

DASK = str(Path(sys.executable).parent / "dask")
_SECONDS = 90.0


class DaskCluster:
    """A scheduler, and the workers that were started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start_scheduler(self, allowed_failures: int) -> None:
        environment = os.environ | {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(allowed_failures)}
        host, port = self.address.removeprefix("tcp://").split(":")
        self._start("scheduler", ["scheduler", "--host", host, "--port", port, "--no-dashboard"], environment)

    def start_worker(self, name: str, environment: Mapping[str, str]) -> int:
        """One thread, no nanny: what is killed stays away. Its pid."""
        words = ["worker", self.address, "--name", name, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
        words += ["--host", "127.0.0.1", "--local-directory", str(self.directory / f"dask-{name}")]
        self._start(name, words, environment)
        self._wait_for(name, "Registered to")
        return self.processes[name].pid

    def kill(self, name: str) -> None:
        """With SIGKILL, and wait."""
        self.processes[name].kill()
        self.processes[name].wait()

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def _start(self, name: str, words: list[str], environment: Mapping[str, str]) -> None:
        with (self.directory / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [DASK, *words],
                env=dict(environment),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
            )

    def _wait_for(self, name: str, text: str) -> None:
        until = time.monotonic() + _SECONDS
        while text not in self.log(name):
            if self.processes[name].poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"dask {name} did not start:\n{self.log(name)}")
            time.sleep(0.1)


@contextlib.contextmanager
def dask_cluster(directory: Path, *, allowed_failures: int = 3) -> Iterator[DaskCluster]:
    """A scheduler without workers; all that was started ends with it.

    ``allowed_failures``: how often it gives a lost worker's task to another one by itself.
    """
    cluster = DaskCluster(directory)
    cluster.start_scheduler(allowed_failures)
    try:
        yield cluster
    finally:
        cluster.stop()
