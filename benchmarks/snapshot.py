"""What building snapshots costs: rate, bytes, memory.

    python -m benchmarks.snapshot [--wal-mb 256] [--samples 3] [--json]

A pgbench database is archived into a directory with a base backup; then WAL is written and archived, and ``tl
snapshot`` runs in a fresh process. Memory is the peak of that process and of its mount, from the kernel's own
count, without Postgres. Uploaded bytes are counted in the store's directory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.fixture import TL, make_host, working_directory
from benchmarks.replay import SETTINGS, pgbench, position
from benchmarks.report import Report
from tests.support.postgres import running_server

_POLL_SECONDS = 0.05


def stored_bytes(store: Path) -> int:
    """What a directory store holds."""
    return sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


class PeakMemory(threading.Thread):
    """The highest sum of the proportional memory of processes whose command line names a builder's place."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self._root = root
        self._ended = threading.Event()
        self.bytes = 0

    def run(self) -> None:
        """Look until ``end``."""
        while not self._ended.wait(_POLL_SECONDS):
            pids = [
                self._root,
                *(int(name) for name in os.listdir("/proc") if name.isdecimal() and _is_ours(name)),
            ]
            self.bytes = max(self.bytes, sum(_proportional(pid) for pid in set(pids)))

    def end(self) -> int:
        """Stop looking; the peak."""
        self._ended.set()
        self.join()
        return self.bytes


def _is_ours(pid: str) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return command.startswith((b"tl agent", b"tl mount"))


def _proportional(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wal-mb", type=int, default=256)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="(always on: the last line is JSON)")
    options = parser.parse_args()
    report = Report("snapshot")
    with working_directory() as directory, running_server(15, settings=SETTINGS) as server:
        store = directory / "store"
        host = make_host(directory / "host", f"file://{store}", source=server.conninfo)
        host.tl("init", host.store, "--source", server.conninfo)
        pgbench(server, "-i", "-q", "-I", "dtgvp", "-s", "60")
        host.tl("archive", "--once")
        for sample in range(options.samples):
            begin = position(server)
            while position(server) - begin < options.wal_mb * 1_000_000:
                pgbench(server, "-n", "-c", "4", "-j", "2", "-T", "4")
            host.tl("archive", "--once")
            before = stored_bytes(store)
            began = time.perf_counter()
            with subprocess.Popen(
                [TL, "snapshot", "--json"], env=host.environment, stdout=subprocess.PIPE, text=True
            ) as child:
                memory = PeakMemory(child.pid)
                memory.start()
                out, _ = child.communicate()
                seconds = time.perf_counter() - began
                peak = memory.end()
            if child.returncode != 0:
                raise RuntimeError(f"tl snapshot failed: {out}")
            built = json.loads(out.splitlines()[-1])["snapshots"]
            megabytes = sum(each["replayed_bytes"] for each in built) / 1e6
            report.add("build_mb_of_wal_per_second", megabytes / seconds, "MB/s", "higher")
            report.add(
                "uploaded_bytes_per_wal_byte",
                (stored_bytes(store) - before) / megabytes / 1e6,
                "ratio",
                "lower",
            )
            report.add("peak_memory_mb", peak / 1e6, "MB", "lower")
            print(
                f"sample {sample}: {megabytes:.0f} MB of WAL in {seconds:.1f} s", file=sys.stderr, flush=True
            )
        host.end_agent()
        host.tl("detach", "--yes")
    report.print()


if __name__ == "__main__":
    main()
