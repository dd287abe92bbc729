"""Reading every byte that the log reaches, the one not read for longest first.

Packs are read whole, one request each, at most IN_FLIGHT_BYTES at once; what their frames must be comes from the
manifests, for as many packs at a time as have ROWS_AT_ONCE rows. Neither grows with the store.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from timeline.catalog.parallel import in_order
from timeline.catalog.tail import TailChunk, read_chunk
from timeline.clock import Clock
from timeline.errors import DamagedStore, NotFound
from timeline.format.branch_state import BranchState
from timeline.format.digest import DIGEST_BYTES
from timeline.format.extent import GROUP_BLOCKS, GROUP_BYTES
from timeline.format.parquet_file import PAGES, WAL
from timeline.format.wal_frame import WAL_FRAME_MAX_BYTES
from timeline.maintain.manifest_rules import PAGE_COLUMNS, PAGE_DICTIONARY
from timeline.maintain.manifest_scan import scan_manifest
from timeline.maintain.pack_check import ROW, FrameFault, PackResult, Rows, check_pack
from timeline.maintain.pack_set import Indexes, PackSet
from timeline.maintain.verify_ledger import Ledger
from timeline.maintain.verify_pages import PageSource
from timeline.maintain.verify_part import WHOLE, Part
from timeline.maintain.verify_report import DataChecked
from timeline.maintain.verify_wal import FRAME_COLUMNS
from timeline.pg.relation_file import parse_relation_file
from timeline.store.base import Store

IN_FLIGHT_BYTES = 80 << 20
"""Two full packs, of which a client may hold copies for a moment."""
_IN_FLIGHT = 4
"""Objects read at once."""
ROWS_AT_ONCE = 400_000
"""Rows of manifests in memory (about 60 bytes each, twice while they are sorted): some 50 GB of files."""
PACK_MAX_BYTES = 64 << 20
"""No object is longer [GEN-4]."""
_SAVE_BYTES = 1 << 30
"""The ledger is written whenever so much was read since."""


@dataclass(slots=True)
class ReadData:
    """What the reading gave."""

    checked: DataChecked
    faults: dict[str, tuple[FrameFault, ...]] = field(default_factory=dict)
    """By id of the pack."""
    chunks: list[tuple[TailChunk, DamagedStore]] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    """Ids of packs that were listed and could not be found."""


async def read_data(
    store: Store,
    state: BranchState,
    sources: Sequence[PageSource],
    packs_of: dict[str, Indexes],
    packs: PackSet,
    chunks: Sequence[TailChunk],
    ledger: Ledger,
    clock: Clock,
    *,
    budget: int | None,
    part: Part = WHOLE,
    expect: Callable[[int], None],
    report: Callable[[int], None],
) -> ReadData:
    """Check chunks, then packs, until ``budget`` bytes are read (at least one pack); ``None``: all.

    Of the packs only those of ``part``; the chunks are the first part's, and the counts are of this part alone.
    ``expect``: bytes that will be read; ``report``: bytes as they are. Raises NotFound for a chunk, Unavailable;
    the ledger holds what was done.
    """
    readable = packs.named[packs.sizes[packs.named] >= packs.needed[packs.named]]
    readable = readable[packs.sizes[readable] <= PACK_MAX_BYTES]
    readable = readable[part.holds(packs.ids[readable])]
    chunks = chunks if part.first else ()
    found = ReadData(DataChecked(0, 0, 0, 0, len(readable), int(packs.sizes[readable].sum()), 0, None, False))
    expect(sum(chunk.layout.size for chunk in chunks))
    chunk_bytes = await _read_chunks(store, chunks, found, report)
    chosen = _choose(readable, packs, ledger, None if budget is None else budget - chunk_bytes)
    expect(int(packs.sizes[chosen].sum()))
    done = pages = read = unsaved = 0
    try:
        for batch in _batches(chosen, packs):
            rows = await _rows_of(store, state, sources, packs_of, packs, batch)

            async def check(number: int, rows: Rows = rows) -> tuple[int, PackResult | None]:
                first, last = np.searchsorted(rows["pack"], (number, number + 1))
                try:
                    data = await store.get(packs.key(number))
                except NotFound:
                    return number, None
                return number, await asyncio.to_thread(
                    check_pack, data, packs.name(number), packs.key(number), rows[first:last]
                )

            results = in_order(
                batch.tolist(),
                check,
                limit=_IN_FLIGHT,
                cost=lambda number: int(packs.sizes[number]),
                budget=IN_FLIGHT_BYTES,
            )
            async with aclosing(results) as checks:
                async for number, result in checks:
                    size = int(packs.sizes[number])
                    report(size)
                    if result is None:
                        found.vanished.append(packs.name(number))
                        continue
                    done, read, pages, unsaved = done + 1, read + size, pages + result.pages, unsaved + size
                    if result.faults:
                        found.faults[packs.name(number)] = result.faults
                    else:
                        ledger.mark(number, clock.now())
                    if unsaved >= _SAVE_BYTES:
                        await asyncio.to_thread(ledger.save)
                        unsaved = 0
    finally:
        await asyncio.to_thread(ledger.save)
    times = ledger.at[readable]
    never = int((times == 0).sum())
    found.checked = DataChecked(
        packs=done,
        chunks=len(chunks),
        bytes=read + chunk_bytes,
        pages=pages,
        packs_total=len(readable),
        bytes_total=int(packs.sizes[readable].sum()),
        never=never,
        oldest=None if never or not len(times) else int(times.min()),
        complete=len(chosen) == len(readable),
    )
    return found


async def _read_chunks(
    store: Store, chunks: Sequence[TailChunk], found: ReadData, report: Callable[[int], None]
) -> int:
    async def check(chunk: TailChunk) -> tuple[TailChunk, DamagedStore | None]:
        try:
            await read_chunk(store, chunk)
        except DamagedStore as error:
            return chunk, error
        return chunk, None

    total = 0
    results = in_order(
        chunks,
        check,
        limit=_IN_FLIGHT,
        cost=lambda chunk: chunk.layout.size + chunk.end - chunk.start,
        budget=IN_FLIGHT_BYTES,
    )
    async with aclosing(results) as checks:
        async for chunk, error in checks:
            total += chunk.layout.size
            report(chunk.layout.size)
            if error is not None:
                found.chunks.append((chunk, error))
    return total


def _choose(readable: Indexes, packs: PackSet, ledger: Ledger, budget: int | None) -> Indexes:
    """The packs to read, those not read for longest first."""
    order = readable[np.argsort(ledger.at[readable], kind="stable")]
    if budget is None:
        return order
    before = np.cumsum(packs.sizes[order]) - packs.sizes[order]
    return order[: max(1, int(np.searchsorted(before, budget, "left")))]


def _batches(chosen: Indexes, packs: PackSet) -> Iterator[Indexes]:
    """The packs in turns, each with at most ROWS_AT_ONCE rows but for a pack that has more by itself."""
    first, rows = 0, 0
    for place, count in enumerate(packs.rows[chosen].tolist()):
        if place > first and rows + count > ROWS_AT_ONCE:
            yield chosen[first:place]
            first, rows = place, 0
        rows += count
    if len(chosen) > first:
        yield chosen[first:]


async def _rows_of(
    store: Store,
    state: BranchState,
    sources: Sequence[PageSource],
    packs_of: dict[str, Indexes],
    packs: PackSet,
    batch: Indexes,
) -> Rows:
    """All that manifests say of these packs, by pack and offset, each frame's every use once."""
    wanted = np.zeros(len(packs), bool)
    wanted[batch] = True
    parts: list[Rows] = []
    for source in sources:
        if _names_any(packs_of.get(source.ref.digest), wanted):
            take = functools.partial(_page_rows, source=source, packs=packs, wanted=wanted)
            columns = (*PAGE_COLUMNS, "digest")
            parts += await _scan(store, PAGES, source.ref, columns, PAGE_DICTIONARY, take)
    for sealed in state.sealed:
        if _names_any(packs_of.get(sealed.manifest.digest), wanted):
            take = functools.partial(_frame_rows, packs=packs, wanted=wanted)
            parts += await _scan(store, WAL, sealed.manifest, (*FRAME_COLUMNS, "digest"), ("pack",), take)
    return await asyncio.to_thread(_sorted, parts)


def _names_any(numbers: Indexes | None, wanted: npt.NDArray[np.bool_]) -> bool:
    return numbers is not None and bool(wanted[numbers].any())


async def _scan(
    store: Store,
    kind: str,
    ref: Any,
    columns: Sequence[str],
    dictionary: Sequence[str],
    take: Callable[[Any], Rows],
) -> list[Rows]:
    """The rows of one manifest; none of what cannot be read, which has been reported."""
    parts = []
    try:
        async with aclosing(scan_manifest(store, kind, ref, columns, dictionary)) as groups:
            async for group in groups:
                parts.append(await asyncio.to_thread(take, group.table))
    except (DamagedStore, NotFound):
        pass
    return parts


def _sorted(parts: list[Rows]) -> Rows:
    rows = np.concatenate(parts) if parts else np.empty(0, ROW)
    parts.clear()
    rows = rows[np.lexsort((rows["before"], rows["block"], rows["offset"], rows["pack"]))]
    if len(rows) < 2:
        return rows
    again = np.zeros(len(rows), bool)
    again[1:] = rows[1:] == rows[:-1]
    return rows[~again]


def _common(table: Any, packs: PackSet, wanted: npt.NDArray[np.bool_]) -> tuple[Rows, npt.NDArray[np.int64]]:
    """The wanted rows with what all kinds of frames have, and their numbers in the table."""
    column = table.column("pack").combine_chunks()
    numbers = packs.find(column.dictionary.to_pylist())[column.indices.to_numpy()]
    places = np.flatnonzero((numbers >= 0) & wanted[numbers])
    rows = np.zeros(len(places), ROW)
    rows["pack"] = numbers[places]
    rows["offset"] = table.column("offset").to_numpy()[places]
    rows["stored"] = table.column("stored_bytes").to_numpy()[places]
    digests = table.column("digest").combine_chunks()
    raw = np.frombuffer(digests.buffers()[1], f"V{DIGEST_BYTES}")
    rows["digest"] = raw[digests.offset : digests.offset + len(digests)][places]
    return rows, places


def _frame_rows(table: Any, *, packs: PackSet, wanted: npt.NDArray[np.bool_]) -> Rows:
    rows, places = _common(table, packs, wanted)
    lengths = (table.column("end").to_numpy() - table.column("start").to_numpy())[places]
    # Nobody unpacks what is longer than the format allows; the manifest that says so has been reported.
    sound = lengths <= WAL_FRAME_MAX_BYTES
    rows["raw"] = np.where(sound, lengths, 0)
    taken: Rows = rows[sound]
    return taken


def _page_rows(table: Any, *, source: PageSource, packs: PackSet, wanted: npt.NDArray[np.bool_]) -> Rows:
    rows, places = _common(table, packs, wanted)
    rows["raw"] = table.column("raw_bytes").to_numpy()[places]
    if source.judged_below and len(rows):
        paths = table.column("path").combine_chunks()
        files = [parse_relation_file(path) for path in paths.dictionary.to_pylist()]
        first = np.array(
            [0 if file is None else file.first_block(source.relation_segment_bytes) for file in files]
        )
        relation = np.array([file is not None for file in files])
        codes = paths.indices.to_numpy()[places]
        inside = table.column("group").to_numpy()[places].astype(np.int64) * GROUP_BLOCKS
        inside += table.column("first_block").to_numpy()[places]
        rows["block"] = np.where(relation[codes], first[codes] + inside, 0).astype(np.uint32)
        rows["before"] = np.where(relation[codes], source.judged_below, 0).astype(np.uint64)
    sound: Rows = rows[rows["raw"] <= GROUP_BYTES]
    return sound
