"""What building snapshots costs: rate, bytes, memory.

    python -m benchmarks.snapshot [--stores file,s3] [--wal-mb 256] [--samples 3] [--json]

A pgbench database is archived with a base backup; then WAL is written and archived, and ``tl snapshot`` runs in a fresh
process. Memory is the peak of the proportional memory, by the kernel's own count, of everything that runs for it: the
command, agent, mount and prefetcher, all but Postgres. Uploaded bytes are counted in the store's directory, or by the proxy
that puts the S3 server 20 ms away.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.fixture import TL, distant_s3, make_host, working_directory
from benchmarks.replay import SETTINGS, pgbench, position
from benchmarks.report import Report
from tests.support.postgres import PostgresServer, running_server
from tests.support.s3_proxy import S3Proxy

_POLL_SECONDS = 0.05


def stored_bytes(store: Path) -> int:
    """What a directory store holds."""
    return sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


class PeakMemory(threading.Thread):
    """The highest sum of the proportional memory of what runs for a host's state directory, but Postgres."""

    def __init__(self, state: str) -> None:
        super().__init__(daemon=True)
        self._state = state.encode()
        self._ended = threading.Event()
        self.bytes = 0
        self.parts: dict[str, int] = {}
        """At the peak, by the first words of the command line."""

    def run(self) -> None:
        """Look until ``end``."""
        while not self._ended.wait(_POLL_SECONDS):
            parts: dict[str, int] = {}
            for pid in filter(str.isdecimal, os.listdir("/proc")):
                name = self._name_of(pid)
                if name is not None:
                    parts[name] = parts.get(name, 0) + _proportional(int(pid))
            if sum(parts.values()) > self.bytes:
                self.bytes, self.parts = sum(parts.values()), parts

    def end(self) -> int:
        """Stop looking; the peak."""
        self._ended.set()
        self.join()
        return self.bytes

    def _is_served_by(self, agent: int) -> bool:
        """Whether that agent forked one of ours."""
        children = (Path("/proc") / str(agent) / "task" / str(agent) / "children").read_text().split()
        return any(self._state in (Path("/proc") / child / "cmdline").read_bytes() for child in children)

    def _name_of(self, pid: str) -> str | None:
        """``None``: not one of ours. What a builder starts has the host's state directory in its environment; mounts have it in
        their title, which took the environment's place; an agent's title tells nothing."""
        process = Path("/proc") / pid
        try:
            if int(pid) == os.getpid() or os.readlink(process / "exe").endswith("/postgres"):
                return None
            command = (process / "cmdline").read_bytes()
            told = self._state in (process / "environ").read_bytes() or self._state in command
            if not told and not (command.startswith(b"tl agent") and self._is_served_by(int(pid))):
                return None
        except OSError:
            return None
        return " ".join(word.decode(errors="replace")[-20:] for word in command.split(b"\0")[:3]).strip()


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
    parser.add_argument("--stores", default="file,s3")
    parser.add_argument("--wal-mb", type=int, default=256)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="(always on: the last line is JSON)")
    options = parser.parse_args()
    report = Report("snapshot")
    stores = options.stores.split(",")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(working_directory())
        direct, proxy = stack.enter_context(distant_s3()) if "s3" in stores else ("", None)
        for kind in stores:
            store = f"file://{directory}/store" if kind == "file" else "s3://bench/store"
            with running_server(15, settings=SETTINGS) as server:
                measure(report, kind, directory / kind, store, server, direct, proxy, options)
    report.print()


def measure(
    report: Report,
    kind: str,
    place: Path,
    store: str,
    server: PostgresServer,
    direct: str,
    proxy: S3Proxy | None,
    options: argparse.Namespace,
) -> None:
    """One kind of store. The archiver talks to the S3 server directly: only builds are measured through the proxy."""
    endpoint = proxy.endpoint_url if proxy is not None and kind == "s3" else None
    archiving = make_host(
        place / "archiving", store, source=server.conninfo, endpoint_url=direct if endpoint else None
    )
    building = make_host(place / "building", store, endpoint_url=endpoint)
    archiving.tl("init", store, "--source", server.conninfo)
    pgbench(server, "-i", "-q", "-I", "dtgvp", "-s", "60")
    archiving.tl("archive", "--once")
    for sample in range(options.samples):
        begin = position(server)
        while position(server) - begin < options.wal_mb * 1_000_000:
            pgbench(server, "-n", "-c", "4", "-j", "2", "-T", "4")
        archiving.tl("archive", "--once")
        before = 0
        if proxy is not None and endpoint is not None:
            proxy.reset()
        else:
            before = stored_bytes(Path(store.removeprefix("file://")))
        memory = PeakMemory(building.environment["TL_STATE"])
        memory.start()
        began = time.perf_counter()
        with subprocess.Popen(
            [TL, "snapshot", "--json"], env=building.environment, stdout=subprocess.PIPE, text=True
        ) as child:
            out, _ = child.communicate()
        seconds = time.perf_counter() - began
        peak = memory.end()
        if child.returncode != 0:
            raise RuntimeError(f"tl snapshot failed: {out}")
        if proxy is not None and endpoint is not None:
            uploaded = proxy.stats().bytes_up
        else:
            uploaded = stored_bytes(Path(store.removeprefix("file://"))) - before
        built = json.loads(out.splitlines()[-1])["snapshots"]
        megabytes = sum(each["replayed_bytes"] for each in built) / 1e6
        report.add(f"build_mb_of_wal_per_second/{kind}", megabytes / seconds, "MB/s", "higher")
        report.add(f"uploaded_bytes_per_wal_byte/{kind}", uploaded / megabytes / 1e6, "ratio", "lower")
        report.add(f"peak_memory_mb/{kind}", peak / 1e6, "MB", "lower")
        shares = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in memory.parts.items())
        print(
            f"sample {sample}: {megabytes:.0f} MB of WAL in {len(built)} steps and {seconds:.1f} s; MB at the peak: {shares}",
            file=sys.stderr,
            flush=True,
        )
    building.end_agent()
    archiving.end_agent()
    archiving.tl("detach", "--yes")


if __name__ == "__main__":
    main()
