"""Sorting page rows outside memory: sorted runs in the store, merged at the end.

A base backup arrives in the order of the source's directories; a page manifest is sorted by path. So rows
are collected, sorted and written as runs, each an ordinary page manifest. The same runs are what a second
try of an interrupted backup knows about the first, so nothing extra is stored.

Memory: a merge holds one decoded row group of each run it reads (about 0.6 MB) and one manifest under
construction. Runs are merged FAN_IN at a time into runs of the next level as they become many, so that the
last merge reads fewer than FAN_IN of each level: 48 runs when a first-level run was written every gigabyte
of 4 TB.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from concurrent.futures import Executor

from timeline.archive.extent_writer import create_named
from timeline.clock import Clock
from timeline.format import keys
from timeline.format.manifest import PAGE_ROWS_PER_GROUP, ManifestRef, PageRow
from timeline.format.pack import NONCE_BYTES
from timeline.format.page_manifest import Footer, PageManifestWriter, PageRowGroup, open_footer
from timeline.store.base import Store

FAN_IN = 16
"""Runs of one level that are merged into one."""
MERGE_WIDTH = 64
"""Runs read at once where they come from an earlier try, whatever their number."""

Run = tuple[ManifestRef, ...]
"""Manifests that together are one sorted sequence."""


async def open_manifest(store: Store, ref: ManifestRef) -> Footer:
    """The verified footer of a page manifest in the store."""
    footer = await store.get(keys.manifest(ref.digest), ref.size - ref.footer_bytes, ref.footer_bytes)
    return open_footer(ref, footer)


async def read_row_group(store: Store, threads: Executor, footer: Footer, number: int) -> PageRowGroup:
    """One verified row group of a page manifest in the store."""
    entry = footer.entries[number]
    data = await store.get(keys.manifest(footer.ref.digest), entry.offset, entry.length)
    return await asyncio.get_running_loop().run_in_executor(threads, footer.decode, number, data)


async def read_rows(store: Store, threads: Executor, run: Run) -> AsyncGenerator[PageRow, None]:
    """All rows of a run, in order."""
    for ref in run:
        footer = await open_manifest(store, ref)
        for number in range(len(footer.entries)):
            for row in (await read_row_group(store, threads, footer, number)).rows():
                yield row


async def merge_rows(sources: Sequence[AsyncIterator[PageRow]]) -> AsyncGenerator[PageRow, None]:
    """The rows of all sources, each of them sorted, in one sorted sequence; where several have the same
    (path, group), the last source's rows alone."""
    heap: list[tuple[str, int, int, PageRow]] = []
    for number, source in enumerate(sources):
        async for row in source:
            heap.append((row.path, row.group, -number, row))
            break
    heapq.heapify(heap)
    winner: tuple[str, int, int] | None = None
    while heap:
        path, group, order, row = heap[0]
        if winner is None or (path, group) != winner[:2]:
            winner = (path, group, order)
        if order == winner[2]:
            yield row
        async for following in sources[-order]:
            heapq.heapreplace(heap, (following.path, following.group, order, following))
            break
        else:
            heapq.heappop(heap)


async def write_run(store: Store, threads: Executor, clock: Clock, rows: AsyncIterator[PageRow]) -> Run:
    """Write sorted rows as page manifests, as many as needed, and upload them; at least one."""
    loop = asyncio.get_running_loop()
    nonce = clock.token(NONCE_BYTES)
    refs: list[ManifestRef] = []
    writer = PageManifestWriter()
    batch: list[PageRow] = []
    last: PageRow | None = None
    async for row in rows:
        if len(batch) >= PAGE_ROWS_PER_GROUP:
            await loop.run_in_executor(threads, _append_all, writer, batch)
            batch = []
        if writer.full and last is not None and (row.path, row.group) != (last.path, last.group):
            await loop.run_in_executor(threads, _append_all, writer, batch)
            batch = []
            refs.append(await _upload(store, threads, writer, nonce))
            writer = PageManifestWriter()
        batch.append(row)
        last = row
    await loop.run_in_executor(threads, _append_all, writer, batch)
    refs.append(await _upload(store, threads, writer, nonce))
    return tuple(refs)


async def merge_runs(
    store: Store, threads: Executor, clock: Clock, runs: Sequence[Run], rows: Iterable[PageRow] = ()
) -> Run:
    """One run of all the runs, oldest first, and then ``rows``, in any order."""
    sources = [read_rows(store, threads, run) for run in runs]
    sources.append(_iterate(sort_rows(rows)))
    return await write_run(store, threads, clock, merge_rows(sources))


async def join_runs(store: Store, threads: Executor, clock: Clock, refs: Sequence[ManifestRef]) -> Run:
    """One run of any number of manifests, oldest first, MERGE_WIDTH at a time."""
    runs: list[Run] = [(ref,) for ref in refs]
    while len(runs) > 1:
        runs = [
            await merge_runs(store, threads, clock, runs[at : at + MERGE_WIDTH])
            for at in range(0, len(runs), MERGE_WIDTH)
        ]
    return runs[0] if runs else ()


def sort_rows(rows: Iterable[PageRow]) -> list[PageRow]:
    """By (path, group, first block); of equal ones the last (a file may be met twice while it is renamed)."""
    latest = {(row.path, row.group, row.extent.first_block): row for row in rows}
    return [latest[key] for key in sorted(latest)]


class PageRuns:
    """The runs of one backup."""

    def __init__(self, store: Store, threads: Executor, clock: Clock) -> None:
        self._store = store
        self._threads = threads
        self._clock = clock
        self._levels: list[list[Run]] = [[]]

    @property
    def manifests(self) -> tuple[ManifestRef, ...]:
        """All there is, oldest first."""
        return tuple(ref for run in self._oldest_first() for ref in run)

    async def add(self, rows: Sequence[PageRow]) -> None:
        """Write rows, in any order, as a run."""
        if not rows:
            return
        self._levels[0].append(await merge_runs(self._store, self._threads, self._clock, (), rows))
        for number, level in enumerate(self._levels):
            if len(level) < FAN_IN:
                break
            if number + 1 == len(self._levels):
                self._levels.append([])
            self._levels[number + 1].append(await merge_runs(self._store, self._threads, self._clock, level))
            self._levels[number] = []

    async def finish(self, rows: Iterable[PageRow]) -> Run:
        """Everything, and the rows given, as one run."""
        return await merge_runs(self._store, self._threads, self._clock, self._oldest_first(), rows)

    def _oldest_first(self) -> list[Run]:
        return [run for level in reversed(self._levels) for run in level]


async def _upload(store: Store, threads: Executor, writer: PageManifestWriter, nonce: str) -> ManifestRef:
    data, ref = await asyncio.get_running_loop().run_in_executor(threads, writer.finish, nonce)
    await create_named(store, keys.manifest(ref.digest), data)
    return ref


def _append_all(writer: PageManifestWriter, rows: list[PageRow]) -> None:
    for row in rows:
        writer.append(row)


async def _iterate(rows: Iterable[PageRow]) -> AsyncGenerator[PageRow, None]:
    for row in rows:
        yield row
