"""One run of WAL, seen through its indexes: entries in order, and the record boundaries at and around any
LSN.

WAL itself is read only where the indexes do not say enough: one record header to learn its predecessor, or
the stretch from the nearest known record to an arbitrary LSN.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from timeline.catalog.index_reader import READS, Entry, IndexReader
from timeline.catalog.line import Piece, Run, incarnation_at
from timeline.catalog.parallel import in_order
from timeline.catalog.record_boundary import Boundary, find_boundary
from timeline.catalog.tail import TailChunk
from timeline.errors import TargetUnreachable
from timeline.format.log import BranchState
from timeline.lsn import Lsn
from timeline.pg.wal_patch import previous_record

_PAGE_BYTES = 8192
_RECORD_HEADER_BYTES = 24
_PAGE_HEADER_BYTES = 40
"""The longer kind."""
_FIRST_LOOK_BYTES = 64 << 10
_LONGEST_RECORD_BYTES = 64 << 20
"""How far the end of the record at an arbitrary LSN is looked for."""

ReadWal = Callable[[Run, int, int], Awaitable[bytes]]
"""The WAL [start, end) of a run, verified."""


class RunReader:
    """Reads the indexes of one run. All methods raise NotFound and DamagedStore."""

    def __init__(self, run: Run, state: BranchState, reader: IndexReader, read_wal: ReadWal) -> None:
        self.run = run
        self._state = state
        self._reader = reader
        self._read_wal = read_wal

    async def entries(self, piece: Piece) -> tuple[Entry, ...]:
        """The entries of one piece, in WAL order."""
        return await self._reader.entries(piece)

    async def scan(self, pieces: Iterable[Piece], *, ahead: int = READS) -> AsyncGenerator[Entry, None]:
        """The entries of the pieces, in the order given; ``ahead``: how many manifests of sealed ranges to
        fetch at once. Of chunks it is always READS."""
        for sealed, group in itertools.groupby(
            pieces, key=lambda piece: not isinstance(piece.source, TailChunk)
        ):
            reads = in_order(group, self._reader.entries, limit=ahead if sealed else READS)
            async with aclosing(reads) as results:
                async for entries in results:
                    for entry in entries:
                        yield entry

    async def head(self) -> Boundary:
        """The end of the run's complete records."""
        number = len(self.run.pieces) - 1
        entry = (await self._reader.entries(self.run.pieces[number]))[-1]
        if entry.cut:
            return await self.boundary_at(entry.end)
        return Boundary(max(entry.pending, self.run.start), await self._last_record_up_to(number, entry))

    async def before_record(self, start: Lsn) -> Boundary:
        """Just before a record that is known to start there: the record itself names the one before."""
        # Not a byte more than needed: the next one may be in another frame, and its manifest another request.
        length = _RECORD_HEADER_BYTES
        if start % _PAGE_BYTES == 0 or start % _PAGE_BYTES + length > _PAGE_BYTES:
            length += _PAGE_HEADER_BYTES
        wal = await self._read_wal(self.run, start, min(start + length, self.run.end))
        return Boundary(start, previous_record(wal, start, start))

    async def boundary_at(self, lsn: Lsn) -> Boundary:
        """The boundary that stands for any LSN in (run.start, head].

        Raises TargetUnreachable for one inside a record longer than _LONGEST_RECORD_BYTES.
        """
        number = self.run.position(lsn - 1)
        entries = await self._reader.entries(self.run.pieces[number])
        entry = next(entry for entry in entries if entry.start < lsn <= entry.end)
        known = _records_before(entry, lsn)
        for start, end in known:
            if end == lsn:
                return Boundary(lsn, start)
        # Begin where the nearest known record ends, or where it starts when the LSN falls into it.
        begin, before = max(
            ((end, start) if end < lsn else (start, Lsn(0)) for start, end in known), default=(0, 0)
        )
        if not known:
            return await self._boundary_from_entry(number, entry, lsn)
        found = await self._scan_wal(number, Lsn(begin), lsn)
        return found if found.last_record else replace(found, last_record=Lsn(before))

    async def _boundary_from_entry(self, number: int, entry: Entry, lsn: Lsn) -> Boundary:
        """As ``boundary_at``, with nothing known of the entry but what was unfinished where it begins."""
        earlier = await self._entry_before(number, entry)
        if earlier is None:
            return await self._scan_wal(number, entry.start, lsn)
        begin = max(earlier[1].pending, self.run.start)
        found = await self._scan_wal(number, begin, lsn)
        if found.last_record:
            return found
        return replace(found, last_record=await self._last_record_up_to(*earlier))

    async def _entry_before(self, number: int, entry: Entry) -> tuple[int, Entry] | None:
        starts = [one.start for one in await self._reader.entries(self.run.pieces[number])]
        place = starts.index(entry.start)
        if place == 0 and number == 0:
            return None
        number, place = (number, place - 1) if place else (number - 1, -1)
        return number, (await self._reader.entries(self.run.pieces[number]))[place]

    async def _last_record_up_to(self, number: int, entry: Entry) -> Lsn:
        """Start of the last record complete at the end of an entry of piece ``number``; 0 when none is."""
        for earlier_number in range(number, -1, -1):
            for earlier in reversed(await self._reader.entries(self.run.pieces[earlier_number])):
                if earlier.start > entry.start:
                    continue
                if earlier.cut:
                    return (await self.boundary_at(earlier.end)).last_record
                if earlier.last_record:
                    return earlier.last_record
        return Lsn(0)

    async def _scan_wal(self, number: int, begin: Lsn, lsn: Lsn) -> Boundary:
        incarnation = incarnation_at(self._state, begin)
        reach = _FIRST_LOOK_BYTES
        while True:
            end = min(lsn + reach, self.run.end)
            found = await asyncio.to_thread(
                find_boundary,
                await self._read_wal(self.run, begin, end),
                begin,
                lsn,
                segment_bytes=incarnation.segment_bytes,
                tli=self.run.pieces[number].tli,
                major=incarnation.major,
            )
            if found is not None:
                return found
            if end == self.run.end or reach >= _LONGEST_RECORD_BYTES:
                raise TargetUnreachable(
                    f"LSN {lsn} lies inside a record whose end is not in reach", hint="choose an earlier LSN"
                )
            reach *= 8


def _records_before(entry: Entry, lsn: Lsn) -> list[tuple[Lsn, Lsn]]:
    """(start, end) of records the entry tells of that start before an LSN, the nearest commit among them."""
    records = [(event.start, event.end) for event in entry.events]
    records.append((entry.last_record, entry.last_record_end))
    for row in np.flatnonzero(entry.commits["start"] < lsn)[-1:]:
        commit = entry.commits[row]
        records.append((Lsn(int(commit["start"])), Lsn(int(commit["end"]))))
    return [(start, end) for start, end in records if 0 < start < lsn]
