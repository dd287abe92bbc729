"""WAL segment and timeline history files: their names, and the lineage a history file tells.

Sources: src/include/access/xlog_internal.h (names), src/backend/access/transam/timeline.c (history files).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from timeline.lsn import Lsn
from timeline.pg.errors import FormatError

MIN_SEGMENT_BYTES = 1 << 20
MAX_SEGMENT_BYTES = 1 << 30

_SEGMENT = re.compile(r"[0-9A-F]{24}")
_HISTORY = re.compile(r"([0-9A-F]{8})\.history")
_ROW = re.compile(r"\s*(\d+)\s+([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})(?:\s+(.*))?")


def check_segment_bytes(segment_bytes: int) -> int:
    """The size, if WAL segments may have it (power of two, 1 MiB to 1 GiB); else raises FormatError."""
    power_of_two = segment_bytes > 0 and segment_bytes & (segment_bytes - 1) == 0
    if not power_of_two or not MIN_SEGMENT_BYTES <= segment_bytes <= MAX_SEGMENT_BYTES:
        raise FormatError("WAL segment size", segment_bytes, "expected a power of two from 1 MiB to 1 GiB")
    return segment_bytes


def segment_start(lsn: int, segment_bytes: int) -> Lsn:
    """Where the segment that holds the byte at ``lsn`` begins."""
    return Lsn(lsn - lsn % segment_bytes)


def segment_name(tli: int, lsn: int, segment_bytes: int) -> str:
    """File name of the segment of ``tli`` that holds the byte at ``lsn``."""
    per_id = (1 << 32) // segment_bytes
    number = lsn // segment_bytes
    return f"{tli:08X}{number // per_id:08X}{number % per_id:08X}"


def is_segment_name(name: str) -> bool:
    """Whether the name has the form of a complete segment's (no ``.partial``, no ``.backup``)."""
    return _SEGMENT.fullmatch(name) is not None


def parse_segment_name(name: str, segment_bytes: int) -> tuple[int, Lsn]:
    """tli and start LSN of a segment file; raises FormatError for names that segment size rules out."""
    if not is_segment_name(name):
        raise FormatError(name, 0, "expected a WAL segment name of 24 upper-case hex digits")
    tli, high, low = int(name[:8], 16), int(name[8:16], 16), int(name[16:], 16)
    per_id = (1 << 32) // segment_bytes
    if low >= per_id:
        raise FormatError(name, 16, f"expected a segment number below {per_id:X} for this segment size")
    return tli, Lsn((high * per_id + low) * segment_bytes)


def history_name(tli: int) -> str:
    """File name of the history of ``tli`` (tli 1 has none)."""
    return f"{tli:08X}.history"


def parse_history_name(name: str) -> int | None:
    """The tli whose history file this is, ``None`` for any other name."""
    match = _HISTORY.fullmatch(name)
    return int(match[1], 16) if match else None


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """One ancestor in a history file."""

    tli: int
    end: Lsn
    """Where the ancestor was left: its WAL counts up to, and not at, this LSN."""
    reason: str
    """Postgres's remark on why."""


def parse_history(text: str) -> tuple[HistoryRow, ...]:
    """Rows of a history file, oldest ancestor first; raises FormatError naming the line.

    Comments and empty lines are skipped, as Postgres does. The tli the file belongs to is not in it.
    """
    rows: list[HistoryRow] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _ROW.match(line)
        if match is None:
            raise FormatError("history file, line", number, "expected: tli, tab, switch LSN, tab, reason")
        row = HistoryRow(
            int(match[1]), Lsn(int(match[2], 16) << 32 | int(match[3], 16)), (match[4] or "").strip()
        )
        if rows and row.tli <= rows[-1].tli:
            raise FormatError("history file, line", number, f"expected a tli above {rows[-1].tli}")
        if rows and row.end < rows[-1].end:
            raise FormatError("history file, line", number, f"expected an LSN not before {rows[-1].end}")
        rows.append(row)
    return tuple(rows)


def format_history(rows: Sequence[HistoryRow]) -> str:
    """A history file that Postgres reads back as these rows."""
    return "".join(f"{row.tli}\t{row.end >> 32:X}/{row.end & 0xFFFFFFFF:X}\t{row.reason}\n" for row in rows)


@dataclass(frozen=True, slots=True)
class LineageSpan:
    """The part of a line of history that one tli wrote."""

    tli: int
    begin: Lsn
    """First LSN of this tli on the line; 0 for the oldest."""
    end: Lsn | None
    """Just after its last LSN on the line; ``None`` while it is the youngest."""


def lineage(tli: int, rows: Sequence[HistoryRow]) -> tuple[LineageSpan, ...]:
    """The line of history that ends in ``tli``, oldest span first; FormatError unless rows lead there."""
    if rows and rows[-1].tli >= tli:
        raise FormatError(history_name(tli), len(rows), f"expected only ancestors below tli {tli}")
    begins = [Lsn(0), *(row.end for row in rows)]
    tlis = [*(row.tli for row in rows), tli]
    ends: list[Lsn | None] = [*(row.end for row in rows), None]
    return tuple(LineageSpan(t, b, e) for t, b, e in zip(tlis, begins, ends, strict=True))


def tli_of(lsn: int, spans: Sequence[LineageSpan]) -> int:
    """Which tli of the line wrote the byte at ``lsn`` (the child at the fork itself, as Postgres decides)."""
    for span in spans:
        if span.end is None or lsn < span.end:
            return span.tli
    return spans[-1].tli
