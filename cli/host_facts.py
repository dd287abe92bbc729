"""This host's branches and cache, from the files they keep: nothing is mounted, woken or asked.

Bounds: MOST_FILES files are looked at for each branch's own bytes, MOST_CACHED for the cache's, whose shards
are alike, so that the rest is reckoned.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from cli.facts import BranchFacts, CacheFacts, HostFacts
from timeline.clock import Clock
from timeline.errors import UsageError

MOST_FILES = 20_000
MOST_CACHED = 20_000
_BLOCK_BYTES = 512
"""Unit of st_blocks."""


def gather_host(environ: Mapping[str, str], clock: Clock) -> HostFacts:
    """What ``tl branches`` and the mounts' own files tell. May wait for the disk; raises TimelineError."""
    from restore.branches import Branches
    from restore.host import find_host
    from restore.local_branch import LAZY
    from restore.mount_spec import read_stats

    try:
        host = find_host(environ)
    except UsageError:
        # Nobody could run a branch here: there are none.
        return HostFacts(branches=(), cache=None)
    registry = Branches(host, clock)
    found = []
    for branch in registry.all():
        directory = registry.directory(branch.id)
        lazy = branch.mode == LAZY
        own, complete = own_bytes(directory / ("overlay" if lazy else "data"))
        stats = read_stats(directory / "stats.json") if lazy else None
        found.append(
            BranchFacts(
                name=branch.name,
                store_url=branch.origin.store_url if branch.origin is not None else "",
                mode=branch.mode,
                created=branch.created,
                expires=branch.expires,
                own_bytes=own,
                own_complete=complete,
                requests=stats.requests if stats is not None else 0,
                fetched_bytes=stats.fetched_bytes if stats is not None else 0,
                store_extents=stats.extents if stats is not None else 0,
                memory_hits=stats.memory_hits if stats is not None else 0,
                disk_hits=stats.disk_hits if stats is not None else 0,
            )
        )
    return HostFacts(branches=tuple(found), cache=cache_bytes(host.cache))


def own_bytes(root: Path) -> tuple[int, bool]:
    """Bytes on disk below a directory, holes left out, and whether all files were looked at."""
    total = 0
    for number, entry in enumerate(_walk(root)):
        if number >= MOST_FILES:
            return total, False
        with contextlib.suppress(OSError):
            total += entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES
    return total, True


def cache_bytes(root: Path) -> CacheFacts | None:
    """Bytes of the extent cache (see restore/cache.py for its layout)."""
    try:
        shards = sorted(entry.path for entry in os.scandir(root / "v1") if len(entry.name) == 2)
    except OSError:
        return None
    total = seen = 0
    for done, shard in enumerate(shards):
        if seen >= MOST_CACHED:
            return CacheFacts(total * len(shards) // done, exact=False)
        for entry in _walk(Path(shard)):
            seen += 1
            with contextlib.suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES
    return CacheFacts(total, exact=True)


def _walk(root: Path) -> Iterator[os.DirEntry[str]]:
    """Files below a directory, as far as they are still there when looked at."""
    left = [os.fspath(root)]
    while left:
        try:
            with os.scandir(left.pop()) as found:
                for entry in found:
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    else:
                        yield entry
        except OSError:
            continue
