"""Any size: a database of 1 TiB beside one of 1 GiB, both branched, started and queried.

    python -m benchmarks.any_size [--segments 1024] [--gib 1] [--stores file,s3] [--samples 3] [--json]

A pgbench database is archived and branched; then the same store is given a snapshot in which its largest table has
1,024 segments of 1 GiB (tests/support/enlarged_store.py), and is branched again. What is simulated is where
the pages came from: manifests, listing and log are of that size, each extent that is read is verified, and Postgres
finds, opens and queries a table of 1 TiB. The clock runs outside: from the exec of the installed ``tl`` in a fresh process
with an empty extent cache and no agent, to a row of the last segment through psql. The proxy before the S3
server counts requests and bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.fixture import (
    GIB,
    Host,
    distant_s3,
    first_row,
    make_host,
    pgbench_source,
    resident_bytes,
    working_directory,
)
from benchmarks.report import Report
from tests.support.enlarged_store import EnlargedTable, enlarge
from tests.support.postgres import PostgresServer
from tests.support.s3_proxy import S3Proxy
from timeline.catalog.branch_log import BranchLog
from timeline.clock import SystemClock
from timeline.format.extent import BLOCK_BYTES
from timeline.store.open import open_store

_TABLE = "pgbench_accounts"


async def _enlarge(host: Host, table: str, segments: int) -> EnlargedTable:
    clock = SystemClock()
    # Where the S3 client looks for its keys.
    os.environ.update({name: value for name, value in host.environment.items() if name.startswith("AWS_")})
    store = await open_store(host.store, endpoint_url=host.environment.get("TL_ENDPOINT_URL"))
    try:
        return await enlarge(store, BranchLog(store, "main", clock, clock.token(8)), clock, table, segments)
    finally:
        await store.aclose()


def _first_query(
    host: Host, source: PostgresServer, name: str, block: int, real: int
) -> tuple[float, dict[str, Any]]:
    """Seconds to the row at that block, which must be the one at block ``real`` of the source; and the branch."""
    query = f"select aid from {_TABLE} where ctid = '({{}},1)'"
    begin = time.perf_counter()
    branch = host.tl("branch", name)
    row = first_row(source.bin, branch["dsn"], query.format(block))
    elapsed = time.perf_counter() - begin
    if row != source.value(query.format(real)):
        raise RuntimeError(f"block {block} answered {row!r}")
    return elapsed, branch


def _measure(
    report: Report,
    host: Host,
    source: PostgresServer,
    label: str,
    samples: int,
    proxy: S3Proxy | None,
    enlarged: EnlargedTable | None,
) -> None:
    size = int(source.value(f"select pg_relation_size('{_TABLE}')")) if enlarged is None else enlarged.bytes
    chance = random.Random(label)
    for sample in range(samples):
        host.forget_cache()
        host.end_agent()
        if proxy is not None:
            proxy.reset()
        # Among the last blocks, so that Postgres has to go through all segments.
        block = size // BLOCK_BYTES - 1 - chance.randrange(1, 1000)
        real = block if enlarged is None else enlarged.real_block(block)
        name = f"sample-{sample}"
        elapsed, branch = _first_query(host, source, name, block, real)
        report.add(f"first_query_seconds/{label}", elapsed, "s", "lower")
        if proxy is not None:
            stats = proxy.stats()
            report.add(f"requests/{label}", sum(stats.requests.values()), "requests", "lower")
            report.add(f"fetched_mb/{label}", stats.bytes_down / 1e6, "MB", "lower")
        if sample == 0:
            mount = host.mount_pid(branch["data_directory"])
            if mount is None:
                raise RuntimeError(f"{name} is no mount")
            report.add(f"mount_rss_mb/{label}", resident_bytes(mount) / 1e6, "MB", "lower")
            counted = int(first_row(source.bin, branch["dsn"], f"select pg_relation_size('{_TABLE}')"))
            if counted != size:
                raise RuntimeError(f"the table has {counted} bytes instead of {size}")
            report.add(f"table_gib/{label}", counted / GIB, "GiB", "higher")
        host.tl("delete", name, "--yes")


def _clear(host: Host) -> None:
    """Leave no branch and no agent behind, whatever happened."""
    for branch in host.branches():
        host.tl("delete", branch["name"], "--yes")
    host.end_agent()


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--segments", type=int, default=1024, help="of 1 GiB")
    parser.add_argument("--gib", type=float, default=1, help="size of the real database")
    parser.add_argument("--stores", default="file,s3")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="(always on: the last line is JSON)")
    options = parser.parse_args()
    report = Report("any_size")
    stores = options.stores.split(",")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(working_directory())
        direct, proxy = stack.enter_context(distant_s3()) if "s3" in stores else ("", None)
        source = stack.enter_context(pgbench_source(int(options.gib * GIB)))
        table = source.value(f"select pg_relation_filepath('{_TABLE}')")
        for kind in stores:
            place: Path = directory / kind
            store = f"file://{place}/store" if kind == "file" else "s3://bench/store"
            counting = proxy if kind == "s3" else None
            # The archiver talks to the server directly: only branches are measured through the proxy.
            archiving = make_host(
                place, store, source=source.conninfo, endpoint_url=direct if counting else None
            )
            archiving.tl("init", store, "--source", source.conninfo)
            archiving.tl("archive", "--once")
            branching = make_host(place, store, endpoint_url=counting.endpoint_url if counting else None)
            stack.callback(_clear, branching)
            small, large = f"{kind}/{options.gib:g}GiB", f"{kind}/{options.segments}GiB"
            _measure(report, branching, source, small, options.samples, counting, None)
            print("enlarging", file=sys.stderr, flush=True)
            enlarged = asyncio.run(_enlarge(archiving, table, options.segments))
            manifests = sum(ref.size for ref in enlarged.snapshot.pages)
            report.add(f"page_manifests_mb/{large}", manifests / 1e6, "MB", "lower")
            _measure(report, branching, source, large, options.samples, counting, enlarged)
            ratio = report.median(f"first_query_seconds/{large}") / report.median(
                f"first_query_seconds/{small}"
            )
            report.add(f"ratio/{kind}", ratio, "ratio", "lower")
            archiving.tl("detach", "--source", source.conninfo, "--yes")
    report.print()


if __name__ == "__main__":
    main()
