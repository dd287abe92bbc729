"""The WAL scanner against Postgres's own reader, over WAL of every resource manager (EDGE 23, 24, 26)."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.fix_postgres import MAJORS
from tests.support.postgres import PostgresServer, running_server
from tests.support.wal_workload import (
    SETTINGS,
    copy_server,
    first_segment,
    hand_over,
    read_wal,
    write_every_kind_of_wal,
)
from tests.support.waldump import RESOURCE_MANAGERS, DumpedRecord, dump_wal
from timeline.lsn import Lsn
from timeline.pg import wal_scan
from timeline.pg.control import parse_control
from timeline.pg.segment import segment_name
from timeline.pg.wal import RecordKind, ScanResult, WalRecordEvent, WalScanner, merge_results
from timeline.pg.wal_blocks import first_touches
from timeline.pg.wal_machine import Machine, as_bytes_array
from timeline.pg.wal_patch import (
    apply_patches,
    blank_tablespace_creates,
    find_tablespace_creates,
    previous_record,
    read_record,
    tablespace_patches,
)

pytestmark = pytest.mark.majors

MIB = 1 << 20
PAGE = 8192


@dataclass(frozen=True)
class RealWal:
    """A stopped server, its WAL and what pg_waldump says is in it."""

    server: PostgresServer
    segment_bytes: int
    start: Lsn
    data: bytes
    records: list[DumpedRecord]

    @property
    def directory(self) -> Path:
        return self.server.data / "pg_wal"


def capture(server: PostgresServer, *, tli: int = 1) -> RealWal:
    """Everything from the oldest segment to the end of the shutdown checkpoint."""
    control = parse_control((server.data / "global/pg_control").read_bytes())
    end = control.checkpoint_lsn + 120
    start = first_segment(server.data / "pg_wal", control.segment_bytes, tli=tli)
    data = read_wal(server.data / "pg_wal", start, end, control.segment_bytes, tli=tli)
    records = dump_wal(server, server.data / "pg_wal", start, end, tli=tli)
    return RealWal(server, control.segment_bytes, Lsn(start), data, records)


CASES = [(major, size) for major in MAJORS for size in ((1, 64) if major == 15 else (1, 16))]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"pg{case[0]}-{case[1]}MB")
def real(request: pytest.FixtureRequest) -> Iterator[RealWal]:
    major, size = request.param
    with running_server(major, initdb=[f"--wal-segsize={size}"], settings=SETTINGS) as server:
        write_every_kind_of_wal(server)
        server.stop()
        wal = capture(server)
        assert wal.segment_bytes == size * MIB
        yield wal


def scan(wal: RealWal, cuts: list[int] | None = None) -> ScanResult:
    scanner = WalScanner(wal.segment_bytes, 1, wal.start)
    edges = sorted([0, *(cuts or []), len(wal.data)])
    view = memoryview(wal.data)
    return merge_results([scanner.feed(view[a:b]) for a, b in pairwise(edges)])


def test_the_workload_is_worth_comparing(real: RealWal) -> None:
    seen = {record.rmgr for record in real.records}
    assert set(RESOURCE_MANAGERS) - seen <= {"CLOG", "CommitTs", "Generic"}
    ends = Counter(end[2] for record in real.records if (end := record.transaction_end))
    assert set(ends) == {0, 1, 2, 3}
    assert max(record.length for record in real.records) > 20 * MIB
    assert any("FPW for WAL verification" in record.text for record in real.records)
    assert len(real.records) > 20_000


def test_every_record(real: RealWal) -> None:
    """One record at a time: place, resource manager, xid and each block reference."""
    machine = Machine(real.segment_bytes, 1, real.records[0].start, real.server.major)
    array = as_bytes_array(real.data)
    position = real.records[0].start - real.start
    starts = [record.start for record in real.records[1:]] + [real.start + len(real.data)]
    for record, following in zip(real.records, starts, strict=True):
        assert machine.run(array[position : following - real.start], 0) == following - real.start - position
        position = following - real.start
        state = machine.state
        assert state[wal_scan.LAST_START] == record.start
        assert machine.take(wal_scan.RECORDS) == 1
        assert RESOURCE_MANAGERS[state[wal_scan.RMID]] == record.rmgr
        if record.transaction_end is None:
            assert state[wal_scan.XID] == record.xid
        count = machine.take(wal_scan.OUT_REFS)
        refs = [
            (spc, db, rel, flags & 0x0F, block, bool(flags & wal_scan.REF_IMAGE))
            for spc, db, rel, block, flags, _ in machine.refs[:count].tolist()
        ]
        assert refs == [(b.spc, b.db, b.rel, b.fork, b.block, b.image) for b in record.blocks]
        for slot in (wal_scan.OUT_COMMITS, wal_scan.OUT_EVENTS, wal_scan.OUT_BYTES):
            machine.take(slot)


def test_transaction_ends(real: RealWal) -> None:
    expected = [(r.start, *end) for r in real.records if (end := r.transaction_end)]
    commits = scan(real).commits
    assert [(*map(int, row),) for row in commits[["start", "time", "xid", "kind"]]] == expected


def test_touches(real: RealWal) -> None:
    touched: dict[tuple[int, int, int], list[int]] = {}
    for record in real.records:
        for block in record.blocks:
            row = touched.setdefault((block.spc, block.db, block.rel), [0, 0, 0, record.start, 0])
            row[0] += 1
            row[1] += block.image
            row[2] = max(row[2], block.block if block.fork == 0 else 0)
            row[4] = record.start
    expected = [(*relation, *row) for relation, row in sorted(touched.items())]
    result = scan(real)
    assert [tuple(map(int, row)) for row in result.touches] == expected
    assert result.records == len(real.records)
    assert result.last_record == real.records[-1].start
    assert result.last_record_end == result.pending == real.start + len(real.data)


def test_first_touches(real: RealWal) -> None:
    expected: dict[tuple[int, ...], bool] = {}
    initialised = set()
    for record in real.records:
        for block in record.blocks:
            key = (block.spc, block.db, block.rel, block.fork, block.block)
            if key not in expected and "+INIT" in record.text.split(" ")[0]:
                initialised.add(key)
            expected.setdefault(key, block.image)
    rows = first_touches(real.data, real.start, real.segment_bytes)
    names = ["spc", "db", "rel", "fork", "block"]
    found = {
        tuple(row): bool(flag)
        for row, flag in zip(rows[names].tolist(), rows["has_image_or_init"], strict=True)
    }
    assert list(found) == list(expected)
    assert all(found[key] for key, image in expected.items() if image)
    assert initialised
    assert sum(found[key] for key in initialised) > 0.5 * len(initialised)


def described(record: DumpedRecord) -> tuple[str, str | None, dict[str, int]] | None:
    """Kind, name and numbers of a record that is an event, from pg_waldump's words."""
    kind, _, rest = record.text.partition(" ")
    numbers: dict[str, int] = {}
    if (record.rmgr, kind) in {("XLOG", "CHECKPOINT_ONLINE"), ("XLOG", "CHECKPOINT_SHUTDOWN")}:
        match = re.match(
            r"redo (?P<redo>\S+); tli (?P<tli>\d+); prev tli (?P<prev_tli>\d+); fpw (?P<full_page_writes>\w+); "
            r"(?:wal_level (?P<wal_level>\w+); )?xid (?P<next_xid>\d+:\d+); oid (?P<next_oid>\d+); "
            r"multi (?P<next_multi>\d+); offset (?P<next_multi_offset>\d+); oldest xid (?P<oldest_xid>\d+) in DB "
            r"(?P<oldest_xid_db>\d+); oldest multi (?P<oldest_multi>\d+) in DB (?P<oldest_multi_db>\d+); "
            r"oldest/newest commit timestamp xid: (?P<oldest_commit_ts_xid>\d+)/(?P<newest_commit_ts_xid>\d+); "
            r"oldest running xid (?P<oldest_active_xid>\d+); (?P<shutdown>\w+)",
            rest,
        )
        assert match, record.text
        words = {"true": 1, "false": 0, "replica": 1, "logical": 2, "shutdown": 1, "online": 0}
        for name, value in match.groupdict().items():
            if name == "redo":
                numbers[name] = int(Lsn.parse(value))
            elif name == "next_xid":
                epoch, xid = value.split(":")
                numbers[name] = int(epoch) << 32 | int(xid)
            elif value is not None:
                numbers[name] = words.get(value, -1) if value in words else int(value)
        return "CHECKPOINT", None, numbers
    if record.rmgr == "XLOG" and kind == "PARAMETER_CHANGE":
        renamed = {
            "max_prepared_xacts": "max_prepared_transactions",
            "max_locks_per_xact": "max_locks_per_transaction",
        }
        for name, value in re.findall(r"(\w+)=(\w+)", rest):
            words = {"on": 1, "off": 0, "minimal": 0, "replica": 1, "logical": 2}
            numbers[renamed.get(name, name)] = words[value] if value in words else int(value)
        return kind, None, numbers
    if record.rmgr == "XLOG" and kind == "RESTORE_POINT":
        return kind, rest, {}
    if record.rmgr == "XLOG" and kind == "SWITCH":
        return kind, None, {}
    if record.rmgr == "XLOG" and kind == "BACKUP_END":
        return kind, None, {"start_point": int(Lsn.parse(rest))}
    if record.rmgr == "XLOG" and kind == "FPW_CHANGE":
        return "FULL_PAGE_WRITES", None, {"full_page_writes": int(rest == "true")}
    if record.rmgr == "Tablespace":
        oid, _, path = rest.partition(" ")
        return f"TABLESPACE_{kind}", path.strip('"') or None, {"oid": int(oid)}
    if record.rmgr == "Database" and kind in ("CREATE_FILE_COPY", "CREATE"):
        match = re.match(r"copy dir (\d+)/(\d+) to (\d+)/(\d+)", rest)
        assert match, record.text
        source_tablespace, source_db, tablespace, db = map(int, match.groups())
        numbers = {
            "db": db,
            "tablespace": tablespace,
            "source_db": source_db,
            "source_tablespace": source_tablespace,
        }
        return "DATABASE_CREATE_FILE_COPY", None, numbers
    return None


def summary(event: WalRecordEvent) -> tuple[str, str | None, dict[str, int]]:
    return event.kind.name, event.name, dict(event.values)


def test_events(real: RealWal) -> None:
    expected = [(r.start, told) for r in real.records if (told := described(r))]
    events = scan(real).events
    assert [(event.start, summary(event)) for event in events] == expected
    kinds = Counter(event.kind for event in events)
    assert set(kinds) >= set(RecordKind) - {RecordKind.END_OF_RECOVERY, RecordKind.OVERWRITE_CONTRECORD}
    ends = {event.end % real.segment_bytes for event in events if event.kind is RecordKind.SWITCH}
    assert ends == {0}
    (point, _) = [event for event in events if event.kind is RecordKind.RESTORE_POINT]
    commits = scan(real).commits
    nearby = commits["time"][np.searchsorted(commits["start"], point.start) - 1]
    assert point.time is not None
    assert 0 <= point.time - nearby < 60_000_000


@pytest.mark.parametrize("seed", range(3))
def test_any_split_gives_the_same_result(real: RealWal, seed: int) -> None:
    """EDGE 13."""
    rng = random.Random(seed)
    whole = scan(real)
    step = [131072, 4096 + 24, 1 << 22][seed]
    cuts = list(range(0, len(real.data), step)) + [rng.randrange(len(real.data)) for _ in range(300)]
    near = [record.start - real.start + rng.randrange(60) for record in rng.sample(real.records, 300)]
    split = scan(real, cuts + [cut for cut in near if cut < len(real.data)])
    assert np.array_equal(split.commits, whole.commits)
    assert np.array_equal(split.touches, whole.touches)
    assert split.events == whole.events
    assert (split.records, split.pending, split.last_record, split.last_record_end) == (
        whole.records,
        whole.pending,
        whole.last_record,
        whole.last_record_end,
    )


def test_a_scan_may_begin_at_any_page(real: RealWal) -> None:
    rng = random.Random(1)
    for _ in range(10):
        page = rng.randrange(len(real.data) // PAGE) * PAGE
        scanner = WalScanner(real.segment_bytes, 1, Lsn(real.start + page))
        expected = sum(record.start >= real.start + page for record in real.records)
        assert scanner.feed(real.data[page:]).records == expected


def test_records_are_read_with_their_checksums(real: RealWal) -> None:
    rng = random.Random(2)
    for record in [*rng.sample(real.records, 500), *sorted(real.records, key=lambda r: -r.length)[:3]]:
        raw = read_record(real.data, real.start, Lsn(record.start), real.segment_bytes)
        assert len(raw) == record.length
        assert previous_record(real.data, real.start, Lsn(record.start)) == record.previous


def test_tablespace_paths_are_blanked(real: RealWal, tmp_path_factory: pytest.TempPathFactory) -> None:
    """EDGE 49, as pg_waldump sees it, checksums included."""
    creates = [r for r in real.records if r.rmgr == "Tablespace" and r.text.startswith("CREATE")]
    assert len(creates) == 20
    crossing = [r for r in creates if r.start // PAGE != (r.start + r.length - 1) // PAGE]
    assert crossing
    found = find_tablespace_creates(real.data, real.start, real.segment_bytes)
    assert list(found) == [record.start for record in creates]
    wal = bytearray(real.data)
    blank_tablespace_creates(wal, real.start, real.segment_bytes, found)

    private = real.server.make_directory(real.server.directory / "private")
    patches = tablespace_patches(real.data, real.start, real.segment_bytes, found)
    for offset in range(0, len(real.data), real.segment_bytes):
        start = Lsn(real.start + offset)
        segment = bytearray(real.data[offset : offset + real.segment_bytes])
        apply_patches(segment, start, patches)
        assert segment == wal[offset : offset + real.segment_bytes]
        path = private / segment_name(1, start, real.segment_bytes)
        path.write_bytes(segment + bytes(real.segment_bytes - len(segment)))
    hand_over(real.server, private)
    after = dump_wal(real.server, private, real.start, real.start + len(real.data), rmgr="Tablespace")
    before = [record for record in real.records if record.rmgr == "Tablespace"]
    for old, new in zip(before, after, strict=True):
        if old in creates:
            assert (new.start, new.length, new.xid) == (old.start, old.length, old.xid)
            assert re.fullmatch(r'CREATE \d+ ""', new.text)
        else:
            assert old == new
    changed = np.flatnonzero(np.frombuffer(real.data, np.uint8) != np.frombuffer(wal, np.uint8)) + real.start
    for old in creates:
        last = old.start + old.length + 2 * 40
        changed = changed[(changed < old.start) | (changed >= last)]
    assert not len(changed)


# --- the unusual ends and beginnings of WAL ------------------------------------------------------


def crash(server: PostgresServer) -> None:
    """End the postmaster and every process of its at once, as a power cut does."""
    postmaster = server.postmaster_pid()
    assert postmaster is not None
    listed = subprocess.run(["pgrep", "-P", str(postmaster)], capture_output=True, text=True, check=True)
    for pid in [postmaster, *map(int, listed.stdout.split())]:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in listed.stdout.split()) and time.monotonic() < deadline:
        time.sleep(0.02)
    (server.data / "postmaster.pid").unlink()


@pytest.mark.parametrize("major", MAJORS)
def test_overwritten_contrecord_after_a_crash(major: int) -> None:
    """EDGE 24: a record whose end was never flushed is replaced behind its first pages."""
    settings = {
        **SETTINGS,
        "wal_buffers": "64kB",
        "wal_writer_delay": "10s",
        "synchronous_commit": "off",
        "restart_after_crash": "off",
    }
    with running_server(major, initdb=["--wal-segsize=1"], settings=settings) as server:
        for round_ in range(2):
            server.sql(f"create table t{round_}(a int)", "select pg_switch_wal()")
            with server.connect() as conn:
                conn.execute("select pg_logical_emit_message(false, 'cut', repeat('c', 3000000))")
                crash(server)
            server.start()
            server.sql(f"insert into t{round_} select generate_series(1, 100)")
        server.stop()
        real = capture(server)
        events = [e for e in scan(real).events if e.kind is RecordKind.OVERWRITE_CONTRECORD]
        told = [r for r in real.records if r.text.startswith("OVERWRITE_CONTRECORD")]
        assert len(told) == 2
        assert [event.start for event in events] == [record.start for record in told]
        for event, record in zip(events, told, strict=True):
            lsn = re.search(r"lsn (\S+);", record.text)
            assert lsn
            assert dict(event.values) == {"overwritten": int(Lsn.parse(lsn[1]))}
        test_touches(real)
        test_transaction_ends(real)
        for seed in range(3):
            test_any_split_gives_the_same_result(real, seed)


@pytest.mark.parametrize("major", MAJORS)
def test_a_new_tli(major: int, make_postgres: Callable[..., PostgresServer]) -> None:
    """EDGE 17, 21: the first segment of a promoted standby, from its beginning and from the fork."""
    primary = make_postgres(major, settings={"wal_keep_size": "1GB"})
    primary.sql("create table t(a int)", "insert into t select generate_series(1, 5000)")
    primary.stop()
    standby = copy_server(primary, "standby")
    (standby.data / "standby.signal").touch()
    try:
        standby.start()
        standby.tool("pg_ctl", "-D", str(standby.data), "-w", "promote")
        standby.sql("insert into t select generate_series(1, 5000)")
        standby.stop()
        control = parse_control((standby.data / "global/pg_control").read_bytes())
        assert control.tli == 2
        end = control.checkpoint_lsn + 120
        fork = parse_control((primary.data / "global/pg_control").read_bytes()).checkpoint_lsn + 120
        directory = standby.data / "pg_wal"
        start = Lsn(first_segment(directory, control.segment_bytes, tli=2))
        data = read_wal(directory, start, end, control.segment_bytes, tli=2)
        records = dump_wal(standby, directory, fork, end, tli=2)
        scanner = WalScanner(control.segment_bytes, 2, start)
        result = scanner.feed(data)
        assert scanner.system_identifier == control.system_identifier
        assert scanner.major == major
        since = WalScanner(control.segment_bytes, 2, Lsn(fork), major=major).feed(data[fork - start :])
        assert since.records == len(records)
        (event,) = [e for e in result.events if e.kind is RecordKind.END_OF_RECOVERY]
        assert event.start == records[0].start
        values = dict(event.values)
        assert (values["tli"], values["prev_tli"]) == (2, 1)
        assert (values.get("wal_level") == 1) == (major >= 17)
        assert [e for e in since.events if e.kind is RecordKind.END_OF_RECOVERY] == [event]
        assert result.last_record == since.last_record == records[-1].start
    finally:
        standby.stop("immediate")
