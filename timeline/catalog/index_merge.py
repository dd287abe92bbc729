"""One index for several adjoining runs of WAL. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from timeline.format.wal_index import WalIndex
from timeline.lsn import Lsn
from timeline.pg.wal import merge_touches


def merge_indexes(parts: Sequence[WalIndex]) -> WalIndex:
    """What scanning the runs as one would have told; raises ValueError for none at all.

    ``parts``: in WAL order, each run starting where the one before ends.
    """
    if not parts:
        raise ValueError("nothing to merge")
    if len(parts) == 1:
        return parts[0]
    last = next((part for part in reversed(parts) if part.last_record), None)
    return WalIndex(
        last_record=last.last_record if last is not None else Lsn(0),
        last_record_end=last.last_record_end if last is not None else Lsn(0),
        pending=parts[-1].pending,
        records=sum(part.records for part in parts),
        commits=np.concatenate([part.commits for part in parts]),
        events=tuple(event for part in parts for event in part.events),
        touches=merge_touches([part.touches for part in parts]),
    )
