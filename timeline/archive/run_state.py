"""What one archiver run carries from connection to connection: who it is, what it counted, what it says."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

from timeline.archive.budget import RequestBudget
from timeline.archive.committer import Committer, CommitterStats
from timeline.archive.lag import LagMeter
from timeline.archive.status import ArchiverConfig, ArchiverStatus, Phase
from timeline.catalog.branch_log import BranchLog
from timeline.clock import Clock
from timeline.format.meta import StoreMeta
from timeline.store.base import Store


@dataclass(slots=True)
class RunState:
    """Shared by the parts of one run; changed only in its event loop."""

    store: Store
    meta: StoreMeta
    log: BranchLog
    branch: str
    writer: str
    config: ArchiverConfig
    clock: Clock
    executor: Executor
    budget: RequestBudget
    publish: Callable[[ArchiverStatus], None]
    status: ArchiverStatus
    slot: str | None
    epoch: int = 0
    """0: not claimed yet."""
    streamed: bool = False
    """Whether any stream has run: the settings worked once."""
    moved: bool = False
    """Whether anything became durable since the runner last looked."""
    begun: Callable[[], None] = lambda: None
    committer: Committer | None = None
    """Of the last stream: knows what is durable now, while the status is as old as its last showing."""
    lag: LagMeter = field(default_factory=LagMeter)

    def tell(self, **changes: Any) -> None:
        """Change the status and show it."""
        self.status = replace(self.status, **changes)
        if self.status.phase is Phase.WAITING and self.status.behind_since is None:
            # Nobody tells us what the source writes meanwhile: the worst is assumed.
            self.status = replace(self.status, behind_since=self.clock.now())
        self.publish(self.status)

    def add(self, stats: CommitterStats) -> None:
        """Count what a committer that is done has done."""
        self.moved |= stats.chunks > 0
        self.status = replace(
            self.status,
            chunks=self.status.chunks + stats.chunks,
            wal_bytes=self.status.wal_bytes + stats.wal_bytes,
            stored_bytes=self.status.stored_bytes + stats.stored_bytes,
            uploads=self.status.uploads + stats.uploads,
            upload_seconds=self.status.upload_seconds + stats.upload_seconds,
            upload_errors=self.status.upload_errors + stats.upload_errors,
        )
