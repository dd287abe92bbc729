"""Which extents a start of Postgres and a first connection touch, told from names and sizes alone.

Observed with a trace of system calls on Postgres 15 and 18 (they agree): recovery and start-up read the
newest page of the commit log and of the multixact logs; the first connection of all reads the shared
catalogs; the first connection to a database reads 14 groups of its catalogs to fill the relation cache
(whose file a base backup leaves out), a first query some 17 more, ``psql \\d`` about 40. Catalogs are known
by their OIDs, which never change between major versions (src/include/catalog/*.h); their files have the
same number until something rewrites them (``VACUUM FULL``).

The set is kept small, because a branch fetches all of it at once: BOOT_BYTES compressed, of which
DATABASE_BYTES for one database. What does not fit, or was rewritten and is not in ``rewritten``, is fetched
when it is touched: slower, not wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timeline.format.extent import GROUP_BYTES

BOOT_BYTES = 3 << 20
DATABASE_BYTES = 768 << 10
MAX_DATABASES = 8
"""The busiest ones; about 430 KiB each when new."""

SHARED = 0
"""Stands for "no database" in budgets: shared catalogs and transaction logs."""

_FIRST_CATALOG_OF_USERS = 16384
_SMALL_FILE_BYTES = 16384
"""Catalogs this small are mostly empty indexes, and compress to next to nothing: taken whole."""
_SLRU_SEGMENT_BYTES = 32 * 8192

# Leading groups of larger catalogs and their indexes, by OID.
_CATALOG_GROUPS: Mapping[int, int] = {
    1247: 2,  # pg_type
    1249: 4,  # pg_attribute
    1255: 1,  # pg_proc
    1259: 2,  # pg_class
    2601: 1,  # pg_am
    2602: 1,  # pg_amop
    2603: 1,  # pg_amproc
    2604: 1,  # pg_attrdef
    2605: 1,  # pg_cast
    2606: 1,  # pg_constraint
    2607: 1,  # pg_conversion
    2610: 1,  # pg_index
    2615: 1,  # pg_namespace
    2616: 1,  # pg_opclass
    2617: 1,  # pg_operator
    2618: 1,  # pg_rewrite
    2619: 2,  # pg_statistic
    2651: 1,  # pg_am_name_index
    2652: 1,  # pg_am_oid_index
    2653: 1,  # pg_amop_fam_strat_index
    2654: 1,  # pg_amop_opr_fam_index
    2655: 1,  # pg_amproc_fam_proc_index
    2656: 1,  # pg_attrdef_adrelid_adnum_index
    2657: 1,  # pg_attrdef_oid_index
    2658: 1,  # pg_attribute_relid_attnam_index
    2659: 2,  # pg_attribute_relid_attnum_index
    2661: 1,  # pg_cast_source_target_index
    2662: 1,  # pg_class_oid_index
    2663: 1,  # pg_class_relname_nsp_index
    2664: 1,  # pg_constraint_conname_nsp_index
    2665: 1,  # pg_constraint_conrelid_contypid_conname_index
    2667: 1,  # pg_constraint_oid_index
    2678: 1,  # pg_index_indrelid_index
    2679: 1,  # pg_index_indexrelid_index
    2680: 1,  # pg_inherits_relid_seqno_index
    2684: 1,  # pg_namespace_nspname_index
    2685: 1,  # pg_namespace_oid_index
    2686: 1,  # pg_opclass_am_name_nsp_index
    2687: 1,  # pg_opclass_oid_index
    2688: 1,  # pg_operator_oid_index
    2689: 1,  # pg_operator_oprname_l_r_n_index
    2690: 1,  # pg_proc_oid_index
    2691: 2,  # pg_proc_proname_args_nsp_index
    2693: 1,  # pg_rewrite_rel_rulename_index
    2696: 1,  # pg_statistic_relid_att_inh_index
    2703: 1,  # pg_type_oid_index
    2704: 1,  # pg_type_typname_nsp_index
    2840: 1,  # toast of pg_statistic
    2841: 1,  # its index
    3455: 1,  # pg_class_tblspc_relfilenode_index
}

_RELATION = re.compile(r"(?:base|pg_tblspc/\d+/PG_[0-9_]+)/(\d+)/(\d+)(_fsm|_vm)?")
_SHARED_RELATION = re.compile(r"global/\d+(_fsm|_vm)?")
_TRANSACTION_LOG = re.compile(r"(?:pg_xact|pg_commit_ts|pg_multixact/offsets|pg_multixact/members)/[0-9A-F]+")


@dataclass(frozen=True, slots=True)
class BootFile:
    """A file of which the first groups belong to the boot set."""

    database: int
    """OID, or SHARED."""
    groups: int


class BootRule:
    """Says which files belong to the boot set, before their content is seen."""

    def __init__(self, databases: Sequence[int], rewritten: Mapping[tuple[int, int], int]) -> None:
        """``databases``: OIDs, most important first; ``rewritten``: (database, file number) → catalog OID
        for catalogs whose file has another number."""
        self._databases = frozenset(databases[:MAX_DATABASES])
        self._rewritten = rewritten

    def boot_file(self, path: str, size: int) -> BootFile | None:
        """``None`` when the file has no part in a start."""
        if size == 0:
            return None
        groups = -(-size // GROUP_BYTES)
        if _SHARED_RELATION.fullmatch(path):
            return BootFile(SHARED, min(groups, 2))
        if _TRANSACTION_LOG.fullmatch(path):
            # A full segment is history; the one that is still growing holds the newest transactions.
            return BootFile(SHARED, groups) if size < _SLRU_SEGMENT_BYTES else None
        match = _RELATION.fullmatch(path)
        if match is None or int(match[1]) not in self._databases:
            return None
        database = int(match[1])
        catalog = self._rewritten.get((database, int(match[2])), int(match[2]))
        if catalog >= _FIRST_CATALOG_OF_USERS:
            return None
        if match[3] is not None:
            return BootFile(database, 1)
        leading = groups if size <= _SMALL_FILE_BYTES else min(groups, _CATALOG_GROUPS.get(catalog, 0))
        return BootFile(database, leading) if leading else None


class BootBudget:
    """Keeps the boot set within its bounds."""

    def __init__(self) -> None:
        self._spent: dict[int, int] = {}
        self.total = 0
        """Compressed bytes admitted so far."""

    def admit(self, database: int, stored_bytes: int) -> bool:
        """Whether one more extent fits; if so it is counted."""
        spent = self._spent.get(database, 0) + stored_bytes
        if spent > DATABASE_BYTES or self.total + stored_bytes > BOOT_BYTES:
            return False
        self._spent[database] = spent
        self.total += stored_bytes
        return True
