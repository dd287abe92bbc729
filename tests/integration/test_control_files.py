"""pg_control and data pages of real servers, against pg_controldata and pg_checksums."""

from __future__ import annotations

import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.fix_postgres import MAJORS
from tests.support.postgres import PostgresServer, running_server
from timeline.lsn import Lsn
from timeline.pg.backup_label import parse_backup_label, parse_tablespace_map
from timeline.pg.control import ClusterState, ControlFile, parse_control
from timeline.pg.page import PAGE_BYTES, bad_pages, page_lsns

pytestmark = pytest.mark.majors

_STATES = {
    "shut down": ClusterState.SHUT_DOWN,
    "in production": ClusterState.IN_PRODUCTION,
    "in crash recovery": ClusterState.CRASH_RECOVERY,
}


def read(server: PostgresServer) -> ControlFile:
    return parse_control((server.data / "global/pg_control").read_bytes())


def told(server: PostgresServer) -> dict[str, str]:
    lines = server.tool("pg_controldata", "-D", str(server.data)).stdout.splitlines()
    pairs = (line.split(":", 1) for line in lines)
    return {name.strip(): value.strip() for name, value in pairs}


def assert_agrees(control: ControlFile, text: dict[str, str]) -> None:
    """Every line of pg_controldata that has a counterpart."""

    def moment(name: str) -> int:
        instant = datetime.strptime(text[name], "%a %b %d %H:%M:%S %Y").replace(tzinfo=UTC)
        return int(instant.timestamp()) * 1_000_000

    def lsn(name: str) -> Lsn:
        return Lsn.parse(text[name])

    def yes(name: str) -> bool:
        return {"on": True, "yes": True, "off": False, "no": False}[text[name]]

    point = control.checkpoint
    epoch, xid = text["Latest checkpoint's NextXID"].split(":")
    assert str(control.control_version) == text["pg_control version number"]
    assert str(control.catalog_version) == text["Catalog version number"]
    assert str(control.system_identifier) == text["Database system identifier"]
    assert control.state is _STATES[text["Database cluster state"]]
    assert control.time == moment("pg_control last modified")
    assert control.checkpoint_lsn == lsn("Latest checkpoint location")
    assert control.redo == point.redo == lsn("Latest checkpoint's REDO location")
    assert str(control.tli) == text["Latest checkpoint's TimeLineID"]
    assert str(point.prev_tli) == text["Latest checkpoint's PrevTimeLineID"]
    assert point.full_page_writes == yes("Latest checkpoint's full_page_writes")
    assert point.next_xid == int(epoch) << 32 | int(xid)
    for name, value in {
        "Latest checkpoint's NextOID": point.next_oid,
        "Latest checkpoint's NextMultiXactId": point.next_multi,
        "Latest checkpoint's NextMultiOffset": point.next_multi_offset,
        "Latest checkpoint's oldestXID": point.oldest_xid,
        "Latest checkpoint's oldestXID's DB": point.oldest_xid_db,
        "Latest checkpoint's oldestActiveXID": point.oldest_active_xid,
        "Latest checkpoint's oldestMultiXid": point.oldest_multi,
        "Latest checkpoint's oldestMulti's DB": point.oldest_multi_db,
        "Latest checkpoint's oldestCommitTsXid": point.oldest_commit_ts_xid,
        "Latest checkpoint's newestCommitTsXid": point.newest_commit_ts_xid,
        "Min recovery ending loc's timeline": control.min_recovery_point_tli,
        "max_connections setting": control.max_connections,
        "max_worker_processes setting": control.max_worker_processes,
        "max_wal_senders setting": control.max_wal_senders,
        "max_prepared_xacts setting": control.max_prepared_transactions,
        "max_locks_per_xact setting": control.max_locks_per_transaction,
        "Maximum data alignment": control.max_align,
        "Database block size": control.block_bytes,
        "Blocks per segment of large relation": control.relation_segment_blocks,
        "WAL block size": control.wal_block_bytes,
        "Bytes per WAL segment": control.segment_bytes,
        "Maximum length of identifiers": control.name_bytes,
        "Maximum columns in an index": control.index_max_keys,
        "Maximum size of a TOAST chunk": control.toast_chunk_bytes,
        "Size of a large-object chunk": control.large_object_chunk_bytes,
        "Data page checksum version": control.data_checksum_version,
    }.items():
        assert str(value) == text[name], name
    assert point.time == moment("Time of latest checkpoint")
    assert control.unlogged_lsn == lsn("Fake LSN counter for unlogged rels")
    assert control.min_recovery_point == lsn("Minimum recovery ending location")
    assert control.backup_start_point == lsn("Backup start location")
    assert control.backup_end_point == lsn("Backup end location")
    assert control.backup_end_required == yes("End-of-backup record required")
    assert ("minimal", "replica", "logical")[control.wal_level] == text["wal_level setting"]
    assert control.wal_log_hints == yes("wal_log_hints setting")
    assert control.track_commit_timestamp == yes("track_commit_timestamp setting")
    assert control.float8_by_value == (text["Float8 argument passing"] == "by value")
    assert control.data_checksums == (text["Data page checksum version"] != "0")
    signedness = text.get("Default char data signedness")
    assert control.default_char_signed == (None if signedness is None else signedness == "signed")


@pytest.mark.parametrize("major", MAJORS)
def test_control_file_and_pages(major: int) -> None:
    settings = {
        "wal_level": "logical",
        "wal_log_hints": "on",
        "track_commit_timestamp": "on",
        "max_connections": "31",
        "max_worker_processes": "12",
        "max_wal_senders": "13",
        "max_prepared_transactions": "14",
        "max_locks_per_transaction": "65",
        "max_replication_slots": "4",
    }
    with running_server(major, initdb=["--data-checksums", "--wal-segsize=4"], settings=settings) as server:
        server.sql(
            "create table t(a int, b text)",
            "insert into t select g, md5(g::text) from generate_series(1, 20000) g",
            "create index on t(a)",
            "checkpoint",
        )
        assert_agrees(read(server), told(server))
        assert read(server).major == major
        path = server.data / server.value("select pg_relation_filepath('t')")
        server.stop()
        control = read(server)
        assert_agrees(control, told(server))
        assert control.state is ClusterState.SHUT_DOWN
        assert control.segment_bytes == 4 << 20

        data = bytearray(path.read_bytes())
        assert len(data) > 100 * PAGE_BYTES
        assert bad_pages(data, 0).tolist() == []
        assert page_lsns(data).max() <= control.checkpoint_lsn
        data[7 * PAGE_BYTES + 4000] ^= 1
        assert bad_pages(data, 0).tolist() == [7]
        path.write_bytes(data)
        checked = server.tool("pg_checksums", "--check", "-D", str(server.data), check=False)
        assert re.search(r"failed in file .* block 7:", checked.stderr)
        relation_files = [
            file
            for file in (server.data / "base").rglob("*")
            if re.fullmatch(r"\d+(_\w+)?", file.name) and file.is_file()
        ]
        whole = [file for file in relation_files if file != path and file.stat().st_size]
        assert all(not bad_pages(file.read_bytes(), 0).size for file in whole)


@pytest.mark.parametrize("major", MAJORS)
def test_backup_label_of_a_real_backup(major: int) -> None:
    with running_server(major) as server:
        place = server.make_directory(server.directory / "a b\\c")
        server.sql(f"create tablespace space location '{place}'")
        target = server.directory / "backup"
        command = [
            "-D",
            str(target),
            "-Ft",
            "-X",
            "none",
            "-c",
            "fast",
            "-l",
            "my label",
            "-d",
            server.conninfo,
        ]
        server.tool("pg_basebackup", *command)
        label = parse_backup_label(tar_member(target / "base.tar", "backup_label"))
        assert (label.label, label.tli, label.method, label.from_standby) == (
            "my label",
            1,
            "streamed",
            False,
        )
        assert label.start <= label.checkpoint
        assert label.start_segment == server.value(f"select pg_walfile_name('{label.start}'::pg_lsn)")
        (link,) = parse_tablespace_map(tar_member(target / "base.tar", "tablespace_map"))
        assert link.path == str(place)
        assert str(link.oid) == server.value("select oid from pg_tablespace where spcname = 'space'")


def tar_member(archive: Path, name: str) -> str:
    return subprocess.run(
        ["tar", "-xOf", str(archive), name], capture_output=True, text=True, check=True
    ).stdout
