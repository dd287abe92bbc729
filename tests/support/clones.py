"""Copies of a server, standbys, promotions: for tests of failovers."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.postgres import PostgresServer, scratch


def copy_data(server: PostgresServer, to: Path) -> None:
    """A cold copy of a stopped server's data directory, owned by its user."""
    shutil.copytree(server.data, to)
    for root, directories, files in os.walk(to):
        for name in (".", *directories, *files):
            os.chown(os.path.join(root, name), server.user.pw_uid, server.user.pw_gid)


def signal_standby(server: PostgresServer) -> None:
    """Let the stopped server start as a standby."""
    path = server.data / "standby.signal"
    path.touch()
    os.chown(path, server.user.pw_uid, server.user.pw_gid)


def promote(server: PostgresServer) -> None:
    """End a standby's recovery; it takes the next tli."""
    server.tool("pg_ctl", "-D", str(server.data), "-w", "-t", "60", "promote")


def next_tli(server: PostgresServer) -> None:
    """Restart the server on a new tli, as if a standby of it had been promoted."""
    server.stop()
    signal_standby(server)
    server.start()
    promote(server)


def wait_for(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    """RuntimeError when it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("took too long")
        time.sleep(0.05)


class Clones:
    """Makes copies of a stopped server and removes them at the end."""

    def __init__(self) -> None:
        self._made: list[PostgresServer] = []

    def make(self, server: PostgresServer, *, standby: bool = False) -> PostgresServer:
        """A copy of its own address, not started; with ``standby``, one that will follow the server."""
        clone = PostgresServer(server.major, scratch("tl-clone-"))
        self._made.append(clone)
        copy_data(server, clone.data)
        clone.configure(
            {"port": str(clone.port), "unix_socket_directories": f"'{clone.sockets}'"}
            | (
                {"primary_conninfo": f"'host={server.sockets} port={server.port} user=postgres'"}
                if standby
                else {}
            )
        )
        if standby:
            signal_standby(clone)
        return clone

    def close(self) -> None:
        """Stop and remove them all."""
        for clone in self._made:
            clone.stop("immediate")
            shutil.rmtree(clone.directory, ignore_errors=True)


@contextlib.contextmanager
def clones() -> Iterator[Clones]:
    """As a context."""
    made = Clones()
    try:
        yield made
    finally:
        made.close()
