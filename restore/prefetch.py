"""Have in the kernel's page cache what a replay will read, before the replay gets there.

A process of its own: it reads the same private segment files, finds out which blocks replay will read (replay_reads),
has the mount fetch them from a store that is far away, many to a request, and reads them through the mount. So the
store's latency is paid in parallel, and Postgres, which asks for 8 KiB at a time, is answered by the kernel rather than
by the mount. It is a help and nothing more: it may fail, or be late, and is stopped when the server is ready.

The child is begun while the branch is still being planned out, imports what it needs, and is told its task once there is a
plan: it waits for the mount and for the first segment. Bounds: one segment and ``WINDOW_BYTES`` of WAL in memory, ``READERS``
reads at once, ``OPEN_FILES`` files open at a time, about; ``ASKED_RANGES`` asked of the mount.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from restore.mount_control import BlockRange, prefetch, stands
from restore.plan import BranchPlan, SegmentFile
from timeline.clock import Clock, SystemClock
from timeline.errors import TimelineError
from timeline.format.extent import BLOCK_BYTES
from timeline.format.value_json import from_json, to_json
from timeline.lsn import Lsn

if TYPE_CHECKING:
    from restore.replay_reads import ReplayReads

T = TypeVar("T")

WINDOW_BYTES = 16 << 20
"""WAL looked at together, at most."""
BATCH_RANGES = 2000
"""Asked of the mount at once: the more, the fewer requests it makes of the store."""
ASKED_RANGES = 10_000
"""Asked of the mount and not read yet, at most."""
READERS = 4
OPEN_FILES = 64
REAP_SECONDS = 0.5
"""Whoever makes a branch waits no longer: one that was killed ends by itself when what it asked of the mount is answered."""
_WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.01
_STATUS_DIRECTORIES = ("pg_xact", "pg_multixact/offsets", "pg_multixact/members", "pg_commit_ts")
_STATUS_BLOCKS = 32


@dataclass(frozen=True, slots=True)
class PrefetchTask:
    """What the child needs to know."""

    data: str
    """Mount point."""
    places: tuple[str, ...]
    """Directories where segment files appear, in the order in which they are looked at."""
    segments: tuple[SegmentFile, ...]
    redo: Lsn
    end: Lsn
    segment_bytes: int
    relation_segment_bytes: int
    tablespace_directory: str
    """Name of the version's directory inside a tablespace, ``PG_15_202209061``."""
    near: bool
    """Whether the store is on this host: then there is nothing to fetch ahead."""


class Prefetcher:
    """A child at work."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def begin(cls, directory: Path) -> Prefetcher:
        """Start the child for a branch in that directory: it imports what it needs."""
        root = os.fspath(Path(__file__).parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from restore.prefetch import main; main()"
        with (directory / "prefetch.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=log, stderr=log, cwd="/"
            )
        return cls(process)

    def work(self, plan: BranchPlan, directory: Path, data: Path, *, near: bool) -> None:
        """Have it prefetch, as soon as the mount stands and segments appear."""
        task = PrefetchTask(
            data=str(data),
            places=(str(directory / "feed"), str(directory / "wal")),
            segments=plan.segments,
            redo=plan.snapshot.lsn,
            end=plan.lsn,
            segment_bytes=plan.incarnation.segment_bytes,
            relation_segment_bytes=plan.incarnation.relation_segment_bytes,
            tablespace_directory=f"PG_{plan.incarnation.major}_{plan.incarnation.catalog_version}",
            near=near,
        )
        if self._process.stdin is not None:
            # It is a help and nothing more: one that has died is not missed.
            with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
                pipe.write(json.dumps(to_json(task)).encode())

    def stop(self) -> None:
        """End it, and do not wait: what it has asked of the mount has to be answered first. Harmless when it has ended."""
        self._process.kill()

    def reap(self) -> None:
        """Wait for its end, REAP_SECONDS at most; after ``stop``."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(REAP_SECONDS)
        if self._process.stdin is not None:
            self._process.stdin.close()


def main() -> None:
    """The child."""
    with ThreadPoolExecutor(1) as reader:
        # Whoever writes must not wait for what is imported here.
        telling = reader.submit(sys.stdin.read)
        importlib.import_module("restore.replay_reads")
        told = telling.result()
    if not told:
        return
    try:
        run(from_json(PrefetchTask, json.loads(told)), SystemClock())
    except (TimelineError, OSError, ValueError) as error:
        print(f"prefetch: {error}", file=sys.stderr)


def run(task: PrefetchTask, clock: Clock) -> None:
    """Read everything; raises OSError, WalFormatError and TimelineError."""
    from restore.replay_reads import ReplayReads

    data = Path(task.data)
    reads = ReplayReads(task.segment_bytes, task.relation_segment_bytes, task.tablespace_directory)
    with Warmer(data) as warmer, ThreadPoolExecutor(1) as asking, ThreadPoolExecutor(1) as reading:
        # Neither looking through the WAL nor asking waits for what comes after it: what the mount knows of comes in fewer
        # requests, and what it was not asked for yet must not be read.
        under_way: deque[tuple[int, Future[None]]] = deque()
        for wanted in batches(task, reads, clock):
            while under_way and sum(count for count, _ in under_way) + len(wanted) > ASKED_RANGES:
                under_way.popleft()[1].result()
            asked = asking.submit(_ask, task, wanted)
            under_way.append((len(wanted), reading.submit(_read_when_asked, warmer, asked, wanted)))
        for _, read in under_way:
            read.result()


def _ask(task: PrefetchTask, wanted: Sequence[BlockRange]) -> None:
    if not task.near:
        prefetch(task.data, wanted)


def _read_when_asked(warmer: Warmer, asked: Future[None], wanted: Sequence[BlockRange]) -> None:
    asked.result()
    warmer.read(wanted)


def batches(task: PrefetchTask, reads: ReplayReads, clock: Clock) -> Iterator[list[BlockRange]]:
    """What replay reads, about in its order: BATCH_RANGES at a time, or as much as the WAL tells of that is there."""
    _wait_for(lambda: stands(task.data) or None, "the mount", clock)
    batch = list(status_files(Path(task.data)))
    for start, wal, more in windows(task, clock):
        batch += reads.of(wal, start)
        while len(batch) >= BATCH_RANGES:
            yield batch[:BATCH_RANGES]
            del batch[:BATCH_RANGES]
        if batch and not more:
            yield batch
            batch = []


class Warmer:
    """Reads files of the mount, so that the kernel has them."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._pool = ThreadPoolExecutor(READERS)
        self._files: OrderedDict[str, int] = OrderedDict()

    def __enter__(self) -> Warmer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, wanted: Sequence[BlockRange]) -> None:
        """All of it; what cannot be read is left to whoever needs it."""
        for at in range(0, len(wanted), OPEN_FILES):
            part = wanted[at : at + OPEN_FILES]
            found = [(fd, one) for one in part if (fd := self._open(one.path)) is not None]
            list(self._pool.map(lambda pair: _read_range(*pair), found))
            while len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])

    def _open(self, path: str) -> int | None:
        """A descriptor; ``None`` for a file that replay has removed, or not made yet."""
        fd = self._files.get(path)
        if fd is None:
            try:
                fd = os.open(self._data / path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return None
            # Nothing beyond what is asked for.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            self._files[path] = fd
        self._files.move_to_end(path)
        return fd


def _read_range(fd: int, wanted: BlockRange) -> None:
    with contextlib.suppress(OSError):
        os.pread(fd, wanted.blocks * BLOCK_BYTES, wanted.first_block * BLOCK_BYTES)


def status_files(data: Path) -> Iterator[BlockRange]:
    """The newest file of every transaction status log."""
    for directory in _STATUS_DIRECTORIES:
        try:
            names = sorted(os.listdir(data / directory))
        except FileNotFoundError:
            continue
        if names:
            yield BlockRange(f"{directory}/{names[-1]}", 0, _STATUS_BLOCKS)


def windows(task: PrefetchTask, clock: Clock) -> Iterator[tuple[Lsn, bytes, bool]]:
    """The WAL from the redo point on, cut at multiples of WINDOW_BYTES; with each part, whether the next one is there already.

    A record across a cut is known in neither part; its blocks are left out.
    """
    following = (*task.segments[1:], None)
    for segment, after in zip(task.segments, following, strict=True):
        data = _read(task, segment, clock)[: segment.end - segment.start]
        at = max(task.redo - segment.start, 0)
        while at < len(data):
            stop = min(len(data), at - at % WINDOW_BYTES + WINDOW_BYTES)
            more = stop < len(data) or (after is not None and _is_there(task, after))
            yield Lsn(segment.start + at), data[at:stop], more
            at = stop


def _is_there(task: PrefetchTask, segment: SegmentFile) -> bool:
    return any((Path(place) / segment.name).exists() for place in task.places)


def _read(task: PrefetchTask, segment: SegmentFile, clock: Clock) -> bytes:
    """The segment's file, once it has appeared; it may move from the feed to pg_wal meanwhile."""

    def found() -> bytes | None:
        for place in task.places:
            with contextlib.suppress(FileNotFoundError):
                return (Path(place) / segment.name).read_bytes()
        return None

    return _wait_for(found, segment.name, clock)


def _wait_for(look: Callable[[], T | None], what: str, clock: Clock) -> T:
    """What ``look`` finds, once it finds something; raises TimelineError after _WAIT_SECONDS."""
    deadline = clock.monotonic() + _WAIT_SECONDS
    while (found := look()) is None:
        if clock.monotonic() >= deadline:
            raise TimelineError(f"{what} did not appear")
        clock.pause(_POLL_SECONDS)
    return found
