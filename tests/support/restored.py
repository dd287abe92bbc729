"""Stock Postgres on what ``tl restore`` wrote."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from restore.branch_request import StoreAddress
from restore.export import restore_directory
from restore.host import Host
from tests.support.postgres import PostgresServer, free_port
from timeline.catalog.when import AtLsn
from timeline.clock import SystemClock
from timeline.lsn import Lsn


def stock_recovery(url: str, lsn: Lsn, home: Path, major: int, host: Host) -> Path:
    """A data directory recovered by stock Postgres from a full copy, and stopped before anyone connected."""
    server = PostgresServer(major, home)
    server.make_directory(home)
    asyncio.run(restore_directory(StoreAddress(url), AtLsn(lsn), server.data, host, SystemClock()))
    server.configure(
        {"port": str(free_port()), "unix_socket_directories": f"'{server.sockets}'", "autovacuum": "off"}
    )
    server.start()
    wait_until_promoted(server, seconds=120)
    server.stop()
    return server.data


def wait_until_promoted(server: PostgresServer, *, seconds: float) -> None:
    """Without hot standby pg_ctl takes the beginning of recovery for its end."""
    deadline = time.monotonic() + seconds
    while "ready" not in (server.data / "postmaster.pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def started(source: PostgresServer, home: Path) -> Iterator[PostgresServer]:
    """Stock Postgres of the source's version on ``home/data``, its recovery over; stopped at the end."""
    copy = PostgresServer(source.major, home)
    copy.make_directory(home)
    copy.port = free_port()
    copy.configure({"port": str(copy.port), "unix_socket_directories": f"'{copy.sockets}'"})
    try:
        copy.start()
        wait_until_promoted(copy, seconds=60)
        yield copy
    finally:
        copy.stop("immediate")
