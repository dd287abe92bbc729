"""The registry of host-local branches: directories, names and locks.

One directory per branch, ``branches/<id>/``::

    branch.json      what is known about it; replaced atomically
    lock             held (flock) by the process that makes, starts, stops or deletes it
    mount.json       lazy: what the mount process needs to know
    overlay/         lazy: what the branch has written
    data/            the data directory: a mount point, or an ordinary directory
    wal/             pg_wal
    postgres.log

Crash behaviour: a name is taken by creating a symlink, which is atomic and exclusive. The kernel drops the
lock of a process that dies, so a directory that says ``making`` or ``deleting`` while its lock is free is
debris, and ``debris()`` hands it over for removal. Names and directories change hands only under
``registry.lock``.

Nothing here waits longer than the bounds below, and nothing here touches mounts or processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from restore.branch_names import generate_name
from restore.host import Host
from restore.local_branch import MAKING, READY, LocalBranch, decode_branch, encode_branch
from timeline.clock import Clock, Micros
from timeline.errors import TimelineError, Unavailable, UsageError
from timeline.ids import branch_name, new_branch_name

_REGISTRY_SECONDS = 60.0
"""Held for moments only, but a crowd on a busy host waits for all of them."""
_BRANCH_SECONDS = 2.0
"""Whoever looks for debris has a branch's lock for a moment."""
_LOCK_POLL_SECONDS = 0.01
_NAME_ATTEMPTS = 50


class BranchLock:
    """The right to change one branch; released by ``close`` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        """Let others have it; harmless twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> BranchLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Branches:
    """The branches of one host."""

    def __init__(self, host: Host, clock: Clock) -> None:
        self.host = host
        self._clock = clock

    def directory(self, branch_id: str) -> Path:
        """Where a branch keeps everything but its socket."""
        return self.host.branches / branch_id

    def sockets(self, branch_id: str) -> Path:
        """Directory of a branch's socket."""
        return self.host.sockets / branch_id

    def reserve(
        self, name: str | None, *, mode: str, expires: Micros | None, durable: bool
    ) -> tuple[LocalBranch, BranchLock]:
        """Take a name (a generated one when ``None``) and make the directory of a branch in phase ``making``.

        Raises UsageError when the name is invalid or taken.
        """
        if name is not None:
            new_branch_name(name)
        self.host.make()
        with self._registry():
            branch = LocalBranch(
                id=self._clock.token(5),
                name=self._free_name(name),
                phase=MAKING,
                mode=mode,
                created=self._clock.now(),
                expires=expires,
                durable=durable,
                boot_id=self.host.boot_id,
            )
            directory = self.directory(branch.id)
            directory.mkdir(mode=0o711 if self.host.switches_user else 0o700)
            lock = self._try_lock(directory)
            if lock is None:
                raise TimelineError(f"{directory} was locked by another process as it was made")
            self.save(branch)
            self._link_name(branch)
        return branch, lock

    def save(self, branch: LocalBranch) -> None:
        """Write ``branch.json``; a reader sees the old one or the new one.

        Durable, but for a branch in the making: a power failure makes debris of that anyway.
        """
        path = self.directory(branch.id) / "branch.json"
        temporary = path.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(encode_branch(branch))
            file.flush()
            if branch.phase != MAKING:
                os.fsync(file.fileno())
        temporary.replace(path)
        if branch.phase != MAKING:
            _sync_directory(path.parent)

    def get(self, name: str) -> LocalBranch:
        """The branch of that name; raises UsageError when there is none that has been offered."""
        branch = self.find(name)
        if branch is None:
            raise UsageError(f"no branch {name!r} on this host", hint="tl branches lists them")
        return branch

    def find(self, name: str) -> LocalBranch | None:
        """The branch of that name if it has been offered, else ``None``."""
        branch = self._holder(branch_name(name))
        return branch if branch is not None and branch.phase == READY else None

    def all(self) -> tuple[LocalBranch, ...]:
        """Branches that have been offered, oldest first."""
        ready = [branch for branch in self._read_all() if branch.phase == READY]
        return tuple(sorted(ready, key=lambda branch: branch.created))

    def lock(self, branch: LocalBranch) -> BranchLock:
        """The right to change it; raises Unavailable when another process has it for longer than a moment.

        Read the branch again after locking: it may have changed, or gone.
        """
        deadline = self._clock.monotonic() + _BRANCH_SECONDS
        while (lock := self._try_lock(self.directory(branch.id))) is None:
            if self._clock.monotonic() >= deadline:
                raise Unavailable(
                    f"branch {branch.name!r} is being worked on by another tl", hint="try again"
                )
            self._clock.pause(_LOCK_POLL_SECONDS)
        return lock

    def reread(self, branch: LocalBranch) -> LocalBranch:
        """The same branch as it is now; raises UsageError when it has gone."""
        current = self._read(self.directory(branch.id))
        if current is None or current.phase != READY:
            raise UsageError(f"branch {branch.name!r} has just been deleted")
        return current

    def debris(self) -> list[tuple[LocalBranch, BranchLock]]:
        """Branches that a crash left half made or half deleted, locked for the caller to remove."""
        found = []
        if not self.host.branches.is_dir():
            return []
        with self._registry():
            for directory in sorted(self.host.branches.iterdir()):
                if directory.name.startswith("."):
                    # Somebody tries the file system (restore/sparse.py).
                    continue
                branch = self._read(directory)
                if branch is not None and branch.phase == READY:
                    continue
                lock = self._try_lock(directory)
                if lock is None:
                    continue
                # Read again: its maker may have offered it and let go of it in between.
                branch = self._read(directory)
                if branch is not None and branch.phase == READY:
                    lock.close()
                    continue
                if branch is None:
                    # Created but nothing written yet, and its maker is dead: there is nothing more to it.
                    shutil.rmtree(directory)
                    lock.close()
                else:
                    found.append((branch, lock))
            self._drop_stale_names()
        return found

    def remove(self, branch: LocalBranch) -> None:
        """Remove directory, socket directory and name.

        The caller holds the lock, has stopped its processes and unmounted it.
        """
        shutil.rmtree(self.sockets(branch.id), ignore_errors=True)
        directory = self.directory(branch.id)
        # branch.json goes last but one, the lock last: whatever is left says what it is.
        for entry in sorted(directory.iterdir(), key=lambda path: path.name in ("branch.json", "lock")):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name not in ("branch.json", "lock"):
                entry.unlink()
        with self._registry():
            link = self.host.names / branch.name
            if self._link_target(link) == branch.id:
                link.unlink()
            shutil.rmtree(directory)

    def rename(self, branch: LocalBranch, name: str) -> LocalBranch:
        """Give it another name, under its lock; raises UsageError when that is invalid or taken."""
        new_branch_name(name)
        with self._registry():
            renamed = dataclasses.replace(branch, name=self._free_name(name))
            self._link_name(renamed)
            self.save(renamed)
            (self.host.names / branch.name).unlink(missing_ok=True)
        return renamed

    def _free_name(self, name: str | None) -> str:
        if name is not None:
            if self._holder(name) is not None:
                raise UsageError(
                    f"a branch {name!r} already exists on this host",
                    hint="choose another name, or say --if-exists reuse or reset",
                )
            return name
        for _ in range(_NAME_ATTEMPTS):
            generated = generate_name(self._clock)
            if self._holder(generated) is None:
                return generated
        return f"{generate_name(self._clock)}-{self._clock.token(3)}"

    def _link_name(self, branch: LocalBranch) -> None:
        link = self.host.names / branch.name
        link.unlink(missing_ok=True)
        link.symlink_to(f"../branches/{branch.id}")

    def _link_target(self, link: Path) -> str | None:
        try:
            return os.path.basename(os.readlink(link))
        except OSError:
            return None

    def _holder(self, name: str) -> LocalBranch | None:
        """Who has the name, in whatever phase. A link whose branch is gone or named otherwise is stale."""
        branch_id = self._link_target(self.host.names / name)
        branch = self._read(self.directory(branch_id)) if branch_id else None
        return branch if branch is not None and branch.name == name else None

    def _drop_stale_names(self) -> None:
        for link in self.host.names.iterdir():
            if self._holder(link.name) is None:
                link.unlink(missing_ok=True)

    def _read(self, directory: Path) -> LocalBranch | None:
        path = directory / "branch.json"
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        # Empty: a power failure during the making, see ``save``.
        return decode_branch(data, path) if data else None

    def _read_all(self) -> list[LocalBranch]:
        if not self.host.branches.is_dir():
            return []
        found = (self._read(directory) for directory in self.host.branches.iterdir())
        return [branch for branch in found if branch is not None]

    def _try_lock(self, directory: Path) -> BranchLock | None:
        try:
            descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise UsageError(f"branch {directory.name} has just been deleted") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return BranchLock(descriptor)

    @contextlib.contextmanager
    def _registry(self) -> Iterator[None]:
        """Hold ``registry.lock``, waiting at most ``_REGISTRY_SECONDS`` for it."""
        descriptor = os.open(self.host.state / "registry.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = self._clock.monotonic() + _REGISTRY_SECONDS
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self._clock.monotonic() >= deadline:
                        raise Unavailable(
                            f"{self.host.state}/registry.lock is held by another tl", hint="try again"
                        ) from None
                    self._clock.pause(_LOCK_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
