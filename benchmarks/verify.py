"""What verifying costs: rate and memory, structure alone and every byte.

    python -m benchmarks.verify [--size-gb 1] [--samples 3]

A pgbench database with page checksums is archived into a directory, then ``tl verify`` and ``tl verify --data`` run in
fresh processes. The rate counts stored bytes, as read from the store; memory is the peak of the process, from the
kernel's own count. The files are in the page cache: what is measured is our work, not the disk's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from typing import Any

from benchmarks.fixture import GIB, PGBENCH_BYTES_PER_SCALE, TL, Host, make_host, working_directory
from benchmarks.replay import SETTINGS, pgbench
from benchmarks.report import Report
from tests.support.postgres import running_server


def verified(host: Host, *args: str) -> tuple[float, float, int, dict[str, Any]]:
    """Seconds, CPU seconds, peak bytes of memory, and the report; raises RuntimeError unless it exits with 0."""
    began = time.perf_counter()
    with subprocess.Popen(
        [TL, "verify", *args, "--json"], env=host.environment, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        out = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"tl verify exited with {child.returncode}: {out}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    cpu = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - began, cpu, usage.ru_maxrss * 1024, found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gb", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=3)
    options = parser.parse_args()
    report = Report("verify")
    initdb = ["--data-checksums"]
    with working_directory() as directory, running_server(15, initdb=initdb, settings=SETTINGS) as server:
        host = make_host(directory / "host", f"file://{directory}/store", source=server.conninfo)
        host.tl("init", host.store, "--source", server.conninfo)
        scale = max(1, int(options.size_gb * GIB) // PGBENCH_BYTES_PER_SCALE)
        pgbench(server, "-i", "-q", "-I", "dtgvp", "-s", str(scale))
        host.tl("archive", "--once")
        for _ in range(options.samples):
            seconds, _, peak, _ = verified(host)
            report.add("structure_seconds", seconds, "s", "lower")
            report.add("structure_peak_memory_mb", peak / 1e6, "MB", "lower")
            seconds, cpu, peak, found = verified(host, "--data")
            data = found["data"]
            report.add("data_stored_mb_per_second", data["bytes"] / 1e6 / seconds, "MB/s", "higher")
            report.add("data_page_mb_per_second", data["pages"] * 8192 / 1e6 / seconds, "MB/s", "higher")
            report.add("data_cpu_seconds_per_page_gb", cpu / (data["pages"] * 8192 / 1e9), "s/GB", "lower")
            report.add("data_peak_memory_mb", peak / 1e6, "MB", "lower")
        host.tl("detach", "--yes")
    report.print()


if __name__ == "__main__":
    main()
