"""Postgres replays our changes to private WAL: a blanked tablespace path, a forged NOOP (EDGE 49, 58)."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.fix_postgres import MAJORS
from tests.support.postgres import PostgresServer
from tests.support.wal_workload import copy_server, first_segment, hand_over, read_wal
from timeline.lsn import Lsn
from timeline.pg.control import parse_control
from timeline.pg.segment import segment_name
from timeline.pg.wal import RecordKind, WalScanner
from timeline.pg.wal_patch import apply_patches, find_tablespace_creates, noop_record, tablespace_patches

pytestmark = pytest.mark.majors


def wait_until_promoted(server: PostgresServer) -> None:
    """With hot_standby off pg_ctl returns before connections are accepted; the file says when they are."""
    deadline = time.monotonic() + 30
    while (server.data / "postmaster.pid").read_text().splitlines()[7:8] != ["ready   "]:
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("switch", [False, True], ids=["mid-page", "after-switch"])
@pytest.mark.parametrize("major", MAJORS)
def test_a_branch_never_reaches_the_sources_tablespace(
    major: int, switch: bool, make_postgres: Callable[..., PostgresServer]
) -> None:
    source = make_postgres(major, settings={"wal_keep_size": "1GB"})
    source.stop()
    branch = copy_server(source, "branch")
    source.start()
    place = source.make_directory(source.directory / "fast")
    source.sql(
        f"create tablespace fast location '{place}'",
        "create table precious(a int) tablespace fast",
        "insert into precious select generate_series(1, 1000)",
        "checkpoint",
    )
    if switch:
        source.sql("select pg_switch_wal()")
        end = Lsn.parse(source.value("select pg_current_wal_lsn()"))
        source.stop("immediate")
    else:
        source.stop()
        end = Lsn(parse_control((source.data / "global/pg_control").read_bytes()).checkpoint_lsn + 120)
    files_before = sorted(path for path in place.rglob("*") if path.is_file())
    assert files_before

    control = parse_control((branch.data / "global/pg_control").read_bytes())
    size = control.segment_bytes
    start = Lsn(first_segment(source.data / "pg_wal", size))
    wal = read_wal(source.data / "pg_wal", start, end, size)
    scanner = WalScanner(size, 1, start)
    result = scanner.feed(wal)
    if switch:
        assert result.events[-1].kind is RecordKind.SWITCH
    noop = noop_record(
        result.last_record_end,
        previous=result.last_record,
        tli=1,
        major=major,
        system_identifier=control.system_identifier,
        segment_bytes=size,
    )
    assert bool(noop.start % size == 40) == switch
    patches = [*tablespace_patches(wal, start, size, find_tablespace_creates(wal, start, size)), noop.patch]
    archive = branch.make_directory(branch.directory / "archive")
    for segment in range(start, noop.end, size):
        piece = bytearray(wal[segment - start : segment - start + size])
        piece += bytes(size - len(piece))
        apply_patches(piece, Lsn(segment), patches)
        (archive / segment_name(1, segment, size)).write_bytes(piece)
    hand_over(branch, archive)

    (branch.data / "recovery.signal").touch()
    branch.configure(
        {
            "restore_command": f"'cp {archive}/%f %p'",
            "recovery_target_lsn": f"'{noop.start}'",
            "recovery_target_inclusive": "on",
            "recovery_target_action": "promote",
            "recovery_target_timeline": "1",
            "allow_in_place_tablespaces": "on",
            "hot_standby": "off",
            "log_min_messages": "log",
        }
    )
    try:
        branch.start()
        wait_until_promoted(branch)
        short = f"{noop.start >> 32:X}/{noop.start & 0xFFFFFFFF:X}"
        assert f'recovery stopping after WAL location (LSN) "{short}"' in branch.log.read_text()
        assert branch.value("select count(*) from precious") == "1000"
        oid = branch.value("select oid from pg_tablespace where spcname = 'fast'")
        inside = branch.data / "pg_tblspc" / oid
        assert inside.is_dir()
        assert not inside.is_symlink()
        branch.sql("drop table precious", "checkpoint", "drop tablespace fast")
    finally:
        branch.stop("immediate")
    assert sorted(path for path in place.rglob("*") if path.is_file()) == files_before
    source.start()
    assert source.value("select count(*) from precious") == "1000"
