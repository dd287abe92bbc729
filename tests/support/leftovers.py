"""What works below a directory, or because of it: processes and mounts (Linux)."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path


def mounts_below(directory: Path) -> list[str]:
    """Mount points."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{directory}/")]


def processes_of(directory: Path) -> list[str]:
    """Command lines of the processes, but this one, that name it in their words or their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        # One that has ended meanwhile, or is about to.
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            if f"{directory}/".encode() in words + (entry / "environ").read_bytes():
                found.append(words.replace(b"\0", b" ").decode(errors="replace"))
    return found


def children_of(pid: int) -> list[int]:
    """Processes that its threads have started and not yet waited for."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def open_files(pid: int) -> set[str]:
    """Paths that a process holds open."""
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        # One that was closed meanwhile.
        with contextlib.suppress(OSError):
            found.add(os.readlink(file))
    return found


def wait_until_nothing(directory: Path, seconds: float = 60.0) -> None:
    """Agents linger a moment after their last branch; raises AssertionError when something stays."""
    until = time.monotonic() + seconds
    while (left := [*processes_of(directory), *mounts_below(directory)]) and time.monotonic() < until:
        time.sleep(0.2)
    assert left == []
