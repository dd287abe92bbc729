"""Resident memory of every process of ours, sampled from /proc, and what it must stay below."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 5.0
SETTLED_SECONDS = 300.0
"""Of a process, before its slope is told: until then caches fill and threads begin."""
MOST_SLOPE = 1.0
"""MB per minute."""
CEILINGS = {
    "daemon": 60,
    "archive": 340,
    "backup": 300,
    "mount": 160,
    "agent": 160,
    "snapshot": 500,
    "drill": 300,
    "branch": 300,
    "delete": 160,
    "expire": 160,
    "gc": 260,
    "verify": 360,
    "status": 260,
}
"""MB resident, by command: what the architecture page states for the work of each, and some room for noise. The
archiver's aim is 300."""
_LASTING = {"daemon", "archive", "mount", "agent"}
"""A slope says something of what lives on; a job that is half done has grown, of course."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment."""

    seconds: float
    """Since the sampler began."""
    pid: int
    name: str
    megabytes: float


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """All processes of one name."""

    name: str
    processes: int
    peak_mb: float
    ceiling_mb: float
    slope_mb_per_minute: float | None
    """Of the one that lived longest, by least squares; ``None``: it did not live long enough."""

    @property
    def passed(self) -> bool:
        """Whether it kept to its bounds."""
        return self.peak_mb <= self.ceiling_mb and (self.slope_mb_per_minute or 0.0) <= MOST_SLOPE


class MemorySampler:
    """``start``; ``stop`` gives the lines. Bound: one sample of each process in 5 s."""

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self._pids = pids
        self._stop = threading.Event()
        self._samples: list[Sample] = []
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, *, slopes: bool) -> tuple[MemoryLine, ...]:
        """End; what was seen, by name."""
        self._stop.set()
        self._thread.join(30)
        return memory_lines(self._samples, slopes=slopes)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            now = time.monotonic() - self._began
            for pid in self._pids():
                with contextlib.suppress(OSError, IndexError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                    name = process_name(words)
                    if name is not None:
                        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                        self._samples.append(Sample(now, pid, name, pages * _PAGE / 1e6))


def process_name(words: list[str]) -> str | None:
    """The ``tl`` command of a command line; ``None`` for other programs (a branch's Postgres, pg_amcheck)."""
    title = " ".join(words).strip()
    for kind in ("mount", "agent"):
        if title.startswith(f"tl {kind}"):
            return kind
    if "python" not in Path(words[0]).name and Path(words[0]).name != "tl":
        return None
    return next((word for word in words[1:] if word in CEILINGS), None)


def memory_lines(samples: Iterable[Sample], *, slopes: bool) -> tuple[MemoryLine, ...]:
    """By name. Pure."""
    by_name: dict[str, dict[int, list[Sample]]] = {}
    for sample in samples:
        by_name.setdefault(sample.name, {}).setdefault(sample.pid, []).append(sample)
    lines = []
    for name, processes in sorted(by_name.items()):
        longest = max(processes.values(), key=lambda of: of[-1].seconds - of[0].seconds)
        late = [one for one in longest if one.seconds - longest[0].seconds >= SETTLED_SECONDS]
        lines.append(
            MemoryLine(
                name=name,
                processes=len(processes),
                peak_mb=max(one.megabytes for of in processes.values() for one in of),
                ceiling_mb=CEILINGS[name],
                slope_mb_per_minute=slope(late) if slopes and name in _LASTING and len(late) >= 24 else None,
            )
        )
    return tuple(lines)


def slope(samples: list[Sample]) -> float:
    """MB per minute, by least squares."""
    mean_x = sum(one.seconds for one in samples) / len(samples)
    mean_y = sum(one.megabytes for one in samples) / len(samples)
    spread = sum((one.seconds - mean_x) ** 2 for one in samples)
    together = sum((one.seconds - mean_x) * (one.megabytes - mean_y) for one in samples)
    return 60 * together / spread if spread else 0.0


def relatives_of(state: str) -> list[int]:
    """Every living process with this state directory in its environment."""
    mark = f"TL_STATE={state}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found
