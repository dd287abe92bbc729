"""Extents that lie close together in one pack, as runs that one ranged read brings. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from timeline.format import keys
from timeline.format.extent import ExtentRef

MAX_GAP_BYTES = 32 << 10
"""Bytes nobody asked for that are read rather than making another request."""


def coalesce(refs: Sequence[ExtentRef], *, max_gap_bytes: int, max_run_bytes: int) -> list[list[ExtentRef]]:
    """Cut extents into runs of one pack that are read at once."""
    runs: list[list[ExtentRef]] = []
    pack, start, end = "", 0, 0
    for ref in sorted(refs, key=lambda ref: (ref.pack, ref.offset)):
        close = ref.pack == pack and ref.offset - end <= max_gap_bytes
        if runs and close and ref.offset + ref.stored_bytes - start <= max_run_bytes:
            runs[-1].append(ref)
        else:
            runs.append([ref])
            pack, start, end = ref.pack, ref.offset, ref.offset
        end = max(end, ref.offset + ref.stored_bytes)
    return runs


def range_of(run: Sequence[ExtentRef]) -> tuple[str, int, int]:
    """Key, first byte and length of what holds a run's frames."""
    start = min(ref.offset for ref in run)
    end = max(ref.offset + ref.stored_bytes for ref in run)
    return keys.pack(run[0].pack), start, end - start


def frame_of(data: memoryview, start: int, ref: ExtentRef) -> memoryview:
    """The frame of one extent of a run, out of its bytes, which begin at ``start`` of the pack."""
    at = ref.offset - start
    return data[at : at + ref.stored_bytes]
