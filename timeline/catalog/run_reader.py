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

from timeline.catalog.index_reader import READS, Entry, IndexReader, is_long
from timeline.catalog.line import Piece, Run, incarnation_at
from timeline.catalog.parallel import in_order
from timeline.catalog.record_boundary import Boundary, find_boundary
from timeline.catalog.tail import TailChunk
from timeline.errors import TargetUnreachable
from timeline.format.branch_state import BranchState
from timeline.lsn import Lsn
from timeline.pg.wal_machine import LONG_HEADER_BYTES, PAGE_BYTES, RECORD_HEADER_BYTES
from timeline.pg.wal_patch import previous_record

_FIRST_LOOK_BYTES = 64 << 10
_LONGEST_RECORD_BYTES = 64 << 20
"""How far the end of the record at an arbitrary LSN is looked for."""

ReadWal = Callable[[Run, int, int], Awaitable[bytes]]
"""The WAL [start, end) of a run, verified."""

_GROUPS_AHEAD = 4
"""Groups of rows of a merged range fetched at once while scanning: each is as long as four manifests."""
_CHUNK, _SHORT, _LONG = range(3)


def _kind(piece: Piece) -> int:
    if isinstance(piece.source, TailChunk):
        return _CHUNK
    return _LONG if is_long(piece.source) else _SHORT


def _any(piece: Piece) -> bool:
    return True


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

    async def parts(self, piece: Piece) -> tuple[Piece, ...]:
        """A piece, in as many as its manifest has groups of rows: what is asked of one costs no more for a
        merged range than for any other."""
        return await self._reader.parts(piece)

    async def scan(
        self, pieces: Iterable[Piece], wanted: Callable[[Piece], bool] = _any, *, ahead: int = READS
    ) -> AsyncGenerator[Entry, None]:
        """The entries of the pieces, in the order given, but of those that are not ``wanted``; ``ahead``: how
        many manifests of sealed ranges to fetch at once. Of chunks it is always READS."""
        for kind, group in itertools.groupby(filter(wanted, pieces), key=_kind):
            if kind == _LONG:
                for piece in group:
                    parts = filter(wanted, await self.parts(piece))
                    async with aclosing(self._entries_of(parts, min(ahead, _GROUPS_AHEAD))) as entries:
                        async for entry in entries:
                            yield entry
            else:
                limit = READS if kind == _CHUNK else ahead
                async with aclosing(self._entries_of(group, limit)) as entries:
                    async for entry in entries:
                        yield entry

    async def _entries_of(self, pieces: Iterable[Piece], limit: int) -> AsyncGenerator[Entry, None]:
        async with aclosing(in_order(pieces, self._reader.entries, limit=limit)) as results:
            async for entries in results:
                for entry in entries:
                    yield entry

    async def head(self) -> Boundary:
        """The end of the run's complete records."""
        entry = (await self._reader.entries(await self._piece_at(self.run.end - 1)))[-1]
        if entry.cut:
            return await self.boundary_at(entry.end)
        return Boundary(max(entry.pending, self.run.start), await self._last_record_up_to(entry))

    async def before_record(self, start: Lsn) -> Boundary:
        """Just before a record that is known to start there: the record itself names the one before."""
        # Not a byte more than needed: the next one may be in another frame, and its manifest another request.
        length = RECORD_HEADER_BYTES
        if start % PAGE_BYTES == 0 or start % PAGE_BYTES + length > PAGE_BYTES:
            length += LONG_HEADER_BYTES
        wal = await self._read_wal(self.run, start, min(start + length, self.run.end))
        return Boundary(start, previous_record(wal, start, start))

    async def boundary_at(self, lsn: Lsn) -> Boundary:
        """The boundary that stands for any LSN in (run.start, head].

        Raises TargetUnreachable for one inside a record longer than _LONGEST_RECORD_BYTES.
        """
        piece = await self._piece_at(lsn - 1)
        entries = await self._reader.entries(piece)
        entry = next(entry for entry in entries if entry.start < lsn <= entry.end)
        # A record that began before the run is not wholly there.
        known = [(start, end) for start, end in _records_before(entry, lsn) if start >= self.run.start]
        for start, end in known:
            if end == lsn:
                return Boundary(lsn, start)
        # Begin where the nearest known record ends, or where it starts when the LSN falls into it.
        begin, before = max(
            ((end, start) if end < lsn else (start, Lsn(0)) for start, end in known), default=(0, 0)
        )
        if not known:
            return await self._boundary_from_entry(entry, lsn)
        found = await self._scan_wal(entry.tli, Lsn(begin), lsn)
        return found if found.last_record else replace(found, last_record=Lsn(before))

    async def _boundary_from_entry(self, entry: Entry, lsn: Lsn) -> Boundary:
        """As ``boundary_at``, with nothing known of the entry but what was unfinished where it begins."""
        earlier = await self._entry_before(entry)
        if earlier is None:
            return await self._scan_wal(entry.tli, self._first_page(lsn), lsn)
        if earlier.pending < self.run.start:
            begin = self._first_page(lsn)
        else:
            begin = earlier.pending
        found = await self._scan_wal(entry.tli, begin, lsn)
        if found.last_record:
            return found
        return replace(found, last_record=await self._last_record_up_to(earlier))

    def _first_page(self, lsn: Lsn) -> Lsn:
        """Where to begin when the WAL before the run is not there (any more): at a page the scanner finds a
        record, inside one it cannot."""
        start = self.run.start
        begin = Lsn(start + -start % PAGE_BYTES)
        if begin > lsn:
            raise TargetUnreachable(f"LSN {lsn} lies inside the first page of the WAL that is kept")
        return begin

    async def _piece_at(self, lsn: int) -> Piece:
        parts = await self.parts(self.run.pieces[self.run.position(lsn)])
        return next(part for part in parts if part.start <= lsn < part.end)

    async def _entry_before(self, entry: Entry) -> Entry | None:
        if entry.start <= self.run.start:
            return None
        entries = await self._reader.entries(await self._piece_at(entry.start - 1))
        return next(earlier for earlier in reversed(entries) if earlier.start < entry.start)

    async def _last_record_up_to(self, entry: Entry) -> Lsn:
        """Start of the last record complete at the end of an entry; 0 when none is."""
        at: int = entry.start
        while at >= self.run.start:
            piece = await self._piece_at(at)
            for earlier in reversed(await self._reader.entries(piece)):
                if earlier.start > entry.start:
                    continue
                if earlier.cut:
                    return (await self.boundary_at(earlier.end)).last_record
                if earlier.last_record:
                    return earlier.last_record
            at = piece.start - 1
        return Lsn(0)

    async def _scan_wal(self, tli: int, begin: Lsn, lsn: Lsn) -> Boundary:
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
                tli=tli,
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
