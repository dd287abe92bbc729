"""Copy-on-write layer of a branch: an ordinary directory tree of sparse files over a snapshot.

What is where: ``tree/`` mirrors the data directory, ``tmp/`` holds what is not visible yet, ``overlay.json``
says what the directory is. A range of a file is *local* when it is no hole of the sparse file (SEEK_DATA);
every other byte below the file's *valid* mark shows the snapshot, every byte above it is zero. One extended
attribute, ``user.tl.base``, holds the snapshot path whose content shows through (so a renamed file keeps its
base) and the valid mark:

- regular file or directory without it: nothing shows through;
- ``w``: a whiteout: the name does not exist, whatever the snapshot says (always a regular file);
- ``<valid>\\0+<base path>``, perhaps with ``\\0<inode>/<name>`` behind: then it is a whiteout while it lies
  in the directory with that inode under that name (the instant between the two halves of a rename).

Crash behaviour: there is no journal. Every change becomes visible by one rename or exchange of a finished
file, and the valid mark that counts is the smaller of the attribute and the file's size, so that truncation
needs no second step: ``kill -9`` between any two system calls leaves either the old or the new state. What
survives the *host* is what was fsynced.

Everything here is synchronous, touches the local disk only, and raises OSError as the kernel would.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from restore.sparse import ATTRIBUTE, OverlayUnusable, exchange, probe_file_system
from timeline.errors import UsageError

FILE, DIRECTORY, SYMLINK, WHITEOUT = "f", "d", "l", "w"

_VERSION = 1
_TABLESPACES = "pg_tblspc"


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of the overlay."""

    kind: str
    """FILE, DIRECTORY, SYMLINK or WHITEOUT."""
    size: int
    mode: int
    """Permission bits."""
    mtime_ns: int
    base: str | None
    """Snapshot path that shows through; ``None``: nothing does."""
    valid_bytes: int
    """Files: up to here the snapshot shows through holes."""


@dataclass(frozen=True, slots=True)
class _Mark:
    """The extended attribute, decoded."""

    whiteout: bool
    base: str | None
    valid_bytes: int
    dies_at: str | None


_NOATTRIBUTE = _Mark(False, None, 0, None)
_GONE = _Mark(True, None, 0, None)


def is_tablespace_path(path: str) -> bool:
    """Whether the path lies in ``pg_tblspc``, where no symlink may be (EDGE 49)."""
    return path.startswith(_TABLESPACES + "/")


class Overlay:
    """One branch's overlay directory. Paths are relative to the data directory, ``/``-separated."""

    def __init__(self, directory: Path) -> None:
        """Use ``create`` or ``open``."""
        self.directory = directory
        self._tree = os.fspath(directory / "tree")
        self._tmp = os.fspath(directory / "tmp")
        self._serial = itertools.count()
        self._lock_fd: int | None = None

    @classmethod
    def create(cls, directory: Path | str) -> Overlay:
        """Make an empty overlay; raises OverlayUnusable when the file system there cannot hold one."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (path / "overlay.json").exists() or (path / "tree").exists():
            raise UsageError(f"{path} already holds an overlay")
        probe_file_system(path)
        (path / "tmp").mkdir(mode=0o700, exist_ok=True)
        (path / "tree").mkdir(mode=0o700)
        os.setxattr(path / "tree", ATTRIBUTE, _encode("", 0))
        marker = path / "tmp" / "overlay.json"
        marker.write_text(json.dumps({"version": _VERSION, "boot_id": boot_id()}))
        marker.rename(path / "overlay.json")
        return cls(path)

    @classmethod
    def open(cls, directory: Path | str, *, durable: bool = True, exclusive: bool = False) -> Overlay:
        """An existing overlay, as its last user left it; raises OverlayUnusable.

        ``durable=False``: fsync was not passed on, so an overlay written before a reboot is refused.
        ``exclusive``: for a mount: refused while another process holds it, and held until ``close``, or until
        the process ends, however it ends.
        """
        path = Path(directory)
        try:
            marker = json.loads((path / "overlay.json").read_text())
        except FileNotFoundError:
            raise OverlayUnusable(f"{path} holds no overlay") from None
        except ValueError as error:
            raise OverlayUnusable(f"{path / 'overlay.json'} is damaged: {error}") from error
        if marker.get("version") != _VERSION:
            raise OverlayUnusable(
                f"{path} was made by another version of tl", hint="delete the branch and make it again"
            )
        if not durable and marker.get("boot_id") != boot_id():
            raise OverlayUnusable(
                f"{path} was written without fsync and the host was restarted since",
                hint="the branch was made for a short life: delete it and make it again",
            )
        overlay = cls(path)
        if exclusive:
            overlay._lock()
            shutil.rmtree(path / "tmp", ignore_errors=True)
        (path / "tmp").mkdir(mode=0o700, exist_ok=True)
        return overlay

    def close(self) -> None:
        """Let another process have it."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    # What compute puts in place before anything is mounted. ----------------------------------------------

    def put_file(self, path: str, data: bytes, mode: int = 0o600) -> None:
        """Make or replace a file with exactly this content; directories above it are made as needed."""
        self._make_parents(path)
        temporary = self._temporary()
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _write_all(fd, data, 0)
            os.fchmod(fd, mode | 0o600)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, self._real(path))

    def make_dir(self, path: str, mode: int = 0o700) -> None:
        """Make a directory that shows nothing of the snapshot's; no error when the overlay has one."""
        self._make_parents(path)
        entry = self.lookup(path)
        if entry is None or entry.kind == WHITEOUT:
            self.add_dir(path, mode)
        elif entry.kind != DIRECTORY:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    def symlink(self, path: str, target: str) -> None:
        """Make or replace a symlink. Under ``pg_tblspc``: PermissionError."""
        self._make_parents(path)
        self.add_symlink(path, target)

    def whiteout(self, path: str) -> None:
        """Hide whatever the snapshot, or the overlay, has at that path (a directory: with all below it)."""
        self._make_parents(path)
        entry = self.lookup(path)
        if entry is not None and entry.kind == DIRECTORY:
            self.remove_dir(path, hide=True)
        else:
            self._place_whiteout(path)

    def _make_parents(self, path: str) -> None:
        # Offline nobody knows the snapshot: directories above show the snapshot's of the same path, if any.
        parent = os.path.dirname(path)
        if not parent:
            return
        entry = self.lookup(parent)
        if entry is not None and entry.kind == DIRECTORY:
            return
        self._make_parents(parent)
        above = self.lookup(os.path.dirname(parent))
        base = (
            None
            if above is None or above.base is None or entry is not None
            else _join(above.base, os.path.basename(parent))
        )
        if base is None:
            self.add_dir(parent, 0o700)
        else:
            self.adopt_dir(parent, base, 0o700)

    # Reading. --------------------------------------------------------------------------------------------

    def lookup(self, path: str) -> Entry | None:
        """What the overlay has at that path; ``None``: nothing, the snapshot decides."""
        real = self._real(path)
        try:
            info = os.lstat(real)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if stat.S_ISLNK(info.st_mode):
            return Entry(SYMLINK, len(os.readlink(real)), 0o777, info.st_mtime_ns, None, 0)
        mark = self._mark(real)
        if mark.whiteout:
            return Entry(WHITEOUT, 0, 0, 0, None, 0)
        kind = DIRECTORY if stat.S_ISDIR(info.st_mode) else FILE
        valid = min(mark.valid_bytes, info.st_size) if kind == FILE else 0
        return Entry(kind, info.st_size, stat.S_IMODE(info.st_mode), info.st_mtime_ns, mark.base, valid)

    def has_dir(self, path: str) -> bool:
        """Whether the overlay has a directory there."""
        return os.path.isdir(self._real(path))

    def names(self, path: str) -> list[str]:
        """Names in a directory of the overlay, whiteouts included; empty when it has no such directory."""
        try:
            return os.listdir(self._real(path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read_link(self, path: str) -> str:
        """Target of a symlink."""
        return os.readlink(self._real(path))

    def statvfs(self) -> os.statvfs_result:
        """Of the file system that holds the overlay."""
        return os.statvfs(self._tree)

    # Changing. -------------------------------------------------------------------------------------------

    def open_file(self, path: str) -> int:
        """A read-write descriptor of a file the overlay has."""
        return os.open(self._real(path), os.O_RDWR | os.O_CLOEXEC)

    def add_file(self, path: str, mode: int) -> int:
        """Make an empty file with no base; its descriptor."""
        temporary = self._temporary()
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, mode | 0o600)
            os.rename(temporary, self._real(path))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def adopt_file(self, path: str, base: str, size: int, mode: int) -> int:
        """Make the overlay's file for one of the snapshot: all holes, all of it valid; its descriptor."""
        temporary = self._temporary()
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            os.setxattr(fd, ATTRIBUTE, _encode(base, size))
            os.fchmod(fd, mode | 0o600)
            os.rename(temporary, self._real(path))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def anonymous_file(self, size: int) -> int:
        """A descriptor of a nameless file, all holes: for a file that was unlinked while open."""
        temporary = self._temporary()
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.unlink(temporary)
        os.ftruncate(fd, size)
        return fd

    def truncate(self, fd: int, size: int, base: str | None, valid_bytes: int) -> int:
        """Set the size; the valid mark that counts from now on.

        The size goes first: a valid mark above the size counts as the size, so a crash in between is
        harmless, while the other order would show zeros in a file that was not truncated yet.
        """
        os.ftruncate(fd, size)
        if size >= valid_bytes or base is None:
            return valid_bytes
        os.setxattr(fd, ATTRIBUTE, _encode(base, size))
        return size

    def settle_valid(self, fd: int, base: str, valid_bytes: int) -> None:
        """Write the valid mark that counts, before a file is used: a crash may have left a greater one."""
        if _decode(os.getxattr(fd, ATTRIBUTE)).valid_bytes != valid_bytes:
            os.setxattr(fd, ATTRIBUTE, _encode(base, valid_bytes))

    def add_dir(self, path: str, mode: int) -> None:
        """Make a directory that shows nothing of the snapshot's."""
        self._place_dir(path, mode, None)

    def adopt_dir(self, path: str, base: str, mode: int) -> None:
        """Make the overlay's directory for one of the snapshot."""
        self._place_dir(path, mode, base)

    def add_symlink(self, path: str, target: str) -> None:
        """Make or replace a symlink. Under ``pg_tblspc``: PermissionError (EDGE 49)."""
        if is_tablespace_path(path):
            raise PermissionError(errno.EPERM, "no symlink may be in pg_tblspc", path)
        temporary = self._temporary()
        os.symlink(target, temporary)
        os.rename(temporary, self._real(path))

    def remove_file(self, path: str, *, hide: bool) -> None:
        """Remove a file or symlink; ``hide``: the snapshot has something there that must not come back."""
        if hide:
            self._place_whiteout(path)
        else:
            os.unlink(self._real(path))

    def remove_dir(self, path: str, *, hide: bool) -> None:
        """Remove a directory and what is left in it (whiteouts); in one step."""
        temporary = self._temporary()
        if hide:
            self._new_whiteout(temporary)
            if self.has_dir(path):
                exchange(temporary, self._real(path))
            else:
                os.rename(temporary, self._real(path))
                return
        else:
            os.rename(self._real(path), temporary)
        shutil.rmtree(temporary, ignore_errors=True)

    def rename(self, old: str, new: str, *, hide_old: bool) -> None:
        """Move ``old``, which the overlay has, over whatever the overlay has at ``new``, in one step.

        ``hide_old``: the snapshot has something at ``old`` that must not come back. The caller has adopted
        whatever is visible at ``new`` and made sure that POSIX allows the move.
        """
        source, target = self._real(old), self._real(new)
        occupant = self.lookup(new)
        if not hide_old and (occupant is None or _plain_rename_works(self.lookup(old), occupant)):
            os.rename(source, target)
            return
        if occupant is None:
            self._place_whiteout(new)
        elif occupant.kind in (FILE, DIRECTORY):
            parent = os.stat(os.path.dirname(source)).st_ino
            where = f"{parent}/{os.path.basename(source)}"
            os.setxattr(target, ATTRIBUTE, _encode(occupant.base, occupant.valid_bytes, dies_at=where))
        elif occupant.kind == SYMLINK:
            # A symlink cannot carry the mark; Postgres renames over none, and its going first loses nothing.
            self._place_whiteout(new)
        self._clear_death(source)
        exchange(source, target)
        leftover = stat.S_ISDIR(os.lstat(source).st_mode)
        if leftover:
            self.remove_dir(old, hide=hide_old)
        else:
            self.remove_file(old, hide=hide_old)

    def set_mode(self, path: str, mode: int) -> None:
        """Permission bits; the owner keeps access, for the owner here is the mount."""
        os.chmod(self._real(path), mode | (0o700 if self.has_dir(path) else 0o600))

    def set_mtime(self, path: str, mtime_ns: int) -> None:
        """Time of the last change."""
        os.utime(self._real(path), ns=(mtime_ns, mtime_ns))

    def sync_dirs(self, path: str) -> None:
        """fsync the directory at ``path``, if the overlay has it, and all above it."""
        while True:
            try:
                fd = os.open(self._real(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                pass
            else:
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            if not path:
                return
            path = os.path.dirname(path)

    # Internals. ------------------------------------------------------------------------------------------

    def _lock(self) -> None:
        fd = os.open(self.directory / "overlay.json", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise OverlayUnusable(f"{self.directory} is in use by another mount") from None
        self._lock_fd = fd

    def _real(self, path: str) -> str:
        return f"{self._tree}/{path}" if path else self._tree

    def _temporary(self) -> str:
        return f"{self._tmp}/{os.getpid()}.{next(self._serial)}"

    def _new_whiteout(self, real: str) -> None:
        os.close(os.open(real, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.setxattr(real, ATTRIBUTE, b"w")

    def _place_whiteout(self, path: str) -> None:
        temporary = self._temporary()
        self._new_whiteout(temporary)
        os.rename(temporary, self._real(path))

    def _place_dir(self, path: str, mode: int, base: str | None) -> None:
        temporary = self._temporary()
        os.mkdir(temporary, 0o700)
        os.chmod(temporary, mode | 0o700)
        if base is not None:
            os.setxattr(temporary, ATTRIBUTE, _encode(base, 0))
        real = self._real(path)
        if os.path.lexists(real):
            exchange(temporary, real)
            os.unlink(temporary)
        else:
            os.rename(temporary, real)

    def _mark(self, real: str) -> _Mark:
        try:
            value = os.getxattr(real, ATTRIBUTE)
        except OSError as error:
            if error.errno == errno.ENODATA:
                return _NOATTRIBUTE
            raise
        mark = _decode(value)
        if mark.dies_at is not None:
            parent = os.stat(os.path.dirname(real)).st_ino
            if mark.dies_at == f"{parent}/{os.path.basename(real)}":
                return _GONE
        return mark

    def _clear_death(self, real: str) -> None:
        """Before a file moves: a mark left by an interrupted rename must not take effect at its new place."""
        if os.path.islink(real):
            return
        mark = self._mark(real)
        if mark.dies_at is not None:
            os.setxattr(real, ATTRIBUTE, _encode(mark.base, mark.valid_bytes))


def boot_id() -> str:
    """What changes when the host restarts."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _plain_rename_works(moved: Entry | None, occupant: Entry) -> bool:
    # Over an overlay directory it would fail: an empty-looking one may be full of whiteouts.
    return moved is not None and moved.kind != DIRECTORY and occupant.kind != DIRECTORY


def _encode(base: str | None, valid_bytes: int, *, dies_at: str | None = None) -> bytes:
    parts = [str(valid_bytes), "-" if base is None else f"+{base}"]
    if dies_at is not None:
        parts.append(dies_at)
    return "\0".join(parts).encode("utf-8", "surrogateescape")


def _decode(value: bytes) -> _Mark:
    if value == b"w":
        return _GONE
    parts = value.decode("utf-8", "surrogateescape").split("\0")
    if len(parts) not in (2, 3) or not parts[0].isdigit() or parts[1][:1] not in ("+", "-"):
        raise OSError(errno.EIO, f"damaged attribute {ATTRIBUTE}: {value!r}")
    base = parts[1][1:] if parts[1][0] == "+" else None
    return _Mark(False, base, int(parts[0]), parts[2] if len(parts) == 3 else None)


def _join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]
