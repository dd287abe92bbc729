"""Verifying a store: whether everything that the log reaches is there, intact, and enough to restore from.

Structure (always): ``tl.json``; the log back to its last checkpoint; every listing and manifest to its last byte;
every pack's presence and size, by listing; WAL without holes but for recorded gaps; the headers of all chunks.
Data (on demand): every byte, see ``verify_data``.

Only what a fresh log still names is damage: what was not found is looked for once more under the newest log
[GEN-6], for a collector may have been at work. Reads only (P10). Memory: about 50 bytes a pack, 2 KiB a chunk of
the tail, and what ``manifest_scan`` and ``verify_data`` say; no manifest is held as a whole.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from timeline.catalog.branch_log import LogHead, read_head
from timeline.catalog.meta import read_meta
from timeline.catalog.parallel import in_parallel
from timeline.catalog.tail import TailChunk
from timeline.clock import Clock
from timeline.errors import DamagedStore, LogConflict, MissingObject, NotFound, Unavailable, UsageError
from timeline.format import keys
from timeline.format.branch_state import BranchState
from timeline.format.log import STATE_EVERY, LogEntry, decode_entry
from timeline.ids import MAIN
from timeline.lsn import Lsn
from timeline.maintain.lost_ranges import lost, restorable
from timeline.maintain.pack_set import Indexes, PackSet, list_packs
from timeline.maintain.verify_data import PACK_MAX_BYTES, ReadData, read_data
from timeline.maintain.verify_ledger import Ledger
from timeline.maintain.verify_pages import (
    PageSource,
    affected_blocks,
    check_listings,
    check_pages,
    page_sources,
)
from timeline.maintain.verify_part import WHOLE, Part
from timeline.maintain.verify_report import (
    MAX_PROBLEMS,
    Checked,
    DataChecked,
    Fault,
    LsnRange,
    Problem,
    VerifyReport,
)
from timeline.maintain.verify_wal import (
    TliChunks,
    check_chunks,
    check_sealed,
    frame_holes,
    joined,
    problem_of,
    wal_intervals,
)
from timeline.store.base import Store

_LOG_READS = 16
_VIEWS = 3
"""A store that is collected while it is looked at is looked at anew so many times at most."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    done_bytes: int
    total_bytes: int


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class _Structure:
    """One view of the branch, with all that was found in it."""

    state: BranchState
    sources: tuple[PageSource, ...]
    packs: PackSet
    packs_of: dict[str, Indexes]
    """By manifest: the packs it names."""
    tails: dict[int, TliChunks]
    checked: Checked
    problems: tuple[Problem, ...]

    @property
    def chunks(self) -> list[TailChunk]:
        """All on their chains."""
        return [chunk for tail in self.tails.values() for chunk in tail.chunks]


class _Meter:
    """Sums what is reported."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._done = 0
        self._total = 0

    def __call__(self, count: int) -> None:
        self._done += count
        self._report(Progress(self._done, max(self._total, self._done)))

    def expect(self, count: int) -> None:
        """So many bytes more are to come."""
        self._total += count


async def verify(
    store: Store,
    clock: Clock,
    *,
    data: bool = False,
    budget: int | None = None,
    part: Part = WHOLE,
    ledger_directory: Path | None = None,
    report: Report = lambda _: None,
    branch: str = MAIN,
) -> VerifyReport:
    """Verify a branch. ``data``: read everything, or of the packs only those of ``part``; ``budget`` bytes at most in this
    run; ``ledger_directory``: where this host keeps what it has read, by store.

    Damage is in the report, not raised. Raises UsageError when there is no store, Unavailable, UnknownFeature.
    """
    meter = _Meter(report)
    try:
        meta = await read_meta(store)
    except DamagedStore as error:
        return _hopeless(store, None, branch, problem_of(error))
    except UsageError:
        if not await store.list(keys.log_prefix(branch), limit=1):
            raise
        return _hopeless(store, None, branch, _missing(keys.META))
    try:
        head = await read_head(store, branch)
    except MissingObject as error:
        return _hopeless(store, meta.store_id, branch, _missing(error.key))
    except DamagedStore as error:
        return _hopeless(store, meta.store_id, branch, problem_of(error))
    if head is None:
        raise UsageError(f"{store.url}: nothing was ever archived as {branch}", hint="start `tl archive`")
    head, found = await _view(store, branch, head, meter)
    read: ReadData | None = None
    if data:
        path = ledger_directory / f"{meta.store_id}.packs" if ledger_directory is not None else None
        try:
            read = await _read(store, clock, found, path, budget, part, meter)
        except NotFound:
            # A chunk was sealed and collected meanwhile: what replaces it is in the next view.
            head, found = await _view(store, branch, await _newest(store, branch), meter)
            read = await _read(store, clock, found, path, budget, part, meter)
        if read.vanished:
            # Collected meanwhile, or lost: the next view names only what is still needed.
            head, found = await _view(store, branch, await _newest(store, branch), meter)
    problems = [
        *found.problems,
        *await _pack_problems(store, found, read),
        *(_chunk_problem(chunk, error) for chunk, error in (read.chunks if read else ())),
    ]
    return _report(store, meta.store_id, branch, head, found, problems, read.checked if read else None)


async def _read(
    store: Store,
    clock: Clock,
    found: _Structure,
    path: Path | None,
    budget: int | None,
    part: Part,
    meter: _Meter,
) -> ReadData:
    ledger = await asyncio.to_thread(Ledger, path, found.packs)
    return await read_data(
        store,
        found.state,
        found.sources,
        found.packs_of,
        found.packs,
        found.chunks,
        ledger,
        clock,
        budget=budget,
        part=part,
        expect=meter.expect,
        report=meter,
    )


async def _view(store: Store, branch: str, head: LogHead, meter: _Meter) -> tuple[LogHead, _Structure]:
    """The newest view in which nothing is missing that a still newer one does not name."""
    found: _Structure | None = None
    for _ in range(_VIEWS):
        try:
            found = await _structure(store, branch, head, meter)
        except NotFound as error:
            found, suspects = None, [error.key]
        else:
            suspects = [problem.key for problem in found.problems if problem.fault is Fault.MISSING]
            suspects += [keys.pack(name) for name in found.packs.missing]
            if not suspects and not any(tail.doubts for tail in found.tails.values()):
                return head, found
        newer = await _newest(store, branch)
        if found is not None and newer.number == head.number and not await _any_there(store, suspects):
            return head, found
        head = newer
    if found is None:
        raise Unavailable(
            f"{store.url}: chunks vanish as fast as they are looked at",
            hint="try again when no collection is running",
        )
    return head, found


async def _newest(store: Store, branch: str) -> LogHead:
    head = await read_head(store, branch)
    if head is None:
        raise MissingObject(keys.log_prefix(branch))
    return head


async def _any_there(store: Store, suspects: Sequence[str]) -> bool:
    """Whether something that was not found is there after all; a few of them tell."""
    for key in suspects[:4]:
        try:
            await store.get(key, 0, 1)
            return True
        except NotFound:
            continue
        except DamagedStore:
            return True
    return False


async def _structure(store: Store, branch: str, head: LogHead, meter: _Meter) -> _Structure:
    """Raises NotFound when a chunk vanished while it was looked at."""
    state = head.state
    entries, log_problems = await _check_log(store, branch, head)
    packs = await list_packs(store)
    sizes = {
        item.key.removeprefix("manifests/").removesuffix(".parquet"): item.size
        for item in await store.list("manifests/")
    }
    sources = page_sources(state)
    listings = {snapshot.files: snapshot.files.size for snapshot in state.snapshots}
    meter.expect(sum(source.ref.size for source in sources) + sum(listings.values()))
    sealed = await check_sealed(store, state, packs, sizes)
    files = await check_listings(store, state, sizes, meter)
    pages = await check_pages(store, sources, packs, sizes, meter)
    tails = {tli.tli: await check_chunks(store, state, tli) for tli in state.tlis}
    chunks = [chunk for tail in tails.values() for chunk in tail.chunks]
    wal = sum(part.end - part.start for part in state.sealed) + sum(one.end - one.start for one in chunks)
    return _Structure(
        state=state,
        sources=sources,
        packs=packs,
        packs_of=sealed.packs_of | pages.packs_of,
        tails=tails,
        checked=Checked(
            log_entries=entries,
            manifests=sealed.manifests + files.manifests + pages.manifests,
            manifest_bytes=sealed.manifest_bytes + files.manifest_bytes + pages.manifest_bytes,
            page_rows=pages.rows,
            snapshots=len(state.snapshots),
            packs=len(packs.named),
            pack_bytes=int(packs.sizes[packs.named].sum()),
            sealed_ranges=len(state.sealed),
            chunks=len(chunks),
            wal_bytes=wal,
        ),
        problems=(
            *log_problems,
            *sealed.problems,
            *files.problems,
            *pages.problems,
            *(problem for tail in tails.values() for problem in tail.problems),
        ),
    )


async def _check_log(store: Store, branch: str, head: LogHead) -> tuple[int, list[Problem]]:
    """The entries from the last checkpoint to the head; older ones are void [LOG-4]."""
    first = head.number - head.number % STATE_EVERY
    listed = await store.list(keys.log_prefix(branch), after="", limit=head.number - first + STATE_EVERY)
    there = {named[1] for item in listed if (named := keys.parse_log_entry(item.key)) is not None}
    problems: list[Problem] = []
    entries = 0
    state: BranchState | None = None

    async def read(number: int) -> object:
        key = keys.log_entry(branch, number)
        if number not in there:
            return _missing(key)
        try:
            return decode_entry(await store.get(key), key)
        except DamagedStore as error:
            return problem_of(error)
        except NotFound:
            return _missing(key)

    for found in await in_parallel(range(first, head.number + 1), read, limit=_LOG_READS):
        if isinstance(found, Problem):
            problems.append(found)
            state = None
            continue
        assert isinstance(found, LogEntry)
        entries += 1
        try:
            state = found.change.apply(state) if state is not None else found.state
        except LogConflict as error:
            problems.append(_contradiction(branch, found.number, f"expected a change that follows: {error}"))
            state = found.state
        if found.state is not None and state != found.state:
            problems.append(
                _contradiction(branch, found.number, "expected the state that its change leads to")
            )
            state = found.state
    return entries, problems


async def _pack_problems(store: Store, found: _Structure, read: ReadData | None) -> list[Problem]:
    """What is wrong with packs, and what each takes with it."""
    packs = found.packs
    bad: dict[str, int | frozenset[int]] = dict.fromkeys(itertools.islice(packs.missing, MAX_PROBLEMS), 0)
    problems = [_missing(keys.pack(name)) for name in packs.missing]
    for number in packs.short.tolist():
        name, size, needed = packs.name(number), int(packs.sizes[number]), int(packs.needed[number])
        bad[name] = size
        problems.append(
            Problem(Fault.SHORT, keys.pack(name), size, f"object ends here, {needed} bytes expected")
        )
    for number in packs.named[packs.sizes[packs.named] > PACK_MAX_BYTES].tolist():
        expected = f"expected at most {PACK_MAX_BYTES} bytes, found {int(packs.sizes[number])}"
        problems.append(Problem(Fault.CONTRADICTION, packs.key(number), PACK_MAX_BYTES, expected))
    for name, faults in (read.faults if read else {}).items():
        bad[name] = frozenset(fault.offset for fault in faults)
        problems += [Problem(one.fault, keys.pack(name), one.offset, one.expected) for one in faults]
    if not bad:
        return problems
    holes = await frame_holes(store, found.state, bad)
    blocks = await affected_blocks(store, found.sources, bad)
    complete = []
    for problem in problems:
        place = (problem.key.rpartition("/")[2], problem.offset)
        affected = blocks.get(place)
        if affected is not None:
            problem = replace(
                problem,
                snapshots=tuple(sorted(affected.snapshots)),
                files=tuple(affected.files),
                file_runs=affected.runs,
            )
        complete.append(replace(problem, holes=holes.get(place, ())))
    return complete


def _report(
    store: Store,
    store_id: str,
    branch: str,
    head: LogHead,
    found: _Structure,
    problems: list[Problem],
    data: DataChecked | None,
) -> VerifyReport:
    state = found.state
    holes = joined([hole for problem in problems for hole in problem.holes])
    unusable = {name for problem in problems if problem.snapshots_unusable for name in problem.snapshots}
    wal = {
        tli.tli: [
            *wal_intervals(state, found.tails[tli.tli].chunks, tli.tli),
            *((int(hole.start), int(hole.end)) for hole in holes if hole.tli == tli.tli),
        ]
        for tli in state.tlis
    }
    before, after = restorable(state, wal), restorable(state, wal, holes, unusable)
    return VerifyReport(
        store=store.url,
        store_id=store_id,
        branch=branch,
        log_number=head.number,
        checked=found.checked,
        data=data,
        problems=tuple(problems[:MAX_PROBLEMS]),
        problem_count=len(problems),
        unrestorable=lost(before, after),
        restorable=after,
        gaps=tuple(LsnRange(gap.tli, gap.start, gap.end) for gap in state.gaps),
        remarks=tuple(doubt for tail in found.tails.values() for doubt in tail.doubts),
    )


def _hopeless(store: Store, store_id: str | None, branch: str, problem: Problem) -> VerifyReport:
    """Without this object nothing of the branch can be read."""
    return VerifyReport(
        store=store.url,
        store_id=store_id,
        branch=branch,
        log_number=None,
        checked=Checked(),
        data=None,
        problems=(problem,),
        problem_count=1,
        unrestorable=(),
        restorable=(),
        gaps=(),
        remarks=("nothing of this branch can be read without that object, and nothing else was looked at",),
    )


def _missing(key: str) -> Problem:
    return Problem(Fault.MISSING, key, 0, "object is missing")


def _contradiction(branch: str, number: int, expected: str) -> Problem:
    return Problem(Fault.CONTRADICTION, keys.log_entry(branch, number), 0, expected)


def _chunk_problem(chunk: TailChunk, error: DamagedStore) -> Problem:
    hole = LsnRange(chunk.header.tli, Lsn(chunk.start), Lsn(chunk.end))
    return problem_of(error, holes=(hole,))
