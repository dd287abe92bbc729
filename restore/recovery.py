"""What Postgres is told at a branch's first start: how it gets from its snapshot to T and becomes a primary there.

A server that recovers to a target writes all it has replayed to its files before it is ready (the end-of-recovery checkpoint):
half a second and more through a mount. A standby that is promoted is not made to wait: it writes one record, is ready, and
checkpoints afterwards (src/backend/access/transam/xlog.c, PerformRecoveryXLogAction). So with all WAL in place, ending in zeros
at T, the branch starts as a standby that was asked to be promoted when its WAL ends. Until that checkpoint is done the overlay
cannot be resumed (EDGE 57): ``has_own_checkpoint`` tells.

With WAL that is still to come, the end of what is there is not T: recovery has a target then, and a feed that dies is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from restore.plan import RECOVERY_SIGNAL, STANDBY_SIGNAL, BranchPlan
from restore.wal_files import WHOLE_BYTES
from timeline.format.branch_state import Setting
from timeline.pg.control import ControlFile

NEVER = "false"
"""``restore_command`` when everything is in place."""


NOBODY_READS = Setting("hot_standby", "off")
"""On the command line, where no file can say otherwise: a reader that comes during replay from a redo point of ours may take
rows of transactions that were in progress there for dead (EDGE 56)."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """One way to T."""

    options: tuple[Setting, ...]
    """For the command line of this start alone."""
    promotes: bool
    """Whether the server is asked to end its recovery where its WAL ends."""


def is_whole(plan: BranchPlan) -> bool:
    """Whether all WAL is to be in place before Postgres starts."""
    return plan.replayed_bytes <= WHOLE_BYTES


def signal_file(plan: BranchPlan) -> str:
    """Name of the file in the data directory that makes the first start a recovery."""
    return STANDBY_SIGNAL if is_whole(plan) else RECOVERY_SIGNAL


def recovery_in_place(plan: BranchPlan) -> Recovery:
    """With all WAL in ``pg_wal``."""
    return Recovery(
        (
            NOBODY_READS,
            Setting("recovery_target_timeline", str(plan.tli)),
            Setting("restore_command", NEVER),
            # The checkpoint after promotion makes the branch able to survive, so it is not to take its time; nor is it to be
            # in the way of the first queries, which need the mount, too: three seconds (of Postgres's five minutes). As an
            # option of the command line this also holds for later checkpoints, until the next start.
            Setting("checkpoint_completion_target", "0.01"),
        ),
        promotes=True,
    )


def recovery_from_feed(plan: BranchPlan, restore_command: str) -> Recovery:
    """With segments that ``restore_command`` waits for."""
    options = (NOBODY_READS, *plan.recovery, Setting("restore_command", restore_command))
    return Recovery(options, promotes=False)


def has_own_checkpoint(control: ControlFile, parent_tli: int) -> bool:
    """Whether a branch of ``parent_tli`` has completed a checkpoint since its promotion."""
    return control.tli > parent_tli
