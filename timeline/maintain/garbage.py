"""Garbage: what a store holds that nothing names any more (SPEC.md, chapter 9). Finding it only reads.

The order is the proof's: the keys are listed first, then the head of the log is read, then what is reachable
from it is taken away. A writer that began at a later entry than that head made its objects after the listing; one
that began earlier is kept out by the log once the mark is collected.

Only keys of the forms in SPEC.md, chapter 2, are ever garbage. Memory: about 0.2 KB for each pack and manifest of
the store, 6 MB for a TiB, beside what reach.py states; chunks and log entries are counted page by page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from timeline.catalog.branch_log import LogHead, read_head
from timeline.catalog.meta import read_meta
from timeline.catalog.parallel import in_parallel
from timeline.catalog.pins import read_pins
from timeline.clock import Clock
from timeline.errors import MissingObject, NotFound, Unavailable, UsageError
from timeline.format import keys
from timeline.format.branch_state import BranchState
from timeline.format.log import STATE_EVERY
from timeline.format.mark import MARK_KEYS, Garbage, VoidChunks, VoidEntries
from timeline.lsn import Lsn
from timeline.maintain.reach import Reach, named_in, reach_of
from timeline.store.base import Listed, Store

PACKS = "packs"
MANIFESTS = "manifests"
CHUNKS = "chunks"
ENTRIES = "log entries"
PINS = "pins"
MARKS = "marks"
KINDS = (PACKS, MANIFESTS, CHUNKS, ENTRIES, PINS, MARKS)
"""Kinds of objects, as people are told of them."""

PAGE_KEYS = 10_000
"""Chunks and log entries are listed so many at a time."""
_LISTS = 8
_PACK_PREFIXES = tuple(f"{keys.PACKS}{first:02x}/" for first in range(256))

Progress = Callable[[str, int, int], None]
"""(what is going on, how far, of how much)."""


@dataclass(frozen=True, slots=True)
class Tally:
    """How much of one kind."""

    kind: str
    objects: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Found:
    """What is garbage as of one log entry."""

    head: LogHead
    garbage: tuple[Garbage, ...]
    """Packs, manifests, pins and marks; at most MARK_KEYS."""
    left_over: int
    """How many more there are, for the next mark."""
    chunks: tuple[VoidChunks, ...]
    entries: VoidEntries
    stored: tuple[Tally, ...]
    """Packs and manifests that the store holds altogether."""
    pins: int
    """Pins in force."""

    @property
    def tallies(self) -> tuple[Tally, ...]:
        """How much garbage, by kind; kinds of which there is none are left out."""
        return tallies_of(self.garbage, self.chunks, self.entries)


def tallies_of(
    garbage: Iterable[Garbage], chunks: Iterable[VoidChunks], entries: VoidEntries
) -> tuple[Tally, ...]:
    """How much a mark lists, by kind; kinds of which there is none are left out."""
    objects, size = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for one in garbage:
        kind = kind_of(one.key)
        objects[kind] += 1
        size[kind] += one.size
    for void in chunks:
        objects[CHUNKS] += void.objects
        size[CHUNKS] += void.bytes
    objects[ENTRIES] += entries.objects
    size[ENTRIES] += entries.bytes
    return tuple(Tally(kind, objects[kind], size[kind]) for kind in KINDS if objects[kind])


def kind_of(key: str) -> str:
    """The kind of an object that may be garbage; raises ValueError for any other key."""
    for parse, kind in (
        (keys.parse_pack, PACKS),
        (keys.parse_manifest, MANIFESTS),
        (keys.parse_pin, PINS),
        (keys.parse_mark, MARKS),
        (keys.parse_chunk, CHUNKS),
        (keys.parse_log_entry, ENTRIES),
    ):
        if parse(key) is not None:
            return kind
    raise ValueError(f"{key}: never garbage")


async def find_garbage(store: Store, branch: str, clock: Clock, progress: Progress) -> Found:
    """All garbage of the store as of now. Needs read and list permission only (P10).

    Raises UsageError for a store of several branches, DamagedStore for a manifest or pin that cannot be read,
    UnknownFeature, Unavailable.
    """
    await read_meta(store)
    await refuse_others(store, branch)
    progress("listing", 0, len(_PACK_PREFIXES))
    packs = await _list_packs(store, progress)
    listed = [
        *packs,
        *(one for one in await store.list(keys.MANIFESTS) if keys.parse_manifest(one.key) is not None),
    ]
    marks = [one for one in await store.list(keys.MARKS) if keys.parse_mark(one.key) is not None]
    # From here on the order matters: nothing may be listed after the head was read, but what is void for good.
    head = await read_head(store, branch)
    if head is None:
        raise UsageError(f"{store.url}: nothing was ever archived as {branch}", hint="start `tl archive`")
    state = head.state
    pins = await read_pins(store, clock.now())
    reach = await _reach(store, state, progress)
    pinned = await reach_of(store, named_in(pins.live), missing_ok=True)
    collection = state.collection
    known_marks = {collection.last, collection.mark.id if collection.mark is not None else None}
    garbage = [Garbage(one.key, one.size) for one in listed if not (reach | pinned).holds(one.key)]
    garbage += (Garbage(one.key, one.size) for one in pins.expired)
    garbage += (Garbage(one.key, one.size) for one in marks if keys.parse_mark(one.key) not in known_marks)
    return Found(
        head=head,
        garbage=tuple(garbage[:MARK_KEYS]),
        left_over=max(0, len(garbage) - MARK_KEYS),
        chunks=await _void_chunks(store, state),
        entries=await _void_entries(store, head),
        stored=(_tally(PACKS, packs), _tally(MANIFESTS, listed[len(packs) :])),
        pins=len(pins.live),
    )


async def refuse_others(store: Store, branch: str) -> None:
    """Raises UsageError when the store has logs of branches that nobody would mark from [COL-11]."""
    if await store.list(keys.CATALOG, limit=1):
        raise UsageError(
            f"{store.url}: holds branches of its own ({keys.CATALOG}), which this version cannot collect around",
            hint="use a newer version of tl",
        )
    named = [keys.parse_log_entry(one.key) for one in await store.list(keys.BRANCHES)]
    others = sorted({parsed[0] for parsed in named if parsed is not None and parsed[0] != branch})
    if others:
        raise UsageError(
            f"{store.url}: holds the logs of other branches ({', '.join(others[:5])}), which this version cannot "
            "collect around",
            hint="use a newer version of tl",
        )


async def list_chunks(
    store: Store, branch: str, tli: int, below: int, after: str = ""
) -> tuple[list[Listed], str]:
    """One page of the void chunks of a tli, and where the next page begins (empty: there is none)."""
    page = await store.list(keys.chunk_prefix(branch, tli), after=after, limit=PAGE_KEYS)
    void: list[Listed] = []
    for one in page:
        parsed = keys.parse_chunk(one.key)
        if parsed is None:
            continue
        if parsed.start >= below:
            return void, ""
        void.append(one)
    return void, page[-1].key if len(page) == PAGE_KEYS else ""


async def list_entries(store: Store, branch: str, below: int, after: str = "") -> tuple[list[Listed], str]:
    """One page of the log entries below a number, newest first; as ``list_chunks``."""
    after = after or keys.log_entry(branch, below)
    page = await store.list(keys.log_prefix(branch), after=after, limit=PAGE_KEYS)
    old = [one for one in page if keys.parse_log_entry(one.key) is not None]
    return old, page[-1].key if len(page) == PAGE_KEYS else ""


async def _list_packs(store: Store, progress: Progress) -> list[Listed]:
    done = 0

    async def list_prefix(prefix: str) -> list[Listed]:
        nonlocal done
        found = [one for one in await store.list(prefix) if keys.parse_pack(one.key) is not None]
        done += 1
        progress("listing", done, len(_PACK_PREFIXES))
        return found

    pages = await in_parallel(_PACK_PREFIXES, list_prefix, limit=_LISTS)
    return [one for page in pages for one in page]


async def _reach(store: Store, state: BranchState, progress: Progress) -> Reach:
    named = list(named_in(state))
    progress("marking", 0, len(named))
    try:
        reach = await reach_of(store, named)
    except NotFound as error:
        head = await read_head(store, state.branch)
        still = {one.key for one in named_in(head.state)} if head is not None else set()
        if error.key in still:
            raise MissingObject(error.key) from error
        raise Unavailable(
            f"{error.key} was collected while it was read",
            hint="another collection is under way; run it again",
        ) from error
    progress("marking", len(named), len(named))
    return reach


async def _void_chunks(store: Store, state: BranchState) -> tuple[VoidChunks, ...]:
    voids = []
    for tli in state.tlis:
        objects = size = 0
        at = ""
        while True:
            page, at = await list_chunks(store, state.branch, tli.tli, tli.sealed, at)
            objects += len(page)
            size += sum(one.size for one in page)
            if not at:
                break
        if objects:
            voids.append(VoidChunks(tli.tli, Lsn(tli.sealed), objects, size))
    return tuple(voids)


async def _void_entries(store: Store, head: LogHead) -> VoidEntries:
    below = head.number - head.number % STATE_EVERY
    objects = size = 0
    at = ""
    while True:
        page, at = await list_entries(store, head.state.branch, below, at)
        objects += len(page)
        size += sum(one.size for one in page)
        if not at:
            break
    return VoidEntries(below, objects, size)


def _tally(kind: str, listed: Iterable[Listed]) -> Tally:
    sizes = [one.size for one in listed]
    return Tally(kind, len(sizes), sum(sizes))
