"""A source of a given size, archived into a store, for benchmarks; and the installed ``tl`` in fresh processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.postgres import PostgresServer, running_server, scratch

TL = str(Path(sys.executable).parent / "tl")
GIB = 1 << 30
PGBENCH_BYTES_PER_SCALE = 15_700_000
"""What one unit of pgbench's scale takes on disk, indexes included."""


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

    def start_archiver(self, *args: str) -> subprocess.Popen[bytes]:
        """``tl archive`` in the background; the caller ends it."""
        log = (self.directory / "archive.log").open("ab")
        return subprocess.Popen([TL, "archive", *args], env=self.environment, stdout=log, stderr=log)

    def forget_cache(self) -> None:
        """As a host that has never seen this store: no extent cache."""
        shutil.rmtree(self.environment["TL_CACHE"], ignore_errors=True)

    def end_agent(self) -> None:
        """Wait until the mount agent, which ends with its last branch, is gone; ends it by pid if it lingers."""
        pid_file = Path(self.environment["TL_STATE"]) / "agent.pid"
        for _ in range(100):
            try:
                os.kill(int(pid_file.read_text()), 15)
            except (OSError, ValueError):
                return
            time.sleep(0.02)


def make_host(
    directory: Path, store: str, *, source: str | None = None, endpoint_url: str | None = None
) -> Host:
    """A host whose state lives under ``directory``."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TL_", "PG"))}
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


@contextlib.contextmanager
def working_directory() -> Iterator[Path]:
    """A directory for one benchmark run, removed at the end."""
    path = scratch("tl-bench-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def pgbench_source(size_bytes: int, major: int = 15) -> Iterator[PostgresServer]:
    """A server holding a pgbench database of about that size."""
    settings = {
        "max_wal_size": "4GB",
        "checkpoint_timeout": "1h",
        "shared_buffers": "256MB",
        "autovacuum": "off",
    }
    with running_server(major, settings=settings) as server:
        scale = max(1, size_bytes // PGBENCH_BYTES_PER_SCALE)
        server.tool("pgbench", "-i", "-I", "dtgvp", "-q", "-s", str(scale), "-h", str(server.sockets), "-p", str(server.port),
                    "-U", "postgres", "postgres")  # fmt: skip
        server.sql("checkpoint")
        yield server


def first_row(bin_dir: Path, dsn: str, query: str) -> str:
    """The first row of a query, through a fresh psql."""
    result = subprocess.run(
        [str(bin_dir / "psql"), "-XAtq", dsn, "-c", query],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout.strip()


def timed_branch(host: Host, bin_dir: Path, name: str, *args: str) -> tuple[float, dict[str, Any]]:
    """Seconds from the exec of ``tl branch`` to the first row of a primary-key lookup, and what ``tl`` said."""
    begin = time.perf_counter()
    result = host.tl("branch", name, *args)
    row = first_row(bin_dir, result["dsn"], "select abalance from pgbench_accounts where aid = 77777")
    elapsed = time.perf_counter() - begin
    if row != "0":
        raise RuntimeError(f"the branch answered {row!r}")
    return elapsed, result


def resident_bytes(pid: int, kind: str = "Rss") -> int:
    """Memory of a process from smaps_rollup: ``Rss``, or ``Private`` (clean and dirty)."""
    wanted = ("Private_Clean", "Private_Dirty") if kind == "Private" else (kind,)
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in wanted:
            total += int(rest.split()[0]) * 1024
    return total
