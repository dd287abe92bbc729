"""The installed ``tl`` in fresh processes, with state, cache and configuration of a host of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restore import agent

TL = str(Path(sys.executable).parent / "tl")


@dataclass(frozen=True, slots=True)
class Host:
    """State and cache directories of one simulated host."""

    directory: Path
    store: str
    environment: dict[str, str]

    def tl(self, *args: str, timeout: float = 600) -> dict[str, Any]:
        """Run ``tl … --json`` to its end; the decoded result. Raises RuntimeError with stderr when it fails."""
        result = subprocess.run(
            [TL, *args, "--json"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if result.returncode != 0:
            raise RuntimeError(
                f"tl {' '.join(args)} exited with {result.returncode}:\n{result.stdout}\n{result.stderr}"
            )
        decoded: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
        return decoded

    def branches(self) -> list[dict[str, Any]]:
        """What ``tl branches`` lists."""
        listed: list[dict[str, Any]] = json.loads(self.run("branches", "--json").stdout)
        return listed

    def run(self, *args: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run ``tl …`` to its end, whatever the outcome."""
        return subprocess.run(
            [TL, *args],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def start_archiver(self, *args: str) -> subprocess.Popen[bytes]:
        """``tl archive`` in the background; the caller ends it."""
        with (self.directory / "archive.log").open("ab") as log:
            return subprocess.Popen([TL, "archive", *args], env=self.environment, stdout=log, stderr=log)

    def forget_cache(self) -> None:
        """As a host that has never seen this store: no extent cache."""
        shutil.rmtree(self.environment["TL_CACHE"], ignore_errors=True)

    def end_agent(self) -> None:
        """End the mount agent, which lingers a moment after its last branch, and wait until it is gone."""
        pid = agent.ping(Path(self.environment["TL_STATE"]))
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            for _ in range(500):
                os.kill(pid, 0)
                time.sleep(0.01)

    def mount_pid(self, data_directory: str) -> int | None:
        """Process that serves a branch's data directory; ``None``: it is no mount."""
        mounts = agent.mounts(Path(self.environment["TL_STATE"]))
        return next((each.pid for each in mounts if str(each.mountpoint) == data_directory), None)


def make_host(
    directory: Path, store: str, *, source: str | None = None, endpoint_url: str | None = None
) -> Host:
    """A host whose state lives under ``directory``."""
    environment = {k: v for k, v in os.environ.items() if k == "TL_PG_BIN" or not k.startswith(("TL_", "PG"))}
    environment |= {
        "TL_STATE": str(directory / "state"),
        "TL_CACHE": str(directory / "cache"),
        "TL_CONFIG": str(directory / "tl.toml"),
        "TL_STORE": store,
        "PYTHONDONTWRITEBYTECODE": "",
    }
    if source:
        environment["TL_SOURCE"] = source
    if endpoint_url:
        environment |= {
            "TL_ENDPOINT_URL": endpoint_url,
            "AWS_ACCESS_KEY_ID": "testkey",
            "AWS_SECRET_ACCESS_KEY": "testsecret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    directory.mkdir(parents=True, exist_ok=True)
    return Host(directory, store, environment)
