"""What runs in a mount's own process: store, cache, tree, FUSE session; from ready to unmounted.

The process tells through a pipe, in one JSON line, that the mount stands (``{"ready": true}``) or why not
(``{"error", "hint", "exit_code"}``). It ends when the file system is unmounted, by SIGTERM or by anyone. A
mount point left over by a mount that was killed is detached first; that no two processes serve one overlay is
the overlay's lock.

Start: the prefetcher of a replay is forked, while there is one thread and nothing open; listing and overlay are opened, the
kernel mounts, ready is told; footers of the page manifests and the boot set come meanwhile, and reach the disk cache when the
branch has started.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn, TypeVar

from restore import fuse_loop, mount_table
from restore.cache import DiskCache
from restore.fetcher import Counters, Fetcher
from restore.fuse_loop import pyfuse3
from restore.mount import MountOperations
from restore.mount_control import BlockRange
from restore.mount_spec import MountSpec, MountStats, decode_spec
from restore.overlay import FILE, Overlay
from restore.pin_keeper import keep_pinned
from restore.prefetch import END_SECONDS, Prefetcher
from restore.source import ExtentSource
from restore.tree import Tree
from timeline.catalog.branch_log import read_head
from timeline.clock import Clock, SystemClock
from timeline.errors import TimelineError
from timeline.format.branch_state import Snapshot
from timeline.format.file_listing import FileListing
from timeline.format.value_json import to_json
from timeline.store.base import Store
from timeline.store.open import open_store

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

THREADS = 4
STATS_SECONDS = 1.0
READ_AHEAD_KB = 1024
MAX_BACKGROUND = 64
IDLE_SECONDS = 10.0
"""A mount that was asked for nothing for so long keeps no extents in memory: a host runs many."""
DETACHED_SECONDS = 3.0
"""How long a detached mount goes on serving whoever still has files open."""
PIN_DELAY_SECONDS = 3.0
"""A branch starts before it is pinned: collection is hours away, and its user waits."""
QUIET_SECONDS = 5.0
"""A young mount leaves the disk cache for later: Postgres wants the processor for its start."""
LOOK_UP_SECONDS = 5.0
"""Whoever asks for what will be wanted waits no longer than this."""
_IDLE_WORKERS = 8
_LOG_BYTES = 16 << 20
"""A log longer than this at the start of a mount is begun anew."""

Ready = Callable[[], None]
EndPrefetcher = Callable[[], Awaitable[None]]


async def serve(spec: MountSpec, clock: Clock, ready: Ready, prefetcher: Prefetcher | None = None) -> None:
    """Mount, call ``ready``, serve until unmounted or told to stop; raises TimelineError when it cannot
    begin. ``prefetcher``: reads the mount, and must not keep it from being unmounted."""
    counters = Counters()
    async with contextlib.AsyncExitStack() as stack:
        store = await open_store(
            spec.store_url, endpoint_url=spec.endpoint_url, region=spec.region, clock=clock
        )
        stack.push_async_callback(store.aclose)
        overlay = Overlay.open(spec.overlay, durable=spec.durable, exclusive=True)
        stack.callback(overlay.close)
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="mount")
        stack.callback(pool.shutdown)
        cache = DiskCache.of(store, spec.cache, spec.cache_bytes, clock)
        fetcher = Fetcher(
            store,
            cache,
            clock,
            pool,
            counters,
            patience_seconds=spec.patience_seconds,
            quiet_seconds=QUIET_SECONDS,
        )
        stack.push_async_callback(fetcher.aclose)
        source = ExtentSource(spec.snapshot, fetcher, reload=lambda: _reload_snapshot(store, spec))
        boot = await stack.enter_async_context(_background(_fetch_boot_set(source)))
        listing = await source.listing()
        tree = Tree(listing, source.content, overlay, snapshot_mtime_ns=spec.snapshot.time * 1000)
        operations = MountOperations(
            tree,
            pool,
            uid=spec.uid,
            gid=spec.gid,
            durable=spec.durable,
            begun=lambda: _tune(spec.mountpoint),
            fetch_ahead=lambda wanted: _fetch_ahead(source, listing, wanted),
        )
        mount_table.detach_stale(spec.mountpoint)
        _mount(operations, spec.mountpoint)
        stats = _Stats(spec, counters, operations, boot)
        operations.write_stats = stats.write
        try:
            ready()
            _log.info("mounted %s on %s", spec.snapshot.id, spec.mountpoint)
            async with (
                _background(stats.write_regularly(clock)),
                _background(_rest_when_idle(fetcher, operations, clock)),
                _background(_keep_pinned(store, spec, clock)),
                _watching(prefetcher, clock) as end_prefetcher,
                _stopping(spec.mountpoint, clock, end_prefetcher),
            ):
                await pyfuse3.main(min_tasks=_IDLE_WORKERS)
        finally:
            pyfuse3.close(unmount=True)
            stats.write(mounted=False)
            _log.info("unmounted %s", spec.mountpoint)


def run(spec_path: str, ready_fd: int) -> NoReturn:
    """The whole life of a mount process; ends it."""
    code = 0
    try:
        spec = decode_spec(Path(spec_path).read_bytes(), spec_path)
        _start_logging(spec.log)
        _raise_descriptor_limit()
        clock = SystemClock()
        prefetcher = _begin_prefetcher(spec, ready_fd)
        try:
            asyncio.run(serve(spec, clock, lambda: _tell(ready_fd, {"ready": True}), prefetcher))
        finally:
            if prefetcher is not None:
                prefetcher.end(clock)
    except TimelineError as error:
        _log.error("%s", error.message)
        _tell(ready_fd, {"error": error.message, "hint": error.hint, "exit_code": error.exit_code})
        code = error.exit_code
    except Exception as error:  # noqa: BLE001 - the last line of a process: told to whoever waits, and logged
        _log.exception("the mount ended")
        _tell(
            ready_fd, {"error": f"the mount process failed: {error!r}", "hint": "see its log", "exit_code": 1}
        )
        code = 1
    logging.shutdown()
    # Without the interpreter's own clearing up: it costs time, and everything durable is done.
    os._exit(code)


def _begin_prefetcher(spec: MountSpec, ready_fd: int) -> Prefetcher | None:
    """``None``: there is nothing to replay, or no process to be had."""
    if spec.replay is None or not os.path.exists(spec.replay):
        return None
    try:
        return Prefetcher.begin(Path(spec.replay), spec.mountpoint, not_to_keep=ready_fd)
    except OSError as error:
        _log.warning("no prefetcher: %s", error)
        return None


class _Stats:
    def __init__(
        self, spec: MountSpec, counters: Counters, operations: MountOperations, boot: asyncio.Task[int]
    ) -> None:
        self._path = spec.stats
        self._counters = counters
        self._traffic = operations.traffic
        self._boot = boot
        self._written: MountStats | None = None

    def write(self, *, mounted: bool = True) -> None:
        """Replace the stats file, if anything changed."""
        booted = self._boot.done() and not self._boot.cancelled() and self._boot.exception() is None
        stats = MountStats(
            pid=os.getpid(),
            mounted=mounted,
            boot_extents=self._boot.result() if booted else 0,
            **dataclasses.asdict(self._counters),
            **dataclasses.asdict(self._traffic),
        )
        if stats == self._written:
            return
        temporary = f"{self._path}.{os.getpid()}"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(to_json(stats), file)
            os.replace(temporary, self._path)
        except OSError as error:
            _log.warning("stats: %s", error)
        self._written = stats

    async def write_regularly(self, clock: Clock) -> None:
        """Every second, until cancelled."""
        while True:
            self.write()
            await clock.sleep(STATS_SECONDS)


async def _rest_when_idle(fetcher: Fetcher, operations: MountOperations, clock: Clock) -> None:
    """Give memory back once the mount has nothing to do, until cancelled."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    seen = rested = dataclasses.astuple(operations.traffic)
    while True:
        await clock.sleep(IDLE_SECONDS)
        now = dataclasses.astuple(operations.traffic)
        if now == seen != rested:
            rested = now
            fetcher.let_go()
            if trim is not None:
                trim(0)
        seen = now


async def _keep_pinned(store: Store, spec: MountSpec, clock: Clock) -> None:
    """Once Postgres has had the store to itself for its start."""
    if spec.pin is None:
        return
    await clock.sleep(PIN_DELAY_SECONDS)
    await keep_pinned(
        store,
        clock,
        branch=spec.branch,
        snapshot=spec.snapshot,
        expires=spec.expires,
        note=spec.pin,
        named=spec.name,
    )


async def _fetch_boot_set(source: ExtentSource) -> int:
    """With the footers, which every look-up needs; a failure is left to whoever needs the bytes."""
    try:
        _, fetched = await asyncio.gather(source.with_reload(source.open_index), source.fetch_boot_set())
        return fetched
    except TimelineError as error:
        _log.warning("boot set: %s", error.message)
        return 0


async def _fetch_ahead(source: ExtentSource, listing: FileListing, wanted: Iterable[BlockRange]) -> None:
    """At most LOOK_UP_SECONDS; what is not known of, or fails, is left to whoever needs the bytes."""
    rows = [(row, blocks) for blocks in wanted if (row := listing.get(blocks.path)) is not None]
    try:
        async with asyncio.timeout(LOOK_UP_SECONDS):
            await source.fetch_ahead([(row, blocks) for row, blocks in rows if row.kind == FILE])
    except (TimelineError, TimeoutError) as error:
        _log.info("fetching ahead: %s", error)


async def _reload_snapshot(store: Store, spec: MountSpec) -> Snapshot | None:
    head = await read_head(store, spec.branch)
    if head is None:
        return None
    return next((s for s in head.state.snapshots if s.id == spec.snapshot.id), None)


def _mount(operations: MountOperations, mountpoint: str) -> None:
    fuse_loop.enable()
    options = {"default_permissions", "fsname=tl", "subtype=tl", "nosuid", "nodev"}
    if os.geteuid() == 0:
        # Postgres runs as somebody else; the root directory's mode 0700 keeps all others out.
        options.add("allow_other")
    try:
        pyfuse3.init(operations, mountpoint, options)
    except RuntimeError as error:
        raise TimelineError(
            f"cannot mount {mountpoint}: {error}",
            hint="FUSE needs /dev/fuse, and fusermount3 for anyone but root; --mode copy works without",
        ) from error


def _tune(mountpoint: str) -> None:
    """Raise the kernel's read-ahead and number of requests in flight, where we may; its own offer comes
    first."""
    mounted = mount_table.find(mountpoint)
    if mounted is None:
        return
    minor = mounted.device.split(":")[1]
    for path, value in (
        (f"/sys/class/bdi/{mounted.device}/read_ahead_kb", READ_AHEAD_KB),
        (f"/sys/fs/fuse/connections/{minor}/max_background", MAX_BACKGROUND),
        (f"/sys/fs/fuse/connections/{minor}/congestion_threshold", MAX_BACKGROUND * 3 // 4),
    ):
        try:
            Path(path).write_text(str(value))
        except OSError as error:
            _log.debug("%s stays as it is: %s", path, error.strerror)


@contextlib.asynccontextmanager
async def _watching(prefetcher: Prefetcher | None, clock: Clock) -> AsyncIterator[EndPrefetcher]:
    """Reap it; it is ended with the mount, or with what this gives: whoever has files open would keep the mount busy."""
    if prefetcher is None:
        yield _nothing_to_end
        return
    async with _background(prefetcher.ended(clock)) as ended:

        async def end() -> None:
            prefetcher.kill()
            await asyncio.wait({ended}, timeout=END_SECONDS)

        try:
            yield end
        finally:
            prefetcher.kill()


async def _nothing_to_end() -> None:
    pass


@contextlib.asynccontextmanager
async def _stopping(mountpoint: str, clock: Clock, end_prefetcher: EndPrefetcher) -> AsyncIterator[None]:
    """SIGTERM unmounts; the loop goes on answering meanwhile, for unmounting asks it."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def stop() -> None:
        await end_prefetcher()
        busy = await loop.run_in_executor(None, mount_table.unmount, mountpoint)
        if busy:
            _log.warning("%s was in use: detached", mountpoint)
            await clock.sleep(DETACHED_SECONDS)
            pyfuse3.terminate()

    def begin() -> None:
        if not tasks:
            tasks.add(loop.create_task(stop()))

    loop.add_signal_handler(signal.SIGTERM, begin)
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def _background(work: Coroutine[None, None, _T]) -> AsyncIterator[asyncio.Task[_T]]:
    task = asyncio.get_running_loop().create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _start_logging(path: str) -> None:
    with contextlib.suppress(OSError):
        if os.path.getsize(path) > _LOG_BYTES:
            os.truncate(path, 0)
    logging.basicConfig(
        filename=path,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    # Python-level stderr of the agent goes nowhere; what C libraries say is kept with the rest.
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 2)


def _raise_descriptor_limit() -> None:
    """One descriptor for each file that Postgres has open and has changed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _tell(fd: int, message: dict[str, object]) -> None:
    with contextlib.suppress(OSError):
        os.write(fd, json.dumps(message).encode() + b"\n")
        os.close(fd)


if __name__ == "__main__":
    run(sys.argv[1], 1)
