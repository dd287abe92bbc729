"""What pg_waldump makes of WAL, as values to compare with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tests.support.postgres import PostgresServer
from timeline.lsn import Lsn

_LINE = re.compile(
    r"rmgr: (\S+)\s+len \(rec/tot\):\s*\d+/\s*(\d+), tx:\s*(\d+), lsn: (\S+), prev (\S+), desc: (.*)"
)
_BLOCK = re.compile(
    r"blkref #(\d+): rel (\d+)/(\d+)/(\d+)(?: fork (\w+))? blk (\d+)( FPW for WAL verification| FPW)?"
)
_ENDED = re.compile(r"(COMMIT|ABORT)(_PREPARED \d+:)? (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} UTC)")
_FORKS = {None: 0, "main": 0, "fsm": 1, "vm": 2, "init": 3}

RESOURCE_MANAGERS = (
    "XLOG", "Transaction", "Storage", "CLOG", "Database", "Tablespace", "MultiXact", "RelMap", "Standby", "Heap2",
    "Heap", "Btree", "Hash", "Gin", "Gist", "Sequence", "SPGist", "BRIN", "CommitTs", "ReplicationOrigin",
    "Generic", "LogicalMessage",
)  # fmt: skip
"""Names by id, src/include/access/rmgrlist.h."""


@dataclass(frozen=True, slots=True)
class DumpedBlock:
    """One block reference."""

    spc: int
    db: int
    rel: int
    fork: int
    block: int
    image: bool
    """A full-page image that replay restores."""


@dataclass(frozen=True, slots=True)
class DumpedRecord:
    """One line of pg_waldump."""

    rmgr: str
    length: int
    xid: int
    start: int
    previous: int
    text: str
    blocks: tuple[DumpedBlock, ...]

    @property
    def kind(self) -> str:
        """Resource manager and operation."""
        return f"{self.rmgr} {self.text.split(' ', 1)[0].rstrip(':')}"

    @property
    def transaction_end(self) -> tuple[int, int, int] | None:
        """Micros, top-level xid and kind (as COMMIT_DTYPE) of a record that ends a transaction."""
        match = _ENDED.match(self.text) if self.rmgr == "Transaction" else None
        if match is None:
            return None
        instant = datetime.strptime(match[3] + "+0000", "%Y-%m-%d %H:%M:%S.%f UTC%z")
        micros = int(instant.replace(microsecond=0).timestamp()) * 1_000_000 + instant.microsecond
        prepared = match[2]
        xid = int(prepared.split()[1].rstrip(":")) if prepared else self.xid
        return micros, xid, (match[1] == "ABORT") + 2 * bool(prepared)


def parse_line(line: str) -> DumpedRecord:
    """One line of output; raises ValueError for anything else."""
    match = _LINE.match(line)
    if match is None:
        raise ValueError(f"not a line of pg_waldump: {line!r}")
    blocks = tuple(
        DumpedBlock(int(b[2]), int(b[3]), int(b[4]), _FORKS[b[5]], int(b[6]), b[7] == " FPW")
        for b in _BLOCK.finditer(match[6])
    )
    return DumpedRecord(
        match[1],
        int(match[2]),
        int(match[3]),
        int(Lsn.parse(match[4])),
        int(Lsn.parse(match[5])),
        match[6],
        blocks,
    )


def dump_wal(
    server: PostgresServer, directory: Path, start: int, end: int, *, tli: int = 1, rmgr: str | None = None
) -> list[DumpedRecord]:
    """The records in [start, end) of the segments in ``directory``; fails where pg_waldump fails.

    ``rmgr``: tell only of that resource manager's (all are read and their checksums verified).
    """
    where = ["-p", str(directory), "-t", str(tli), "-s", str(Lsn(start)), "-e", str(Lsn(end))]
    result = server.tool("pg_waldump", *where, *(["-r", rmgr] if rmgr else []))
    return [parse_line(line) for line in result.stdout.splitlines() if line.startswith("rmgr:")]
