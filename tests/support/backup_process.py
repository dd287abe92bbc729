"""One base backup in a process of its own, to be killed or measured: prints its report as JSON.

usage: python -m tests.support.backup_process STORE_DIRECTORY CONNINFO RATE_BYTES PACK_BYTES
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

from timeline.archive.basebackup import BackupOptions, BackupReport, take_base_backup
from timeline.catalog.branch_log import BranchLog
from timeline.clock import SystemClock
from timeline.store.local import LocalStore


async def _take(directory: str, conninfo: str, rate: int, pack_bytes: int) -> BackupReport:
    clock = SystemClock()
    store = LocalStore(directory)
    options = BackupOptions(
        fast_checkpoint=True,
        rate_bytes_per_second=rate or None,
        pack_bytes=pack_bytes,
        progress_packs=2,
    )
    log = BranchLog(store, "main", clock, clock.token(8))
    try:
        return await take_base_backup(conninfo, store, log, clock, options=options)
    finally:
        await store.aclose()


def _peak_rss_bytes() -> int:
    """Of this program alone: ``ru_maxrss`` would remember the process that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    """See above."""
    directory, conninfo, rate, pack_bytes = sys.argv[1:5]
    report = asyncio.run(_take(directory, conninfo, int(rate), int(pack_bytes)))
    facts = {
        "uploaded_bytes": report.uploaded_bytes,
        "read_bytes": report.read_bytes,
        "elapsed_seconds": report.elapsed_seconds,
        "peak_rss_bytes": _peak_rss_bytes(),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
