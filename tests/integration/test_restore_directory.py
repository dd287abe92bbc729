"""``tl restore``: a directory that stock Postgres starts from, at exactly T, harming nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from restore.branch_request import StoreAddress
from restore.eager import Progress
from restore.export import RestoreResult, restore_directory
from restore.host import find_host
from tests.support.archived_server import ArchivedServer, archived_server
from tests.support.postgres import PostgresServer, scratch
from tests.support.restored import started
from timeline.catalog.when import AtLsn
from timeline.clock import SystemClock
from timeline.errors import DamagedStore, TargetUnreachable, UsageError
from timeline.lsn import Lsn

CLOCK = SystemClock()


@pytest.fixture(scope="module")
def source(
    make_postgres_session: Callable[..., PostgresServer], request: pytest.FixtureRequest
) -> Iterator[ArchivedServer]:
    """A server that archives elsewhere too, with a tablespace, a base backup and an archiver at work."""
    directory = scratch("tl-rs-")
    marker = directory / "archive"
    server = make_postgres_session(
        getattr(request, "param", 15),
        initdb=["--wal-segsize=1"],
        settings={"archive_mode": "on", "archive_command": f"'touch {marker}/%f'", "work_mem": "'9MB'"},
    )
    server.make_directory(marker)
    spot = server.make_directory(directory / "space")
    server.sql("create table t (n int)", "insert into t select generate_series(1, 50000)")
    server.sql(f"create tablespace spot location '{spot}'", "create table placed (n int) tablespace spot")
    with archived_server(server, directory / "store") as archived:
        server.sql("insert into placed select generate_series(1, 700)", "alter system set work_mem = '11MB'")
        yield archived
    server.stop("immediate")
    shutil.rmtree(directory)


both_majors = pytest.mark.parametrize("source", [15, 18], indirect=True)


@pytest.fixture
def directory() -> Iterator[Path]:
    path = scratch("tl-rd-")
    yield path
    shutil.rmtree(path)


def restore(
    archived: ArchivedServer,
    directory: Path,
    lsn: Lsn,
    *,
    url: str | None = None,
    report: Callable[[Progress], None] = lambda _: None,
) -> RestoreResult:
    return asyncio.run(
        restore_directory(
            StoreAddress(url or archived.url),
            AtLsn(lsn),
            directory,
            find_host(os.environ),
            CLOCK,
            report=report,
        )
    )


@both_majors
def test_stock_postgres_starts_from_it(source: ArchivedServer, directory: Path) -> None:
    """P6, P8, EDGE 32, 49: exactly T, the source's settings, guarded against reaching out."""
    server = source.server
    at = source.position()
    server.sql("insert into t values (-1)")
    source.position()
    seen: list[Progress] = []
    result = restore(source, directory / "data", at, report=seen.append)
    assert result.major == server.major and result.target.lsn == at
    assert result.fetched_bytes > 0 and seen[-1].done_bytes > 1 << 20
    assert any("tablespace" in warning for warning in result.warnings)
    marker = Path(str(source.url)).parent / "archive"
    server.sql("select pg_switch_wal()")
    with started(server, directory) as copy:
        assert copy.value("select count(*) from t") == "50000"
        assert copy.value("select count(*) from placed") == "700"
        assert copy.value("select pg_is_in_recovery()") == "False"
        assert copy.value("show work_mem") == "9MB", "as of the base backup"
        assert copy.value("show archive_mode") == "off"
        copy.sql("insert into placed values (1)", "select pg_switch_wal()", "drop table placed", "checkpoint")
        assert not [path for path in (copy.data / "pg_tblspc").iterdir() if path.is_symlink()]
        copy.stop()
        copy.start()
        assert copy.value("select count(*) from t") == "50000"
    assert not [name for name in os.listdir(marker) if name.startswith("00000002")]
    assert server.value("select count(*) from placed") == "700"
    server.sql("delete from t where n < 0")


def test_nothing_is_written_over(source: ArchivedServer, directory: Path) -> None:
    (directory / "mine").write_text("precious")
    with pytest.raises(UsageError, match="not an empty directory"):
        restore(source, directory, source.position())
    assert (directory / "mine").read_text() == "precious"


def test_a_failure_removes_what_it_made(source: ArchivedServer, directory: Path) -> None:
    """EDGE 31, P5, P7: an absent directory is absent again, an empty one empty."""
    with pytest.raises(TargetUnreachable):
        restore(source, directory / "new", Lsn.parse("FFFF/0"))
    assert not (directory / "new").exists()
    at = source.position()
    hurt = directory / "hurt"
    shutil.copytree(source.url, hurt)
    for pack in (path for path in (hurt / "packs").rglob("*") if path.is_file()):
        data = bytearray(pack.read_bytes())
        data[len(data) // 2] ^= 1
        pack.chmod(0o600)
        pack.write_bytes(data)
    (directory / "empty").mkdir()
    with pytest.raises(DamagedStore):
        restore(source, directory / "empty", at, url=str(hurt))
    assert list((directory / "empty").iterdir()) == []


def test_an_interrupted_restore_never_starts(source: ArchivedServer, directory: Path) -> None:
    """EDGE 31: pg_control comes last, so what a killed restore leaves is refused by Postgres."""
    script = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from restore import export\n"
        "from restore.branch_request import StoreAddress\n"
        "from restore.host import find_host\n"
        "from timeline.catalog.when import Latest\n"
        "from timeline.clock import SystemClock\n"
        "def die(*args): os._exit(9)\n"
        "export.write_control = die\n"
        "asyncio.run(export.restore_directory(StoreAddress(sys.argv[1]), Latest(), Path(sys.argv[2]),\n"
        "    find_host(os.environ), SystemClock()))\n"
    )
    data = directory / "data"
    died = subprocess.run(
        [sys.executable, "-c", script, source.url, str(data)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        check=False,
    )
    assert died.returncode == 9
    assert (data / "PG_VERSION").exists() and not (data / "global/pg_control").exists()
    with (
        pytest.raises(RuntimeError, match=r"pg_control|could not start server"),
        started(source.server, directory),
    ):
        pass


def test_configuration_kept_elsewhere_is_made_from_its_settings(
    make_postgres: Callable[..., PostgresServer], directory: Path
) -> None:
    """EDGE 45: Debian's way."""
    server = make_postgres(15, settings={"work_mem": "'13MB'", "max_connections": "33"})
    server.stop()
    etc = server.make_directory(server.directory / "etc")
    for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf"):
        (server.data / name).rename(etc / name)
    with (etc / "postgresql.conf").open("a") as conf:
        conf.write(f"data_directory = '{server.data}'\nhba_file = '{etc}/pg_hba.conf'\n")
        conf.write(f"ident_file = '{etc}/pg_ident.conf'\n")
    server.tool("pg_ctl", "-D", str(etc), "-l", str(server.log), "-w", "start")
    server.sql("create table t as select generate_series(1, 10) n")
    with archived_server(server, directory / "store") as archived:
        result = restore(archived, directory / "data", archived.position())
        assert len(result.warnings) == 3
        hba = directory / "data" / "pg_hba.conf"
        hba.write_text("local all all trust\n")
        with started(server, directory) as copy:
            assert copy.value("show work_mem") == "13MB"
            assert copy.value("show max_connections") == "33"
            assert copy.value("select count(*) from t") == "10"
