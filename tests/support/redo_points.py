"""Stock recovery to a moment, images of it, and replay that goes on from an image: without a store.

An image is a base backup that stock Postgres recovered to S, promoted and shut down; nobody ever connects to
it. A branch is a copy of it with a synthetic redo point.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.crossing_workload import OPEN_KINDS, SETTINGS, THE_END, OpenSpan, near_the_end_of_segments
from tests.support.postgres import PostgresServer, scratch
from tests.support.wal_workload import hand_over, read_wal
from tests.support.waldump import DumpedRecord, dump_wal
from timeline.lsn import Lsn
from timeline.pg.backup_label import parse_backup_label
from timeline.pg.control import CONTROL_FILE, Parameters, parse_control
from timeline.pg.redo_point import is_candidate, redo_point_control, redo_point_patches
from timeline.pg.segment import (
    LineageSpan,
    history_name,
    lineage,
    parse_history,
    segment_name,
    segment_start,
    tli_of,
)
from timeline.pg.wal import RecordKind, WalRecordEvent, WalScanner
from timeline.pg.wal_machine import PAGE_BYTES
from timeline.pg.wal_patch import apply_patches

COMPARED = (
    "base",
    "global",
    "pg_xact",
    "pg_multixact",
    "pg_commit_ts",
    "pg_twophase",
    "pg_logical",
    "pg_tblspc",
)
_NOT_COMPARED = ("pg_control", "pg_internal.init")
_WAL_LEVELS = ("minimal", "replica", "logical")


@dataclass(frozen=True, slots=True)
class SourceState:
    """What the source said of itself, as of some LSN."""

    parameters: Parameters
    full_page_writes: bool


@dataclass(frozen=True, slots=True)
class Recording:
    """A source whose work is over: a base backup from before it, and all the WAL since."""

    server: PostgresServer
    """Stopped."""
    place: Path
    """For images and branches."""
    backup: Path
    wal: Path
    """Its segments."""
    redo: Lsn
    """Where recovery of the backup begins."""
    consistent: Lsn
    """The backup's end: no image can be of a moment before it."""
    end: Lsn
    """T: the last record but the one that makes it a recovery target."""
    records: tuple[DumpedRecord, ...]
    """From ``redo`` on, as pg_waldump tells them."""
    events: tuple[WalRecordEvent, ...]
    segment_bytes: int
    spans: tuple[LineageSpan, ...]
    """The line of history, oldest tli first."""
    hints: bool
    """Whether changes of hints are logged, for checksums' sake or because of wal_log_hints."""
    open: tuple[OpenSpan, ...]
    """What was in progress, and where."""

    def candidates(self) -> dict[str, list[DumpedRecord]]:
        """Where a redo point can be, by what the record there does: resource manager and operation."""
        found: dict[str, list[DumpedRecord]] = {}
        for record in self.records:
            place = Lsn(record.start)
            if self.consistent < place < self.end and is_candidate(
                place,
                record.length,
                tli_start=self.span_of(place).begin,
                segment_bytes=self.segment_bytes,
            ):
                found.setdefault(record.kind, []).append(record)
        return found

    def points(self, spread: int, seed: int) -> list[tuple[str, Lsn]]:
        """One redo point at a record of every kind, one inside each kind of open transaction, and ``spread`` more evenly
        over the WAL."""
        chance = random.Random(seed)
        candidates = self.candidates()
        chosen = [(kind, chance.choice(records)) for kind, records in sorted(candidates.items())]
        everywhere = sorted(
            ((kind, record) for kind, records in candidates.items() for record in records),
            key=lambda pair: pair[1].start,
        )
        for kind in OPEN_KINDS if self.open else ():
            span = chance.choice([span for span in self.open if span.kind == kind])
            inside = [record for _, record in everywhere if span.begin <= record.start < span.end]
            chosen.append((f"in: {kind}", chance.choice(inside)))
        chosen += [everywhere[len(everywhere) * n // spread] for n in range(spread)]
        return [(kind, Lsn(record.start)) for kind, record in chosen]

    def state_at(self, lsn: Lsn) -> SourceState:
        """As of that LSN: what the backup's pg_control says and the records since."""
        control = parse_control((self.backup / CONTROL_FILE).read_bytes())
        parameters, full_page_writes = control.parameters, control.checkpoint.full_page_writes
        for event in self.events:
            if not self.redo <= event.start < lsn:
                continue
            values = dict(event.values)
            if event.kind is RecordKind.PARAMETER_CHANGE:
                flags = {name: bool(values[name]) for name in ("wal_log_hints", "track_commit_timestamp")}
                parameters = Parameters(**{**values, **flags})  # type: ignore[arg-type]
            if event.kind in (RecordKind.CHECKPOINT, RecordKind.FULL_PAGE_WRITES):
                full_page_writes = bool(values["full_page_writes"])
        return SourceState(parameters, full_page_writes)

    def span_of(self, lsn: Lsn) -> LineageSpan:
        """The tli that wrote the record at ``lsn``, and from where on."""
        tli = tli_of(lsn, self.spans)
        return next(span for span in self.spans if span.tli == tli)

    def segment(self, lsn: Lsn, target: Lsn) -> Path:
        """The file that recovery to ``target`` reads there: of the youngest tli up to it that has one."""
        youngest = self.span_of(target).tli
        tlis = [span.tli for span in reversed(self.spans) if span.tli <= youngest]
        names = (segment_name(tli, lsn, self.segment_bytes) for tli in tlis)
        return next(path for path in map(self.wal.joinpath, names) if path.exists())

    def last_before(self, lsn: Lsn) -> Lsn:
        """Start of the last record before the one at ``lsn``."""
        return Lsn(max(record.start for record in self.records if record.start < lsn))


@contextlib.contextmanager
def recorded(
    major: int,
    work: Callable[[PostgresServer], tuple[OpenSpan, ...]],
    *initdb: str,
    prepare: Callable[[PostgresServer], None],
) -> Iterator[Recording]:
    """What ``work`` did on a server of that version, backed up after ``prepare``; removed at the end.

    ``work`` leaves the server stopped, and a restore point named THE_END before the last segment.
    """
    place = scratch("tl-redo-")
    server = PostgresServer(major, place / "source")
    server.make_directory(server.directory)
    try:
        server.initdb(*initdb, settings=SETTINGS)
        near_the_end_of_segments(server)
        server.start()
        prepare(server)
        connection = ("-h", str(server.sockets), "-p", str(server.port), "-U", "postgres")
        backup = ("-D", str(place / "backup"), "-c", "fast", "-X", "none", "--no-manifest")
        server.tool("pg_basebackup", *backup, *connection)
        spans = work(server)
        yield _read_recording(server, place, spans)
    finally:
        server.stop("immediate")
        shutil.rmtree(place, ignore_errors=True)


def _read_recording(server: PostgresServer, place: Path, spans_open: tuple[OpenSpan, ...]) -> Recording:
    backup, wal = place / "backup", server.data / "pg_wal"
    label = parse_backup_label((backup / "backup_label").read_text())
    control = parse_control((server.data / CONTROL_FILE).read_bytes())
    segment_bytes = control.segment_bytes
    history = wal / history_name(control.tli)
    spans = lineage(control.tli, parse_history(history.read_text() if history.exists() else ""))
    end = segment_start(control.checkpoint_lsn, segment_bytes)
    records: list[DumpedRecord] = []
    events: list[WalRecordEvent] = []
    for span in spans:
        first, last = max(label.start, span.begin), end if span.end is None else span.end
        records += dump_wal(server, wal, first, last, tli=span.tli)
        begin = segment_start(first, segment_bytes)
        data = read_wal(wal, begin, last, segment_bytes, tli=span.tli)
        found = WalScanner(segment_bytes, span.tli, begin).feed(data).events
        events += [event for event in found if event.start >= first]
    consistent = next(
        event.end
        for event in events
        if event.kind is RecordKind.BACKUP_END and dict(event.values)["start_point"] == label.start
    )
    return Recording(
        server=server,
        place=place,
        backup=backup,
        wal=wal,
        redo=label.start,
        consistent=consistent,
        end=next(event.start for event in events if event.name == THE_END),
        records=tuple(records),
        events=tuple(events),
        segment_bytes=segment_bytes,
        spans=spans,
        hints=control.data_checksums or control.wal_log_hints,
        open=spans_open,
    )


def _recover(recording: Recording, data: Path, wal: Path, lsn: Lsn) -> None:
    """Stock recovery to just before the record at ``lsn``, promotion, a clean stop before anyone connects."""
    state = recording.state_at(lsn)
    server = PostgresServer(recording.server.major, data.parent)
    server.data, server.log = data, data.parent / f"{data.name}.log"
    server.sockets = data.parent / f"{data.name}-sock"
    server.configure(
        {name: str(value).lower() for name, value in dataclasses.asdict(state.parameters).items()}
        | {
            "wal_level": _WAL_LEVELS[state.parameters.wal_level],
            "full_page_writes": str(state.full_page_writes).lower(),
            "port": str(server.port),
            "unix_socket_directories": f"'{server.sockets}'",
            "listen_addresses": "''",
            "restore_command": f"'cp {wal}/%f %p'",
            "recovery_target_timeline": f"'{recording.span_of(lsn).tli}'",
            # The last record before, inclusive, as for a branch: there need not be one after it.
            "recovery_target_lsn": f"'{recording.last_before(lsn)}'",
            "recovery_target_inclusive": "on",
            "recovery_target_action": "promote",
            "hot_standby": "off",
            "archive_mode": "off",
            "max_logical_replication_workers": "0",
            "wal_keep_size": "0",
            "wal_recycle": "off",
            "wal_init_zero": "off",
            "log_min_messages": "warning",
        }
    )
    (data / "recovery.signal").touch()
    hand_over(server, data / "recovery.signal")
    try:
        server.start()
        _wait_until_promoted(server)
    except RuntimeError:
        raise AssertionError(server.log.read_text()[-4000:]) from None
    finally:
        server.stop()
    assert server.postmaster_pid() is None


def _wait_until_promoted(server: PostgresServer, seconds: float = 120) -> None:
    """Without hot standby pg_ctl takes the beginning of recovery for its end."""
    deadline = time.monotonic() + seconds
    pid_file = server.data / "postmaster.pid"
    while not (pid_file.exists() and pid_file.read_text().rstrip().endswith("ready")):
        if server.postmaster_pid() is None or time.monotonic() > deadline:
            raise RuntimeError("not promoted")
        time.sleep(0.02)


def recover_backup(recording: Recording, lsn: Lsn, data: Path) -> Path:
    """From the base backup to just before the record at ``lsn``: an image, and what branches are judged by."""
    _copy(recording, recording.backup, data)
    _recover(recording, data, recording.wal, lsn)
    return data


def recover_image(recording: Recording, image: Path, begin: Lsn, lsn: Lsn, data: Path) -> Path:
    """From an image of ``begin`` to just before the record at ``lsn``, over a synthetic redo point."""
    _copy(recording, image, data)
    for path in (data / "pg_wal").iterdir():
        if path.is_file():
            path.unlink()
    state, span = recording.state_at(begin), recording.span_of(begin)
    control = redo_point_control(
        (data / CONTROL_FILE).read_bytes(),
        begin,
        tli=span.tli,
        parameters=state.parameters,
        full_page_writes=state.full_page_writes,
    )
    (data / CONTROL_FILE).write_bytes(control)
    wal = data.parent / f"{data.name}-wal"
    wal.mkdir()
    first = segment_start(begin, recording.segment_bytes)
    patched = recording.segment(begin, lsn)
    for path in recording.wal.iterdir():
        if path.is_file() and (path.suffix == ".history" or path.name[8:] > patched.name[8:]):
            (wal / path.name).symlink_to(path)
    segment = bytearray(patched.read_bytes())
    apply_patches(segment, first, redo_point_patches(segment, first, control, tli_start=span.begin))
    # Nothing between the segment's first header and the checkpoint's page is looked at.
    page = parse_control(control).checkpoint_lsn // PAGE_BYTES * PAGE_BYTES - first
    segment[PAGE_BYTES:page] = bytes(max(0, page - PAGE_BYTES))
    (wal / patched.name).write_bytes(segment)
    _recover(recording, data, wal, lsn)
    shutil.rmtree(wal)
    return data


def _copy(recording: Recording, source: Path, data: Path) -> None:
    shutil.copytree(source, data, symlinks=True)
    data.chmod(0o700)
    hand_over(recording.server, data)


def differing_pages(expected: Path, found: Path) -> tuple[list[str], int]:
    """What differs between two stopped data directories, and how many pages were compared."""
    differing: list[str] = []
    compared = 0
    theirs, ours = _files(expected), _files(found)
    differing += [f"only expected: {path}" for path in sorted(theirs - ours)]
    differing += [f"not expected: {path}" for path in sorted(ours - theirs)]
    for path in sorted(theirs & ours):
        left, right = (expected / path).read_bytes(), (found / path).read_bytes()
        compared += max(1, -(-len(left) // PAGE_BYTES))
        if left == right:
            continue
        if len(left) != len(right):
            differing.append(f"{path}: {len(left)} bytes expected, {len(right)} found")
        for offset in range(0, min(len(left), len(right)), PAGE_BYTES):
            if left[offset : offset + PAGE_BYTES] != right[offset : offset + PAGE_BYTES]:
                differing.append(f"{path} page {offset // PAGE_BYTES}")
    return differing, compared


def _files(root: Path) -> set[str]:
    return {
        str(path.relative_to(root))
        for top in COMPARED
        for path in (root / top).rglob("*")
        if path.is_file() and path.name not in _NOT_COMPARED
    }
