"""Tell the mount which blocks a replay will read, before the replay gets there.

A process of its own beside the first start: it reads the same private segment files, finds the first
touch of every block, and asks the mount for those whose first touch is neither a full-page image nor a
page initialisation, for only those are read; with them come the free space and visibility pages of the
blocks, which WAL does not name, and the ends of the transaction status files. It is a help and nothing
more: it may fail, or be late, and is stopped when the server is ready.

numba is imported by the child alone. Bounds: ``WINDOW_BYTES`` of WAL in memory, and what first_touches
takes for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from restore.mount_control import BlockRange, prefetch
from restore.plan import BranchPlan, SegmentFile
from timeline.clock import Clock, SystemClock
from timeline.errors import TimelineError
from timeline.format.extent import BLOCK_BYTES
from timeline.format.value_json import from_json, to_json
from timeline.lsn import Lsn

WINDOW_BYTES = 64 << 20
_WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.01
_DEFAULT_TABLESPACE, _GLOBAL_TABLESPACE = 1663, 1664
_FORKS = ("", "_fsm", "_vm", "_init")
_HEAP_BLOCKS_PER_VM_PAGE = 32_672
_SLOTS_PER_FSM_PAGE = 4_069
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


class Prefetcher:
    """A child at work."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def start(cls, plan: BranchPlan, directory: Path, data: Path) -> Prefetcher:
        """Begin to prefetch for a branch in that directory."""
        task = PrefetchTask(
            data=str(data),
            places=(str(directory / "feed"), str(directory / "wal")),
            segments=plan.segments,
            redo=plan.snapshot.lsn,
            end=plan.lsn,
            segment_bytes=plan.incarnation.segment_bytes,
            relation_segment_bytes=plan.incarnation.relation_segment_bytes,
            tablespace_directory=f"PG_{plan.incarnation.major}_{plan.incarnation.catalog_version}",
        )
        root = os.fspath(Path(__file__).parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from restore.prefetch import main; main()"
        with (directory / "prefetch.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=log, stderr=log, cwd="/"
            )
        if process.stdin is not None:
            process.stdin.write(json.dumps(to_json(task)).encode())
            process.stdin.close()
        return cls(process)

    def stop(self) -> None:
        """End it; harmless when it has ended."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    """The child."""
    try:
        run(from_json(PrefetchTask, json.load(sys.stdin)), SystemClock())
    except (TimelineError, OSError, ValueError) as error:
        print(f"prefetch: {error}", file=sys.stderr)


def run(task: PrefetchTask, clock: Clock) -> None:
    """Ask the mount for everything; raises OSError, WalFormatError and Unavailable."""
    prefetch(task.data, status_files(Path(task.data)))
    for start, wal in _windows(task, clock):
        prefetch(task.data, wanted_blocks(task, wal, start))


def wanted_blocks(task: PrefetchTask, wal: bytes, start: Lsn) -> Iterator[BlockRange]:
    """The blocks that replay of ``wal`` reads, merged where they adjoin."""
    from timeline.pg.wal_blocks import first_touches

    touches = first_touches(wal, start, task.segment_bytes)
    read = touches[~touches["has_image_or_init"]]
    main = touches[touches["fork"] == 0]
    blocks = {
        (int(row["spc"]), int(row["db"]), int(row["rel"]), int(row["fork"]), int(row["block"]))
        for row in read
    }
    for row in main:
        place = (int(row["spc"]), int(row["db"]), int(row["rel"]))
        block = int(row["block"])
        leaf = block // _SLOTS_PER_FSM_PAGE
        upper = leaf // _SLOTS_PER_FSM_PAGE
        blocks.add((*place, 2, block // _HEAP_BLOCKS_PER_VM_PAGE))
        # src/backend/storage/freespace/freespace.c: the pages of the upper levels come before their leaves.
        blocks.update((*place, 1, page) for page in (0, 1 + upper, leaf + 2 + upper))
    per_file = task.relation_segment_bytes // BLOCK_BYTES
    return _merged(sorted(blocks), per_file, task.tablespace_directory)


def _merged(
    blocks: Iterable[tuple[int, int, int, int, int]], per_file: int, version: str
) -> Iterator[BlockRange]:
    path, first, count = "", 0, 0
    for spc, db, rel, fork, block in blocks:
        file = relation_path(spc, db, rel, fork, block // per_file, version)
        inside = block % per_file
        if file == path and inside == first + count:
            count += 1
            continue
        if count:
            yield BlockRange(path, first, count)
        path, first, count = file, inside, 1
    if count:
        yield BlockRange(path, first, count)


def relation_path(spc: int, db: int, rel: int, fork: int, segment: int, version: str) -> str:
    """Path of a relation's file in the data directory (src/common/relpath.c)."""
    if spc == _GLOBAL_TABLESPACE:
        directory = "global"
    elif spc == _DEFAULT_TABLESPACE:
        directory = f"base/{db}"
    else:
        directory = f"pg_tblspc/{spc}/{version}/{db}"
    return f"{directory}/{rel}{_FORKS[fork]}" + (f".{segment}" if segment else "")


def status_files(data: Path) -> Iterator[BlockRange]:
    """The newest file of every transaction status log."""
    for directory in _STATUS_DIRECTORIES:
        try:
            names = sorted(os.listdir(data / directory))
        except FileNotFoundError:
            continue
        if names:
            yield BlockRange(f"{directory}/{names[-1]}", 0, _STATUS_BLOCKS)


def _windows(task: PrefetchTask, clock: Clock) -> Iterator[tuple[Lsn, bytes]]:
    """The WAL from the redo point on, in runs of whole segments."""
    held: list[bytes] = []
    start = Lsn(task.redo)
    size = 0
    for segment in task.segments:
        data = _read(task, segment, clock)
        if not held:
            start = Lsn(max(task.redo, segment.start))
        data = data[max(0, task.redo - segment.start) : segment.end - segment.start]
        held.append(data)
        size += len(data)
        if size >= WINDOW_BYTES:
            yield start, b"".join(held)
            held, size = [], 0
    if held:
        yield start, b"".join(held)


def _read(task: PrefetchTask, segment: SegmentFile, clock: Clock) -> bytes:
    """The segment's file, once it has appeared; it may move from the feed to pg_wal meanwhile."""
    deadline = clock.monotonic() + _WAIT_SECONDS
    while True:
        for place in task.places:
            try:
                return (Path(place) / segment.name).read_bytes()
            except FileNotFoundError:
                continue
        if clock.monotonic() >= deadline:
            raise TimelineError(f"{segment.name} did not appear")
        clock.pause(_POLL_SECONDS)
