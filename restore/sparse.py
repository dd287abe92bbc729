"""Sparse files and names: the few system calls an overlay is made of, and whether a file system has them.

A range of a file is data or a hole (lseek(2), SEEK_DATA); names are swapped in one step (renameat2(2),
RENAME_EXCHANGE); a file carries one extended attribute.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from timeline.errors import TimelineError

UNIT_BYTES = 4096
"""Granularity at which data and holes must be told apart."""
ATTRIBUTE = "user.tl.base"

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CURE = "put the state directory (TL_STATE) on ext4, xfs, btrfs or tmpfs"

_libc = ctypes.CDLL(None, use_errno=True)


class OverlayUnusable(TimelineError):
    """The file system cannot hold an overlay, or the overlay there cannot be trusted."""


def data_ranges(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The local ranges within [start, end), ascending; what is between them are holes."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if start >= end:
            return
        stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        yield start, stop
        start = stop


def is_local(fd: int, start: int, end: int) -> bool:
    """Whether [start, end), inside the file, has no hole."""
    return os.lseek(fd, start, os.SEEK_HOLE) >= end


def exchange(one: str, two: str) -> None:
    """Swap two names in one step (renameat2 with RENAME_EXCHANGE)."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), one, None, two)


def probe_file_system(directory: Path) -> None:
    """Raise OverlayUnusable unless files there tell data from holes at UNIT_BYTES and carry attributes."""
    probe = directory / f".probe.{os.getpid()}"
    other = directory / f".probe2.{os.getpid()}"
    try:
        fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _probe_attributes(fd, directory)
            _probe_holes(fd, directory)
            _probe_exchange(probe, other, directory)
        finally:
            os.close(fd)
    finally:
        for leftover in (probe, other):
            leftover.unlink(missing_ok=True)


def _probe_attributes(fd: int, directory: Path) -> None:
    try:
        os.setxattr(fd, ATTRIBUTE, b"w")
    except OSError as error:
        raise OverlayUnusable(
            f"the file system of {directory} has no user extended attributes: {error.strerror}", hint=_CURE
        ) from error


def _probe_holes(fd: int, directory: Path) -> None:
    expected = [(2 * UNIT_BYTES, 3 * UNIT_BYTES), (16 * UNIT_BYTES, 17 * UNIT_BYTES)]
    os.ftruncate(fd, 256 * UNIT_BYTES)
    os.pwrite(fd, b"\x5a" * UNIT_BYTES, expected[0][0])
    os.pwrite(fd, bytes(UNIT_BYTES), expected[1][0])
    for moment in ("as written", "after fsync"):
        found = list(data_ranges(fd, 0, 256 * UNIT_BYTES))
        if found != expected:
            raise OverlayUnusable(
                f"the file system of {directory} does not tell data from holes at {UNIT_BYTES} bytes"
                f" ({moment}: expected {expected}, found {found})",
                hint=_CURE,
            )
        os.fsync(fd)


def _probe_exchange(probe: Path, other: Path, directory: Path) -> None:
    other.mkdir()
    try:
        exchange(os.fspath(probe), os.fspath(other))
        exchange(os.fspath(probe), os.fspath(other))
    except OSError as error:
        raise OverlayUnusable(
            f"the file system of {directory} cannot exchange two names: {error.strerror}", hint=_CURE
        ) from error
    finally:
        if other.is_dir():
            other.rmdir()
