"""What several workers are worth: the rate of ``tl verify --data`` of one store, with one and with two.

    python -m benchmarks.executor [--size-gb 1] [--samples 3] [--dask]

A database with page checksums, of rows that do not compress, so that it makes many packs, is archived into a directory.
Then ``tl verify --data`` reads all of it: by itself, in parts by processes of this host, and with --dask by Dask workers
of one thread each. Every report must be that of an intact store and count the same packs, bytes and pages. Samples take
turns, so that a machine that gets busier is unfair to none; the load average beside them says how busy it was.
Rates count raw pages, imports and all else included.

On a machine whose cores are busy already two workers cannot show what they are worth, so the same is told from CPU time:
that of the whole over that of the costlier half, which is the ratio of the rates where each worker has a core.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator

from benchmarks.fixture import GIB, Host, make_host, working_directory
from benchmarks.replay import SETTINGS
from benchmarks.report import Report
from benchmarks.verify import verified as measured
from tests.support.dask_cluster import DaskCluster, dask_cluster
from tests.support.postgres import running_server

PAGE_BYTES = 8192
ROWS_PER_PAGE = 7
WORKERS = (1, 2)


def verified(host: Host, *args: str) -> tuple[float, tuple[int, int, int]]:
    """Seconds, and what was read: packs, bytes, pages."""
    began = time.perf_counter()
    data = host.tl("verify", "--data", *args)["data"]
    return time.perf_counter() - began, (data["packs"], data["bytes"], data["pages"])


@contextlib.contextmanager
def clusters(host: Host, wanted: bool) -> Iterator[list[tuple[str, str]]]:
    """Names and addresses of a Dask cluster of each size."""
    with contextlib.ExitStack() as stack:
        found = []
        for count in WORKERS if wanted else ():
            directory = host.directory / f"dask-{count}"
            directory.mkdir()
            cluster: DaskCluster = stack.enter_context(dask_cluster(directory))
            for number in range(count):
                cluster.start_worker(f"worker-{number}", host.environment)
            found.append((f"dask_{count}", cluster.address))
        yield found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gb", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--dask", action="store_true")
    options = parser.parse_args()
    report = Report("executor")
    with working_directory() as directory:
        host = make_host(directory / "host", f"file://{directory}/store")
        with running_server(15, initdb=["--data-checksums"], settings=SETTINGS) as server:
            source = ["--source", server.conninfo]
            host.tl("init", host.store, *source)
            rows = int(options.size_gb * GIB) // PAGE_BYTES * ROWS_PER_PAGE
            server.sql(
                "create extension pgcrypto",
                f"create table t as select gen_random_bytes(1000) from generate_series(1, {rows})",
                "checkpoint",
            )
            host.tl("archive", "--once", *source)
            host.tl("detach", "--yes", *source)
        with clusters(host, options.dask) as addresses:
            places: list[tuple[str, tuple[str, ...]]] = [("alone", ())]
            places += [(f"local_{count}", ("--executor", f"local:{count}")) for count in WORKERS]
            places += [(name, ("--executor", address)) for name, address in addresses]
            _, expected = verified(host)
            for _ in range(options.samples):
                for name, words in places:
                    seconds, read = verified(host, *words)
                    if read != expected:
                        raise RuntimeError(f"{name} read {read}, not {expected}")
                    report.add(
                        f"{name}_page_mb_per_second", read[2] * PAGE_BYTES / 1e6 / seconds, "MB/s", "higher"
                    )
                    report.add("load_average", os.getloadavg()[0], "", "lower")
                _, whole, _, _ = measured(host, "--data")
                halves = [measured(host, "--data", "--part", f"{number}/2")[1] for number in (1, 2)]
                report.add("whole_cpu_seconds", whole, "s", "lower")
                report.add("costlier_half_cpu_seconds", max(halves), "s", "lower")
                report.add("whole_over_costlier_half", whole / max(halves), "x", "higher")
        for kind in ("local", "dask") if options.dask else ("local",):
            one, two = (report.median(f"{kind}_{count}_page_mb_per_second") for count in WORKERS)
            report.add(f"{kind}_two_over_one", two / one, "x", "higher")
    report.print()


if __name__ == "__main__":
    main()
