"""Stock Postgres on what ``tl restore`` wrote."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.postgres import PostgresServer, free_port


@contextlib.contextmanager
def started(source: PostgresServer, home: Path) -> Iterator[PostgresServer]:
    """Stock Postgres of the source's version on ``home/data``, its recovery over; stopped at the end."""
    copy = PostgresServer(source.major, home)
    copy.make_directory(home)
    copy.port = free_port()
    copy.configure({"port": str(copy.port), "unix_socket_directories": f"'{copy.sockets}'"})
    try:
        copy.start()
        # Without hot standby pg_ctl takes the beginning of recovery for its end.
        deadline = time.monotonic() + 60
        while "ready" not in (copy.data / "postmaster.pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield copy
    finally:
        copy.stop("immediate")
