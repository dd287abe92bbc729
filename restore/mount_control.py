"""What other processes may ask of a mount: to fetch ahead what they know will be read, and to tell its
counters.

A request is an extended attribute set on a file of the mount, so that it needs no socket and no permission beyond
writing there. The kernel locks a file while an attribute of it is set: it is one that nobody writes, and not the
data directory, in which Postgres makes and removes files. To fetch ahead: lines of ``<first block> <blocks> <path>``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PREFETCH_ATTRIBUTE = b"user.tl.prefetch"
STATS_ATTRIBUTE = b"user.tl.stats"
_ASKED_FILE = "PG_VERSION"
_MAX_VALUE_BYTES = 60_000
"""Below the kernel's bound for one attribute (64 KiB)."""


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Blocks of 8 KiB of one file of the data directory."""

    path: str
    """Relative, as the snapshot lists it."""
    first_block: int
    blocks: int


def prefetch(mountpoint: str | os.PathLike[str], wanted: Iterable[BlockRange]) -> None:
    """Ask the mount to fetch ahead; returns when it has begun, so that reading it does not cost requests of its own, or after
    seconds, and promises nothing. Raises OSError when there is no mount."""
    asked = os.path.join(mountpoint, _ASKED_FILE)
    lines: list[bytes] = []
    held = 0
    for blocks in wanted:
        line = f"{blocks.first_block} {blocks.blocks} {blocks.path}\n".encode("utf-8", "surrogateescape")
        if held + len(line) > _MAX_VALUE_BYTES:
            os.setxattr(asked, PREFETCH_ATTRIBUTE, b"".join(lines))
            lines, held = [], 0
        lines.append(line)
        held += len(line)
    if lines:
        os.setxattr(asked, PREFETCH_ATTRIBUTE, b"".join(lines))


def stands(mountpoint: str | os.PathLike[str]) -> bool:
    """Whether there is a mount that can be asked."""
    return os.path.exists(os.path.join(mountpoint, _ASKED_FILE))


def refresh_stats(mountpoint: str | os.PathLike[str]) -> None:
    """Have the mount write its stats file now; it is written when this returns. Raises OSError without a
    mount."""
    os.setxattr(mountpoint, STATS_ATTRIBUTE, b"now")


def decode_prefetch(value: bytes) -> Iterator[BlockRange]:
    """The ranges of one request; raises ValueError."""
    for line in value.decode("utf-8", "surrogateescape").splitlines():
        first, blocks, path = line.split(" ", 2)
        yield BlockRange(path, int(first), int(blocks))
