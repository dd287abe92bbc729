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
from tests.support.wal_workload import hand_over
from timeline.catalog.when import AtLsn
from timeline.clock import SystemClock
from timeline.lsn import Lsn


def stock_recovery(url: str, lsn: Lsn, home: Path, major: int, host: Host, *, tli: int | None = None) -> Path:
    """A data directory recovered by stock Postgres from a full copy, and stopped before anyone connected.

    ``tli``: on whose line; the source's current one by default.
    """
    server = PostgresServer(major, home)
    server.make_directory(home)
    address = StoreAddress(url)
    asyncio.run(restore_directory(address, AtLsn(lsn), server.data, host, SystemClock(), tli=tli))
    server.configure(
        {"port": str(free_port()), "unix_socket_directories": f"'{server.sockets}'", "autovacuum": "off"}
    )
    server.start()
    wait_until_promoted(server, seconds=120)
    server.stop()
    return server.data


def recover_copy(server: PostgresServer, wal: Path, lsn: Lsn, tli: int) -> Path:
    """Let stock Postgres replay a base backup, ``server.data``, with the segments in ``wal``, up to the record at
    that LSN and not with it; promoted, and stopped before anyone connected."""
    for name in ("standby.signal", "postgresql.auto.conf"):
        (server.data / name).unlink(missing_ok=True)
    server.configure(
        {
            "port": str(server.port),
            "unix_socket_directories": f"'{server.sockets}'",
            "primary_conninfo": "''",
            "restore_command": f"'cp {wal}/%f %p'",
            "recovery_target_timeline": f"'{tli}'",
            "recovery_target_lsn": f"'{lsn}'",
            "recovery_target_inclusive": "off",
            "recovery_target_action": "promote",
            "hot_standby": "off",
            "max_logical_replication_workers": "0",
        }
    )
    (server.data / "recovery.signal").touch()
    hand_over(server, server.data / "recovery.signal")
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
