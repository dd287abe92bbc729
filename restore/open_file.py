"""The content of one file of a branch: what was written over what the snapshot has.

Below the valid mark, a hole of the overlay's file shows the snapshot; above it there are zeros or what was
written. Every write below the mark covers whole units (sparse.UNIT_BYTES), completed with the snapshot's
bytes where the caller gave fewer, so that a unit is either local or not.

Concurrency: one event loop. What is local is looked up *after* the snapshot's bytes have arrived and in the
same step in which they are used, so a write or truncation that came in between is seen. Bytes of the snapshot
never change, so they cannot be stale.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Protocol

from restore.overlay import Overlay
from restore.sparse import UNIT_BYTES, data_ranges, is_local
from timeline.format.extent import GROUP_BYTES


class BaseContent(Protocol):
    """What the snapshot has in one file."""

    def read_now(self, offset: int, length: int) -> bytes | None:
        """Exactly that range if it can be had without waiting, else ``None``."""
        ...

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly that range; raises TimelineError."""
        ...


class OpenFile:
    """One file, while it is open. ``adopt`` makes the overlay's file when the first write needs one."""

    def __init__(
        self,
        overlay: Overlay,
        *,
        fd: int | None,
        size: int,
        base: BaseContent | None,
        base_path: str | None,
        valid_bytes: int,
        adopt: Callable[[], int],
    ) -> None:
        self._overlay = overlay
        self._adopt = adopt
        self.fd = fd
        """Descriptor of the overlay's file; ``None``: nothing was written yet."""
        self.size = size
        self._base = base
        self._base_path = base_path
        self._valid_bytes = valid_bytes if base is not None else 0
        self._complete = bytearray(-(-self._valid_bytes // GROUP_BYTES))
        """Groups known to be wholly local: they need no look at the holes."""
        self.unsynced_name = False
        """The overlay's file was made since the last fsync: so must its directories be synced."""

    def close(self) -> None:
        """Give the descriptor back."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def read_now(self, offset: int, length: int) -> bytes | None:
        """The bytes, fewer at the end of the file; ``None`` when some have to be fetched first."""
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        holes = self._holes(offset, end)
        pieces = []
        for start, stop in holes:
            piece = self._content.read_now(start, stop - start)
            if piece is None:
                return None
            pieces.append((start, piece))
        return self._assemble(offset, end, holes, pieces)

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes, fewer at the end of the file; raises TimelineError when the snapshot's cannot be had."""
        now = self.read_now(offset, length)
        if now is not None:
            return now
        wanted = self._holes(offset, min(offset + length, self.size))
        content = self._content
        fetched = await asyncio.gather(*(content.read(start, stop - start) for start, stop in wanted))
        pieces = [(start, piece) for (start, _), piece in zip(wanted, fetched, strict=True)]
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        # Since the first look holes can only have become fewer or smaller, so what was fetched suffices.
        return self._assemble(offset, end, self._holes(offset, end), pieces)

    async def write(self, offset: int, data: bytes) -> int:
        """Write all of it; raises OSError, and TimelineError when bytes around it cannot be had."""
        given = len(data)
        end = offset + given
        if not data:
            return 0
        self.make_local()
        torn = self._torn_units(offset, end)
        while torn:
            around = {unit: await self._base_unit(unit) for unit in torn}
            if torn == self._torn_units(offset, end):
                data, offset = self._completed(data, offset, end, around)
                break
            torn = self._torn_units(offset, end)
        self._pwrite(data, offset)
        self.size = max(self.size, end)
        return given

    def truncate(self, size: int) -> None:
        """Cut or extend with zeros."""
        if size == self.size:
            return
        self.make_local()
        self._valid_bytes = self._overlay.truncate(self._local, size, self._base_path, self._valid_bytes)
        self.size = size

    def make_local(self) -> None:
        """Make the overlay's file, if there is none yet."""
        if self.fd is None:
            self.fd = self._adopt()
            self.unsynced_name = True

    def groups_to_fetch(self, groups: range) -> range:
        """The part of ``groups`` that may show the snapshot."""
        start, stop = groups.start, min(groups.stop, len(self._complete))
        while start < stop and self._complete[start]:
            start += 1
        while stop > start and self._complete[stop - 1]:
            stop -= 1
        return range(start, stop)

    @property
    def _content(self) -> BaseContent:
        if self._base is None:
            raise RuntimeError("a file without a base has no hole that shows one")
        return self._base

    @property
    def _local(self) -> int:
        if self.fd is None:
            raise RuntimeError("nothing was written yet")
        return self.fd

    def _holes(self, offset: int, end: int) -> list[tuple[int, int]]:
        """Ranges of [offset, end) that show the snapshot; remembers groups that have none."""
        end = min(end, self._valid_bytes)
        if offset >= end:
            return []
        if self.fd is None:
            return [(offset, end)]
        first, last = offset // GROUP_BYTES, (end - 1) // GROUP_BYTES
        if all(self._complete[first : last + 1]):
            return []
        holes = []
        at = offset
        for start, stop in data_ranges(self.fd, offset, end):
            if start > at:
                holes.append((at, start))
            at = stop
        if at < end:
            holes.append((at, end))
        if not holes:
            for group in range(first, last + 1):
                start = group * GROUP_BYTES
                if is_local(self.fd, start, min(start + GROUP_BYTES, self._valid_bytes)):
                    self._complete[group] = 1
        return holes

    def _assemble(
        self, offset: int, end: int, holes: list[tuple[int, int]], pieces: list[tuple[int, bytes]]
    ) -> bytes:
        """[offset, end) with the holes filled from the pieces, which cover at least the holes."""
        if not holes:
            return os.pread(self._local, end - offset, offset)
        if holes == [(offset, end)] and len(pieces) == 1:
            start, piece = pieces[0]
            exact = start == offset and len(piece) == end - offset
            return piece if exact else piece[offset - start : end - start]
        whole = bytearray(end - offset)
        os.preadv(self._local, [whole], offset)
        for start, stop in holes:
            for at, piece in pieces:
                if at <= start and stop <= at + len(piece):
                    whole[start - offset : stop - offset] = piece[start - at : stop - at]
                    break
            else:
                raise RuntimeError(f"bytes {start} to {stop} were not fetched")
        return bytes(whole)

    def _torn_units(self, offset: int, end: int) -> tuple[int, ...]:
        """Units that show the snapshot and that a write of [offset, end) would cover in part."""
        units = []
        head, tail = offset - offset % UNIT_BYTES, end - end % UNIT_BYTES
        if offset != head and head < self._valid_bytes:
            units.append(head)
        # Behind the valid mark there is nothing of the snapshot to be kept.
        if end != tail and end < self._valid_bytes and tail not in units:
            units.append(tail)
        return tuple(unit for unit in units if not is_local(self._local, unit, unit + 1))

    async def _base_unit(self, unit: int) -> bytes:
        length = min(UNIT_BYTES, self._valid_bytes - unit)
        now = self._content.read_now(unit, length)
        return now if now is not None else await self._content.read(unit, length)

    def _completed(self, data: bytes, offset: int, end: int, around: dict[int, bytes]) -> tuple[bytes, int]:
        """The write with the snapshot's bytes in front and behind, up to unit borders or the valid mark."""
        head, tail = offset - offset % UNIT_BYTES, end - end % UNIT_BYTES
        prefix = suffix = b""
        if offset != head and head in around:
            valid = max(0, min(offset, self._valid_bytes) - head)
            prefix = around[head][:valid].ljust(offset - head, b"\0")
        if end != tail and end < self._valid_bytes and tail in around:
            suffix = around[tail][end - tail : self._valid_bytes - tail]
        return prefix + data + suffix, offset - len(prefix)

    def _pwrite(self, data: bytes, offset: int) -> None:
        written = os.pwrite(self._local, data, offset)
        while written < len(data):
            written += os.pwrite(self._local, memoryview(data)[written:], offset + written)
