"""What the host gives, the binaries on it, and small notes kept there."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from restore import process
from restore.binaries import Binaries, find_binaries
from restore.branch_request import Listen, dsn_of, socket_dsn_of
from restore.host import find_host
from restore.icu_memory import IcuMemory
from restore.isolation import mapped_filenode
from restore.local_branch import Server
from timeline.errors import TimelineError, UsageError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="about what root does")


@as_root
def test_root_needs_another_account() -> None:
    """EDGE 48."""
    with pytest.raises(UsageError, match="no user 'nobody-here'"):
        find_host({"TL_RUN_AS": "nobody-here"})
    with pytest.raises(UsageError, match="which is root"):
        find_host({"TL_RUN_AS": "root"})


def test_no_binaries_is_one_line() -> None:
    """EDGE 54."""
    with pytest.raises(UsageError, match="no PostgreSQL 11 on this host"):
        find_binaries(11, {"PATH": "/nonexistent"})


def test_binaries_of_another_major_are_passed_over(tmp_path: Path) -> None:
    fake = tmp_path / "postgres"
    fake.write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 12.3 (Debian)'\n")
    fake.chmod(0o755)
    assert find_binaries(12, {"TL_PG_BIN": str(tmp_path)}) == Binaries(12, tmp_path)
    with pytest.raises(UsageError):
        find_binaries(11, {"TL_PG_BIN": str(tmp_path), "PATH": "/nonexistent"})


def test_dsn_without_password() -> None:
    """P8."""
    server = Server(15, "/bin", "odd user@x", "/run/tl/s/ab", 5432, None)
    assert dsn_of(server) == "postgresql://odd%20user%40x@/postgres?host=/run/tl/s/ab"
    tcp = Server(15, "/bin", "me", "/run/tl/s/ab", 5444, "::1")
    assert dsn_of(tcp, database="a b") == "postgresql://me@[::1]:5444/a%20b"
    assert socket_dsn_of(tcp) == "postgresql://me@/postgres?host=/run/tl/s/ab&port=5444"


def test_addresses_to_listen_on() -> None:
    assert Listen.parse("127.0.0.1:5433") == Listen("127.0.0.1", 5433)
    assert Listen.parse("[::1]:5433") == Listen("::1", 5433)
    for text in ("5433", ":5433", "localhost", "localhost:", "localhost:0", "localhost:70000"):
        with pytest.raises(UsageError, match="not an address"):
            Listen.parse(text)


def test_filenodes_of_mapped_catalogs() -> None:
    entries = struct.pack("<Ii", 0x592717, 2) + struct.pack("<IIII", 1262, 1262, 6100, 24601) + bytes(500)
    assert mapped_filenode(entries, 6100) == 24601
    assert mapped_filenode(entries, 1260) is None
    with pytest.raises(TimelineError, match="not a relation map"):
        mapped_filenode(bytes(512), 6100)


def test_icu_versions_are_remembered_by_server(tmp_path: Path) -> None:
    server = tmp_path / "postgres"
    server.touch()
    memory = IcuMemory(tmp_path)
    assert memory.recall(Binaries(15, tmp_path)) is None
    memory.note(Binaries(15, tmp_path), "153.120")
    assert memory.recall(Binaries(15, tmp_path)) == "153.120"
    os.utime(server, (1, 1))
    assert memory.recall(Binaries(15, tmp_path)) is None, "replaced by another one"
    (tmp_path / "icu.json").write_text("{")
    assert memory.recall(Binaries(15, tmp_path)) is None


def test_processes_are_told_apart_by_their_start() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = process.start_time(child.pid)
    assert process.is_alive(child.pid, started)
    assert not process.is_alive(child.pid, "another")
    assert (child.pid, started) in process.children(os.getpid())
    assert process.send(child.pid, started, 9)
    deadline = time.monotonic() + 10
    while process.is_alive(child.pid, started):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not process.send(child.pid, started, 9)
    child.returncode = 0
