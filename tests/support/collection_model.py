"""A store on which everybody works at once while it is collected, and what must hold after every step.

Actors are the project's own code on the memory store, except that what they archive is small and made up: the
sealer, the collectors and the log are real; builders and base backups go through the real writers of packs and
manifests and the real commits. Each may crash at a write, be stopped for weeks at any call, lose answers, and has a
clock that is wrong by up to an hour.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tests.support.archived_wal import FIRST, SYSTEM, incarnation
from tests.support.stage import SKEW, InlineExecutor, Stage, StagedClock
from timeline.archive.backup_commits import BackupCommits
from timeline.archive.extent_writer import UNKNOWN, ExtentWriter, Group, KnownGroup, create_named
from timeline.archive.page_runs import PageRuns, join_runs
from timeline.catalog.branch_log import BranchLog, LogHead, read_head
from timeline.catalog.meta import create_store
from timeline.errors import LogConflict, MissingObject, NotFound, Superseded, Unavailable
from timeline.format import keys, log
from timeline.format.branch_state import BASE, BUILT, BackupProgress, BranchState, SealedRange, Snapshot, Tli
from timeline.format.chunk import ChunkHeader, encode_chunk
from timeline.format.extent import ExtentRef
from timeline.format.file_listing import write_file_listing
from timeline.format.log import decode_entry
from timeline.format.log_change import AddSnapshot, Begin, DropSnapshots
from timeline.format.manifest import FileRow, ManifestRef, PageRow
from timeline.format.pack import NONCE_BYTES
from timeline.format.page_manifest import read_page_rows, write_page_manifest
from timeline.format.pin import PIN_ID_BYTES, Pin, encode_pin
from timeline.format.wal_index import WalIndex, no_commits, no_touches
from timeline.format.wal_manifest import read_wal_manifest
from timeline.lsn import Lsn
from timeline.maintain import collect as collecting
from timeline.maintain.seal import seal
from timeline.store.base import Refused
from timeline.store.faulty import Call, Crashed, Faults, FaultyStore
from timeline.store.memory import MemoryStore
from timeline.store.retry import RetryingStore, RetryPolicy

NOON = 1_768_910_400_000_000
GRACE_SECONDS = 86_400.0
GRACE = round(GRACE_SECONDS * 1e6)
CHUNK_BYTES = 100
CONTENTS = [bytes([value]) * 8192 for value in range(3)]
"""So few that equal objects would be made all the time, if it were not for the nonce."""
_EXECUTOR = InlineExecutor()
_POLICY = RetryPolicy(attempts=1000, deadline_seconds=1e12)


class Lost(AssertionError):
    """Something that somebody needs is not there."""


@dataclass(slots=True)
class Plan:
    """What a reader will read, and until when it may rely on it (world's time)."""

    reader: str
    objects: frozenset[str]
    until: int


class WatchedStore(MemoryStore):
    """Says when it was written to."""

    watcher: Callable[[str, str], None] | None = None

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        created = await super().create(key, data)
        if self.watcher is not None:
            self.watcher("create", key)
        return created

    async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        refused = await super().delete(keys)
        if self.watcher is not None:
            self.watcher("delete", "")
        return refused

    def has(self, key: str) -> bool:
        return key in self._objects

    def data(self, key: str) -> bytes:
        return self._objects[key]

    @property
    def keys(self) -> list[str]:
        return list(self._keys)


class World:
    """One schedule."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.stage = Stage(seed, grace=GRACE, now=NOON)
        self.store = WatchedStore()
        self.seen: Counter[str] = Counter()
        self._acknowledged = FIRST
        self._chunks: dict[int, int] = {}
        self._plans: list[Plan] = []
        self._packs: dict[str, frozenset[str]] = {}
        self._head = -1
        self._state = BranchState.empty("main")
        self._needed: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Open the store, let everybody work, then collect until nothing is left to collect."""
        draw = self.stage.random
        self.store.watcher = self._watch
        clock = StagedClock(self.stage, "opener", self.seed)
        await create_store(self.store, clock)
        opener = BranchLog(self.store, "main", clock, "opener")
        await opener.append(Begin(incarnation(FIRST), Tli(1, None, FIRST, FIRST, None, None)))
        first = Actor(self, "first", back_up)
        first.faulty.crash_at, first.faulty.faults = None, Faults()
        while not self._state.snapshots:
            await self.stage.play([first.run()])
        cast: list[tuple[str, Callable[[Actor], Awaitable[None]]]] = [
            *[("backup", back_up)] * draw.choice((0, 1, 1, 2)),
            *[("archiver", archive), ("sealer", seal_often)] * draw.choice((0, 1, 1, 2)),
            *[("builder", build)] * draw.choice((0, 1, 1, 2)),
            *[("reader", read)] * draw.choice((0, 1, 1, 2)),
            *[("thinner", thin)] * draw.choice((1, 1, 2)),
            *[("collector", collect_often)] * 2,
        ]
        actors = [Actor(self, f"{name}-{number}", play) for number, (name, play) in enumerate(cast)]
        await self.stage.play([actor.run() for actor in actors])
        await self._quiesce()

    def plan(self, plan: Plan) -> None:
        self._plans.append(plan)

    def acknowledge(self, end: int) -> None:
        self._acknowledged = Lsn(max(self._acknowledged, end))

    def chunk(self, start: int, end: int) -> None:
        self._chunks[start] = end

    def objects_of(self, value: object) -> frozenset[str]:
        """Keys of all that a state, a snapshot or a sealed range names; independent of the collector's own view."""
        named: set[str] = set()
        if isinstance(value, BranchState):
            parts: list[object] = [*value.snapshots, *value.sealed]
            for part in parts:
                named |= self.objects_of(part)
            for ref in value.progress.manifests if value.progress is not None else ():
                named |= self._manifest(ref, wal=False)
        elif isinstance(value, Snapshot):
            named.add(keys.manifest(value.files.digest))
            for ref in value.pages if value.boot is None else (*value.pages, value.boot):
                named |= self._manifest(ref, wal=False)
        elif isinstance(value, SealedRange):
            named |= self._manifest(value.manifest, wal=True)
        return frozenset(named)

    def _manifest(self, ref: ManifestRef, *, wal: bool) -> frozenset[str]:
        found = self._packs.get(ref.digest)
        if found is None:
            key = keys.manifest(ref.digest)
            if not self.store.has(key):
                raise Lost(f"{key} is named and was never there, or is gone")
            data = self.store.data(key)
            rows = read_wal_manifest(data, ref) if wal else read_page_rows(data, ref)
            packs = {row.pack if wal else row.extent.pack for row in rows}  # type: ignore[union-attr]
            found = self._packs[ref.digest] = frozenset({key, *(keys.pack(pack) for pack in packs)})
        return found

    def _watch(self, verb: str, key: str) -> None:
        if verb == "create":
            parsed = keys.parse_log_entry(key)
            if parsed is None or parsed[1] != self._head + 1:
                return
            entry = decode_entry(self.store.data(key), key)
            self._state = entry.change.apply(self._state)
            if entry.state not in (None, self._state):
                raise AssertionError(f"entry {parsed[1]} was computed from another state")
            self._head = parsed[1]
            self._needed = self.objects_of(self._state)
        self.check()

    def check(self) -> None:
        """Raises Lost when anything that is needed now is missing."""
        for key in self._needed:
            if not self.store.has(key):
                raise Lost(f"{key} is reachable from entry {self._head} and gone")
        for number in range(self._head - self._head % log.STATE_EVERY, self._head + 1):
            if not self.store.has(keys.log_entry("main", number)):
                raise Lost(f"log entry {number} is needed and gone")
        self._plans = [plan for plan in self._plans if plan.until > self.stage.now]
        for plan in self._plans:
            for key in plan.objects:
                if not self.store.has(key):
                    raise Lost(f"{key} is gone, and {plan.reader} relies on it")
        tli = self._state.find_tli(1)
        if tli is not None and self._chain(tli.sealed) < self._acknowledged:
            raise Lost(
                f"WAL up to {self._acknowledged} was acknowledged, and is there to {self._chain(tli.sealed)}"
            )

    def _chain(self, at: int) -> int:
        while at in self._chunks and self.store.has(keys.chunk("main", 1, at)):
            at = self._chunks[at]
        return at

    async def _quiesce(self) -> None:
        """With nobody at work, everything that is not needed goes."""
        clock = StagedClock(self.stage, "last collector", self.seed)
        clock.skew = 0
        branch = BranchLog(self.store, "main", clock, "last")
        self._plans = []
        for _ in range(20):
            self.stage.now += 10 * GRACE
            await collecting.collect(self.store, branch, clock, GRACE_SECONDS, _no_progress)
            head = await branch.load()
            assert head is not None
            if head.state.collection.mark is None:
                marked = await collecting.mark(self.store, branch, clock, _no_progress)
                if marked.mark is None:
                    break
        else:
            raise AssertionError("there is always something to collect")
        tli = self._state.tlis[0]
        for key in self.store.keys:
            chunk, entry = keys.parse_chunk(key), keys.parse_log_entry(key)
            kept = (
                key in self._needed
                or key == keys.META
                or (chunk is not None and chunk.start >= tli.sealed)
                or (entry is not None and entry[1] >= self._head - self._head % log.STATE_EVERY)
            )
            if not kept:
                raise AssertionError(f"{key} is garbage, and stays")


class Actor:
    """One process: its own store client, log, clock and luck."""

    def __init__(self, world: World, name: str, play: Callable[[Actor], Awaitable[None]]) -> None:
        draw = world.stage.random
        self.world = world
        self.name = name
        self.play = play
        self.clock = StagedClock(world.stage, name, world.seed)
        self.faulty = FaultyStore(
            world.store,
            seed=draw.randrange(1 << 30),
            faults=Faults(unavailable=0.02, lost_answer=0.03),
            crash_at=draw.randrange(24) if draw.random() < 0.3 else None,
            before=self._before,
        )
        self.store = RetryingStore(self.faulty, self.clock, _POLICY)
        self.log = BranchLog(self.store, "main", self.clock, name)

    async def _before(self, call: Call) -> None:
        if call.verb == "list" and call.key.startswith(keys.PACKS) and call.key[6] not in "08":
            return  # packs are listed prefix by prefix; two places to be stopped at are enough
        await self.world.stage.turn(self.name)

    def chance(self, probability: float) -> bool:
        return self.clock.random() < probability

    def pick(self, count: int) -> int:
        return int(self.clock.random() * count)

    async def run(self) -> None:
        seen = self.world.seen
        try:
            await self.play(self)
        except Crashed:
            seen["crashed"] += 1
        except Superseded:
            seen["superseded"] += 1
        except (Unavailable, LogConflict):
            seen["gave up"] += 1
        except MissingObject as error:
            # Stopped for weeks twice, in the middle of reading the log.
            if keys.parse_log_entry(error.key) is None:
                raise
            seen["slept through the log"] += 1
        except NotFound as error:
            # What was read was dropped and collected meanwhile; whether it was allowed to be, the world checks.
            seen["slept through its objects"] += 1
            if error.key in self.world.objects_of(self.world._state):
                raise


async def archive(actor: Actor) -> None:
    """Chunks of a fixed grid, at the end of the chain; whoever is late finds them taken."""
    world = actor.world
    index = WalIndex(Lsn(0), Lsn(0), FIRST, 0, no_commits(), (), no_touches())
    start = int(FIRST)
    for _ in range(2 + actor.pick(3)):
        end = start + CHUNK_BYTES
        header = ChunkHeader(
            "0" * 32, "main", SYSTEM, 1, Lsn(start), Lsn(end), actor.name, 0, actor.clock.now(), None, ""
        )
        world.chunk(start, end)
        await actor.store.create(
            keys.chunk("main", 1, start), encode_chunk(header, bytes(CHUNK_BYTES), index)
        )
        world.acknowledge(end)
        start = end


async def seal_often(actor: Actor) -> None:
    for _ in range(2):
        try:
            if await seal(actor.store, actor.log, actor.clock, force=True, tli=1) is not None:
                actor.world.seen["sealed"] += 1
        except Unavailable as error:
            if not isinstance(error.__cause__, Superseded):
                raise
            actor.world.seen["superseded seal"] += 1


async def back_up(actor: Actor) -> None:
    """Once more when it is interrupted."""
    if not await _back_up(actor):
        await _back_up(actor)


async def _back_up(actor: Actor) -> bool:
    """As basebackup.py does it: compare with the newest snapshot, carry an interrupted try on, progress now and then."""
    world = actor.world
    head = await _begun(actor)
    state = head.state
    newest = state.snapshots[-1] if state.snapshots else None
    commits = BackupCommits(actor.log, head, newest)
    runs = PageRuns(actor.store, _EXECUTOR, actor.clock)
    number = actor.clock.token(8)
    carried: tuple[ManifestRef, ...] = ()
    uploaded: dict[int, ExtentRef] = {}
    if state.progress is not None and state.progress.manifests:
        number = state.progress.id
        carried = await join_runs(actor.store, _EXECUTOR, actor.clock, state.progress.manifests)
        await commits.carry_on(dataclasses.replace(state.progress, manifests=carried, at=actor.clock.now()))
        uploaded = await _extents(actor, carried)
        world.seen["carried on"] += 1
    known = await _extents(actor, newest.pages) if newest is not None else {}
    writer = _writer(actor)
    try:
        for step in range(1 + actor.pick(4)):
            # A file may be met twice while it is renamed: its later rows count.
            group = actor.pick(2) if actor.chance(0.3) else step
            mine = KnownGroup(
                uploaded=(uploaded[group],) if group in uploaded else (),
                snapshot=(known[group],) if group in known else (),
                in_snapshot=group in known,
            )
            await writer.put(Group("f", group, CONTENTS[actor.pick(3)], mine, None, None))
            if actor.chance(0.4):
                await runs.add(await writer.take_rows())
                progress = BackupProgress(number, (*carried, *runs.manifests), 0, actor.clock.now())
                before = commits.began
                await commits.record(progress, writer)
                world.seen["began anew"] += commits.began > before
                if actor.chance(0.2):
                    return False
        rows = await writer.finish()
    finally:
        await writer.abort()
    pages = await runs.finish(rows)
    files = await _put(actor, write_file_listing(_files(), nonce=actor.clock.token(NONCE_BYTES)))
    await commits.finish(_snapshot(actor, BASE, files, pages, None))
    world.seen["backed up"] += 1
    return True


async def build(actor: Actor) -> None:
    """A delta on some snapshot, folded or not, as overlay_snapshot.py commits it."""
    world = actor.world
    for _ in range(2):
        head = await _begun(actor)
        if not head.state.snapshots:
            continue
        parent = head.state.snapshots[actor.pick(len(head.state.snapshots))]
        rows = await _rows(actor, parent.pages)
        writer = _writer(actor)
        try:
            for group in range(1 + actor.pick(3)):
                await writer.put(Group("f", group, CONTENTS[actor.pick(3)], UNKNOWN, None, None))
            fresh = await writer.finish()
        finally:
            await writer.abort()
        nonce = actor.clock.token(NONCE_BYTES)
        if actor.chance(0.5) or len(parent.pages) > 3:
            merged = {row.group: row for row in (*rows, *fresh)}
            folded = await _put(
                actor, write_page_manifest([merged[group] for group in sorted(merged)], nonce=nonce)
            )
            pages: tuple[ManifestRef, ...] = (folded,)
        else:
            delta = await _put(actor, write_page_manifest(_sorted(fresh), nonce=nonce))
            pages = (*parent.pages, delta)
        files = await _put(actor, write_file_listing(_files(), nonce=actor.clock.token(NONCE_BYTES)))
        boot = parent.boot
        if actor.chance(0.5):
            boot = await _put(
                actor, write_page_manifest(_sorted(rows)[:1], nonce=actor.clock.token(NONCE_BYTES))
            )
        try:
            await actor.log.append(AddSnapshot(_snapshot(actor, BUILT, files, pages, boot), head.number))
            world.seen["built"] += 1
        except Superseded:
            world.seen["superseded build"] += 1


async def read(actor: Actor) -> None:
    """A plan, and perhaps a pin for it [PIN-2]."""
    world = actor.world
    for _ in range(2):
        planned_at = world.stage.now
        head = await _begun(actor)
        if not head.state.snapshots:
            continue
        snapshot = head.state.snapshots[actor.pick(len(head.state.snapshots))]
        sealed = head.state.sealed[:1]
        objects = world.objects_of(snapshot).union(*(world.objects_of(one) for one in sealed))
        plan = Plan(actor.name, objects, planned_at + GRACE - 2 * SKEW)
        world.plan(plan)
        if not actor.chance(0.7):
            continue
        until = actor.clock.now() + actor.pick(6) * GRACE
        pin = Pin(
            actor.clock.token(PIN_ID_BYTES), "main", snapshot, until, actor.clock.now(), actor.name, sealed
        )
        await actor.store.create(keys.pin(pin.id), encode_pin(pin))
        again = await _begun(actor)
        if again.state.collection.collected > head.number:
            world.seen["pinned too late"] += 1
        else:
            plan.until = max(plan.until, until - actor.clock.skew)
            world.plan(plan)
            world.seen["pinned"] += 1
        await actor.store.list(keys.PINS)


async def thin(actor: Actor) -> None:
    for _ in range(4):
        head = await _begun(actor)
        known = head.state.snapshots
        if len(known) > 1 or (known and actor.chance(0.3)):
            dropped = known[actor.pick(len(known))].id
            try:
                await actor.log.append(DropSnapshots((dropped,)))
                actor.world.seen["dropped"] += 1
            except LogConflict:
                continue


async def collect_often(actor: Actor) -> None:
    world = actor.world
    for _ in range(3):
        try:
            done = await collecting.collect(actor.store, actor.log, actor.clock, GRACE_SECONDS, _no_progress)
            if done is not None:
                world.seen["collected"] += 1
                world.seen["kept"] += done.kept
            if (await collecting.mark(actor.store, actor.log, actor.clock, _no_progress)).mark is not None:
                world.seen["marked"] += 1
        except Unavailable:
            world.seen["not this time"] += 1
            await actor.clock.sleep(1)


async def _begun(actor: Actor) -> LogHead:
    head = await read_head(actor.store, "main")
    assert head is not None
    return head


async def _rows(actor: Actor, refs: Sequence[ManifestRef]) -> list[PageRow]:
    rows: list[PageRow] = []
    for ref in refs:
        rows += read_page_rows(await actor.store.get(keys.manifest(ref.digest)), ref)
    return rows


async def _extents(actor: Actor, refs: Sequence[ManifestRef]) -> dict[int, ExtentRef]:
    return {row.group: row.extent for row in await _rows(actor, refs)}


def _sorted(rows: Sequence[PageRow]) -> list[PageRow]:
    latest = {row.group: row for row in rows}
    return [latest[group] for group in sorted(latest)]


def _files() -> list[FileRow]:
    return [FileRow("f", "f", 1 << 20, 0o600, None, None, Lsn(0))]


def _writer(actor: Actor) -> ExtentWriter:
    return ExtentWriter(
        actor.store,
        "0" * 32,
        _EXECUTOR,
        actor.clock,
        pack_bytes=1,
        divert=lambda _: False,
        finished=lambda _: None,
    )


async def _put(actor: Actor, written: tuple[bytes, ManifestRef]) -> ManifestRef:
    data, ref = written
    await create_named(actor.store, keys.manifest(ref.digest), data)
    return ref


def _snapshot(
    actor: Actor, kind: str, files: ManifestRef, pages: tuple[ManifestRef, ...], boot: ManifestRef | None
) -> Snapshot:
    return Snapshot(
        id=actor.clock.token(8),
        kind=kind,
        tli=1,
        lsn=FIRST,
        checkpoint=FIRST,
        end=FIRST,
        time=actor.clock.now(),
        files=files,
        pages=pages,
        boot=boot,
        backup_label="label" if kind == BASE else None,
        tablespaces=(),
        settings=(),
        parent=None,
        bytes=0,
    )


def _no_progress(phase: str, done: int, total: int) -> None:
    pass
