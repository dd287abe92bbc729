"""Page manifests: which extent holds which blocks of which file (SPEC.md, [PAG-1] to [PAG-7]).

Written row group by row group in order of (path, group, first block), bytewise by path. All extents of one
(path, group) are in one row group, so a lookup reads at most one row group of each manifest.

A decoded row group is a handful of NumPy arrays (about 60 bytes a row): the mount keeps many of them in
little memory.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from timeline.errors import DamagedStore
from timeline.format.digest import DIGEST_BYTES
from timeline.format.extent import BLOCK_BYTES, GROUP_BLOCKS, GROUP_BYTES, ExtentRef
from timeline.format.manifest import PAGE_ROWS_PER_GROUP, ManifestRef, PageRow
from timeline.format.parquet_file import PAGES, ParquetBuilder, ParquetFooter, verify_manifest
from timeline.format.sorted_texts import SortedTexts

PAGE_MANIFEST_TARGET_BYTES = 32 << 20
"""Where a writer begins another part: about 800,000 extents, 100 GB of files."""

_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("group", pa.uint32(), nullable=False),
        pa.field("first_block", pa.uint8(), nullable=False),
        pa.field("raw_bytes", pa.uint32(), nullable=False),
        pa.field("pack", pa.string(), nullable=False),
        pa.field("offset", pa.uint32(), nullable=False),
        pa.field("stored_bytes", pa.uint32(), nullable=False),
        pa.field("digest", pa.binary(DIGEST_BYTES), nullable=False),
    ]
)
_DICTIONARY = ("path", "pack")
_COMPRESSION = {name: "none" if name == "digest" else "zstd" for name in _SCHEMA.names}
_ENCODING = {"group": "DELTA_BINARY_PACKED", "offset": "DELTA_BINARY_PACKED"}


class PageManifestWriter:
    """Takes rows in order; holds one row group of rows and the bytes of the manifest so far."""

    def __init__(self) -> None:
        self._builder = ParquetBuilder(
            PAGES, _SCHEMA, dictionary=_DICTIONARY, compression=_COMPRESSION, encoding=_ENCODING
        )
        self._pending: list[PageRow] = []
        self._last: PageRow | None = None

    @property
    def rows(self) -> int:
        """How many rows were appended."""
        return self._builder.rows + len(self._pending)

    @property
    def full(self) -> bool:
        """Whether the next (path, group) should begin another manifest."""
        return self._builder.size >= PAGE_MANIFEST_TARGET_BYTES

    def append(self, row: PageRow) -> None:
        """Add one extent; raises ValueError when it is out of order, overlaps the last one or leaves its
        group."""
        extent, last = row.extent, self._last
        if extent.first_block + extent.blocks > GROUP_BLOCKS or extent.raw_bytes <= 0:
            raise ValueError(f"{row.path}, group {row.group}: an extent outside its group")
        if last is not None and (row.path, row.group) <= (last.path, last.group):
            if (row.path, row.group) != (last.path, last.group):
                raise ValueError(f"{row.path}, group {row.group}: out of order")
            if extent.first_block < last.extent.first_block + last.extent.blocks:
                raise ValueError(f"{row.path}, group {row.group}: extents overlap")
        elif len(self._pending) >= PAGE_ROWS_PER_GROUP:
            self._flush()
        self._pending.append(row)
        self._last = row

    def finish(self, nonce: str | None = None) -> tuple[bytes, ManifestRef]:
        """The object and the reference to it; the writer cannot be used afterwards. ``nonce``: as of
        ``ParquetBuilder.finish``."""
        self._flush()
        return self._builder.finish(nonce)

    def _flush(self) -> None:
        rows = self._pending
        if not rows:
            return
        self._builder.write_row_group(
            pa.table(
                [
                    pa.array([row.path for row in rows], pa.string()),
                    pa.array([row.group for row in rows], pa.uint32()),
                    pa.array([row.extent.first_block for row in rows], pa.uint8()),
                    pa.array([row.extent.raw_bytes for row in rows], pa.uint32()),
                    pa.array([row.extent.pack for row in rows], pa.string()),
                    pa.array([row.extent.offset for row in rows], pa.uint32()),
                    pa.array([row.extent.stored_bytes for row in rows], pa.uint32()),
                    pa.array([row.extent.digest for row in rows], pa.binary(DIGEST_BYTES)),
                ],
                schema=_SCHEMA,
            ),
            (rows[0].path, rows[0].group, rows[-1].path, rows[-1].group),
        )
        self._pending = []


def write_page_manifest(rows: Iterable[PageRow], *, nonce: str | None = None) -> tuple[bytes, ManifestRef]:
    """One manifest of all the rows, which are few enough for one object (boot sets, deltas)."""
    writer = PageManifestWriter()
    for row in rows:
        writer.append(row)
    return writer.finish(nonce)


def write_page_manifests(
    rows: Iterable[PageRow], *, nonce: str | None = None
) -> Iterator[tuple[bytes, ManifestRef]]:
    """The rows in as many parts as needed, in order, each about PAGE_MANIFEST_TARGET_BYTES; at least one."""
    writer = PageManifestWriter()
    last: tuple[str, int] | None = None
    for row in rows:
        if writer.full and (row.path, row.group) != last:
            yield writer.finish(nonce)
            writer = PageManifestWriter()
        writer.append(row)
        last = (row.path, row.group)
    yield writer.finish(nonce)


class PageRowGroup:
    """The rows of one row group, compact, immutable, made for lookups."""

    __slots__ = (
        "_digests",
        "_first_block",
        "_keys",
        "_offset",
        "_order",
        "_pack",
        "_packs",
        "_paths",
        "_raw_bytes",
        "_stored",
    )

    def __init__(self, table: Any, key: str, offset: int) -> None:
        """``key`` and ``offset`` name the place in errors; raises DamagedStore when the rows break their
        rules."""
        self._paths = SortedTexts(table.column("path").combine_chunks())
        packs = table.column("pack").combine_chunks()
        self._packs: list[str] = packs.dictionary.to_pylist()
        self._pack = packs.indices.to_numpy().astype(np.uint32)
        self._keys = self._paths.ranks.astype(np.uint64) << np.uint64(32) | _numbers(table, "group")
        # The same once more for single look-ups: numpy takes longer to make its scalars than to search.
        self._order = memoryview(self._keys.data)
        self._first_block = _numbers(table, "first_block")
        self._raw_bytes = _numbers(table, "raw_bytes")
        self._offset = _numbers(table, "offset")
        self._stored = _numbers(table, "stored_bytes")
        digests = table.column("digest").combine_chunks()
        self._digests = digests.buffers()[1].slice(digests.offset * DIGEST_BYTES, len(digests) * DIGEST_BYTES)
        if not self._paths.ascending or (self._keys[1:] < self._keys[:-1]).any():
            raise DamagedStore(key, offset, "expected rows sorted by path and group")
        ends = self._first_block.astype(np.int64) * BLOCK_BYTES + self._raw_bytes
        if (self._raw_bytes == 0).any() or (ends > GROUP_BYTES).any():
            raise DamagedStore(key, offset, "expected every extent inside its group")

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Memory it holds, about: for caches that bound themselves by it."""
        columns = (self._keys, self._first_block, self._raw_bytes, self._offset, self._stored, self._pack)
        return int(
            sum(c.nbytes for c in columns) + self._digests.size + self._paths.nbytes + 120 * len(self._packs)
        )

    def lookup(self, path: str, group: int) -> tuple[ExtentRef, ...]:
        """The extents of that group, by first block; empty when there is none."""
        rank = self._paths.find(path)
        if rank is None:
            return ()
        wanted, order = rank << 32 | group, self._order
        first = last = bisect.bisect_left(order, wanted)
        while last < len(order) and order[last] == wanted:
            last += 1
        return tuple(self._extent(row) for row in range(first, last))

    def lookup_range(self, path: str, first_group: int, last_group: int) -> Iterator[tuple[int, ExtentRef]]:
        """(group, extent) of the groups from ``first_group`` to ``last_group``, both included, in order."""
        first, last = self._span(path, first_group, last_group)
        for row in range(first, last):
            yield int(self._keys[row]) & 0xFFFFFFFF, self._extent(row)

    def rows(self) -> Iterator[PageRow]:
        """All rows in order."""
        for rank, path in enumerate(self._paths):
            for row in range(int(self._paths.starts[rank]), int(self._paths.starts[rank + 1])):
                yield PageRow(path, int(self._keys[row]) & 0xFFFFFFFF, self._extent(row))

    def holding(self, pack: str, offset: int | None) -> Iterator[PageRow]:
        """The rows whose extent lies at that offset of that pack; anywhere in it when ``None``."""
        if pack not in self._packs:
            return
        wanted = self._pack == self._packs.index(pack)
        if offset is not None:
            wanted &= self._offset == offset
        for row in np.flatnonzero(wanted).tolist():
            key = int(self._keys[row])
            yield PageRow(self._paths[key >> 32], key & 0xFFFFFFFF, self._extent(row))

    def _span(self, path: str, first_group: int, last_group: int) -> tuple[int, int]:
        rank = self._paths.find(path)
        if rank is None:
            return 0, 0
        first = self._keys.searchsorted(np.uint64(rank << 32 | first_group), "left")
        last = self._keys.searchsorted(np.uint64(rank << 32 | last_group), "right")
        return int(first), int(last)

    def _extent(self, row: int) -> ExtentRef:
        return ExtentRef(
            first_block=int(self._first_block[row]),
            raw_bytes=int(self._raw_bytes[row]),
            pack=self._packs[self._pack[row]],
            offset=int(self._offset[row]),
            stored_bytes=int(self._stored[row]),
            digest=self._digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES].to_pybytes(),
        )


class Footer:
    """A verified footer of a page manifest: where to read for a path and group."""

    def __init__(self, file: ParquetFooter) -> None:
        self._file = file
        self.ref = file.ref
        self.entries = file.entries
        """Byte ranges of the row groups, in order."""
        self._last_keys = [(entry.bounds[2], entry.bounds[3]) for entry in file.entries]

    def find(self, path: str, group: int) -> int | None:
        """Number of the only row group that may hold extents of that group; ``None`` when there is none."""
        wanted = (path, group)
        number = bisect.bisect_left(self._last_keys, wanted)
        if (
            number == len(self.entries)
            or (self.entries[number].bounds[0], self.entries[number].bounds[1]) > wanted
        ):
            return None
        return number

    def find_path(self, path: str) -> range:
        """Numbers of the row groups that may hold extents of that path."""
        first = bisect.bisect_left(self._last_keys, (path, 0))
        last = first
        while last < len(self.entries) and self.entries[last].bounds[0] <= path:
            last += 1
        return range(first, last)

    def decode(self, number: int, data: bytes | memoryview) -> PageRowGroup:
        """Row group ``number`` from its bytes (``entries[number]``), verified; raises DamagedStore."""
        table = self._file.read(number, data, dictionary=_DICTIONARY).unify_dictionaries()
        return PageRowGroup(table, self._file.key, self.entries[number].offset)


def open_footer(ref: ManifestRef, footer: bytes | memoryview) -> Footer:
    """The footer, from the manifest's last ``ref.footer_bytes`` bytes; raises DamagedStore,
    UnknownFeature."""
    return _checked(ParquetFooter(PAGES, ref, footer))


def read_page_rows(data: bytes | memoryview, ref: ManifestRef) -> Iterator[PageRow]:
    """All rows of a whole manifest, in order, verified; one row group of them in memory at a time."""
    footer = _checked(verify_manifest(PAGES, ref, data))
    view = memoryview(data)
    for number, entry in enumerate(footer.entries):
        yield from footer.decode(number, view[entry.offset : entry.offset + entry.length]).rows()


def _checked(file: ParquetFooter) -> Footer:
    bounds = [entry.bounds for entry in file.entries]
    if any(len(span) != 4 for span in bounds):
        raise DamagedStore(file.key, 0, "expected the first and last path and group of every row group")
    if any((one[2], one[3]) >= (two[0], two[1]) for one, two in pairwise(bounds)):
        raise DamagedStore(file.key, 0, "expected row groups in ascending order")
    return Footer(file)


def _numbers(table: Any, name: str) -> npt.NDArray[np.integer[Any]]:
    numbers: npt.NDArray[np.integer[Any]] = table.column(name).combine_chunks().to_numpy()
    return numbers
