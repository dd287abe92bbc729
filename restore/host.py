"""What this host gives to branches: where they live, and which account runs Postgres.

Layout of the state directory (where root owns it, the service account may only pass through)::

    registry.lock            held for the short moments in which names and directories change hands
    names/<name>             symlink to the branch's directory; its creation is what makes a name unique
    branches/<id>/           see restore/branches.py
    s/<id>/                  the branch's Unix socket, 0700
    cache/                   extents fetched from stores, shared by all branches (see restore/cache.py)
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from timeline.errors import TimelineError, UsageError

SOCKET_DIRECTORY_BYTES = 90
"""A socket's path must fit in 107 bytes; Postgres appends ``/.s.PGSQL.65535``."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Account:
    """An operating system user."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Host:
    """This machine, as one user sees it."""

    state: Path
    cache: Path
    sockets: Path
    """Parent of the branches' socket directories; short enough for any of them."""
    account: Account
    """Who runs Postgres."""
    switches_user: bool
    """Whether that is someone else than ourselves (we are root)."""
    boot_id: str
    """Changes with every boot of the kernel; empty where the kernel does not tell."""

    @property
    def branches(self) -> Path:
        """Parent of the branches' directories."""
        return self.state / "branches"

    @property
    def names(self) -> Path:
        """Directory of the name links."""
        return self.state / "names"

    def make(self) -> None:
        """Create what is missing of the layout; raises TimelineError when the host does not let us."""
        try:
            for directory in (self.state, self.branches, self.names):
                _make_passable(directory, passable=self.switches_user)
            _make_sockets_parent(self.sockets, passable=self.switches_user)
        except OSError as error:
            raise TimelineError(
                f"cannot create {error.filename or self.state}: {error.strerror}",
                hint="set TL_STATE to a directory that may be written",
            ) from error

    def own(self, path: Path) -> None:
        """Give the path to the account that runs Postgres."""
        if self.switches_user:
            os.chown(path, self.account.uid, self.account.gid, follow_symlinks=False)

    def make_private(self, path: Path) -> Path:
        """A new directory (0700) that belongs to the account that runs Postgres."""
        path.mkdir(mode=0o700)
        self.own(path)
        return path


def find_host(environ: Mapping[str, str]) -> Host:
    """The host as the environment describes it; creates nothing.

    ``TL_STATE`` and ``TL_CACHE`` move the directories, ``TL_RUN_AS`` names the account that runs Postgres for
    root. Raises UsageError when we are root and no such account exists (EDGE 48).
    """
    uid = os.geteuid()
    state, cache = _directories(environ, uid)
    sockets = state / "s"
    if len(os.fsencode(sockets)) > SOCKET_DIRECTORY_BYTES - 16:
        # Not XDG_RUNTIME_DIR: that is emptied when the session ends, and branches outlive sessions.
        sockets = Path("/tmp") / f"tl-{uid}"
    return Host(
        state=state,
        cache=cache,
        sockets=sockets,
        account=_find_account(environ, uid),
        switches_user=uid == 0,
        boot_id=_BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "",
    )


def state_directory(environ: Mapping[str, str]) -> Path:
    """Where this user's state lives; needs no account that could run Postgres, and creates nothing."""
    return _directories(environ, os.geteuid())[0]


@contextlib.contextmanager
def told_plainly() -> Iterator[None]:
    """Turn what the operating system refuses (disk full, a dead mount) into one clear line: TimelineError."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise TimelineError(f"{where}{error.strerror or error}") from error


def _directories(environ: Mapping[str, str], uid: int) -> tuple[Path, Path]:
    home = Path(environ.get("HOME") or pwd.getpwuid(uid).pw_dir)
    if environ.get("TL_STATE"):
        state = Path(environ["TL_STATE"]).absolute()
        cache = state / "cache"
    elif uid == 0:
        state = Path("/var/lib/tl")
        cache = state / "cache"
    else:
        state = Path(environ.get("XDG_STATE_HOME") or home / ".local" / "state") / "tl"
        cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "tl"
    if environ.get("TL_CACHE"):
        cache = Path(environ["TL_CACHE"]).absolute()
    return state, cache


def _find_account(environ: Mapping[str, str], uid: int) -> Account:
    if uid != 0:
        entry = pwd.getpwuid(uid)
        return Account(entry.pw_name, uid, os.getegid(), tuple(os.getgroups()))
    name = environ.get("TL_RUN_AS") or "postgres"
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise UsageError(
            f"Postgres refuses to run as root, and there is no user {name!r} to run it as",
            hint="create that user, name another in TL_RUN_AS, or run tl as an ordinary user",
        ) from None
    if entry.pw_uid == 0:
        raise UsageError(
            f"Postgres refuses to run as {name!r}, which is root", hint="name another user in TL_RUN_AS"
        )
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(groups))


def _make_passable(directory: Path, *, passable: bool) -> None:
    if directory.is_dir():
        return
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if passable:
        directory.chmod(0o711)


def _make_sockets_parent(directory: Path, *, passable: bool) -> None:
    _make_passable(directory, passable=passable)
    # The fallback lies in /tmp, where anyone may have been first.
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise TimelineError(
            f"{directory} is not a directory of ours", hint="remove it, or set TL_STATE to a shorter path"
        )
