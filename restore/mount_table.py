"""What is mounted on this host, and how to unmount it."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from timeline.errors import TimelineError

FUSE_TYPE = "fuse.tl"
UNMOUNT_SECONDS = 20
_MNT_DETACH = 2


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of the kernel's mount table."""

    device: str
    """``major:minor``."""
    mountpoint: str
    type: str


def mounted() -> list[Mounted]:
    """All mounts this process can see (proc_pid_mountinfo(5)); none where the system does not tell."""
    try:
        text = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        parts = fields.split(" ")
        found.append(Mounted(parts[2], _unescaped(parts[4]), rest.split(" ")[0]))
    return found


def find(mountpoint: str | os.PathLike[str]) -> Mounted | None:
    """Our mount at that place, living or dead. Asks the mount itself nothing."""
    place = _normal(mountpoint)
    ours = (m for m in reversed(mounted()) if m.mountpoint == place and m.type == FUSE_TYPE)
    return next(ours, None)


def unmount(mountpoint: str | os.PathLike[str], *, detach: bool = False) -> bool:
    """Unmount ours, if it is there; whether it was in use and therefore only detached. Raises TimelineError.

    ``detach``: at once, for a mount whose process is dead.
    """
    if find(mountpoint) is None:
        return False
    place = _normal(mountpoint)
    if os.geteuid() == 0:
        if not detach and _umount2(place, 0):
            return False
        if find(place) is not None and not _umount2(place, _MNT_DETACH):
            raise TimelineError(f"cannot unmount {place}")
        return True
    if not detach and _fusermount("-u", place):
        return False
    if find(place) is not None and not _fusermount("-uz", place):
        raise TimelineError(f"cannot unmount {place}", hint="is fusermount3 installed?")
    return True


def detach_stale(mountpoint: str | os.PathLike[str]) -> None:
    """Remove what a killed mount left. The caller holds the overlay's lock, so nobody serves it."""
    while find(mountpoint) is not None:
        unmount(mountpoint, detach=True)


def _umount2(place: str, flags: int) -> bool:
    """Whether it is unmounted now; busy is no error."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(place), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EBUSY, errno.EINVAL, errno.ENOENT):
        return code != errno.EBUSY
    raise TimelineError(f"cannot unmount {place}: {os.strerror(code)}")


def _fusermount(option: str, place: str) -> bool:
    try:
        done = subprocess.run(
            ["fusermount3", option, place],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=UNMOUNT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TimelineError(f"cannot unmount {place}: {error}", hint="is fusermount3 installed?") from error
    return done.returncode == 0


def _normal(mountpoint: str | os.PathLike[str]) -> str:
    """Absolute, without links above it; the last step itself may be dead and is not looked at."""
    parent, name = os.path.split(os.path.abspath(mountpoint))
    return os.path.join(os.path.realpath(parent), name)


def _unescaped(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
