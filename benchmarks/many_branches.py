"""Many branches made at the same time: does any fail, what does each take, what does each cost?

    python -m benchmarks.many_branches [--branches 100] [--callers 16] [--size 0.25] [--store file|s3] [--json]

Callers are the installed ``tl`` in processes of their own, with one state directory; the first of them find no agent.
Time is from the exec of ``tl branch`` to its end. Memory is private, clean and dirty, read when all branches stand: of
each mount, and of each Postgres with its children. S3 is SeaweedFS behind a proxy 20 ms away.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time

from benchmarks.fixture import (
    GIB,
    distant_s3,
    first_row,
    make_host,
    pgbench_source,
    resident_bytes,
    working_directory,
)
from benchmarks.report import Report
from restore.process import children
from tests.support.many_branches import delete_many, make_many


def _postgres_private_bytes(pid: int) -> int:
    return sum(resident_bytes(each, "Private") for each in (pid, *(child for child, _ in children(pid))))


def main() -> None:
    """Run and print; ends with 1 when any branch could not be made or deleted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--branches", type=int, default=100)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--size", type=float, default=0.25, help="GiB")
    parser.add_argument("--store", choices=["file", "s3"], default="file")
    parser.add_argument("--json", action="store_true", help="(always on: the last line is JSON)")
    options = parser.parse_args()
    report = Report("many_branches")
    label = f"{options.branches}x{options.callers}/{options.store}"
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(working_directory())
        direct, proxy = stack.enter_context(distant_s3()) if options.store == "s3" else (None, None)
        source = stack.enter_context(pgbench_source(int(options.size * GIB)))
        store = f"file://{directory}/store" if proxy is None else "s3://bench/many"
        archiving = make_host(directory / "host", store, source=source.conninfo, endpoint_url=direct)
        archiving.tl("init", store, "--source", source.conninfo)
        archiving.tl("archive", "--once")
        host = make_host(directory / "host", store, endpoint_url=proxy.endpoint_url if proxy else None)
        begin = time.perf_counter()
        made = make_many(host, options.branches, options.callers)
        wall = time.perf_counter() - begin
        try:
            failures = [f"{one.name}: {one.failure}" for one in made if one.failure is not None]
            for one in made:
                report.add(f"branch_seconds/{label}", one.seconds, "s", "lower")
                if one.result is None:
                    continue
                row = first_row(source.bin, one.result["dsn"], "select count(*) from pgbench_branches")
                if int(row) < 1:
                    failures.append(f"{one.name} answers {row!r}")
            for one in made:
                if one.result is None:
                    continue
                mount = host.mount_pid(one.result["data_directory"])
                if mount is not None:
                    report.add(
                        f"mount_private_mb/{label}", resident_bytes(mount, "Private") / 1e6, "MB", "lower"
                    )
                postgres = _postgres_private_bytes(one.result["pid"])
                report.add(f"postgres_private_mb/{label}", postgres / 1e6, "MB", "lower")
        finally:
            begin = time.perf_counter()
            failures += delete_many(host, made, options.callers)
            deleting = time.perf_counter() - begin
            host.end_agent()
        report.add(f"wall_seconds/{label}", wall, "s", "lower")
        report.add(f"delete_wall_seconds/{label}", deleting, "s", "lower")
        report.add(f"failures/{label}", len(failures), "branches", "lower")
        archiving.tl("detach", "--source", source.conninfo, "--yes")
    _print_table(report, label)
    report.print()
    if failures:
        print("\n".join(failures), file=sys.stderr)
        sys.exit(1)


def _print_table(report: Report, label: str) -> None:
    load = os.getloadavg()[0]
    print(f"{label}, load average at the end {load:.1f}")
    print(f"{'':24}{'median':>10}{'p95':>10}{'max':>10}")
    for name, values in report.samples.items():
        if len(values) == 1:
            print(f"{name.partition('/')[0]:24}{values[0]:10.2f}")
            continue
        p95 = statistics.quantiles(values, n=20)[-1]
        print(f"{name.partition('/')[0]:24}{statistics.median(values):10.2f}{p95:10.2f}{max(values):10.2f}")


if __name__ == "__main__":
    main()
