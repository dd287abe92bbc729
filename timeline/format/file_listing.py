"""File listings: every file, directory and symlink of a snapshot (SPEC.md, [FIL-1] to [FIL-5]).

Rows are sorted by (directory, name), so the children of a directory are consecutive. A decoded listing stays
in Arrow and NumPy arrays (about 50 bytes a file beside the names) and is searched by bisection: a million
files are no burden.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import pyarrow as pa

from timeline.errors import DamagedStore
from timeline.format import keys
from timeline.format.manifest import FileRow, ManifestRef
from timeline.format.parquet_file import FILES, ParquetBuilder, read_whole
from timeline.format.sorted_texts import SortedTexts
from timeline.lsn import Lsn

FILE_ROWS_PER_GROUP = 65_536
KINDS = ("f", "d", "l")

_SCHEMA = pa.schema(
    [
        pa.field("directory", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("size", pa.uint64(), nullable=False),
        pa.field("mode", pa.uint32(), nullable=False),
        pa.field("content", pa.binary()),
        pa.field("target", pa.string()),
        pa.field("born", pa.uint64(), nullable=False),
    ]
)
_DICTIONARY = ("directory", "kind")
_COMPRESSION = dict.fromkeys(_SCHEMA.names, "zstd")


def split(path: str) -> tuple[str, str]:
    """(directory, name) of a path; the directory of a top-level entry is the empty string."""
    directory, _, name = path.rpartition("/")
    return directory, name


def write_file_listing(rows: Iterable[FileRow], *, nonce: str | None = None) -> tuple[bytes, ManifestRef]:
    """The listing of the rows, in any order; raises ValueError for a path that occurs twice or is not
    relative."""
    builder = ParquetBuilder(FILES, _SCHEMA, dictionary=_DICTIONARY, compression=_COMPRESSION, encoding={})
    ordered = sorted(rows, key=_order)
    for one, two in pairwise(ordered):
        if one.path == two.path:
            raise ValueError(f"{one.path}: listed twice")
    for at in range(0, len(ordered), FILE_ROWS_PER_GROUP):
        builder.write_row_group(_table(ordered[at : at + FILE_ROWS_PER_GROUP]))
    return builder.finish(nonce)


def _order(row: FileRow) -> tuple[str, str]:
    if row.kind not in KINDS or any(part in ("", ".", "..") for part in row.path.split("/")):
        raise ValueError(f"{row.path!r}: cannot be listed as {row.kind!r}")
    return split(row.path)


def _table(rows: list[FileRow]) -> Any:
    places = [split(row.path) for row in rows]
    return pa.table(
        [
            pa.array([directory for directory, _ in places], pa.string()),
            pa.array([name for _, name in places], pa.string()),
            pa.array([row.kind for row in rows], pa.string()),
            pa.array([row.size for row in rows], pa.uint64()),
            pa.array([row.mode for row in rows], pa.uint32()),
            pa.array([row.content for row in rows], pa.binary()),
            pa.array([row.target for row in rows], pa.string()),
            pa.array([int(row.born) for row in rows], pa.uint64()),
        ],
        schema=_SCHEMA,
    )


class FileListing:
    """All rows of a listing, compact and immutable."""

    __slots__ = ("_content", "_directories", "_kinds", "_names", "_numbers", "_target")

    def __init__(self, table: Any, key: str) -> None:
        """``key`` names the object in errors; raises DamagedStore when the rows are not sorted."""
        self._directories = SortedTexts(table.column("directory").combine_chunks())
        """The directories that have children."""
        self._names = table.column("name").combine_chunks()
        kinds = table.column("kind").combine_chunks()
        self._kinds: tuple[list[str], Any] = (kinds.dictionary.to_pylist(), kinds.indices.to_numpy())
        self._numbers = {
            name: table.column(name).combine_chunks().to_numpy() for name in ("size", "mode", "born")
        }
        self._content = table.column("content").combine_chunks()
        self._target = table.column("target").combine_chunks()
        if not self._directories.ascending:
            raise DamagedStore(key, 0, "expected rows sorted by directory and name")

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[FileRow]:
        """All rows, in order."""
        for number, directory in enumerate(self._directories):
            yield from self._rows(number, directory)

    def children(self, directory: str) -> Iterator[FileRow]:
        """The entries of a directory by name; none for a directory that is empty or does not exist (``get``
        knows).

        The data directory itself is the empty string.
        """
        number = self._directories.find(directory)
        return iter(()) if number is None else self._rows(number, directory)

    def get(self, path: str) -> FileRow | None:
        """The entry of that path."""
        number = self.find(path)
        return None if number is None else self._row(number, split(path)[0])

    def find(self, path: str) -> int | None:
        """Number of the row of that path, 0 to ``len`` - 1: a small name for it, the same in every reader."""
        directory, name = split(path)
        number = self._directories.find(directory)
        if number is None:
            return None
        first, last = self._span(number)
        row = bisect.bisect_left(self._names, name, first, last, key=_as_text)
        return row if row < last and self._names[row].as_py() == name else None

    def row(self, number: int) -> FileRow:
        """The row of that number; raises IndexError when there is none."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        directory = bisect.bisect_right(self._directories.starts, number) - 1
        return self._row(number, self._directories[directory])

    def numbers(self, directory: str) -> range:
        """Numbers of the rows of a directory's entries, by name."""
        number = self._directories.find(directory)
        return range(0) if number is None else range(*self._span(number))

    def _rows(self, number: int, directory: str) -> Iterator[FileRow]:
        for row in range(*self._span(number)):
            yield self._row(row, directory)

    def _span(self, number: int) -> tuple[int, int]:
        return int(self._directories.starts[number]), int(self._directories.starts[number + 1])

    def _row(self, row: int, directory: str) -> FileRow:
        name = self._names[row].as_py()
        kinds, codes = self._kinds
        return FileRow(
            path=f"{directory}/{name}" if directory else name,
            kind=kinds[codes[row]],
            size=int(self._numbers["size"][row]),
            mode=int(self._numbers["mode"][row]),
            content=self._content[row].as_py(),
            target=self._target[row].as_py(),
            born=Lsn(int(self._numbers["born"][row])),
        )


def read_file_listing(data: bytes | memoryview, ref: ManifestRef) -> FileListing:
    """The whole listing, verified; raises DamagedStore, UnknownFeature."""
    return FileListing(
        read_whole(FILES, ref, data, _SCHEMA, dictionary=_DICTIONARY), keys.manifest(ref.digest)
    )


def _as_text(scalar: Any) -> str:
    return str(scalar.as_py())
