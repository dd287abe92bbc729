"""Host-wide cache of verified bytes on local disk, shared by all mounts of one user.

Everything in it is named by the BLAKE3 of its bytes and verified on every load (P5), so nothing in it needs
to be trusted: a torn, stale or foreign file is a miss. Entries appear by one rename; any number of processes
may load, store and evict at once, and ``kill -9`` leaves at most litter in ``tmp/``, removed later. It is a
help, never a condition: when the disk is full or the directory cannot be used, loads miss and stores do
nothing.

Bound: the directory is cut in 256 shards by the first digest byte, each with 1/256 of the bound. A process
scans a shard after it stored a sixteenth of the shard's share there, and removes the least recently used
entries above it. With P processes storing at once the cache may be above its bound by P/16 of it for a
moment. Recency is the file's mtime, renewed by a load when it is older than ten minutes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

from timeline.clock import Clock
from timeline.format.digest import DIGEST_BYTES, digest_of
from timeline.store.base import NearStore, Store

_log = logging.getLogger(__name__)

SHARDS = 256
MIN_FREE_BYTES = 1 << 30
"""Nothing is stored while the disk has less than this, or a twentieth of it, left."""

_RENEW_SECONDS = 600
_LITTER_SECONDS = 3600
_PAUSE_SECONDS = 30.0
_FREE_CHECK_BYTES = 8 << 20
_MAX_ENTRY_BYTES = 16 << 20
PART_ENTRY_BYTES = 128 << 10
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)


class WouldBlock(Exception):
    """The entry is there, but its bytes are not in memory: load it in a thread."""


class DiskCache:
    """The cache in one directory, bounded to ``bound_bytes`` (0: no cache). Methods are thread-safe, but
    ``load_part``."""

    def __init__(self, directory: Path | str | None, bound_bytes: int, clock: Clock) -> None:
        self._clock = clock
        self._shard_bytes = bound_bytes // SHARDS
        self._root = ""
        self._stored = [0] * SHARDS
        self._unscanned = [True] * SHARDS
        self._paused_until = 0.0
        self._since_free_check = _FREE_CHECK_BYTES
        self._serial = 0
        self._part = bytearray(PART_ENTRY_BYTES)
        if directory is not None and bound_bytes > 0:
            self._open(Path(directory))

    @classmethod
    def of(cls, store: Store, directory: Path | str | None, bound_bytes: int, clock: Clock) -> DiskCache:
        """The cache for what is read from a store: none for one on this host, which would be kept twice."""
        return cls(None if isinstance(store, NearStore) else directory, bound_bytes, clock)

    @property
    def usable(self) -> bool:
        """Whether there is a cache at all."""
        return bool(self._root)

    def load(self, digest: bytes) -> bytes | None:
        """The bytes with that BLAKE3, verified; ``None``: not here. May wait for the disk."""
        fd = self._open_entry(digest)
        if fd is None:
            return None
        try:
            size = os.fstat(fd).st_size
            buffer = bytearray(size) if 0 < size <= _MAX_ENTRY_BYTES else bytearray()
            complete = os.readv(fd, [buffer]) == size
            if complete and digest_of(buffer) == digest:
                self._renew(fd)
                return bytes(buffer)
        except OSError:
            return None
        finally:
            os.close(fd)
        self._remove(digest)
        return None

    def load_part(self, digest: bytes, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of an entry of at most PART_ENTRY_BYTES, all of which is verified;
        ``None``: not here.

        Never waits for the disk: raises WouldBlock instead. Not thread-safe (it verifies in a buffer of its
        own, for making one of that size costs as much as all the rest).
        """
        fd = self._open_entry(digest)
        if fd is None:
            return None
        try:
            size = os.preadv(fd, [self._part], 0, _NOWAIT)
            view = memoryview(self._part)[:size]
            if digest_of(view) == digest:
                self._renew(fd)
                return bytes(view[start:stop])
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                return None
        finally:
            os.close(fd)
        # Damaged, or only its beginning was in memory: whoever waits for the disk finds out.
        raise WouldBlock

    def has(self, digest: bytes) -> bool:
        """Whether there is an entry, good or not."""
        return bool(self._root) and os.path.exists(self._path(digest))

    def store(self, digest: bytes, data: bytes | memoryview) -> None:
        """Keep bytes that were verified to have that BLAKE3; does nothing when it cannot."""
        if not self._root or not 0 < len(data) <= min(_MAX_ENTRY_BYTES, self._shard_bytes):
            return
        if self._clock.monotonic() < self._paused_until:
            return
        path = self._path(digest)
        try:
            if os.path.exists(path) or not self._has_room(len(data)):
                return
            self._insert(path, data)
        except OSError as error:
            # Litter of this attempt is removed with all other litter; the mount goes on without storing.
            self._pause(error)
            return
        self._account(digest[0], len(data))

    def _open(self, directory: Path) -> None:
        root = directory / "v1"
        try:
            (root / "tmp").mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(root / "tmp", os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root))
        except OSError as error:
            _log.warning("no cache in %s: %s; going on without", directory, error.strerror)
            return
        self._root = os.fspath(root)
        self._remove_litter()

    def _path(self, digest: bytes) -> str:
        if len(digest) != DIGEST_BYTES:
            raise ValueError(f"not a digest: {digest!r}")
        name = digest.hex()
        return f"{self._root}/{name[:2]}/{name[2:]}"

    def _open_entry(self, digest: bytes) -> int | None:
        if not self._root:
            return None
        try:
            return os.open(self._path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None

    def _renew(self, fd: int) -> None:
        if self._clock.now() / 1e6 - os.fstat(fd).st_mtime > _RENEW_SECONDS:
            with contextlib.suppress(OSError):
                os.utime(fd)

    def _remove(self, digest: bytes) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path(digest))

    def _insert(self, path: str, data: bytes | memoryview) -> None:
        self._serial += 1
        temporary = f"{self._root}/tmp/{os.getpid()}.{id(data):x}.{self._serial}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            complete = os.write(fd, data) == len(data)
        except OSError:
            os.unlink(temporary)
            raise
        finally:
            os.close(fd)
        if complete:
            self._show(temporary, path)
        else:
            os.unlink(temporary)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    @staticmethod
    def _show(temporary: str, path: str) -> None:
        """Give the entry its name; its shard is made when it gets its first one, for a start cannot wait for
        all of them."""
        try:
            os.rename(temporary, path)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.dirname(path), 0o700)
            os.rename(temporary, path)

    def _has_room(self, size: int) -> bool:
        self._since_free_check += size
        if self._since_free_check < _FREE_CHECK_BYTES:
            return True
        self._since_free_check = 0
        info = os.statvfs(self._root)
        free, total = info.f_bavail * info.f_frsize, info.f_blocks * info.f_frsize
        if free >= min(MIN_FREE_BYTES, total // 20):
            return True
        self._pause(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return False

    def _pause(self, error: OSError) -> None:
        self._paused_until = self._clock.monotonic() + _PAUSE_SECONDS
        self._since_free_check = _FREE_CHECK_BYTES
        _log.warning("cache %s: %s; storing nothing for %d s", self._root, error.strerror, _PAUSE_SECONDS)

    def _account(self, shard: int, size: int) -> None:
        self._stored[shard] += size
        if self._unscanned[shard] or self._stored[shard] * 16 >= self._shard_bytes:
            self._unscanned[shard] = False
            self._stored[shard] = 0
            self._evict(f"{self._root}/{shard:02x}")

    def _evict(self, shard: str) -> None:
        """Remove the least recently used entries of a shard above its share."""
        entries = []
        total = 0
        with contextlib.suppress(OSError), os.scandir(shard) as found:
            for entry in found:
                with contextlib.suppress(OSError):
                    info = entry.stat(follow_symlinks=False)
                    size = max(info.st_blocks * 512, info.st_size)
                    total += size
                    entries.append((info.st_mtime_ns, size, entry.path))
        if total <= self._shard_bytes:
            return
        entries.sort()
        for _, size, path in entries:
            if total <= self._shard_bytes:
                return
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size

    def _remove_litter(self) -> None:
        oldest = self._clock.now() / 1e6 - _LITTER_SECONDS
        with contextlib.suppress(OSError), os.scandir(f"{self._root}/tmp") as found:
            for entry in found:
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime < oldest:
                        os.unlink(entry.path)
