"""A directory as a store.

Consistency: an object appears under its name in one step (``link`` of a complete, synced temporary file), so
a reader sees all of it or none, and of several creators the kernel lets exactly one link.
Crash: what was only in ``.tmp/`` is litter, never an object; ``delete``, which only collection calls, removes
litter older than a day. ``create`` returns after the file, the directory that names it, and every directory
above it up to the root are synced.
Cancellation: a cancelled ``create`` goes on in its thread to its end; its outcome is unknown to the caller.
Reading creates nothing and needs no write permission (P10). Names that begin with a dot are never objects.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from timeline.clock import Clock, SystemClock
from timeline.errors import DamagedStore, NotFound, TimelineError, Unavailable, UsageError
from timeline.store._arguments import check_key, check_limit, check_range
from timeline.store.base import Listed, Refused

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

_T = TypeVar("_T")

_TEMPORARY = ".tmp"
_LITTER_SECONDS = 86_400
_INLINE_BYTES = 1 << 20
_DIRECTORY_MODE = 0o750
_FILE_MODE = 0o640
_SYNCED_DIRECTORIES = 10_000
_VANISHING_ATTEMPTS = 5


class LocalStore:
    """Objects as files below one directory. At most ``threads`` blocking calls run at once; others queue."""

    def __init__(self, path: str | os.PathLike[str], *, clock: Clock | None = None, threads: int = 8) -> None:
        self._root = os.path.abspath(path)
        self._clock = clock or SystemClock()
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._synced: set[str] = set()
        self._synced_lock = threading.Lock()

    @property
    def url(self) -> str:
        return "file://" + quote(self._root)

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        check_key(key)
        return await self._in_thread(lambda: self._create(key, data))

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        check_key(key)
        check_range(start, length)
        # A thread costs 0.1 ms, a read from the page cache 1 to 40 µs: threads are for what waits for a disk.
        cached = self._cached(key, start, length)
        if cached is not None:
            return cached
        waited = await self._in_thread(lambda: self._explained_read(key, start, length))
        if waited is None:
            raise Unavailable(f"{self._path(key)}: the read gave nothing")
        return waited

    def get_now(self, key: str, start: int, length: int) -> bytes | None:
        check_key(key)
        check_range(start, length)
        return self._cached(key, start, length)

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[Listed]:
        check_limit(limit)
        return await self._in_thread(lambda: self._list(prefix, after, limit))

    async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        for key in keys:
            check_key(key)
        return await self._in_thread(lambda: self._delete(keys))

    async def aclose(self) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.shutdown(wait=True)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="store")
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextlib.contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _translate(error, verb, key, self._root) from error

    # -- reading

    def _cached(self, key: str, start: int, length: int | None) -> bytes | None:
        with self._explained("read", key):
            return self._read(key, start, length, wait=False)

    def _explained_read(self, key: str, start: int, length: int | None) -> bytes | None:
        with self._explained("read", key):
            return self._read(key, start, length, wait=True)

    def _read(self, key: str, start: int, length: int | None, *, wait: bool) -> bytes | None:
        """The range; ``None`` when ``wait`` is false and it cannot be had without waiting for the disk."""
        try:
            file = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(key) from None
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise NotFound(key)
            size = status.st_size
            first = max(0, size + start) if start < 0 else start
            end = size if length is None else first + length
            if first > size or end > size:
                raise DamagedStore(key, size, f"object ends here, {max(first, end)} bytes expected")
            if wait:
                return _read_all(file, key, first, end)
            return _read_cached(file, first, end) if end - first <= _INLINE_BYTES else None
        finally:
            os.close(file)

    def _list(self, prefix: str, after: str, limit: int | None) -> builtins.list[Listed]:
        found: builtins.list[Listed] = []
        if limit == 0:
            return found
        base = prefix[: prefix.rfind("/") + 1]
        with self._explained("list", prefix):
            for key, path in self._walk(base, prefix, after):
                try:
                    size = os.stat(path).st_size
                except FileNotFoundError:  # collected since its directory was read
                    continue
                found.append(Listed(key, size))
                if limit is not None and len(found) >= limit:
                    break
        return found

    def _walk(self, base: str, prefix: str, after: str) -> Iterator[tuple[str, str]]:
        """Keys and paths in byte order, not descending into directories that cannot hold what is asked for.

        A directory sorts as its name with the slash: ``a-b`` comes before ``a/b``.
        """
        if any(segment.startswith(".") for segment in base.split("/")):
            return
        names: builtins.list[str] = []
        try:
            with os.scandir(self._path(base)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    is_directory = entry.is_dir()
                    name = base + entry.name + ("/" if is_directory else "")
                    if is_directory and after > name and not after.startswith(name):
                        continue
                    if not is_directory and after and name <= after:
                        continue
                    if name.startswith(prefix) or (is_directory and prefix.startswith(name)):
                        names.append(name)
        except (FileNotFoundError, NotADirectoryError):
            return
        names.sort()
        for name in names:
            if name.endswith("/"):
                yield from self._walk(name, prefix, after)
            else:
                yield name, self._path(name)

    # -- writing

    def _create(self, key: str, data: bytes | memoryview) -> bool:
        path = self._path(key)
        with self._explained("write", key):
            for _ in range(_VANISHING_ATTEMPTS):
                if not os.path.lexists(path) and self._link(path, data):
                    return True
                try:
                    # Whoever linked it may not have synced the name yet, and our caller will rely on it.
                    self._make_directories(os.path.dirname(path))
                    _sync_directory(os.path.dirname(path))
                    return self._holds(key, data)
                except NotFound:
                    continue
        raise Unavailable(f"{path}: appears and vanishes while it is being created")

    def _link(self, path: str, data: bytes | memoryview) -> bool:
        """Whether it was this call that gave the object its name."""
        self._make_directories(os.path.dirname(path))
        self._make_directories(f"{self._root}/{_TEMPORARY}")
        temporary = f"{self._root}/{_TEMPORARY}/{self._clock.token(16)}"
        try:
            _write_synced(temporary, data)
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        _sync_directory(os.path.dirname(path))
        return True

    def _holds(self, key: str, data: bytes | memoryview) -> bool:
        try:
            if os.path.getsize(self._path(key)) != len(data):
                return False
        except FileNotFoundError:
            raise NotFound(key) from None
        return self._read(key, 0, len(data), wait=True) == data

    def _make_directories(self, directory: str) -> None:
        """Make it, and itself and everything above it down from the root durable, once for each directory."""
        with self._synced_lock:
            if directory in self._synced:
                return
        missing: builtins.list[str] = []
        named_in: builtins.list[str] = []
        at = directory
        while True:
            exists = os.path.isdir(at)
            if not exists:
                missing.append(at)
            if at == os.path.dirname(at) or (exists and len(at) <= len(self._root)):
                break
            at = os.path.dirname(at)
            named_in.append(at)
        for each in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(each, _DIRECTORY_MODE)
        for each in named_in:
            _sync_directory(each)
        with self._synced_lock:
            if len(self._synced) >= _SYNCED_DIRECTORIES:
                self._synced.clear()
            self._synced.add(directory)

    def _delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        refused: builtins.list[Refused] = []
        for key in keys:
            try:
                os.unlink(self._path(key))
            except (FileNotFoundError, NotADirectoryError):
                pass
            except PermissionError as error:
                # A directory without write permission, or a file that is immutable (chattr +i).
                refused.append(Refused(key, os.strerror(error.errno or errno.EACCES)))
            except OSError as error:
                raise _translate(error, "delete", key, self._root) from error
        with self._explained("delete", _TEMPORARY), contextlib.suppress(FileNotFoundError):
            oldest = self._clock.now() / 1e6 - _LITTER_SECONDS
            with os.scandir(f"{self._root}/{_TEMPORARY}") as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        if entry.stat().st_mtime < oldest:
                            os.unlink(entry.path)
        return refused


def _read_cached(file: int, first: int, end: int) -> bytes | None:
    """The range if the kernel has all of it in memory; ``None`` also where it cannot tell (tmpfs, macOS)."""
    if first == end:
        return b""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    buffer = bytearray(end - first)
    try:
        got = os.preadv(file, [buffer], first, os.RWF_NOWAIT)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return None
        raise
    return bytes(buffer) if got == len(buffer) else None


def _read_all(file: int, key: str, first: int, end: int) -> bytes:
    pieces: builtins.list[bytes] = []
    at = first
    while at < end:
        piece = os.pread(file, end - at, at)
        if not piece:
            raise DamagedStore(key, at, f"object ends here, {end} bytes expected")
        pieces.append(piece)
        at += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _write_synced(path: str, data: bytes | memoryview) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        _sync(file)
    finally:
        os.close(file)


def _sync_directory(path: str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync(file)
    finally:
        os.close(file)


def _sync(file: int) -> None:
    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone stops at the drive's cache
    if full is None:
        os.fsync(file)
    else:
        fcntl.fcntl(file, full)


_TEXT = {
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is not a directory",
    errno.EEXIST: "a part of the path is not a directory",
    errno.ENAMETOOLONG: "the path is too long",
}
_PASSING = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EIO: "input/output error",
    errno.ESTALE: "the network file system lost the file",
    errno.EMFILE: "too many open files in this process",
    errno.ENFILE: "too many open files on this host",
    errno.ETIMEDOUT: "the network file system does not answer",
}


def _translate(error: OSError, verb: str, key: str, root: str) -> TimelineError:
    code = error.errno or 0
    what = f"cannot {verb} {key or 'keys'} in store {root}"
    if code in _PASSING:
        return Unavailable(f"{what}: {_PASSING[code]}")
    if code in (errno.EMLINK, errno.ENOTSUP) or (code == errno.EPERM and error.filename2 is not None):
        return UsageError(
            f"{what}: its file system has no hard links", hint="put the store on ext4, xfs, zfs, apfs or NFS"
        )
    if code in _TEXT:
        hint = "run as a user who may write there, or choose another store" if verb != "read" else None
        return UsageError(f"{what}: {_TEXT[code]}", hint=hint)
    return TimelineError(f"{what}: {os.strerror(code) if code else error}")
