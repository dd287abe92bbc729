"""``tl demo``: the whole idea in a minute, on a throw-away server, leaving nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cli.output import emit_json, note, say
from timeline.errors import TimelineError, Unavailable
from timeline.size_text import size_text

ROWS = 1_500_000
START_SECONDS = 30.0
CATCH_UP_SECONDS = 60.0
STOP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo showed."""

    server_version: str
    database_bytes: int
    rows_lost: int
    rows_back: int
    """Rows of the dropped table, counted on the branch."""
    branch_seconds: float
    """From the exec of `tl branch` to its DSN."""
    first_query_seconds: float
    """From the exec of `tl branch` to the first row from the dropped table."""
    fetched_bytes: int
    """From the store, when that row was there."""
    commit_to_store_seconds: float
    """From a COMMIT on the source to the store holding it."""
    elapsed_seconds: float


@click.command("demo")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option(
    "--major", type=int, metavar="N", help="Major version of the server (default: the newest found here)."
)
@click.option("--rows", type=int, default=ROWS, show_default=True, help="Size of the demo table.")
def demo_command(*, as_json: bool, major: int | None, rows: int) -> None:
    """A database, a mistake, a branch from just before it: in under a minute, leaving nothing behind.

    Starts a throw-away Postgres on a Unix socket, archives it into a temporary directory, drops a table, and branches
    to just before that.
    """
    result = asyncio.run(_Demo(quiet=as_json, major=major, rows=rows).run())
    if as_json:
        emit_json(result)


class _Demo:
    """One run; every process it starts is ended by pid, every file is in one temporary directory."""

    def __init__(self, *, quiet: bool, major: int | None, rows: int) -> None:
        from timeline.clock import SystemClock

        self._quiet = quiet
        self._major = major
        self._rows = rows
        self._clock = SystemClock()

    async def run(self) -> DemoResult:
        """All of it; raises TimelineError with the reason when a step fails."""
        began = self._clock.monotonic()
        with self._place() as place:
            return await asyncio.to_thread(self._show, place, began)

    def _show(self, place: Path, began: float) -> DemoResult:
        from restore.binaries import find_binaries
        from restore.host import find_host

        environment = {key: value for key, value in os.environ.items() if not key.startswith(("TL_", "PG"))}
        environment |= {
            "TL_STATE": str(place / "state"),
            "TL_CACHE": str(place / "cache"),
            "TL_CONFIG": str(place / "tl.toml"),
            "LC_ALL": "C.UTF-8",
        }
        for kept in ("TL_PG_BIN", "TL_RUN_AS"):
            if kept in os.environ:
                environment[kept] = os.environ[kept]
        host = find_host(environment)
        binaries = self._binaries(find_binaries)
        source = _Source(
            place, binaries.directory, binaries.environment(), host.account if host.switches_user else None
        )
        with source.running():
            version = source.value("show server_version")
            self._say(f"1  A throw-away PostgreSQL {version.split()[0]} with a table of {self._rows:,} rows.")
            source.sql(
                "create table orders (id int primary key, customer text, amount numeric)",
                f"insert into orders select i, 'customer ' || i % 1000, i % 500 from generate_series(1, {self._rows}) i",
                "vacuum analyze orders",
                "checkpoint",
            )
            self._tl(environment, "init", f"file://{place}/store", "--source", source.conninfo, "--json")
            with self._archiver(environment, place):
                self._wait_for_base(environment)
                size = int(source.value("select sum(pg_database_size(oid))::int8 from pg_database"))
                self._say(
                    f"2  `tl archive` streams it into a directory; base backup of {size_text(size)} done."
                )
                source.sql("insert into orders values (0, 'the last good order', 42)")
                lag = self._stored_after(environment, source)
                self._say(f"3  An order comes in; {lag:.1f} s after its COMMIT the store has it.")
                moment = source.value("select clock_timestamp()")
                self._clock.pause(0.05)
                count = int(source.value("select count(*) from orders"))
                source.sql("drop table orders")
                self._say(f"4  Somebody says DROP TABLE orders. {count:,} rows are gone.")
                self._stored_after(environment, source)
                branch_began = self._clock.monotonic()
                branch = self._tl(environment, "branch", "rescue", "--at", moment, "--json")
                branch_seconds = self._clock.monotonic() - branch_began
                psql = str(binaries.directory / "psql")
                order = _psql(
                    psql, branch["dsn"], "select customer from orders where id = 0", binaries.environment()
                )
                first_query = self._clock.monotonic() - branch_began
                described = self._branch(environment, "rescue")
                self._say(f'5  tl branch rescue --at "{moment[:22]}"')
                self._say(
                    f"   a writable PostgreSQL in {branch_seconds:.2f} s; the first row after {first_query:.2f} s:"
                )
                self._say(f"   order 0 is from {order!r}")
                share = described / size if size else 0.0
                self._say(
                    f"   fetched from the store: {size_text(described)} of {size_text(size)} ({share:.1%})"
                )
                back = int(_psql(psql, branch["dsn"], "select count(*) from orders", binaries.environment()))
                self._say(f"   select count(*) from orders: {back:,} rows are back")
                self._tl(environment, "delete", "rescue", "--yes", "--json")
            self._tl(environment, "detach", "--yes", "--json")
        elapsed = self._clock.monotonic() - began
        self._say(f"6  All of it in {elapsed:.0f} s; server, store and branch are gone again.")
        if back != count:
            raise TimelineError(f"the branch holds {back} rows and the table had {count}")
        return DemoResult(version, size, count, back, branch_seconds, first_query, described, lag, elapsed)

    def _binaries(self, find: Any) -> Any:
        majors = [self._major] if self._major else [18, 17, 16, 15]
        for major in majors:
            try:
                return find(major, os.environ)
            except TimelineError:
                if major == majors[-1]:
                    raise
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _place(self) -> Iterator[Path]:
        # A short path: the sockets below it have 107 bytes.
        place = Path(tempfile.mkdtemp(prefix="tl-demo-", dir="/tmp"))
        place.chmod(0o755)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    @contextlib.contextmanager
    def _archiver(self, environment: dict[str, str], place: Path) -> Iterator[None]:
        with (place / "archive.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "cli.main",
                    "archive",
                    "--fast-checkpoint",
                    "--max-delay",
                    "0.2",
                    "--snapshot-every",
                    "0",
                ],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._archive_log = place / "archive.log"
        self._archive_process = process
        try:
            yield
        finally:
            _end(process)

    def _wait_for_base(self, environment: dict[str, str]) -> None:
        deadline = self._clock.monotonic() + CATCH_UP_SECONDS
        while self._clock.monotonic() < deadline:
            if self._archive_process.poll() is not None:
                raise TimelineError(f"tl archive ended early:\n{self._archive_log.read_text()[-2000:]}")
            if "base backup done" in self._archive_log.read_text():
                return
            self._clock.pause(0.1)
        raise Unavailable(
            f"no base backup within {CATCH_UP_SECONDS:g} s:\n{self._archive_log.read_text()[-2000:]}"
        )

    def _stored_after(self, environment: dict[str, str], source: _Source) -> float:
        """Seconds until the store holds the source's present position, as its slot tells."""
        began = self._clock.monotonic()
        position = source.value("select pg_current_wal_flush_lsn()")
        while self._clock.monotonic() - began < CATCH_UP_SECONDS:
            if source.value(f"select bool_or(flush_lsn >= '{position}') from pg_stat_replication") == "t":
                return self._clock.monotonic() - began
            self._clock.pause(0.02)
        raise Unavailable(f"the store did not catch up within {CATCH_UP_SECONDS:g} s")

    def _branch(self, environment: dict[str, str], name: str) -> int:
        from restore.branch import HostBranches

        return HostBranches.of(environment, self._clock).describe(name).fetched_bytes

    def _tl(self, environment: dict[str, str], *arguments: str) -> dict[str, Any]:
        """Run ``tl`` as a person would, in a process of its own."""
        import json

        process = subprocess.run(
            [sys.executable, "-m", "cli.main", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=CATCH_UP_SECONDS * 2,
            check=False,
        )
        if process.returncode != 0:
            raise TimelineError(
                f"tl {' '.join(arguments)} failed: {process.stderr.strip() or process.stdout.strip()}"
            )
        answer: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
        return answer

    def _say(self, text: str) -> None:
        if self._quiet:
            note(text)
        else:
            say(text)


class _Source:
    """The throw-away server: private socket, no TCP, nothing of the host's own clusters touched."""

    def __init__(self, place: Path, bin_dir: Path, environment: dict[str, str], account: Any) -> None:
        self._bin = bin_dir
        self._environment = environment
        self._account = account
        self._directory = place / "source"
        self._directory.mkdir(mode=0o700)
        if account is not None:
            os.chown(self._directory, account.uid, account.gid)
        self.conninfo = f"host={self._directory} user=postgres dbname=postgres"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        data = self._directory / "data"
        self._run(
            "initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"
        )
        with (data / "postgresql.conf").open("a") as conf:
            conf.write(
                f"listen_addresses = ''\nunix_socket_directories = '{self._directory}'\nmax_slot_wal_keep_size = '2GB'\n"
                "fsync = off\nwal_level = replica\nautovacuum = off\nmax_wal_size = '2GB'\n"
            )
        self._run("pg_ctl", "-D", str(data), "-l", str(self._directory / "log"), "-w", "-t", "30", "start")
        try:
            yield
        finally:
            self._run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "-t", "30", "stop")

    def sql(self, *statements: str) -> None:
        """Run statements, each in its own transaction."""
        for statement in statements:
            self.value(statement)

    def value(self, statement: str) -> str:
        """What psql prints for a statement."""
        return _psql(str(self._bin / "psql"), f"{self.conninfo}", statement, self._environment)

    def _run(self, program: str, *arguments: str) -> None:
        as_user: dict[str, Any] = {}
        if self._account is not None:
            as_user = {"user": self._account.uid, "group": self._account.gid, "extra_groups": []}
        done = subprocess.run(
            [str(self._bin / program), *arguments],
            env=self._environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
            **as_user,
        )
        if done.returncode != 0:
            raise TimelineError(f"{program} failed: {done.stdout.strip()[-500:]}")


def _psql(psql: str, dsn: str, statement: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [psql, "-XAtq", "-d", dsn, "-c", statement],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != 0:
        raise TimelineError(f"psql failed: {done.stderr.strip()}")
    return done.stdout.strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a child to stop, then insist."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
