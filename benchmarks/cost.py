"""What a store costs: requests, objects and bytes of 30 days, by running the archiver's and the collector's own code
against a store in memory that counts.

    python -m benchmarks.cost --write README.md      # also `make cost-table`

Two parts for each load. *Archiving*: a stretch of it in full, chunk by chunk, through the real chunker, committer,
sealing and merging, with the clock of the archiver's polls; a day is so many stretches. *Keeping*: 30 days of sealed
history, with retention, collection, verification and the daemon's facts as often as they come; there a sealed
range stands for many merged ones, and each object counts as many times as it stands for others (``Weights``), in pages of
listings and batches of deletions, too. All sizes of WAL are divided by SCALE in the simulation and multiplied again in
what it tells.

Not simulated, for it depends on the data: base backups, built snapshots, drills, what branches read.
"""

from __future__ import annotations

import argparse
import asyncio
import builtins
import contextlib
import functools
import math
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from tests.support.archived_wal import FIRST, SYSTEM, incarnation
from tests.support.manual_clock import ManualClock
from tests.support.stage import InlineExecutor
from timeline.archive.chunker import CUT_BYTES, ChunkBuffers, Chunker
from timeline.archive.committer import ChunkIdentity, Committer
from timeline.archive.status import ArchiverConfig
from timeline.catalog.branch_log import BranchLog
from timeline.catalog.history import History
from timeline.catalog.meta import create_store, read_meta
from timeline.catalog.tail import KnownChunks
from timeline.format import keys
from timeline.format.branch_state import BASE, Snapshot, Tli
from timeline.format.file_listing import write_file_listing
from timeline.format.log_change import AddSnapshot, Begin, Cover
from timeline.format.manifest import FileRow, ManifestRef
from timeline.format.page_manifest import write_page_manifest
from timeline.format.wal_index import Coverage, WalIndex, no_commits, no_touches
from timeline.lsn import Lsn
from timeline.maintain import merge as merging
from timeline.maintain import seal as sealing
from timeline.maintain.collect import collect, mark
from timeline.maintain.merge import MOST_WAL, merge_sealed
from timeline.maintain.retention import RetentionPolicy, apply_retention
from timeline.maintain.seal import SEAL_BYTES, seal
from timeline.maintain.seal_pace import SealPace
from timeline.maintain.verify import verify
from timeline.store.base import Listed, Refused
from timeline.store.memory import MemoryStore

SCALE = 256
RANGES = 4
CHUNKS = 2
"""In the second part a day has so many sealed ranges, of so many chunks each."""
FILLED = 0.7
"""How full of the WAL that it may hold a merged range is, as far as it goes."""
DAYS = 30
DAY = 86_400.0
PAGE_KEYS = 1000
"""S3 lists, and deletes, so many at a time."""
RATIO = 0.35
"""Stored bytes per byte of WAL, as `tl init` estimates it; the index is in it."""
_CUT = CUT_BYTES // SCALE
_HEADER_BYTES = 330
"""What a chunk takes beside its WAL; not divided by SCALE."""
_EXECUTOR = InlineExecutor()
_CONFIG = ArchiverConfig(conninfo="")
BEGIN_MARK, END_MARK = "<!-- cost -->", "<!-- /cost -->"


@dataclass(frozen=True, slots=True)
class Prices:
    """Of requests and room, in US dollars. The defaults are an example: AWS's list prices of S3 Standard in
    us-east-1, as they were in January 2025; traffic inside the region is free there, and so is DELETE."""

    per_1000_put: float = 0.005
    per_1000_get: float = 0.0004
    per_1000_list: float = 0.005
    gb_month: float = 0.023


@dataclass(frozen=True, slots=True)
class Requests:
    """How many of each verb."""

    put: float = 0.0
    get: float = 0.0
    list: float = 0.0
    delete: float = 0.0

    def __add__(self, other: Requests) -> Requests:
        return Requests(
            self.put + other.put, self.get + other.get, self.list + other.list, self.delete + other.delete
        )

    def __sub__(self, other: Requests) -> Requests:
        return self + other.times(-1)

    def times(self, factor: float) -> Requests:
        """So many of these."""
        return Requests(self.put * factor, self.get * factor, self.list * factor, self.delete * factor)

    def dollars(self, prices: Prices) -> float:
        """Their price."""
        return (
            self.put * prices.per_1000_put + self.get * prices.per_1000_get + self.list * prices.per_1000_list
        ) / 1000


@dataclass(frozen=True, slots=True)
class Load:
    """What a source writes, and how its history is kept."""

    name: str
    wal_per_second: float
    """Bytes; 0: nothing at all."""
    window_days: float | None
    """``None``: all history is kept."""
    base_days: float = 7.0
    """A base backup every so often."""

    @property
    def chunk_seconds(self) -> float:
        """From one chunk to the next: when it is full, or at the latest when it is old enough."""
        full = CUT_BYTES / self.wal_per_second if self.wal_per_second else math.inf
        return full if full < _CONFIG.max_delay_seconds else _CONFIG.max_delay_seconds


@dataclass(frozen=True, slots=True)
class Stretch:
    """An archiver at work for a while; for a soak's figures, any numbers."""

    seconds: float
    chunks: int
    chunk_bytes: int
    """Of WAL in each, in truth."""
    starts: int = 1
    """Archivers, one after another."""
    seals: int | None = None
    """How often it seals, evenly; ``None``: as soon as it may, as on a machine with time for it."""


@dataclass(frozen=True, slots=True)
class Month:
    """What 30 days come to."""

    load: Load
    archiving: Requests
    """A day of the archiver."""
    keeping: Requests
    """Retention, collection, verification and facts: a day of the last week."""
    objects: float
    gigabytes: float
    """In the store after 30 days."""

    def dollars(self, prices: Prices) -> float:
        """Of a month of days like the last one."""
        daily = self.archiving + self.keeping
        return daily.dollars(prices) * DAYS + self.gigabytes * prices.gb_month


LOADS = (
    Load("idle, everything kept", 0.0, None),
    Load("10 MB/s, everything kept", 10e6, None),
    Load("10 MB/s, 7 days kept", 10e6, 7.0),
)


@dataclass(frozen=True, slots=True)
class Weights:
    """How many objects one of each kind stands for."""

    chunk: float = 1.0
    pack: float = 1.0
    manifest: float = 1.0
    entry: float = 1.0


class MeteredStore(MemoryStore):
    """Counts requests as S3 would, of objects that stand for several of them."""

    def __init__(self, weights: Weights | None = None) -> None:
        super().__init__()
        self._weights = weights or Weights()
        self.requests = Requests()

    def weight_of(self, key: str) -> float:
        """How many objects this one stands for."""
        if key.startswith("wal/"):
            return self._weights.chunk
        if key.startswith(keys.PACKS):
            return self._weights.pack
        if key.startswith(keys.MANIFESTS):
            return self._weights.manifest
        return self._weights.entry if key.startswith(keys.log_prefix("main")) else 1.0

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        self.requests += Requests(put=1)
        return await super().create(key, data)

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        # Whoever reads one manifest reads all that it stands for; entries and chunks are read one by one.
        self.requests += Requests(get=self.weight_of(key) if key.startswith(keys.MANIFESTS) else 1)
        return await super().get(key, start, length)

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[Listed]:
        found = await super().list(prefix, after=after, limit=limit)
        self.requests += Requests(list=self._pages([one.key for one in found]))
        return found

    async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        self.requests += Requests(delete=self._pages(keys) if keys else 0)
        return await super().delete(keys)

    def _pages(self, listed: Sequence[str]) -> int:
        return max(1, math.ceil(sum(map(self.weight_of, listed)) / PAGE_KEYS))

    async def totals(self) -> tuple[float, float]:
        """Objects, and bytes in truth: those of WAL, for which a chunk or a pack of CHUNKS chunks stands, and manifests."""
        listed = await super().list("")
        stored = 0.0
        for one in listed:
            wal = one.key.startswith(("wal/", keys.PACKS))
            stored += one.size * (self._weights.chunk * SCALE if wal else self._kept(one.key))
        return sum(self._kept(one.key) for one in listed), stored

    def _kept(self, key: str) -> float:
        """Of log entries hardly more than those since the last complete one are kept, however many there were."""
        return 1.0 if key.startswith(keys.log_prefix("main")) else self.weight_of(key)


class _OneRecord:
    """What stands for the scan of made-up WAL: a record at the end of each chunk."""

    def __init__(self, position: Lsn) -> None:
        self._position = position

    def feed(self, wal: bytes | bytearray | memoryview) -> WalIndex:
        self._position = Lsn(self._position + len(wal))
        return WalIndex(
            Lsn(self._position - 8), self._position, self._position, 1, no_commits(), (), no_touches()
        )


@contextlib.contextmanager
def scaled() -> Iterator[None]:
    """Sizes that decide when something is due, divided as the WAL is."""
    with (
        patch.multiple(
            sealing,
            SEAL_BYTES=SEAL_BYTES // SCALE,
            FRAME_BYTES=sealing.FRAME_BYTES // SCALE,
            _PACK_BYTES=sealing._PACK_BYTES // SCALE,
        ),
        patch.object(merging, "MOST_WAL", merging.MOST_WAL // SCALE),
    ):
        yield


class Archiver:
    """The real parts of an archiver without a source: what it is given is made up."""

    def __init__(self, store: MeteredStore) -> None:
        self.store = store
        self.clock = ManualClock()
        self.log = BranchLog(store, "main", self.clock, "cost")
        self.position = FIRST
        self.identity = ChunkIdentity("0" * 32, "main", SYSTEM, 1, "cost", 0)
        self._draw = random.Random(1)

    async def begin(self) -> None:
        """A new store, and the first tli."""
        meta = await create_store(self.store, self.clock)
        await self.log.append(Begin(incarnation(FIRST), Tli(1, None, FIRST, FIRST, None, None)))
        self.identity = replace(self.identity, store_id=meta.store_id)

    async def start(self) -> None:
        """What a new archiver asks before it streams, as Session and the first lookers-on do it."""
        await read_meta(self.store, writing=True)
        await self.log.load()
        history = await History.load(self.store)
        await history.tail(1)
        epoch, _ = await self.log.claim_epoch()
        self.identity = replace(self.identity, epoch=epoch)
        await self.log.load()
        await (await History.load(self.store)).tail(1)
        await self.log.load()

    @contextlib.asynccontextmanager
    async def stream(self) -> AsyncIterator[None]:
        """A committer at the present position."""
        self.chunker = Chunker(1, Lsn(self.position), cut_bytes=_CUT, buffers=ChunkBuffers(_CUT))
        self.committer = Committer(
            self.store,
            self.identity,
            Lsn(self.position),
            _OneRecord(Lsn(self.position)),
            clock=self.clock,
            executor=_EXECUTOR,
            uploads_in_flight=4,
            patience_seconds=300,
        )
        try:
            yield
        finally:
            await self.committer.aclose()

    async def put(self, count: int) -> None:
        """One chunk of so many bytes (scaled), or as many as they fill."""
        kept = max(0, int(count * RATIO) - _HEADER_BYTES)
        data = self._draw.randbytes(min(kept, count)) + bytes(count - min(kept, count))
        full = self.chunker.add(data, self.clock.monotonic())
        rest = self.chunker.cut()
        for chunk in (*full, *((rest,) if rest is not None else ())):
            self.committer.submit(chunk)
        await self.committer.drain()
        self.position = self.committer.durable


async def archive_stretch(store: MeteredStore, stretch: Stretch) -> Requests:
    """What an archiver asks for in that time, beginning with its start."""
    archiver = Archiver(store)
    await archiver.begin()
    before = store.requests
    with scaled():
        for number in range(stretch.starts):
            chunks = (
                stretch.chunks * (number + 1) // stretch.starts - stretch.chunks * number // stretch.starts
            )
            await archiver.start()
            async with archiver.stream():
                seals = None if stretch.seals is None else stretch.seals / stretch.starts
                await _steps(archiver, stretch.seconds / stretch.starts, chunks, stretch.chunk_bytes, seals)
    return store.requests - before


async def _steps(
    archiver: Archiver, seconds: float, chunks: int, chunk_bytes: int, seals: float | None
) -> None:
    """Chunks, polls, fence checks and heartbeats, each at its time."""
    from cli.archive import SEAL_PAUSE_SECONDS

    clock, began = archiver.clock, archiver.clock.monotonic()
    scaled_bytes = max(1, chunk_bytes // SCALE)
    pace, known, sent = SealPace(), KnownChunks(), 0
    paced = seals is None
    pause = SEAL_PAUSE_SECONDS if seals is None else seconds / seals if seals else math.inf
    poll, fence, beat = (
        pause,
        _CONFIG.fence_check_seconds,
        _CONFIG.heartbeat_seconds if not chunks else math.inf,
    )
    every = seconds / chunks if chunks else math.inf
    while True:
        next_chunk = (sent + 1) * every if sent < chunks else math.inf
        at = min(next_chunk, poll, fence, beat)
        if at > seconds:
            break
        clock.advance(began + at - clock.monotonic())
        if at == next_chunk:
            await archiver.put(scaled_bytes)
            sent += 1
        if at == fence:
            await archiver.log.load()
            fence += _CONFIG.fence_check_seconds
        if at == beat:
            await archiver.log.append(
                Cover(Coverage(1, Lsn(archiver.position), clock.now())), epoch=archiver.identity.epoch
            )
            beat += _CONFIG.heartbeat_seconds
        if at == poll:
            poll += pause
            pace = pace.seen(Lsn(archiver.position * SCALE), sent, at)
            if not paced or pace.is_due(at):
                while await seal(archiver.store, archiver.log, clock, force=not paced, known_chunks=known):
                    await merge_sealed(archiver.store, archiver.log, clock)
                pace = pace.asked(at)
    clock.advance(max(0.0, began + seconds - clock.monotonic()))


@functools.cache
def archiving_day(load: Load) -> Requests:
    """Twenty minutes under load, without the start, as often as a day has them."""
    # A quiet day costs nothing to simulate; its beginning is not like the rest.
    seconds = 1200.0 if load.wal_per_second else 86_400.0
    count = int(seconds / load.chunk_seconds) if load.wal_per_second else 0
    size = int(min(CUT_BYTES, load.wal_per_second * load.chunk_seconds))
    whole = asyncio.run(archive_stretch(MeteredStore(), Stretch(seconds, count, size)))
    start = asyncio.run(archive_stretch(MeteredStore(), Stretch(0.0, 0, size)))
    return (whole - start).times(DAY / seconds)


async def keep(load: Load) -> tuple[Requests, float, float]:
    """30 days of history and what is done with it once a day: (requests of a day of the last week, objects, bytes)."""
    store = MeteredStore(_weights(load))
    archiver = Archiver(store)
    await archiver.begin()
    await archiver.start()
    policy = RetentionPolicy(window_seconds=load.window_days * DAY) if load.window_days is not None else None
    last = Requests()
    with scaled():
        async with archiver.stream():
            await archiver.put(_CUT)
            await seal(store, archiver.log, archiver.clock, force=True)
            for day in range(DAYS):
                await _write(archiver, load)
                if day % load.base_days == 0:
                    await _base(archiver, f"base-{day}")
                before = store.requests
                await _daily(archiver, policy)
                if day >= DAYS - 7:
                    last += (store.requests - before).times(1 / 7)
    objects, stored = await store.totals()
    return last, objects, stored


def _weights(load: Load) -> Weights:
    """A day of the load in RANGES sealed ranges, of CHUNKS chunks in one pack each."""
    if not load.wal_per_second:
        return Weights(entry=DAY / _CONFIG.heartbeat_seconds / RANGES)
    seals = load.wal_per_second * DAY / SEAL_BYTES
    packs = math.ceil(SEAL_BYTES * RATIO / sealing._PACK_BYTES)
    # A seal, and its part of the merges of RUN ranges; merged ranges are a little below the most they may be.
    merged = load.wal_per_second * DAY / (MOST_WAL * FILLED)
    return Weights(
        chunk=load.wal_per_second * DAY / CUT_BYTES / (RANGES * CHUNKS),
        pack=seals * packs / RANGES,
        manifest=merged / RANGES,
        entry=seals * (1 + 1 / merging.RUN) / RANGES,
    )


async def _write(archiver: Archiver, load: Load) -> None:
    """A day of WAL, sealed."""
    for _ in range(RANGES):
        archiver.clock.advance(DAY / RANGES)
        if load.wal_per_second:
            for _ in range(CHUNKS):
                await archiver.put(_CUT)
            await seal(archiver.store, archiver.log, archiver.clock, force=True)
        else:
            covered = Coverage(1, Lsn(archiver.position), archiver.clock.now())
            await archiver.log.append(Cover(covered), epoch=archiver.identity.epoch)


async def _base(archiver: Archiver, name: str) -> None:
    """A base backup of nothing."""
    nonce = archiver.clock.token(16)
    files = write_file_listing([FileRow("f", "f", 1, 0o600, None, None, Lsn(0))], nonce=nonce)
    pages = write_page_manifest([], nonce=nonce)
    refs: list[ManifestRef] = []
    for data, ref in (files, pages):
        await archiver.store.create(keys.manifest(ref.digest), data)
        refs.append(ref)
    head = await archiver.log.load()
    assert head is not None
    at = Lsn(head.state.tlis[0].sealed - 8)
    base = Snapshot(
        id=name,
        kind=BASE,
        tli=1,
        lsn=at,
        checkpoint=at,
        end=Lsn(at + 8),
        time=archiver.clock.now(),
        files=refs[0],
        pages=(refs[1],),
        boot=None,
        backup_label="label",
        tablespaces=(),
        settings=(),
        parent=None,
        bytes=0,
    )
    await archiver.log.append(AddSnapshot(base, head.number))


async def _daily(archiver: Archiver, policy: RetentionPolicy | None) -> None:
    """`tl gc --yes`, `tl verify`, 24 measurements of the size, and what the metrics ask once a minute."""
    store, log, clock = archiver.store, archiver.log, archiver.clock
    if policy is not None:
        await apply_retention(store, log, clock, policy)
    await collect_and_mark(store, log, clock, DAY / 2)
    report = await verify(store, clock)
    if report.problems:
        raise RuntimeError(f"the simulated store is not whole: {report.problems[:3]}")
    before = store.requests
    await ask_facts(store)
    # One of 1,440 that are alike.
    store.requests += (store.requests - before).times(DAY / 60 - 1)
    before = store.requests
    for prefix in ("wal/", keys.PACKS, keys.MANIFESTS, keys.log_prefix("main")):
        await store.list(prefix)
    store.requests += (store.requests - before).times(23)


async def collect_and_mark(
    store: MeteredStore, log: BranchLog, clock: ManualClock, grace_seconds: float
) -> None:
    """As `tl gc --yes` does it."""
    await collect(store, log, clock, grace_seconds, _no_progress)
    head = await log.load()
    if head is not None and head.state.collection.mark is None:
        await mark(store, log, clock, _no_progress)


async def ask_facts(store: MeteredStore) -> None:
    """What the daemon asks the store for its metrics."""
    history = await History.load(store)
    await history.reachable()
    await history.tail(1)
    await history.remarks()


def _no_progress(phase: str, done: int, total: int) -> None:
    pass


def simulate(load: Load) -> Month:
    """30 days of a load."""
    # It is the same however long history is kept.
    archiving = archiving_day(replace(load, name="", window_days=None))
    keeping, objects, stored = asyncio.run(keep(load))
    return Month(load, archiving, keeping, objects, stored / 1e9)


def markdown(months: Sequence[Month], prices: Prices) -> str:
    """The README's table."""
    lines = [
        "| a day, 30 days on | PUT | GET | LIST | DELETE | objects | GB | example, $ a month |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for month in months:
        for name, requests in (("archiver", month.archiving), ("jobs", month.keeping)):
            counts = (requests.put, requests.get, requests.list, requests.delete)
            lines.append(
                f"| {month.load.name}: {name} | "
                + " | ".join(f"{_round(count):,}" for count in counts)
                + (
                    f" | {_round(month.objects):,} | {_round(month.gigabytes):,} | {month.dollars(prices):,.2f} |"
                    if name == "jobs"
                    else " | | | |"
                )
            )
    return "\n".join(lines)


def _round(value: float) -> int:
    """To three digits: more would be pretended."""
    if value < 1000:
        return round(value)
    step = 10 ** (int(math.log10(value)) - 2)
    return int(round(value / step) * step)


def written(text: str, table: str) -> str:
    """The README with this table in its place; raises ValueError when it has none."""
    begin, end = text.find(BEGIN_MARK), text.find(END_MARK)
    if begin < 0 or end < begin:
        raise ValueError(f"there is no {BEGIN_MARK} … {END_MARK}")
    return text[: begin + len(BEGIN_MARK)] + "\n" + table + "\n" + text[end:]


def main() -> None:
    """Entry point of `make cost-table`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="put the table there instead of printing it"
    )
    for name, value in (
        ("put", Prices().per_1000_put),
        ("get", Prices().per_1000_get),
        ("list", Prices().per_1000_list),
    ):
        parser.add_argument(
            f"--price-{name}", type=float, default=value, metavar="DOLLARS", help=f"of 1,000 {name.upper()}"
        )
    parser.add_argument("--price-gb-month", type=float, default=Prices().gb_month, metavar="DOLLARS")
    given = parser.parse_args()
    prices = Prices(given.price_put, given.price_get, given.price_list, given.price_gb_month)
    table = markdown([simulate(load) for load in LOADS], prices)
    if given.write is None:
        print(table)
    else:
        given.write.write_text(written(given.write.read_text(), table))


if __name__ == "__main__":
    main()
