"""WAL file names for every segment size (EDGE 23), history files and lineage (EDGE 16)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timeline.lsn import Lsn
from timeline.pg.errors import FormatError
from timeline.pg.segment import (
    HistoryRow,
    LineageSpan,
    check_segment_bytes,
    format_history,
    history_name,
    is_segment_name,
    lineage,
    parse_history,
    parse_history_name,
    parse_segment_name,
    segment_name,
    segment_start,
    tli_of,
)

MIB = 1 << 20
sizes = st.integers(20, 30).map(lambda power: 1 << power)


@given(st.integers(1, 2**32 - 1), st.integers(0, 2**64 - 1), sizes)
def test_names_round_trip(tli: int, lsn: int, segment_bytes: int) -> None:
    name = segment_name(tli, lsn, segment_bytes)
    assert is_segment_name(name)
    assert parse_segment_name(name, segment_bytes) == (tli, segment_start(lsn, segment_bytes))


@pytest.mark.parametrize(
    ("segment_mib", "lsn", "name"),
    [
        (16, 0x1000000, "000000010000000000000001"),
        (16, 0x1_00000000, "000000010000000100000000"),
        (16, 0x1_FF000123, "0000000100000001000000FF"),
        (1, 0x1_FFF00000, "000000010000000100000FFF"),
        (64, 0x1_FC000000, "00000001000000010000003F"),
        (1024, 0x1_C0000000, "000000010000000100000003"),
    ],
)
def test_names_are_those_of_postgres(segment_mib: int, lsn: int, name: str) -> None:
    assert segment_name(1, lsn, segment_mib * MIB) == name


@pytest.mark.parametrize(
    "name", ["000000010000000000000100", "00000001000000000000000g", "000000010000000000000001.partial", ""]
)
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        parse_segment_name(name, 16 * MIB)


@pytest.mark.parametrize("size", [0, MIB - 1, 3 * MIB, MIB // 2, 2048 * MIB, -MIB])
def test_impossible_segment_sizes_are_refused(size: int) -> None:
    with pytest.raises(FormatError):
        check_segment_bytes(size)


def test_history_names() -> None:
    assert history_name(0x1A) == "0000001A.history"
    assert parse_history_name("0000001A.history") == 0x1A
    assert parse_history_name("0000001A.history.tmp") is None


HISTORY = (
    "1\t0/3000060\tno recovery target specified\n\n# a remark\n3\t0/5000000\tbefore 2026-01-20 10:00:00+01\n"
)
ROWS = (
    HistoryRow(1, Lsn(0x3000060), "no recovery target specified"),
    HistoryRow(3, Lsn(0x5000000), "before 2026-01-20 10:00:00+01"),
)


def test_history_is_read_as_postgres_reads_it() -> None:
    assert parse_history(HISTORY) == ROWS
    assert parse_history(format_history(ROWS)) == ROWS
    assert parse_history("2\t1/AB\n") == (HistoryRow(2, Lsn(0x1000000AB), ""),)


@pytest.mark.parametrize(
    "text", ["x\t0/1\n", "1\n", "1\t01\n", "2\t0/1\ta\n1\t0/2\tb\n", "1\t0/2\ta\n2\t0/1\tb\n"]
)
def test_bad_history_names_the_line(text: str) -> None:
    with pytest.raises(FormatError, match=r"line: at \d"):
        parse_history(text)


def test_lineage_spans_follow_the_history() -> None:
    spans = lineage(7, ROWS)
    assert spans == (
        LineageSpan(1, Lsn(0), Lsn(0x3000060)),
        LineageSpan(3, Lsn(0x3000060), Lsn(0x5000000)),
        LineageSpan(7, Lsn(0x5000000), None),
    )
    assert [tli_of(lsn, spans) for lsn in (0, 0x300005F, 0x3000060, 0x4FFFFFF, 0x5000000, 2**63)] == [
        1,
        1,
        3,
        3,
        7,
        7,
    ]
    assert lineage(1, ()) == (LineageSpan(1, Lsn(0), None),)
    with pytest.raises(FormatError):
        lineage(3, ROWS)
