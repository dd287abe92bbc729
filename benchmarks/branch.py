"""Time to the first query of a branch, by size of the database and kind of store.

    python -m benchmarks.branch [--sizes 0.25,1,4] [--stores file,s3] [--samples 5] [--replay] [--history DIR] [--json]

The clock runs outside: from the exec of the installed ``tl`` in a fresh process, with an empty extent cache and no agent,
to the first row through psql. S3 is SeaweedFS behind a proxy that adds 20 ms to the first byte, limits each connection to
100 MB/s and counts requests and bytes. ``warm`` has the cache of an earlier branch, ``agent`` another branch running.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from benchmarks.fixture import (
    GIB,
    Host,
    distant_s3,
    make_host,
    pgbench_source,
    resident_bytes,
    timed_branch,
    working_directory,
)
from benchmarks.replay import history_in, replay
from benchmarks.report import Report
from tests.support.s3_proxy import S3Proxy

IDLE_SECONDS = 30.0
"""A further mount is measured right after the first query, and again when it has been idle for so long."""


def _measure(
    report: Report, host: Host, bin_dir: Path, label: str, samples: int, proxy: S3Proxy | None
) -> None:
    for sample in range(samples):
        host.forget_cache()
        host.end_agent()
        if proxy is not None:
            proxy.reset()
        elapsed, result = timed_branch(host, bin_dir, f"cold-{sample}")
        report.add(f"first_query_seconds/{label}", elapsed, "s", "lower")
        if proxy is not None:
            stats = proxy.stats()
            report.add(f"requests/{label}", sum(stats.requests.values()), "requests", "lower")
            report.add(f"fetched_mb/{label}", stats.bytes_down / 1e6, "MB", "lower")
        mount = host.mount_pid(result["data_directory"])
        if sample == 0 and mount is not None:
            report.add(f"mount_rss_mb/{label}", resident_bytes(mount) / 1e6, "MB", "lower")
        host.tl("delete", f"cold-{sample}", "--yes")
    for sample in range(samples):
        host.end_agent()
        elapsed, _ = timed_branch(host, bin_dir, f"warm-{sample}")
        report.add(f"first_query_seconds/{label}/warm", elapsed, "s", "lower")
        host.tl("delete", f"warm-{sample}", "--yes")
    timed_branch(host, bin_dir, "standing")
    for sample in range(samples):
        host.forget_cache()
        elapsed, result = timed_branch(host, bin_dir, f"beside-{sample}")
        report.add(f"first_query_seconds/{label}/agent", elapsed, "s", "lower")
        mount = host.mount_pid(result["data_directory"])
        if sample == 0 and mount is not None:
            private = resident_bytes(mount, "Private")
            report.add(f"further_mount_busy_private_mb/{label}", private / 1e6, "MB", "lower")
            time.sleep(IDLE_SECONDS)
            private = resident_bytes(mount, "Private")
            report.add(f"further_mount_private_mb/{label}", private / 1e6, "MB", "lower")
        host.tl("delete", f"beside-{sample}", "--yes")
    host.tl("delete", "standing", "--yes")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="0.25,1,4", help="GiB, comma-separated")
    parser.add_argument("--stores", default="file,s3")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument(
        "--replay", action="store_true", help="random moments of a long history instead of sizes"
    )
    parser.add_argument("--wal-gib", type=float, default=4, help="how much history --replay writes")
    parser.add_argument("--history", type=Path, help="keep the history there, or use the one that is there")
    parser.add_argument("--json", action="store_true", help="(always on: the last line is JSON)")
    options = parser.parse_args()
    report = Report("branch")
    sizes = [float(size) for size in options.sizes.split(",")]
    stores = options.stores.split(",")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(working_directory())
        direct, proxy = stack.enter_context(distant_s3()) if "s3" in stores else ("", None)
        if options.replay:
            s3 = (direct, proxy.endpoint_url) if proxy is not None else None
            history = history_in(options.history or directory / "history", int(options.wal_gib * GIB))
            replay(report, directory, history, s3, options.samples)
            sizes = []
        for size in sizes:
            with pgbench_source(int(size * GIB)) as source:
                for kind in stores:
                    label = f"{kind}/{size:g}GiB"
                    print(label, file=sys.stderr, flush=True)
                    place = directory / label.replace("/", "-")
                    store = f"file://{place}/store" if kind == "file" else f"s3://bench/{size:g}"
                    # The archiver talks to the server directly: only the branch is measured through the proxy.
                    archiving = make_host(
                        place, store, source=source.conninfo, endpoint_url=direct if kind == "s3" else None
                    )
                    archiving.tl("init", store, "--source", source.conninfo)
                    archiving.tl("archive", "--once")
                    endpoint = proxy.endpoint_url if proxy is not None and kind == "s3" else None
                    branching = make_host(place, store, endpoint_url=endpoint)
                    _measure(
                        report, branching, source.bin, label, options.samples, proxy if endpoint else None
                    )
                    archiving.tl("detach", "--source", source.conninfo, "--yes")
        for kind in stores if sizes else ():
            small, large = f"{kind}/{sizes[0]:g}GiB", f"{kind}/{sizes[-1]:g}GiB"
            ratio = report.median(f"first_query_seconds/{large}") / report.median(
                f"first_query_seconds/{small}"
            )
            report.add(f"flatness/{kind}", ratio, "ratio", "lower")
    report.print()


if __name__ == "__main__":
    main()
