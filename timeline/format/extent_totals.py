"""How many bytes page manifests name, each extent counted once; over columns, never over rows.

Memory: about 30 bytes for each row of the manifests added, and one row group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from timeline.format.manifest import ManifestRef
from timeline.format.parquet_file import PAGES, verify_manifest

_EXTENT = np.dtype([("pack", "<u4"), ("offset", "<u4"), ("raw", "<u4"), ("stored", "<u4")])


class ExtentTotals:
    """Adds manifests up. Not thread-safe; ``add`` and ``sums`` are work for a thread."""

    def __init__(self) -> None:
        self._packs: dict[str, int] = {}
        self._parts: list[npt.NDArray[np.void]] = []

    def add(self, data: bytes | memoryview, ref: ManifestRef) -> None:
        """A whole manifest; raises DamagedStore, UnknownFeature."""
        footer = verify_manifest(PAGES, ref, data)
        view = memoryview(data)
        for number, entry in enumerate(footer.entries):
            rows = footer.read(
                number, view[entry.offset : entry.offset + entry.length], dictionary=("path", "pack")
            )
            part = np.empty(rows.num_rows, _EXTENT)
            part["pack"] = self._numbers(rows.column("pack").combine_chunks())
            for name, column in (("offset", "offset"), ("raw", "raw_bytes"), ("stored", "stored_bytes")):
                part[name] = rows.column(column).combine_chunks().to_numpy()
            self._parts.append(part)

    def sums(self) -> tuple[int, int]:
        """(raw, stored) bytes of everything added."""
        if not self._parts:
            return 0, 0
        extents = np.unique(np.concatenate(self._parts))
        return int(extents["raw"].sum(dtype=np.int64)), int(extents["stored"].sum(dtype=np.int64))

    def _numbers(self, packs: Any) -> npt.NDArray[np.uint32]:
        """Packs as numbers that are the same in all manifests; a row group names few."""
        names = packs.dictionary.to_pylist()
        ours = np.array([self._packs.setdefault(name, len(self._packs)) for name in names], np.uint32)
        numbers: npt.NDArray[np.uint32] = ours[packs.indices.to_numpy()]
        return numbers
