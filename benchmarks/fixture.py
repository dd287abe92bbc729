"""A source of a given size, archived into a store, for benchmarks; and the installed ``tl`` in fresh processes."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.postgres import PostgresServer, running_server, scratch
from tests.support.s3_proxy import S3Proxy, running_proxy
from tests.support.seaweed import running_seaweed
from tests.support.tl_host import TL, Host, make_host

GIB = 1 << 30
PGBENCH_BYTES_PER_SCALE = 15_700_000
"""What one unit of pgbench's scale takes on disk, indexes included."""


@contextlib.contextmanager
def working_directory() -> Iterator[Path]:
    """A directory for one benchmark run, removed at the end. To be entered first: SIGTERM unwinds what was entered after it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    path = scratch("tl-bench-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def distant_s3() -> Iterator[tuple[str, S3Proxy]]:
    """A real S3 server with a bucket ``bench``, and a proxy that puts it 20 ms away and counts."""
    with (
        running_seaweed() as server,
        running_proxy(server.endpoint_url, latency_ms=20, bandwidth_mb=100) as proxy,
    ):
        server.make_bucket("bench")
        yield server.endpoint_url, proxy


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


def timed_branch(
    host: Host, bin_dir: Path, name: str, *args: str, expected: str | None = "0"
) -> tuple[float, dict[str, Any]]:
    """Seconds from the exec of ``tl branch`` to the first row of a primary-key lookup, and what ``tl`` said.

    Raises RuntimeError when the row is not the expected one (``None``: when there is none).
    """
    begin = time.perf_counter()
    result = host.tl("branch", name, *args)
    row = first_row(bin_dir, result["dsn"], "select abalance from pgbench_accounts where aid = 77777")
    elapsed = time.perf_counter() - begin
    if row != expected if expected is not None else not row:
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


__all__ = [
    "GIB",
    "TL",
    "Host",
    "distant_s3",
    "first_row",
    "make_host",
    "pgbench_source",
    "resident_bytes",
    "timed_branch",
    "working_directory",
]
