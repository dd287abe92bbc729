"""What draining a backlog costs at least: receiving it in this language, then one duty of the archiver after the other.

    python -m benchmarks.archive_floor [--backlog-mb 1024] [--samples 3]

One thread takes the WAL off the socket and, chunk by chunk, does what the stage is named for and all stages before it;
nothing of the archiver's own order, threads or bookkeeping is in the way. The difference between two stages is what a
duty costs, and the last one is what no rearranging can get below on one core.
"""

from __future__ import annotations

import argparse
import os
import select
import time
from collections.abc import Callable
from pathlib import Path

from psycopg import pq

from benchmarks.archive import make_backlog
from benchmarks.fixture import working_directory
from benchmarks.report import Report
from tests.support.postgres import PostgresServer, running_server
from timeline.archive.chunker import CUT_BYTES
from timeline.format import zstd_frame
from timeline.format.digest import digest_of
from timeline.lsn import Lsn
from timeline.pg.wal import WalScanner, warm_up

STAGES = ("receive", "scan", "compress", "digest", "sync")
SEGMENT_BYTES = 16 << 20
_XLOG_DATA = ord("w")
_HEADER_BYTES = 25


def duties(stage: str, start: Lsn, directory: Path) -> Callable[[bytearray], None]:
    """All that is done to a chunk, up to and including the stage."""
    upto = STAGES.index(stage)
    scanner = WalScanner(SEGMENT_BYTES, 1, start, major=15)

    def work(chunk: bytearray) -> None:
        if upto >= STAGES.index("scan"):
            scanner.feed(chunk)
        if upto >= STAGES.index("compress"):
            stored = zstd_frame.compress(chunk)
            if upto >= STAGES.index("digest"):
                digest_of(chunk)
                digest_of(stored)
            if upto >= STAGES.index("sync"):
                write_synced(directory / "chunk", stored)

    return work


def write_synced(path: Path, data: bytes) -> None:
    """A new file, durable."""
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def drain(server: PostgresServer, start: Lsn, end: Lsn, work: Callable[[bytearray], None]) -> None:
    """Receive the WAL between two positions, in chunks."""
    connection = pq.PGconn.connect(f"{server.conninfo} replication=true".encode())
    connection.send_query(f"START_REPLICATION PHYSICAL {start}".encode())
    result = connection.get_result()
    if result is None or result.status != pq.ExecStatus.COPY_BOTH:
        raise RuntimeError(f"the server does not stream: {connection.error_message.decode()}")
    readable = select.poll()
    readable.register(connection.socket, select.POLLIN)
    position, chunk = int(start), bytearray()
    while position < end:
        size, message = connection.get_copy_data(1)
        if size == 0:
            readable.poll()
            connection.consume_input()
        elif size < 0:
            raise RuntimeError("the server ended the stream")
        elif message[0] == _XLOG_DATA:
            chunk += message[_HEADER_BYTES:]
            position += size - _HEADER_BYTES
            if len(chunk) >= CUT_BYTES or position >= end:
                work(chunk)
                chunk = bytearray()
    connection.finish()


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backlog-mb", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=3)
    options = parser.parse_args()
    report = Report("archive_floor")
    settings = {"max_wal_size": "32GB", "checkpoint_timeout": "1h", "autovacuum": "off"}
    warm_up()
    with working_directory() as directory, running_server(15, settings=settings) as server:
        server.sql("select pg_create_physical_replication_slot('floor', true)")
        start = Lsn.parse(server.value("select pg_current_wal_lsn()"))
        start = Lsn(start - start % SEGMENT_BYTES)
        make_backlog(server, options.backlog_mb)
        end = Lsn.parse(server.value("select pg_current_wal_flush_lsn()"))
        megabytes = (end - start) / 1e6
        for _ in range(options.samples):
            for stage in STAGES:
                work = duties(stage, start, directory)
                wall, cpu = time.perf_counter(), time.process_time()
                drain(server, start, end, work)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                report.add(f"{stage}_mb_per_second", megabytes / wall, "MB/s", "higher")
                report.add(f"{stage}_cpu_seconds_per_gb", cpu / megabytes * 1000, "s/GB", "lower")
    report.print()


if __name__ == "__main__":
    main()
