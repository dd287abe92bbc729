"""The archiver's report: one line that fits, never waited for, and the end of the one who reads it is noticed."""

from __future__ import annotations

import os
import resource

import pytest

from cli.archiver_report import KEY, StatusWriter, parse_report
from tests.support.manual_clock import ManualClock
from timeline.archive.slot import SlotStatus, WalStatus
from timeline.archive.status import ArchiverStatus, Phase
from timeline.errors import UsageError
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn

STATUS = ArchiverStatus(
    phase=Phase.CATCHING_UP,
    tli=3,
    durable=Lsn(16),
    source_end=Lsn(2**64 - 1),
    coverage=Coverage(3, Lsn(16), 42),
    uploads=7,
    behind_since=41,
    slot=SlotStatus("s" * 63, True, True, 1, Lsn(8), WalStatus.EXTENDED, 2**50, None),
    error='"é"' * 10_000,
    hint="h" * 10_000,
)


def test_a_line_is_whole_and_read_back() -> None:
    reader, writer = os.pipe()
    gone: list[int] = []
    report = StatusWriter(writer, ManualClock(), lambda: gone.append(1))
    report.write(STATUS, Lsn(20), repeat=False)
    report.write(STATUS, Lsn(20), repeat=False)
    line = os.read(reader, 1 << 20)
    assert line.count(b"\n") == 1
    assert len(line) <= resource.getpagesize()
    state = parse_report(line.decode())
    assert state is not None
    assert (state.phase, state.tli, state.durable, state.coverage_time) == ("catching up", 3, 20, 42)
    assert (state.uploads, state.behind_since) == (7, 41)
    assert state.slot is not None
    assert (state.slot.wal_status, state.slot.safe_bytes) == ("extended", 2**50)
    report.write(STATUS, Lsn(20), repeat=True)
    assert os.read(reader, 1 << 20).count(b"\n") == 1
    os.close(reader)
    report.write(STATUS, Lsn(20), repeat=True)
    report.write(STATUS, Lsn(20), repeat=True)
    assert gone == [1]
    assert report.gone
    report.close()
    os.close(writer)


def test_a_reader_that_does_not_read_is_not_waited_for() -> None:
    """P1 does not wait for a supervisor: archiving goes on, and the line that comes next is whole."""
    reader, writer = os.pipe()
    report = StatusWriter(writer, ManualClock(), lambda: None)
    for number in range(1000):
        report.write(STATUS, Lsn(number), repeat=True)
    held = b""
    while len(piece := os.read(reader, 1 << 20)) == 1 << 20:
        held += piece
    held += piece
    assert all(parse_report(line) for line in held.decode().splitlines())
    report.write(STATUS, Lsn(5000), repeat=True)
    state = parse_report(os.read(reader, 1 << 20).decode())
    assert state is not None
    assert state.durable == 5000
    report.close()
    os.close(reader)
    os.close(writer)


def test_other_lines_and_closed_descriptors() -> None:
    assert parse_report("stored up to 0/10") is None
    with pytest.raises(ValueError, match="expected"):
        parse_report(f'{{"{KEY}": 1}}')
    with pytest.raises(UsageError, match="not open"):
        StatusWriter(987, ManualClock(), lambda: None)
