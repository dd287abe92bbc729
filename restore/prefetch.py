"""Have in the kernel's page cache what a replay will read, before the replay gets there.

A process of its own: it reads the same private segment files as they appear, finds out which blocks replay will read
(replay_reads), has the mount fetch them from a store that is far away, many to a request, and reads them through the mount.
So the store's latency is paid in parallel, the mount works while Postgres starts, and Postgres, which asks for 8 KiB at a
time, is answered by the kernel rather than by the mount. It is a help and nothing more: it may fail, or be late, and it ends
when the replay is over: when the file that says what to do is gone (replay_task).

A mount that is made for a replay forks it before it serves anything: it has imported all that is needed, and shares its memory.
Bounds: ``WINDOW_BYTES`` of WAL in memory, twice, and what it touches; ``READERS`` reads at once, ``OPEN_FILES`` files open at a
time, about; ``ASKED_RANGES`` asked of the mount.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

import setproctitle

from restore.attached import attach
from restore.mount_control import BlockRange, prefetch, stands
from restore.plan import SegmentFile
from restore.replay_reads import ReplayReads
from restore.replay_task import ReplayTask, read_task
from timeline.clock import Clock, SystemClock
from timeline.errors import TimelineError
from timeline.format.extent import BLOCK_BYTES
from timeline.lsn import Lsn

T = TypeVar("T")

_log = logging.getLogger(__name__)

WINDOW_BYTES = 16 << 20
"""WAL looked at together, at most."""
BATCH_RANGES = 2000
"""Asked of the mount at once: the more, the fewer requests it makes of the store."""
ASKED_RANGES = 10_000
"""Asked of the mount and not read yet, at most."""
READERS = 4
OPEN_FILES = 64
END_SECONDS = 0.5
"""Whoever ends it waits no longer: it is gone when the mount has answered what it asked."""
_REAP_SECONDS = 0.1
_WAIT_SECONDS = 120.0
_POLL_SECONDS = 0.005
_STATUS_DIRECTORIES = ("pg_xact", "pg_multixact/offsets", "pg_multixact/members", "pg_commit_ts")
_STATUS_BLOCKS = 32


class Prefetcher:
    """A child at work, for the mount that it is a child of."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._gone = False
        self._killed = False

    @classmethod
    def begin(cls, task: Path, mountpoint: str, *, not_to_keep: int) -> Prefetcher:
        """Fork it, without that descriptor; ``task``: a file, and when that is gone the replay is over.

        Only for a process with one thread, and before it has the overlay or the file system's own descriptor.
        """
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become_prefetcher(task, mountpoint, parent, not_to_keep)
        return cls(pid)

    async def ended(self, clock: Clock) -> None:
        """Wait for its end. Never in one system call: its last ones may be requests to the mount that waits here."""
        while not self._reap():
            await clock.sleep(_REAP_SECONDS)

    def kill(self) -> None:
        """End it, without waiting; harmless when it has ended."""
        if not self._gone:
            self._killed = True
            os.kill(self._pid, signal.SIGKILL)

    def end(self, clock: Clock) -> None:
        """End it, and wait for that, END_SECONDS at most; for a mount that is none any more."""
        self.kill()
        deadline = clock.monotonic() + END_SECONDS
        while not self._reap() and clock.monotonic() < deadline:
            clock.pause(_POLL_SECONDS)

    def _reap(self) -> bool:
        """Whether it has ended."""
        if not self._gone:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._gone = pid != 0
            if self._gone and status and not self._killed:
                _log.warning("the prefetcher ended with %d", os.waitstatus_to_exitcode(status))
        return self._gone


class _Over(Exception):
    """The replay is."""


def _become_prefetcher(task: Path, mountpoint: str, parent: int, not_to_keep: int) -> NoReturn:
    code = 1
    try:
        os.close(not_to_keep)
        attach(parent)
        setproctitle.setproctitle(f"tl prefetch {mountpoint}")
        read = run(task, mountpoint, SystemClock())
        _log.info("prefetched %d ranges that the replay reads", read)
        code = 0
    except SystemExit:
        # The mount is gone already.
        pass
    except (TimelineError, OSError, ValueError) as error:
        _log.warning("prefetch: %s", error)
    except BaseException:  # noqa: BLE001 - the last line of a process
        _log.exception("prefetch")
    finally:
        os._exit(code)


def run(file: Path, mountpoint: str, clock: Clock) -> int:
    """Read everything, or until the task's file is gone; how many ranges were read.

    Raises OSError, WalFormatError, ValueError and TimelineError.
    """
    data = Path(mountpoint)
    task = read_task(file)
    reads = ReplayReads(task.segment_bytes, task.relation_segment_bytes, task.tablespace_directory)
    with Warmer(data, file) as warmer, ThreadPoolExecutor(1) as asking, ThreadPoolExecutor(1) as reading:
        # Neither looking through the WAL nor asking waits for what comes after it: what the mount knows of comes in fewer
        # requests, and what it was not asked for yet must not be read.
        under_way: deque[tuple[int, Future[None]]] = deque()
        with contextlib.suppress(_Over):
            for wanted in batches(task, data, reads, Watch(file, clock)):
                while under_way and sum(count for count, _ in under_way) + len(wanted) > ASKED_RANGES:
                    under_way.popleft()[1].result()
                asked = asking.submit(_ask, task, data, wanted)
                under_way.append((len(wanted), reading.submit(_read_when_asked, warmer, asked, wanted)))
        for _, read in under_way:
            read.result()
    return warmer.count


def _ask(task: ReplayTask, data: Path, wanted: Sequence[BlockRange]) -> None:
    if not task.near:
        prefetch(data, wanted)


def _read_when_asked(warmer: Warmer, asked: Future[None], wanted: Sequence[BlockRange]) -> None:
    asked.result()
    warmer.read(wanted)


def batches(task: ReplayTask, data: Path, reads: ReplayReads, watch: Watch) -> Iterator[list[BlockRange]]:
    """What replay reads, about in its order: BATCH_RANGES at a time, or as much as the WAL tells of that is there; from a store
    on this host there is nothing to be gained by waiting for more."""
    watch.wait_for(lambda: stands(data) or None, "the mount")
    batch = list(status_files(data))
    for start, wal, more in windows(task, watch):
        batch += reads.of(wal, start)
        while len(batch) >= BATCH_RANGES:
            yield batch[:BATCH_RANGES]
            del batch[:BATCH_RANGES]
        if batch and (task.near or not more):
            yield batch
            batch = []


class Warmer:
    """Reads files of the mount, so that the kernel has them."""

    def __init__(self, data: Path, task: Path) -> None:
        """``task``: a file; when that is gone, nothing more is read."""
        self._data = data
        self._task = task
        self.count = 0
        """Ranges read."""
        self._pool = ThreadPoolExecutor(READERS)
        self._files: OrderedDict[str, int] = OrderedDict()

    def __enter__(self) -> Warmer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, wanted: Sequence[BlockRange]) -> None:
        """All of it, or until the task is gone; what cannot be read is left to whoever needs it."""
        for at in range(0, len(wanted), OPEN_FILES):
            if not self._task.exists():
                return
            part = wanted[at : at + OPEN_FILES]
            found = [(fd, one) for one in part if (fd := self._open(one.path)) is not None]
            self.count += sum(self._pool.map(lambda pair: _read_range(*pair), found))
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


def _read_range(fd: int, wanted: BlockRange) -> bool:
    """Whether there was something."""
    try:
        return bool(os.pread(fd, wanted.blocks * BLOCK_BYTES, wanted.first_block * BLOCK_BYTES))
    except OSError:
        return False


def status_files(data: Path) -> Iterator[BlockRange]:
    """The newest file of every transaction status log."""
    for directory in _STATUS_DIRECTORIES:
        try:
            names = sorted(os.listdir(data / directory))
        except FileNotFoundError:
            continue
        if names:
            yield BlockRange(f"{directory}/{names[-1]}", 0, _STATUS_BLOCKS)


@dataclass(frozen=True, slots=True)
class Watch:
    """Waits for what others make, for as long as the task's file is there."""

    task: Path
    clock: Clock

    def wait_for(self, look: Callable[[], T | None], what: str) -> T:
        """What ``look`` finds, once it finds something; raises _Over, and TimelineError after _WAIT_SECONDS."""
        deadline = self.clock.monotonic() + _WAIT_SECONDS
        while (found := look()) is None:
            if not self.task.exists():
                raise _Over
            if self.clock.monotonic() >= deadline:
                raise TimelineError(f"{what} did not appear")
            self.clock.pause(_POLL_SECONDS)
        return found


def windows(task: ReplayTask, watch: Watch) -> Iterator[tuple[Lsn, bytes, bool]]:
    """The WAL from the redo point on, cut at multiples of WINDOW_BYTES; with each part, whether the next one is there already.

    A record across a cut is known in neither part; its blocks are left out.
    """
    following = (*task.segments[1:], None)
    for segment, after in zip(task.segments, following, strict=True):
        with _opened(task, segment, watch) as file:
            at = max(task.redo, segment.start)
            while at < segment.end:
                stop = Lsn(min(segment.end, at - at % WINDOW_BYTES + WINDOW_BYTES))
                more = stop < segment.end or (after is not None and _find(task, after) is not None)
                yield Lsn(at), os.pread(file.fileno(), stop - at, at - segment.start), more
                at = stop


def _opened(task: ReplayTask, segment: SegmentFile, watch: Watch) -> BinaryIO:
    """The segment's file, once it has appeared; it may move from the feed to pg_wal meanwhile."""

    def found() -> BinaryIO | None:
        path = _find(task, segment)
        with contextlib.suppress(FileNotFoundError):
            return None if path is None else path.open("rb", buffering=0)
        return None

    return watch.wait_for(found, segment.name)


def _find(task: ReplayTask, segment: SegmentFile) -> Path | None:
    return next((path for place in task.places if (path := Path(place) / segment.name).exists()), None)
