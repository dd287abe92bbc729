"""Put the WAL of (S, T] into segment files that only this branch uses.

Promises: a file has its final name only when it is complete: full length, bytes of the right tli (EDGE
17, 25), no tablespace creation with a path (EDGE 49), and zero from T on, so that Postgres cannot replay
past T whatever else goes wrong. Files are our own copies, never links (Postgres recycles and overwrites
segments).

Two ways to Postgres. Up to ``WHOLE_BYTES`` everything is in ``pg_wal`` before it starts, and
``restore_command`` only fails. Above, it starts at once and ``restore_command`` waits for each segment in
a feed directory and moves it into place; at most ``FEED_AHEAD`` segments lie ready there, so disk use
does not grow with the WAL.

Crash behaviour: nothing is synced; a branch whose first recovery was interrupted is thrown away (EDGE
57). When the feeding process dies its beat stops, ``restore_command`` gives up after
``BEAT_LIMIT_SECONDS``, and Postgres ends with an error, because its target was not reached.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import mmap
import os
import shlex
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from restore.host import Host
from restore.plan import BranchPlan, RedoPoint, SegmentFile, WalSpan
from restore.threads import to_the_end
from restore.wal_creates import find_creates, has_path
from timeline.clock import Clock
from timeline.errors import CheckFailed, TimelineError
from timeline.lsn import Lsn
from timeline.pg.control import CONTROL_FILE, parse_control
from timeline.pg.errors import FormatError
from timeline.pg.redo_point import redo_point_patches, segment_header
from timeline.pg.wal_machine import PAGE_BYTES
from timeline.pg.wal_patch import blank_tablespace_creates, read_record

WHOLE_BYTES = 64 << 20
FEED_AHEAD = 16
BEAT_LIMIT_SECONDS = 30
_BEAT_SECONDS = 0.5
_FEED_POLL_SECONDS = 0.01
_RECORD_WINDOW_BYTES = 3 * PAGE_BYTES
"""A creation takes about 1 KiB: with page headers it touches two pages, never three."""

_FEED_SCRIPT = """\
#!/bin/sh
# Postgres asks for the WAL file $1, to be put at $2; segments appear in the directory $3.
case $1 in *.history) exit 1 ;; esac
# What was handed over before lies in pg_wal already, where Postgres looks when we fail.
[ ! -e "pg_wal/$1" ] || exit 1
beat= still=0
while :; do
    ended=; [ ! -e "$3/ended" ] || ended=1
    [ ! -e "$3/$1" ] || exec mv "$3/$1" "$2"
    [ -z "$ended" ] || exit 1
    now=; read -r now < "$3/beat"
    if [ "$now" = "$beat" ]; then still=$((still + 1)); else still=0 beat=$now; fi
    [ "$still" -lt LIMIT ] || exit 1
    sleep 0.01
done
"""


class RedoPointMisfit(FormatError):
    """Replay cannot begin at this snapshot: its pg_control, the plan and the WAL do not fit each other."""

    def __init__(self, error: FormatError) -> None:
        """``error``: what does not fit."""
        super().__init__(error.subject, error.offset, error.expectation, hint=error.hint)
        self.message = error.message
        self.args = (error.message,)


WalReader = Callable[[Sequence[WalSpan]], AsyncGenerator[tuple[Lsn, bytes | memoryview], None]]
"""Reads the WAL of the spans: consecutive verified pieces, each with its LSN."""


@dataclass(frozen=True, slots=True)
class Feed:
    """Where segments wait for ``restore_command``."""

    directory: Path

    @property
    def restore_command(self) -> str:
        """What Postgres runs for each file it wants."""
        command = f"/bin/sh {shlex.quote(str(self.directory / 'take.sh'))}"
        directory = shlex.quote(str(self.directory))
        return f"{command} %f %p {directory}".replace("%", "%%").replace("%%f %%p", "%f %p", 1)

    def create(self, host: Host) -> None:
        """Make the directory and the script."""
        host.make_private(self.directory)
        # A pause of the script is 10 ms and its other work: twice that at most, on a busy host.
        limit = str(int(BEAT_LIMIT_SECONDS / 0.01))
        (self.directory / "take.sh").write_text(_FEED_SCRIPT.replace("LIMIT", limit))
        (self.directory / "beat").write_text("0\n")
        for path in self.directory.iterdir():
            host.own(path)


def write_histories(plan: BranchPlan, directory: Path, host: Host) -> None:
    """The history files that the plan names."""
    for history in plan.histories:
        path = directory / history.name
        path.write_text(history.text)
        host.own(path)


async def write_wal(
    plan: BranchPlan,
    read: WalReader,
    directory: Path,
    host: Host,
    *,
    creates: Sequence[Lsn],
    before_release: Callable[[SegmentFile], Awaitable[None]] | None = None,
    control: Callable[[], Awaitable[bytes]] | None = None,
) -> None:
    """Write the plan's segments into the directory; each appears there when it is complete.

    ``creates``: starts of the tablespace creations that the index knows; the bytes are searched besides.
    ``before_release``: awaited before a segment appears. ``control``: gives the branch's pg_control, needed
    where replay begins at a redo point of ours. Raises TimelineError when the WAL read does not join up or
    does not fit the redo point, and what ``read`` raises.
    """
    writer = _SegmentWriter(plan, directory, host, creates)

    async def release(finished: list[SegmentFile]) -> None:
        for segment in finished:
            if segment is plan.segments[0] and plan.redo_point is not None and control is not None:
                await to_the_end(functools.partial(writer.plant, segment, plan.redo_point, await control()))
            if before_release is not None:
                await before_release(segment)
            writer.release(segment)

    try:
        async with aclosing(read(plan.spans)) as pieces:
            async for lsn, data in pieces:
                await release(await to_the_end(functools.partial(writer.write, lsn, data)))
        await release(await to_the_end(writer.finish))
    finally:
        writer.close()


async def feed_wal(
    plan: BranchPlan,
    read: WalReader,
    feed: Feed,
    host: Host,
    clock: Clock,
    *,
    creates: Sequence[Lsn],
    control: Callable[[], Awaitable[bytes]] | None = None,
) -> None:
    """Write the segments into the feed as Postgres takes them. Cancel it when Postgres has ended."""
    waiting: collections.deque[Path] = collections.deque()

    async def make_room(segment: SegmentFile) -> None:
        while len(waiting) >= FEED_AHEAD:
            if waiting[0].exists():
                await clock.sleep(_FEED_POLL_SECONDS)
            else:
                waiting.popleft()
        waiting.append(feed.directory / segment.name)

    beating = asyncio.create_task(_beat(feed, clock))
    try:
        await write_wal(
            plan,
            read,
            feed.directory,
            host,
            creates=creates,
            before_release=make_room,
            control=control,
        )
        (feed.directory / "ended").touch()
    finally:
        beating.cancel()


async def _beat(feed: Feed, clock: Clock) -> None:
    temporary = feed.directory / ".beat"
    count = 0
    while True:
        count += 1
        temporary.write_text(f"{count}\n")
        temporary.chmod(0o644)
        temporary.replace(feed.directory / "beat")
        await clock.sleep(_BEAT_SECONDS)


@dataclass(slots=True)
class _Open:
    """A segment being written, under a temporary name."""

    segment: SegmentFile
    path: Path
    descriptor: int


class _SegmentWriter:
    """Writes consecutive bytes into segment files; a file is finished once the one after it is, too,
    because a
    record may begin in the one and end in the other."""

    def __init__(self, plan: BranchPlan, directory: Path, host: Host, creates: Sequence[Lsn]) -> None:
        self._incarnation = plan.incarnation
        self._bytes = plan.incarnation.segment_bytes
        self._directory = directory
        self._host = host
        self._creates = creates
        self._segments = collections.deque(plan.segments)
        self._position = plan.spans[0].start if plan.spans else plan.lsn
        self._end = plan.lsn
        self._open: list[_Open] = []

    def write(self, lsn: Lsn, data: bytes | memoryview) -> list[SegmentFile]:
        """Add bytes; the segments that may be released now."""
        if lsn != self._position:
            raise TimelineError(f"the WAL read goes on at {lsn} where {self._position} was expected")
        view = memoryview(data)
        done: list[SegmentFile] = []
        while view:
            if not self._open or self._position == self._open[-1].segment.end:
                done += self._advance()
            current = self._open[-1]
            part = view[: current.segment.end - self._position]
            _write_at(current.descriptor, part, self._position - current.segment.start)
            self._position = Lsn(self._position + len(part))
            view = view[len(part) :]
        return done

    def finish(self) -> list[SegmentFile]:
        """The rest, when everything up to T has been written."""
        if self._position != self._end:
            raise TimelineError(f"the WAL read ends at {self._position}, before {self._end}")
        done = []
        while self._open:
            done.append(self._seal_first())
        return done

    def release(self, segment: SegmentFile) -> None:
        """Let a finished segment appear under its own name."""
        path = self._temporary(segment)
        self._host.own(path)
        path.replace(self._directory / segment.name)

    def plant(self, segment: SegmentFile, point: RedoPoint, control: bytes) -> None:
        """Put the checkpoint that ``control`` names into the finished first segment; raises RedoPointMisfit."""
        try:
            self._check_control(point, control)
            self._plant(segment, point, control)
        except FormatError as error:
            raise RedoPointMisfit(error) from error

    def _plant(self, segment: SegmentFile, point: RedoPoint, control: bytes) -> None:
        with open(self._temporary(segment), "r+b") as file:
            file.seek(point.page - segment.start)
            wal = bytearray(file.read())
            follows = self._end > point.lsn
            patches = list(
                redo_point_patches(wal, point.page, control, tli_start=point.tli_start, follows=follows)
            )
            if point.page > segment.start:
                patches.append(segment_header(wal, point.page, control))
            for patch in patches:
                file.seek(patch.at - segment.start)
                file.write(patch.data)

    def _check_control(self, point: RedoPoint, control: bytes) -> None:
        """It was made for this very point, of this very cluster."""
        found = parse_control(control)
        if found.system_identifier != self._incarnation.system_identifier:
            raise FormatError(
                CONTROL_FILE, 0, f"expected one of system {self._incarnation.system_identifier}"
            )
        if (found.min_recovery_point, found.checkpoint.tli) != (point.lsn, point.tli):
            raise FormatError(CONTROL_FILE, 0, f"expected one made for {point.lsn} of tli {point.tli}")

    def close(self) -> None:
        """Close what is open; unfinished files stay under their temporary names."""
        for entry in self._open:
            os.close(entry.descriptor)
        self._open.clear()

    def _temporary(self, segment: SegmentFile) -> Path:
        return self._directory / f".{segment.name}"

    def _advance(self) -> list[SegmentFile]:
        """Open the next segment; the one before the last is then complete."""
        if not self._segments:
            raise TimelineError(f"the WAL read goes beyond {self._end}")
        done = [self._seal_first()] if len(self._open) == 2 else []
        segment = self._segments.popleft()
        path = self._temporary(segment)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # Full length and zero beyond what is written: a shorter file would be fatal to recovery.
        os.ftruncate(descriptor, self._bytes)
        self._open.append(_Open(segment, path, descriptor))
        return done

    def _seal_first(self) -> SegmentFile:
        """Make the oldest open segment safe to replay, and close it."""
        first = self._open[0]
        found = set(self._search(first))
        found.update(at for at in self._creates if first.segment.start <= at < first.segment.end)
        for at in sorted(found):
            self._blank(at)
        for at in self._search(first):
            raise CheckFailed(f"the tablespace creation at {at} could not be made harmless")
        os.close(self._open.pop(0).descriptor)
        return first.segment

    def _search(self, entry: _Open) -> list[Lsn]:
        """Creations with a path that begin in the segment."""
        with mmap.mmap(entry.descriptor, self._bytes, prot=mmap.PROT_READ) as wal:
            view = memoryview(wal)[: _round_up(entry.segment.end - entry.segment.start)]
            try:
                inside = list(find_creates(view, entry.segment.start, self._bytes))
            finally:
                view.release()
        # One that goes on in the next segment is found in a window around the boundary.
        boundary = entry.segment.start + self._bytes
        if len(self._open) > 1 and entry is self._open[0]:
            window = Lsn(boundary - _RECORD_WINDOW_BYTES)
            data = self._read(window, 2 * _RECORD_WINDOW_BYTES)
            inside += [
                at
                for at in find_creates(data, window, self._bytes)
                if window <= at < boundary and at not in inside
            ]
        return inside

    def _blank(self, at: Lsn) -> None:
        start = Lsn(at - at % PAGE_BYTES)
        window = bytearray(self._read(start, _RECORD_WINDOW_BYTES))
        if not has_path(read_record(window, start, at, self._bytes)):
            return
        blank_tablespace_creates(window, start, self._bytes, [at])
        self._write(start, window)

    def _read(self, start: Lsn, length: int) -> bytes:
        """Bytes of the open segments; fewer at the end of what was written."""
        parts = []
        for entry in self._open:
            first = max(start, entry.segment.start)
            last = min(start + length, entry.segment.start + self._bytes)
            if first < last:
                parts.append(os.pread(entry.descriptor, last - first, first - entry.segment.start))
        return b"".join(parts)

    def _write(self, start: Lsn, data: bytes | bytearray) -> None:
        view = memoryview(data)
        for entry in self._open:
            first = max(start, entry.segment.start)
            last = min(start + len(view), entry.segment.start + self._bytes)
            if first < last:
                _write_at(entry.descriptor, view[first - start : last - start], first - entry.segment.start)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data = data[written:]
        offset += written


def _round_up(length: int) -> int:
    return -(-length // PAGE_BYTES) * PAGE_BYTES
