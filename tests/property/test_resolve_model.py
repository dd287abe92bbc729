"""Resolving moments against a plain model of the same history: any times, any cuts, seals, a fork, both
lines."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.archived_wal import FIRST, NOON, SECOND, Archive, Server, canonical
from tests.support.wal_builder import Built
from timeline.catalog.history import History
from timeline.catalog.target import Target
from timeline.catalog.when import AtLsn, AtTime, BeforeRestorePoint, BeforeXid, Latest, When
from timeline.clock import POSTGRES_EPOCH_MICROS
from timeline.errors import TargetUnreachable
from timeline.lsn import Lsn
from timeline.maintain import seal as sealing


@dataclass(frozen=True)
class Step:
    """One thing that happens to the branch."""

    kind: str
    amount: int


STEPS = st.lists(
    st.builds(
        Step,
        kind=st.sampled_from(
            ["commit", "commit", "commit", "abort", "fill", "name", "chunk", "chunk", "cover", "seal", "fork"]
        ),
        amount=st.integers(0, 1000),
    ),
    max_size=30,
)


@dataclass
class World:
    """The archive, and what it was made of."""

    archive: Archive
    first: Server
    second: Server | None = None
    fork: int = 0
    base_end: int = 0
    covered: int = 0
    """Latest statement of coverage on the first tli, or on the second."""

    @property
    def server(self) -> Server:
        return self.second or self.first

    def complete(self, tli: int) -> list[Built]:
        """Records of the line to that tli that are wholly archived."""
        durable = self.archive.durable
        if tli == 1 or self.second is None:
            return [record for record in self.first.records if record.end <= durable[1]]
        return [record for record in self.first.records if record.end <= self.fork] + [
            record for record in self.second.records if record.end <= durable[2]
        ]

    def bytes(self, tli: int, start: int, end: int) -> bytes:
        return (self.first if tli == 1 or self.second is None else self.second).bytes(start, end)


async def build(steps: Sequence[Step]) -> World:
    archive, server = Archive(), Server(1, FIRST)
    world = World(archive, server)
    await archive.begin(server)
    clock = NOON
    server.fill(100)
    server.commit(clock, 3)
    world.base_end = server.end
    server.fill(10)
    await archive.archive(server)
    await archive.snapshot("base", 1, FIRST + 40, world.base_end)
    for number, step in enumerate(steps):
        server = world.server
        # The clock of the source goes on, and the stamps of its transactions jitter around it.
        clock += step.amount % 7 * SECOND
        stamp = clock + (step.amount % 13 - 9) * SECOND
        match step.kind:
            case "commit":
                server.commit(stamp, 100 + number)
            case "abort":
                server.abort(stamp, 100 + number)
            case "fill":
                server.fill(step.amount * step.amount % 30_000 + 1)
            case "name":
                server.restore_point(f"point-{step.amount % 3}", clock)
            case "chunk":
                durable = archive.durable[server.tli]
                await archive.archive(server, durable + (server.end - durable) * step.amount // 1000)
            case "cover":
                world.covered = max(world.covered, clock)
                await archive.archive(server, covered=clock)
            case "seal":
                await archive.seal()
            case "fork" if world.second is None:
                await archive.archive(server)
                ends = [record.end for record in server.records if record.end >= world.base_end]
                world.fork = ends[step.amount % len(ends)]
                world.second = server.cut_back(world.fork).promote(2)
                await archive.switch(server, Lsn(world.fork), world.second)
    return world


def is_end(record: Built) -> bool:
    return record.rmid == 1


def is_commit(record: Built) -> bool:
    return record.rmid == 1 and record.info == 0x00


def stamp_of(record: Built) -> int:
    return int(struct.unpack_from("<q", record.main)[0]) + POSTGRES_EPOCH_MICROS


async def check(world: World, history: History, when: When, tli: int, included: int) -> Target:
    """The target holds exactly the first ``included`` records of the line."""
    records = world.complete(tli)
    target = await history.resolve(when, tli=tli)
    last = records[included - 1]
    assert canonical(target.lsn) == canonical(last.end), (when, target.lsn, last)
    assert target.last_record == last.start
    committed = [record for record in records[:included] if is_commit(record)]
    left_out = [record for record in records[included:] if is_commit(record)]
    assert target.last_commit is not None and target.last_commit.start == committed[-1].start
    assert target.last_commit.time == stamp_of(committed[-1])
    assert (target.next_commit.start if target.next_commit else None) == (
        left_out[0].start if left_out else None
    )
    assert target.snapshot.id == "base"
    return target


async def check_line(world: World, tli: int) -> None:
    history = await world.archive.history()
    records = world.complete(tli)
    reachable_from = next(n for n, record in enumerate(records) if record.end >= world.base_end) + 1
    stamps = [stamp_of(record) for record in records if is_end(record)]
    target = await check(world, history, Latest(), tli, len(records))

    wal = b""
    async with aclosing(history.wal(target.spans)) as pieces:
        async for found in pieces:
            assert bytes(found.data) == world.bytes(found.piece.tli, found.piece.start, found.piece.end)
            wal += found.data
    assert len(wal) == target.lsn - target.snapshot.lsn

    for time in sorted({stamp + delta for stamp in stamps for delta in (-1, 0, 1)}):
        crossing = next((n for n, one in enumerate(records) if is_end(one) and stamp_of(one) > time), None)
        if crossing is not None and crossing >= reachable_from and time >= NOON:
            await check(world, history, AtTime(time), tli, crossing)
        elif crossing is not None or time > max(*stamps, world.covered):
            with pytest.raises(TargetUnreachable):
                await history.resolve(AtTime(time), tli=tli)

    for number, record in enumerate(records):
        if is_end(record) and number >= reachable_from:
            await check(world, history, BeforeXid(record.xid), tli, number)
        for lsn in (record.start, record.start + 1, record.end - 1, record.end):
            included = sum(one.start < lsn for one in records)
            if included >= reachable_from and canonical(lsn) <= canonical(records[-1].end):
                await check(world, history, AtLsn(Lsn(lsn)), tli, included)

    for name in ("point-0", "point-1", "point-2", "point-3"):
        first = next((n for n, one in enumerate(records) if name.encode() in one.main), None)
        if first is None:
            with pytest.raises(TargetUnreachable):
                await history.resolve(BeforeRestorePoint(name), tli=tli)
        else:
            await check(world, history, BeforeRestorePoint(name), tli, first + 1)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_every_moment_is_what_the_model_says(steps: list[Step]) -> None:
    """P6, P7, EDGE 17, 18, 35, 38, 39, 40."""

    async def run() -> None:
        world = await build(steps)
        await check_line(world, 1)
        if world.second is not None:
            await check_line(world, 2)

    with pytest.MonkeyPatch.context() as patch:
        # Small frames, so that seals of little WAL have several.
        patch.setattr(sealing, "FRAME_BYTES", 3000)
        asyncio.run(run())
