"""restore/rescue.py run as a stranger would, and stock Postgres on what it wrote."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from tests.support.postgres import PostgresServer

RESCUE = Path(__file__).parents[2] / "restore" / "rescue.py"


def rescue(store: Path, target: Path, *options: str, blake3: bool = True) -> subprocess.CompletedProcess[str]:
    """Run it as a stranger would: by its path, from elsewhere, without our packages in reach."""
    hide = "" if blake3 else "sys.modules['blake3'] = None;"
    code = (
        f"import runpy, sys; {hide} sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", code, str(RESCUE), str(store), str(target), *options],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=120,
        check=False,
    )


@contextlib.contextmanager
def recovered(server: PostgresServer, target: Path) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """Postgres on the directory, when it has recovered; a connection to it."""
    for path in (target, *target.rglob("*")):
        if os.geteuid() == 0:
            os.chown(path, server.user.pw_uid, server.user.pw_gid)
    log_file = target / "server.log"
    server.tool("pg_ctl", "-D", str(target), "-l", str(log_file), "-W", "start")
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                connection = psycopg.connect(
                    host=str(target), user="postgres", dbname="postgres", autocommit=True
                )
                break
            except psycopg.OperationalError:
                if time.monotonic() > deadline or "shut down" in log_file.read_text().split("\n")[-2:][0]:
                    raise AssertionError(log_file.read_text()) from None
                time.sleep(0.05)
        with connection:
            yield connection
    finally:
        server.tool("pg_ctl", "-D", str(target), "-m", "immediate", "stop", check=False)


def value(connection: psycopg.Connection[tuple[object, ...]], query: str) -> str:
    (row,) = connection.execute(query).fetchall()
    return str(row[0])
