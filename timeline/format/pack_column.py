"""Which packs a manifest names: the one column of it that garbage collection reads (SPEC.md, [COL-3])."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from timeline.errors import DamagedStore
from timeline.format.manifest import ManifestRef
from timeline.format.parquet_file import verify_manifest


def packs_named(kind: str, ref: ManifestRef, data: bytes) -> frozenset[str]:
    """Ids of the packs that the rows of a page or WAL manifest name; raises DamagedStore, UnknownFeature.

    All bytes are verified, for the digests are of whole objects and whole row groups; only the column of packs
    is decoded, row group by row group: it is a dictionary of a few names, so this takes little more than the
    hashing.
    """
    footer = verify_manifest(kind, ref, data)
    packs: set[str] = set()
    try:
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=["pack"])
        for number in range(file.metadata.num_row_groups):
            column = file.read_row_group(number, columns=["pack"], use_threads=False).column("pack")
            packs.update(pc.unique(column.cast(pa.string())).to_pylist())
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DamagedStore(footer.key, 0, f"expected a column of packs: {error}") from error
    return frozenset(packs)
