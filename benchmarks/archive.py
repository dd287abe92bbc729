"""How fast the archiver drains a backlog, beside pg_receivewal in the same run.

    python -m benchmarks.archive [--backlog-mb 2048] [--samples 3] [--json]

A backlog of pgbench WAL is prepared behind three replication slots. Each contender is a fresh process timed from exec to
exit: ``tl archive --once`` into a directory store, ``pg_receivewal`` uncompressed and with lz4. CPU seconds and peak
resident memory come from the kernel (wait4). Bytes are WAL bytes between the same two LSNs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fixture import TL, make_host, working_directory
from benchmarks.report import Report
from tests.support.postgres import PostgresServer, running_server
from timeline.lsn import Lsn


@dataclass(frozen=True, slots=True)
class Run:
    """One finished process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(command: Sequence[str], environment: Mapping[str, str], log: Path, uid: int | None = None) -> Run:
    """Run to the end; raises RuntimeError with the log's tail on failure."""
    with log.open("wb") as output:
        begin = time.perf_counter()
        child = subprocess.Popen(
            command, env=dict(environment), stdout=output, stderr=output, user=uid, group=uid
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - begin
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"{command[0]} exited with {child.returncode}:\n{log.read_text()[-3000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def make_backlog(server: PostgresServer, megabytes: int) -> None:
    """Write about that much WAL: bulk load first, then small transactions."""
    server.tool("pgbench", "-i", "-I", "dtgp", "-q", "-s", str(max(1, megabytes // 14)), "-h", str(server.sockets),
                "-p", str(server.port), "-U", "postgres", "postgres")  # fmt: skip
    start = Lsn.parse(server.value("select pg_current_wal_lsn()"))
    while Lsn.parse(server.value("select pg_current_wal_lsn()")) - start < (min(megabytes // 16, 96) << 20):
        server.tool("pgbench", "-n", "-c", "8", "-j", "2", "-T", "5", "-h", str(server.sockets), "-p", str(server.port),
                    "-U", "postgres", "postgres")  # fmt: skip


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backlog-mb", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="(always on: the last line is JSON)")
    options = parser.parse_args()
    report = Report("archive")
    settings = {
        "max_wal_size": "32GB",
        "checkpoint_timeout": "1h",
        "max_slot_wal_keep_size": "64GB",
        "synchronous_commit": "off",
        "shared_buffers": "512MB",
        "autovacuum": "off",
    }
    with working_directory() as directory, running_server(15, settings=settings) as server:
        for sample in range(options.samples):
            host = make_host(
                directory / f"host-{sample}", f"file://{directory}/store-{sample}", source=server.conninfo
            )
            host.tl("init", host.store, "--source", server.conninfo)
            host.tl("archive", "--once")
            for slot in ("plain", "lz4"):
                server.sql(f"select pg_create_physical_replication_slot('{slot}', true)")
            begin = Lsn.parse(server.value("select pg_current_wal_lsn()"))
            make_backlog(server, options.backlog_mb)
            end = Lsn.parse(server.value("select pg_current_wal_flush_lsn()"))
            megabytes = (end - begin) / 1e6
            ours = run([TL, "archive", "--once"], host.environment, directory / "tl.log")
            report.add("archive_mb_per_second", megabytes / ours.seconds, "MB/s", "higher")
            report.add("archive_cpu_seconds_per_gb", ours.cpu_seconds / megabytes * 1000, "s/GB", "lower")
            report.add("archive_rss_mb", ours.peak_bytes / 1e6, "MB", "lower")
            for slot, extra in (("plain", []), ("lz4", ["--compress=lz4"])):
                target = server.make_directory(directory / f"received-{slot}-{sample}")
                directory.chmod(0o755)
                theirs = run(
                    [str(server.bin / "pg_receivewal"), "-D", str(target), "-S", slot, "--endpos", str(end), "--no-loop",
                     "-h", str(server.sockets), "-p", str(server.port), "-U", "postgres", *extra],
                    server.environment(),
                    directory / "receivewal.log",
                    server.user.pw_uid if os.geteuid() == 0 else None,
                )  # fmt: skip
                name = "pg_receivewal" if slot == "plain" else "pg_receivewal_lz4"
                report.add(f"{name}_mb_per_second", megabytes / theirs.seconds, "MB/s", "higher")
                report.add(
                    f"{name}_cpu_seconds_per_gb", theirs.cpu_seconds / megabytes * 1000, "s/GB", "lower"
                )
                report.add(f"archive_vs_{name}", theirs.seconds / ours.seconds, "ratio", "higher")
                shutil.rmtree(target)
                server.sql(f"select pg_drop_replication_slot('{slot}')")
            host.tl("detach", "--yes")
            shutil.rmtree(directory / f"store-{sample}")
            print(f"sample {sample}: {megabytes:.0f} MB", file=sys.stderr, flush=True)
    report.print()


if __name__ == "__main__":
    main()
