"""FUSE adapter: answers the kernel's requests from a Tree. Nothing is decided here.

Every request gets an answer: OSError keeps its errno; a TimelineError (the store cannot be read, P5) and
anything unforeseen become EIO with a line in the log. Names are cached by the kernel without end, absent ones
too, for all changes come through it; so are attributes and pages (writeback cache: the kernel hands dirty
pages over on fsync, on close and when it needs memory).
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from restore.fuse_loop import pyfuse3
from restore.mount_control import PREFETCH_ATTRIBUTE, STATS_ATTRIBUTE, BlockRange, decode_prefetch
from restore.overlay import DIRECTORY, FILE, SYMLINK
from restore.tree import ROOT, Tree
from restore.tree_node import Attributes
from timeline.errors import TimelineError

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_R = TypeVar("_R")

FetchAhead = Callable[[Iterable[BlockRange]], Awaitable[None]]

_CACHED_SECONDS = 86_400.0
_KINDS = {FILE: stat.S_IFREG, DIRECTORY: stat.S_IFDIR, SYMLINK: stat.S_IFLNK}
_EXPECTED = frozenset(
    (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.ESTALE, errno.EPERM)
)
"""What Postgres meets in normal life: answered, not logged."""


@dataclass(slots=True)
class Traffic:
    """Requests of the kernel since the mount started."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    errors: int = 0
    """Answered EIO."""


def _answers(
    method: Callable[Concatenate[MountOperations, _P], Coroutine[Any, Any, _R]],
) -> Callable[Concatenate[MountOperations, _P], Coroutine[Any, Any, _R]]:
    @functools.wraps(method)
    async def answer(self: MountOperations, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return await method(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except OSError as error:
            code = error.errno or errno.EIO
            if code not in _EXPECTED:
                _log.warning("%s: %s", method.__name__, error)
            self.traffic.errors += code == errno.EIO
            raise pyfuse3.FUSEError(code) from None
        except TimelineError as error:
            _log.error("%s: %s", method.__name__, error.message)
            self.traffic.errors += 1
            raise pyfuse3.FUSEError(errno.EIO) from None
        except Exception:  # noqa: BLE001 - an exception that left here would end the mount under a running Postgres
            _log.exception("%s: unforeseen", method.__name__)
            self.traffic.errors += 1
            raise pyfuse3.FUSEError(errno.EIO) from None

    return answer


class MountOperations(pyfuse3.Operations):  # type: ignore[misc]
    """Requests about one Tree, whose files are shown as owned by ``uid`` and ``gid``."""

    supports_dot_lookup = False
    enable_writeback_cache = True

    def __init__(
        self,
        tree: Tree,
        pool: Executor,
        *,
        uid: int,
        gid: int,
        durable: bool,
        begun: Callable[[], None] = lambda: None,
        fetch_ahead: FetchAhead | None = None,
    ) -> None:
        """``begun`` is called once the kernel and the mount have agreed on the session's terms; ``fetch_ahead`` gets what
        others say will be wanted, and does not raise what the store raises."""
        super().__init__()
        self._begun = begun
        self._fetch_ahead = fetch_ahead
        self._tree = tree
        self._pool = pool
        self._uid = uid
        self._gid = gid
        self._durable = durable
        self.traffic = Traffic()
        self.write_stats: Callable[[], None] = lambda: None
        """Called when somebody asks for the counters."""
        self._forgetting: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._absent = pyfuse3.EntryAttributes()
        self._absent.st_ino = 0
        self._absent.entry_timeout = _CACHED_SECONDS
        self._entry = self._new_entry()

    def init(self) -> None:
        """Called just before the answer to the kernel's first request is sent."""
        asyncio.get_running_loop().call_soon(self._begun)

    def _new_entry(self) -> Any:
        entry = pyfuse3.EntryAttributes()
        entry.entry_timeout = entry.attr_timeout = _CACHED_SECONDS
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_blksize = 8192
        return entry

    def _attributes(self, attributes: Attributes, entry: Any = None) -> Any:
        entry = entry or self._new_entry()
        entry.st_ino = attributes.inode
        entry.st_mode = _KINDS[attributes.kind] | attributes.mode
        entry.st_nlink = attributes.links
        entry.st_size = attributes.size
        entry.st_blocks = -(-attributes.size // 512)
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = attributes.mtime_ns
        return entry

    @_answers
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> Any:
        try:
            return self._attributes(self._tree.lookup(parent_inode, os.fsdecode(name)))
        except FileNotFoundError:
            return self._absent

    async def forget(self, inode_list: list[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            self._tree.forget(inode, count)

    @_answers
    async def getattr(self, inode: int, ctx: Any) -> Any:
        return self._attributes(self._tree.attributes(inode))

    @_answers
    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        if (fields.update_uid and attr.st_uid != self._uid) or (
            fields.update_gid and attr.st_gid != self._gid
        ):
            raise OSError(errno.EPERM, "all files belong to one user")
        if fields.update_size:
            self._tree.truncate(inode, attr.st_size)
        if fields.update_mode:
            self._tree.set_mode(inode, stat.S_IMODE(attr.st_mode))
        if fields.update_mtime:
            self._tree.set_mtime(inode, attr.st_mtime_ns)
        return self._attributes(self._tree.attributes(inode))

    @_answers
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        return os.fsencode(self._tree.read_link(inode))

    @_answers
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> Any:
        permissions = stat.S_IMODE(mode)
        return self._attributes(self._tree.make_directory(parent_inode, os.fsdecode(name), permissions))

    @_answers
    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        self._tree.unlink(parent_inode, os.fsdecode(name))

    @_answers
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        self._tree.remove_directory(parent_inode, os.fsdecode(name))

    @_answers
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> Any:
        return self._attributes(self._tree.make_symlink(parent_inode, os.fsdecode(name), os.fsdecode(target)))

    @_answers
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: Any,
    ) -> None:
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise OSError(errno.EINVAL, "only plain renames")
        self._tree.rename(
            parent_inode_old,
            os.fsdecode(name_old),
            parent_inode_new,
            os.fsdecode(name_new),
            replace=not flags & pyfuse3.RENAME_NOREPLACE,
        )

    @_answers
    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        handle = self._tree.open(inode, truncate=bool(flags & os.O_TRUNC))
        return pyfuse3.FileInfo(fh=handle, keep_cache=True)

    @_answers
    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        permissions = stat.S_IMODE(mode)
        attributes, handle = self._tree.create(parent_inode, os.fsdecode(name), permissions)
        return pyfuse3.FileInfo(fh=handle, keep_cache=True), self._attributes(attributes)

    @_answers
    async def read(self, fh: int, off: int, size: int) -> bytes:
        data = await self._tree.read(fh, off, size)
        self.traffic.reads += 1
        self.traffic.read_bytes += len(data)
        return data

    @_answers
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            written = await self._tree.write(fh, off, buf)
        except (OSError, TimelineError):
            self._forget_pages(self._tree.inode_of(fh))
            raise
        self.traffic.writes += 1
        self.traffic.written_bytes += written
        return written

    async def flush(self, fh: int) -> None:
        """Nothing is held back: what was written is in the overlay's files."""

    @_answers
    async def release(self, fh: int) -> None:
        self._tree.release(fh)

    @_answers
    async def fsync(self, fh: int, datasync: bool) -> None:
        if self._durable:
            await self._tree.sync(fh, self._in_thread)

    @_answers
    async def opendir(self, inode: int, ctx: Any) -> int:
        return self._tree.open_directory(inode)

    @_answers
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        for name, attributes, position in self._tree.read_directory(fh, start_id):
            entry = self._attributes(attributes, self._entry)
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, position):
                self._tree.drop(attributes.inode)
                return
            self._tree.remember(attributes.inode)

    @_answers
    async def releasedir(self, fh: int) -> None:
        self._tree.release_directory(fh)

    @_answers
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        if self._durable:
            path = self._tree.directory_path(fh)
            await self._in_thread(lambda: self._tree.overlay.sync_dirs(path))

    @_answers
    async def statfs(self, ctx: Any) -> Any:
        info = self._tree.overlay.statvfs()
        data = pyfuse3.StatvfsData()
        data.f_bsize, data.f_frsize = info.f_bsize, info.f_frsize
        data.f_blocks, data.f_bfree, data.f_bavail = info.f_blocks, info.f_bfree, info.f_bavail
        data.f_files, data.f_ffree, data.f_favail = info.f_files, info.f_ffree, info.f_favail
        data.f_namemax = 255
        return data

    @_answers
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        if inode == ROOT and name == STATS_ATTRIBUTE:
            self.write_stats()
            return
        if name != PREFETCH_ATTRIBUTE or self._fetch_ahead is None:
            raise OSError(errno.EOPNOTSUPP, "no attributes")
        await self._fetch_ahead(decode_prefetch(value))

    def _forget_pages(self, inode: int) -> None:
        """After a write that failed: the kernel would keep showing what it could not write.

        Postgres is told at its next fsync and recovers from WAL, but only if it then reads what is really
        there (EDGE 51, disk full). Dropping the pages waits for writes under way, so it has a thread.
        """
        if inode in self._forgetting:
            return
        self._forgetting.add(inode)

        async def forget() -> None:
            try:
                await self._in_thread(lambda: pyfuse3.invalidate_inode(inode))
            except OSError as error:
                _log.warning("cannot drop the cached pages of a file: %s", error)
            finally:
                self._forgetting.discard(inode)

        task = asyncio.get_running_loop().create_task(forget())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_thread(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._pool, work)
