"""A second S3 implementation (moto's server): in memory, takes any credentials. Never quote its speed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.child import die_with_parent
from tests.support.ports import free_ports, owns_port
from tests.support.seaweed import boto3_client


class MotoServer:
    """One server process."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self, *, seconds: float = 60.0) -> None:
        """Run it and wait until it answers; raises RuntimeError with its log otherwise."""
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(self.port)],
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
                stdout=log,
                stderr=log,
            )
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and self._process.poll() is None:
                if owns_port(self._process.pid, self.port) and self._answers():
                    return
                time.sleep(0.05)
            self.stop()
            log.seek(0)
            raise RuntimeError(f"moto's server did not come up:\n{log.read().decode(errors='replace')}")

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def make_bucket(self, name: str) -> str:
        """Make a bucket; its name."""
        self.client().create_bucket(Bucket=name)
        return name

    def client(self) -> Any:
        """A boto3 client, for what tests must look at from outside."""
        return boto3_client(self.endpoint_url)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint_url}/moto-api/", timeout=10) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False


@contextlib.contextmanager
def running_moto() -> Iterator[MotoServer]:
    """A fresh server, stopped at the end."""
    server = MotoServer()
    try:
        server.start()
        yield server
    finally:
        server.stop()
