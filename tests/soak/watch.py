"""Looks on while a soak runs: how the daemon's jobs end, and how large the store is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from dataclasses import dataclass

from tests.soak.place import BUCKET, CLUSTER, Place
from tests.support.daemon_process import DaemonProcess

_POLL_SECONDS = 0.25
_SIZE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class JobLine:
    """One job of the daemon over a whole soak."""

    name: str
    runs: int
    """Finished ones that were seen."""
    codes: dict[int, int]
    """How often each exit code was seen."""
    messages: tuple[str, ...]
    """What failed runs said, at most five."""


@dataclass(frozen=True, slots=True)
class SizeLine:
    """The store at one moment."""

    seconds: float
    objects: int
    megabytes: float
    chunks: int


class JobWatch:
    """Reads the daemon's state four times a second."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._seen: dict[str, int] = {}
        self._codes: dict[str, Counter[int]] = {}
        self._messages: dict[str, list[str]] = {}
        self._archivers: set[int] = set()

    @property
    def archiver_starts(self) -> int:
        """Processes that archived."""
        return len(self._archivers)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> tuple[JobLine, ...]:
        """End; what was seen."""
        self._stop.set()
        self._thread.join(30)
        return tuple(
            JobLine(name, sum(codes.values()), dict(codes), tuple(self._messages.get(name, ())[:5]))
            for name, codes in sorted(self._codes.items())
        )

    def _run(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            with contextlib.suppress(OSError, ValueError):
                self._look()

    def _look(self) -> None:
        state = self._daemon.state()
        if state is None:
            return
        cluster = next(one for one in state.clusters if one.cluster == CLUSTER)
        if cluster.archiver is not None and cluster.archiver.pid is not None:
            self._archivers.add(cluster.archiver.pid)
        for job in (*cluster.jobs, *state.host_jobs):
            if job.runs == self._seen.get(job.job, 0) or job.running_since is not None:
                continue
            if job.last_exit_code is None:
                continue
            self._seen[job.job] = job.runs
            self._codes.setdefault(job.job, Counter())[job.last_exit_code] += 1
            if job.last_exit_code != 0:
                self._messages.setdefault(job.job, []).append(job.last_message)


class StoreWatch:
    """Lists the bucket, past the proxy."""

    def __init__(self, place: Place) -> None:
        self._client = place.seaweed.client()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began = time.monotonic()
        self._lines: list[SizeLine] = []

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> tuple[SizeLine, ...]:
        """End; what was seen."""
        self._stop.set()
        self._thread.join(60)
        self._lines.append(store_size(self._client, time.monotonic() - self._began))
        return tuple(self._lines)

    def _run(self) -> None:
        while not self._stop.wait(_SIZE_SECONDS):
            self._lines.append(store_size(self._client, time.monotonic() - self._began))


def store_size(client: object, seconds: float) -> SizeLine:
    """The bucket now."""
    objects = size = chunks = 0
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)  # type: ignore[attr-defined]
    for page in pages:
        for one in page.get("Contents", ()):
            objects += 1
            size += one["Size"]
            chunks += "/wal/" in one["Key"]
    return SizeLine(seconds, objects, size / 1e6, chunks)
