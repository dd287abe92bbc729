"""When each pack was last read whole and found intact: kept on the host, so that scheduled runs go round.

Only progress: a ledger that is lost or cannot be read costs reading everything again, and no more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from timeline.clock import Micros
from timeline.maintain.pack_set import PackSet

_ENTRY = np.dtype([("id", "S32"), ("at", "<i8")])


class Ledger:
    """Times by pack; 0: never."""

    def __init__(self, path: Path | None, packs: PackSet) -> None:
        """``path``: of its file; ``None``: remembered nowhere."""
        self._path = path
        self._packs = packs
        self.at: npt.NDArray[np.int64] = np.zeros(len(packs), np.int64)
        if path is not None and path.exists():
            self._load(path)

    def mark(self, number: int, now: Micros) -> None:
        """The pack was read whole and is intact."""
        self.at[number] = now

    def save(self) -> None:
        """Write the file, in one step; raises OSError.

        What others have saved since is kept: several may read parts of one store at once.
        """
        if self._path is None:
            return
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(self._path.parent):
            if self._path.exists():
                self._load(self._path)
            self._write(self._path)

    def _write(self, path: Path) -> None:
        known = np.flatnonzero(self.at)
        entries = np.empty(len(known), _ENTRY)
        entries["id"], entries["at"] = self._packs.ids[known], self.at[known]
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(entries.tobytes())
        os.replace(temporary, path)

    def _load(self, path: Path) -> None:
        data = path.read_bytes()
        # A file cut short by a full disk: what is whole of it counts.
        entries = np.frombuffer(data[: len(data) - len(data) % _ENTRY.itemsize], _ENTRY)
        if not len(self._packs):
            return
        places = np.minimum(np.searchsorted(self._packs.ids, entries["id"]), len(self._packs) - 1)
        same = self._packs.ids[places] == entries["id"]
        # A pack is never unread again: the later time counts.
        self.at[places[same]] = np.maximum(self.at[places[same]], entries["at"][same])


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One writer of a directory's ledgers at a time: for the moment that reading and writing one takes."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
