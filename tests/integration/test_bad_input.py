"""Bad input: one clear line, the documented exit code, nothing lost or half made."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.clones import wait_for
from tests.support.postgres import PostgresServer, free_port, scratch
from tests.support.tl_host import TL, Host, make_host


@pytest.fixture
def place() -> Iterator[Path]:
    """A scratch directory."""
    path = scratch("tl-bad-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def server(make_postgres_session: Callable[..., PostgresServer]) -> PostgresServer:
    """A source shared by the module; nothing here may change it."""
    return make_postgres_session(15)


@pytest.fixture(scope="module")
def archived(server: PostgresServer) -> Iterator[Host]:
    """A host with an archived store."""
    place = scratch("tl-bad-")
    host = make_host(place, f"file://{place}/store", source=server.conninfo)
    host.tl("init", host.store, "--source", server.conninfo)
    host.tl("archive", "--once")
    server.sql("create table if not exists present (id int)", "insert into present values (1)")
    host.tl("archive", "--once")
    yield host
    host.end_agent()
    host.tl("detach", "--yes")
    shutil.rmtree(place, ignore_errors=True)


def refused(host: Host, *args: str, code: int, says: str) -> str:
    """Run, expect that exit code and those words on one line of stderr, and no traceback."""
    result = host.run(*args)
    assert result.returncode == code, (args, result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert any(says in line for line in result.stderr.splitlines()), result.stderr
    return result.stderr


def test_no_server(place: Path) -> None:
    host = make_host(place, f"file://{place}/store", source=f"host=127.0.0.1 port={free_port()} user=x")
    refused(host, "init", host.store, code=7, says="")
    assert not (place / "store" / "tl.json").exists()


def test_wrong_role(place: Path, server: PostgresServer) -> None:
    host = make_host(
        place, f"file://{place}/store", source=server.conninfo.replace("user=postgres", "user=nobody_here")
    )
    refused(host, "init", host.store, code=2, says="does not know this user")


def test_role_without_replication(place: Path, server: PostgresServer) -> None:
    server.sql("drop role if exists plain", "create role plain login")
    host = make_host(
        place, f"file://{place}/store", source=server.conninfo.replace("user=postgres", "user=plain")
    )
    refused(host, "init", host.store, code=6, says="may not stream WAL")
    assert not (place / "store" / "tl.json").exists()


def test_wal_level_minimal(place: Path, make_postgres: Callable[..., PostgresServer]) -> None:
    """EDGE 33."""
    minimal = make_postgres(15, settings={"wal_level": "minimal", "max_wal_senders": "0"})
    host = make_host(place, f"file://{place}/store", source=minimal.conninfo)
    refused(host, "init", host.store, code=6, says="wal_level")


def test_unbounded_slot(place: Path, make_postgres: Callable[..., PostgresServer]) -> None:
    """P11: no slot that could fill production's disk, unless asked for."""
    unbounded = make_postgres(15, settings={"max_slot_wal_keep_size": "-1"})
    host = make_host(place, f"file://{place}/store", source=unbounded.conninfo)
    refused(host, "init", host.store, code=6, says="max_slot_wal_keep_size")
    host.tl("init", host.store, "--unbounded-slot")
    refused(host, "archive", "--once", code=2, says="max_slot_wal_keep_size")
    assert unbounded.value("select count(*) from pg_replication_slots") == "0"
    host.tl("archive", "--once", "--unbounded-slot")
    host.tl("detach", "--yes")
    assert unbounded.value("select count(*) from pg_replication_slots") == "0"


def test_another_cluster_behind_the_store(
    place: Path, archived: Host, make_postgres: Callable[..., PostgresServer]
) -> None:
    """EDGE 12."""
    other = make_postgres(15)
    host = make_host(place, archived.store, source=other.conninfo)
    refused(host, "archive", "--once", code=2, says="another cluster")
    assert other.value("select count(*) from pg_replication_slots") == "0"


def test_init_twice(archived: Host) -> None:
    refused(archived, "init", archived.store, code=2, says="there is a store already")


def test_unwritable_store(place: Path, server: PostgresServer) -> None:
    blocked = place / "file"
    blocked.write_text("not a directory")
    host = make_host(place, f"file://{blocked}/store", source=server.conninfo)
    refused(host, "init", host.store, code=2, says=str(blocked))


@pytest.mark.parametrize(
    ("when", "code", "says"),
    [
        ("yesterday-ish", 2, "yesterday-ish"),
        ("2026-02-30 10:00", 2, "2026-02-30"),
        ("2999-01-01 00:00Z", 3, "recoverable"),
        ("2000-01-01 00:00Z", 3, "recoverable"),
        ("FFFFFF/0", 3, "recoverable"),
        ("0/1000028", 3, "recoverable"),
        ("xid:4000000", 3, "recoverable"),
        ("name:never-made", 3, "never-made"),
    ],
)
def test_when(archived: Host, when: str, code: int, says: str) -> None:
    """P7, EDGE 35–37: unparsable, in the future, before the base backup, beyond what is stored."""
    result = archived.run("branch", "never", "--at", when)
    assert result.returncode == code, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    if says != "recoverable":
        assert says in result.stderr
    else:
        assert " to " in result.stderr or "from" in result.stderr, result.stderr
    nothing_half_made(archived, "never")


def test_inside_the_backup_window(archived: Host) -> None:
    """EDGE 37: between the backup's redo point and its end nothing is consistent."""
    import asyncio

    from timeline.catalog.history import History
    from timeline.store.local import LocalStore

    async def window() -> str:
        history = await History.load(LocalStore(archived.store.removeprefix("file://")))
        snapshot = history.state.snapshots[0]
        assert snapshot.lsn < snapshot.end
        return str(snapshot.lsn)

    refused(archived, "branch", "never", "--at", asyncio.run(window()), code=3, says="")
    nothing_half_made(archived, "never")


def test_ambiguous_local_time(archived: Host) -> None:
    """EDGE 38: an hour that the clock shows twice is refused with both readings."""
    host = Host(archived.directory, archived.store, archived.environment | {"TZ": "Europe/Berlin"})
    stderr = refused(host, "branch", "never", "--at", "2025-10-26 02:30", code=2, says="2025-10-26")
    assert "+02:00" in stderr
    assert "+01:00" in stderr


@pytest.mark.parametrize("name", ["main", "UPPER", "with space", "-dash", "a/b", "x" * 64])
def test_invalid_name(archived: Host, name: str) -> None:
    result = archived.run("branch", "--", name)
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("verb", ["start", "stop", "delete", "psql", "logs"])
def test_main_is_no_branch(archived: Host, verb: str) -> None:
    args = (verb, "main", "--yes") if verb == "delete" else (verb, "main")
    refused(archived, *args, code=2, says="'main' is the archived server")


def test_unknown_branch(archived: Host) -> None:
    refused(archived, "delete", "nowhere", "--yes", code=2, says="nowhere")


def test_delete_needs_yes_off_a_terminal(archived: Host) -> None:
    archived.tl("branch", "kept")
    refused(archived, "delete", "kept", code=2, says="kept")
    assert [each["name"] for each in archived.branches()] == ["kept"]
    archived.tl("delete", "kept", "--yes")


def test_name_taken(archived: Host) -> None:
    archived.tl("branch", "taken")
    try:
        refused(archived, "branch", "taken", code=2, says="taken")
        assert archived.tl("branch", "taken", "--if-exists", "reuse")["name"] == "taken"
    finally:
        archived.tl("delete", "taken", "--yes")


def test_port_taken(archived: Host) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        refused(archived, "branch", "never", "--listen", f"127.0.0.1:{port}", code=2, says=str(port))
    nothing_half_made(archived, "never")


@pytest.mark.skipif(os.geteuid() != 0, reason="hiding the binaries takes a mount namespace")
def test_no_binaries_of_that_major(archived: Host) -> None:
    """EDGE 54."""
    hidden = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none /usr/lib/postgresql && exec {TL} branch never"],
        env=archived.environment | {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert hidden.returncode == 2, (hidden.stdout, hidden.stderr)
    assert "15" in hidden.stderr
    assert "Traceback" not in hidden.stderr
    nothing_half_made(archived, "never")


def test_missing_store(place: Path) -> None:
    host = make_host(place, f"file://{place}/nothing")
    refused(host, "branch", code=2, says="there is no store")
    refused(host, "status", code=2, says="there is no store")
    assert not (place / "nothing").exists()


def test_no_store_named(place: Path) -> None:
    host = make_host(place, "")
    refused(host, "branch", code=2, says="no store given")


def test_restore_refuses_a_directory_in_use(archived: Host, place: Path) -> None:
    full = place / "full"
    full.mkdir()
    (full / "precious").write_text("data")
    refused(archived, "restore", str(full), code=2, says="not an empty directory")
    assert (full / "precious").read_text() == "data"


def test_slot_taken(archived: Host, server: PostgresServer) -> None:
    """EDGE 7: another connection streams from our slot; nothing of it is disturbed."""
    running = archived.start_archiver()
    try:
        wait_for(lambda: server.value("select count(*) from pg_replication_slots where active") == "1")
        stderr = archived.run("detach", "--yes")
        assert stderr.returncode in (1, 7)
        assert "Traceback" not in stderr.stderr
        assert server.value("select count(*) from pg_replication_slots") == "1"
    finally:
        running.terminate()
        running.wait(60)


def nothing_half_made(host: Host, name: str) -> None:
    """No branch of that name, no directory left over."""
    assert name not in [each["name"] for each in host.branches()]
    branches = Path(host.environment["TL_STATE"]) / "branches"
    left = list(os.listdir(branches)) if branches.exists() else []
    known = [each["id"] for each in host.branches()]
    assert sorted(left) == sorted(known)
