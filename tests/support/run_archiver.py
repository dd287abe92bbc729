"""An archiver as a process of its own, which can be stopped, suspended and killed: see
tests/support/archiver.py.

    python -m tests.support.run_archiver --store URL --conninfo CONNINFO [--set NAME=VALUE …] [--faults]

Writes its status to stdout, one JSON object a line, whenever it changes; ends with the exit code of the
error that ended it. SIGTERM stops it gracefully. With ``--faults`` lines on stdin control the store:
``freeze`` (creates wait), ``thaw``, ``fail`` (creates raise Unavailable), ``slow N`` (each create takes N
seconds longer).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from dataclasses import fields
from typing import Any

from tests.support.gated_store import GatedStore
from timeline.archive.runner import Archiver
from timeline.archive.status import ArchiverConfig, ArchiverStatus
from timeline.clock import SystemClock
from timeline.errors import TimelineError
from timeline.store.open import open_store


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` with VALUE as JSON, or a string where it is none."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
        if isinstance(settings[name], list):
            settings[name] = tuple(settings[name])
    unknown = set(settings) - {field.name for field in fields(ArchiverConfig)}
    if unknown:
        raise SystemExit(f"no setting of an archiver: {', '.join(unknown)}")
    return settings


def show(status: ArchiverStatus) -> None:
    """One line on stdout; LSNs as integers."""
    line = {
        "phase": status.phase.value,
        "epoch": status.epoch,
        "tli": status.tli,
        "durable": status.durable,
        "received": status.received,
        "source_end": status.source_end,
        "coverage": [status.coverage.tli, status.coverage.lsn, status.coverage.time]
        if status.coverage
        else None,
        "last_commit_time": status.last_commit_time,
        "synchronous": status.synchronous,
        "buffered_bytes": status.buffered_bytes,
        "chunks": status.chunks,
        "wal_bytes": status.wal_bytes,
        "stored_bytes": status.stored_bytes,
        "uploads": status.uploads,
        "upload_seconds": status.upload_seconds,
        "upload_errors": status.upload_errors,
        "behind_since": status.behind_since,
        "slot_name": status.slot_name,
        "wal_status": status.slot.wal_status.value if status.slot and status.slot.wal_status else None,
        "needs_base": status.needs_base,
        "error": status.error,
        "hint": status.hint,
        "warnings": list(status.warnings),
    }
    print(json.dumps(line), flush=True)


async def main() -> int:
    """Run until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--endpoint-url")
    parser.add_argument("--conninfo", required=True)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--faults", action="store_true")
    options = parser.parse_args()
    config = ArchiverConfig(conninfo=options.conninfo, **parse_settings(options.settings))
    clock = SystemClock()
    store = GatedStore(await open_store(options.store, endpoint_url=options.endpoint_url, clock=clock), clock)
    archiver = Archiver(store, config, clock, on_status=show)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if options.faults:
        loop.add_reader(sys.stdin.fileno(), lambda: store.obey(sys.stdin.readline()))
    try:
        await archiver.run(stop)
    except TimelineError as error:
        print(f"{type(error).__name__}: {error.message}", file=sys.stderr, flush=True)
        return error.exit_code
    finally:
        await store.aclose()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
