"""Which parts of the data directory a replay will read. Pure.

Replay reads the blocks whose first touch is neither a full-page image nor a page initialisation; with them the
free space and visibility pages of the relation, which WAL does not name.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from restore.mount_control import BlockRange
from timeline.format.extent import BLOCK_BYTES, GROUP_BLOCKS
from timeline.lsn import Lsn
from timeline.pg.wal_blocks import first_touches

WHOLE_GROUP_BLOCKS = 4
"""So many blocks of a group, and the rest of it is read as well: soon it will be wanted, too."""
_DEFAULT_TABLESPACE, _GLOBAL_TABLESPACE = 1663, 1664
_FORKS = ("", "_fsm", "_vm", "_init")
_MAIN, _FSM, _VM = 0, 1, 2
_HEAP_BLOCKS_PER_VM_PAGE = 32_672
_SLOTS_PER_FSM_PAGE = 4_069

Blocks = npt.NDArray[np.int64]
Relation = tuple[int, int, int, int]
"""Tablespace, database, relfilenode, fork."""


class ReplayReads:
    """Fed with WAL in order, tells of every block once. Memory: 8 bytes for each block touched."""

    def __init__(self, segment_bytes: int, relation_segment_bytes: int, tablespace_directory: str) -> None:
        """``tablespace_directory``: of a version inside a tablespace, ``PG_15_202209061``."""
        self._segment_bytes = segment_bytes
        self._per_file = relation_segment_bytes // BLOCK_BYTES
        self._tablespace_directory = tablespace_directory
        self._touched: dict[Relation, Blocks] = {}

    def of(self, wal: bytes, start: Lsn) -> list[BlockRange]:
        """What replay of this WAL reads that was not touched before, about in the order in which it does; at most one
        range for each group of 16 blocks. ``start``: a record boundary or a page start. Raises WalFormatError."""
        touches = first_touches(wal, start, self._segment_bytes)
        found: list[tuple[int, BlockRange]] = []
        for relation, rows, places in _by_relation(touches):
            blocks = rows["block"].astype(np.int64)
            wanted = ~rows["has_image_or_init"]
            found += self._ranges(relation, blocks, blocks[wanted], places[wanted])
            if relation[3] == _MAIN:
                for fork, pages in zip((_FSM, _VM), _map_pages(blocks), strict=True):
                    found += self._ranges((*relation[:3], fork), pages, pages, np.full(len(pages), places[0]))
        found.sort(key=lambda one: one[0])
        return [blocks for _, blocks in found]

    def _ranges(
        self, relation: Relation, touched: Blocks, read: Blocks, places: Blocks
    ) -> Iterator[tuple[int, BlockRange]]:
        """Where in the WAL each range is first read, and the range; ``places``: of the blocks read, ascending."""
        known = self._touched.get(relation)
        if known is not None:
            new = ~np.isin(read, known)
            read, places = read[new], places[new]
            touched = np.union1d(touched, known)
        self._touched[relation] = np.unique(touched)
        if not len(read):
            return
        read, at = np.unique(read, return_index=True)
        group = read // GROUP_BLOCKS
        first_of_group = np.flatnonzero(np.diff(group, prepend=-1))
        counts = np.diff(first_of_group, append=len(read))
        begins, ends = read[first_of_group], read[first_of_group + counts - 1] + 1
        whole = counts >= WHOLE_GROUP_BLOCKS
        begins = np.where(whole, group[first_of_group] * GROUP_BLOCKS, begins)
        ends = np.where(whole, (group[first_of_group] + 1) * GROUP_BLOCKS, ends)
        files, inside = np.divmod(begins, self._per_file)
        first_places = np.minimum.reduceat(places[at], first_of_group)
        for place, file, begin, count in zip(
            first_places.tolist(), files.tolist(), inside.tolist(), (ends - begins).tolist(), strict=True
        ):
            path = relation_path(*relation, file, self._tablespace_directory)
            yield place, BlockRange(path, begin, count)


def relation_path(spc: int, db: int, rel: int, fork: int, segment: int, version: str) -> str:
    """Path of a relation's file in the data directory (src/common/relpath.c)."""
    if spc == _GLOBAL_TABLESPACE:
        directory = "global"
    elif spc == _DEFAULT_TABLESPACE:
        directory = f"base/{db}"
    else:
        directory = f"pg_tblspc/{spc}/{version}/{db}"
    return f"{directory}/{rel}{_FORKS[fork]}" + (f".{segment}" if segment else "")


def _by_relation(touches: npt.NDArray[np.void]) -> Iterator[tuple[Relation, npt.NDArray[np.void], Blocks]]:
    """The touches of each relation, and where each is among all of them; in their order."""
    order = np.lexsort((touches["fork"], touches["rel"], touches["db"], touches["spc"]))
    rows = touches[order]
    names = ("spc", "db", "rel", "fork")
    changes = np.zeros(len(rows), bool)
    for name in names:
        changes[1:] |= rows[name][1:] != rows[name][:-1]
    cuts = np.flatnonzero(changes)
    for part, places in zip(np.split(rows, cuts), np.split(order, cuts), strict=True):
        if len(part):
            spc, db, rel, fork = (int(part[0][name]) for name in names)
            yield (spc, db, rel, fork), part, places


def _map_pages(blocks: Blocks) -> tuple[Blocks, Blocks]:
    """Pages of the free space map and of the visibility map that speak of these heap blocks.

    src/backend/storage/freespace/freespace.c: the pages of the upper levels come before their leaves.
    """
    leaves = np.unique(blocks // _SLOTS_PER_FSM_PAGE)
    uppers = leaves // _SLOTS_PER_FSM_PAGE
    free = np.unique(np.concatenate((np.zeros_like(leaves), 1 + uppers, leaves + 2 + uppers)))
    return free, np.unique(blocks // _HEAP_BLOCKS_PER_VM_PAGE)
