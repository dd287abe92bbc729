"""Which blocks a replay will want from the base, in the order in which it will want them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from timeline.lsn import Lsn
from timeline.pg.wal_machine import ANY_TLI, Buffer, Machine, Matrix, as_bytes_array

FIRST_TOUCH_DTYPE = np.dtype(
    [
        ("spc", "<u4"),
        ("db", "<u4"),
        ("rel", "<u4"),
        ("fork", "u1"),
        ("has_image_or_init", "?"),
        ("block", "<u4"),
    ]
)
"""The first reference to a block: tablespace, database, relfilenode, fork number (0 main, 1 free space, 2
visibility, 3 init), whether that record restores a full-page image or initialises the page (then replay does
not read it), and block number."""

FirstTouchArray = npt.NDArray[np.void]


def first_touches(
    data: Buffer, start: Lsn, segment_bytes: int, *, major: int | None = None
) -> FirstTouchArray:
    """FIRST_TOUCH_DTYPE rows in WAL order, one for each block that the records complete in ``data`` refer to.

    ``start``: a record boundary or a page start; ``major`` as for WalScanner. Memory: about 80 bytes a block.
    Raises WalFormatError.
    """
    from timeline.pg import wal_scan

    machine = Machine(segment_bytes, ANY_TLI, start, major)
    array = as_bytes_array(data)
    table: Matrix = np.empty((4096, wal_scan.BLOCK_COLUMNS), np.int64)
    slots = np.full(4 * len(table), -1, np.int32)
    used = index = 0
    while True:
        index = machine.run(array, index)
        count = machine.take(wal_scan.OUT_REFS)
        done = 0
        while done < count:
            done, used = wal_scan.keep_first(machine.refs, done, count, table, slots, used)
            if done < count:
                table = np.concatenate((table, np.empty_like(table)))
                slots = np.full(4 * len(table), -1, np.int32)
                wal_scan.fill_slots(table, used, slots, True)
        for slot in (wal_scan.OUT_COMMITS, wal_scan.OUT_EVENTS, wal_scan.OUT_BYTES):
            machine.take(slot)
        if not machine.full:
            break
    rows = np.empty(used, FIRST_TOUCH_DTYPE)
    for column, name in enumerate(("spc", "db", "rel", "fork", "block", "has_image_or_init")):
        rows[name] = table[:used, column]
    return rows
