"""What a base backup writes into the branch log, and where it may say that it began (SPEC.md, [COL-2]).

A base backup may take longer than garbage collection waits. So at each progress entry, when all it has made so far
is named by that entry, it takes the head with that entry for its beginning: whatever is made or named from then on
is newer, or reachable from there.
"""

from __future__ import annotations

from timeline.archive.extent_writer import ExtentWriter
from timeline.catalog.branch_log import BranchLog, LogHead
from timeline.format.branch_state import BackupProgress, Snapshot
from timeline.format.log_change import AddSnapshot, RecordProgress


class BackupCommits:
    """The log as one backup uses it. Its methods raise Superseded when the backup slept through a collection."""

    def __init__(self, log: BranchLog, head: LogHead, compared: Snapshot | None) -> None:
        """``head``: read before anything was made. ``compared``: the snapshot of it whose extents are named again
        where they are the same."""
        self._log = log
        self._compared = compared
        self.began = head.number

    async def carry_on(self, progress: BackupProgress) -> None:
        """Take over what an interrupted try has left, which ``head`` named."""
        await self._log.append(RecordProgress(progress, self.began))

    async def record(self, progress: BackupProgress, writer: ExtentWriter) -> None:
        """Name all that was uploaded so far.

        ``progress`` names every row of ``writer`` whose pack is closed (``take_rows``), and nothing was put since.
        """
        head = await self._log.append(RecordProgress(progress, self.began))
        kept = self._compared is None or self._compared in head.state.snapshots
        if head.state.progress == progress and kept:
            # No upload is under way. A pack that only superseded rows named is not reachable from this head, so it
            # must not be named again.
            writer.forget_stored()
            self.began = head.number

    async def finish(self, snapshot: Snapshot) -> LogHead:
        """Commit the snapshot."""
        return await self._log.append(AddSnapshot(snapshot, self.began))
