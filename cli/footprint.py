"""What a process that runs for months beside a database should not take from it."""

from __future__ import annotations

import ctypes
import os

BIG_BLOCK_BYTES = 1 << 20
"""A freed block of this size goes back to the system at once."""

_M_MMAP_THRESHOLD = -3
"""glibc's malloc.h."""


def keep_small() -> None:
    """Call before numpy is imported. Where malloc is not glibc's, only the first half has an effect.

    numpy's algebra, which nothing here uses, would start a thread for each core, and they wait for work by
    spinning. glibc stops giving freed blocks of up to 32 MiB back once it has seen one of that size: the chunks
    of one busy minute would stay resident for ever, with holes that only smaller blocks fit in (P9). What would
    then be mapped again and again is kept by its owner (``ChunkBuffers``).
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, BIG_BLOCK_BYTES)


def give_back() -> None:
    """Return freed memory to the system, where malloc is glibc's: worth it after a piece of work, for it takes milliseconds."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
