"""What all manifests have in common as Parquet files (SPEC.md, [MAN-1] to [MAN-6]).

A manifest is built in memory (it is at most one object of the store), row group by row group; the digest of
every row group is taken from the bytes just written and goes into the footer. A reader that has only the
footer and one row group gives pyarrow a file of which just those bytes exist.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from timeline.errors import DamagedStore
from timeline.format import keys
from timeline.format.digest import DIGEST_KIND, hex_digest_of
from timeline.format.features import check_envelope, check_readable
from timeline.format.manifest import ManifestRef

MANIFEST_MAX_BYTES = 64 << 20
"""No manifest is longer; bounds what a reader fetches."""

PAGES = "pages"
FILES = "files"
WAL = "wal"

_KIND = b"tl.kind"
_ENVELOPE = b"tl.envelope"
_ROW_GROUPS = b"tl.row_groups"
_TRAILER_BYTES = 8
_MAGIC = b"PAR1"


@dataclass(frozen=True, slots=True)
class RowGroupEntry:
    """Where one row group is, what it must be, and the keys it spans."""

    offset: int
    length: int
    digest: str
    """BLAKE3 of the bytes, hex."""
    bounds: tuple[Any, ...]
    """Page manifests: first path, first group, last path, last group. WAL manifests of merged ranges: what
    ``WalGroup`` says. Else empty."""


class ParquetBuilder:
    """One manifest under construction; holds its bytes."""

    def __init__(
        self,
        kind: str,
        schema: Any,
        *,
        dictionary: Sequence[str],
        compression: Mapping[str, str],
        encoding: Mapping[str, str],
        statistics: bool = True,
    ) -> None:
        """``statistics``: Parquet's own least and greatest value of each column chunk, which we never read."""
        self._kind = kind
        self._sink = io.BytesIO()
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            use_dictionary=list(dictionary),
            compression=dict(compression),
            column_encoding=dict(encoding),
            store_schema=False,
            write_page_checksum=True,
            write_statistics=statistics,
        )
        self._entries: list[RowGroupEntry] = []
        self.rows = 0

    @property
    def size(self) -> int:
        """Bytes so far, without the footer."""
        return self._sink.tell()

    def write_row_group(self, table: Any, bounds: tuple[Any, ...] = ()) -> None:
        """All rows of the table as one row group."""
        start = self._sink.tell()
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        end = self._sink.tell()
        with self._sink.getbuffer() as whole:
            digest = hex_digest_of(whole[start:end])
        self._entries.append(RowGroupEntry(start, end - start, digest, bounds))
        self.rows += table.num_rows

    def finish(self, nonce: str | None = None) -> tuple[bytes, ManifestRef]:
        """The object and the reference to it. ``nonce``: random hex, as of packs [PAC-4]. Raises ValueError when
        it grew beyond MANIFEST_MAX_BYTES."""
        entries = [[e.offset, e.length, e.digest, *e.bounds] for e in self._entries]
        envelope = {
            "format": 1,
            "requires": [],
            "digest_kind": DIGEST_KIND,
            "key_id": None,
            "cipher": None,
            "nonce": nonce,
        }
        self._writer.add_key_value_metadata(
            {_KIND: self._kind, _ENVELOPE: json.dumps(envelope), _ROW_GROUPS: json.dumps(entries)}
        )
        self._writer.close()
        data = self._sink.getvalue()
        self._sink.close()
        if len(data) > MANIFEST_MAX_BYTES:
            raise ValueError(f"a manifest cannot take {len(data)} bytes")
        footer_bytes = int.from_bytes(data[-8:-4], "little") + _TRAILER_BYTES
        return data, ManifestRef(
            digest=hex_digest_of(data),
            size=len(data),
            rows=self.rows,
            footer_bytes=footer_bytes,
            footer_digest=hex_digest_of(memoryview(data)[-footer_bytes:]),
        )


class _Fragment(io.RawIOBase):
    """A file of which only one range exists; reading anything else is an error."""

    def __init__(self, size: int, start: int, data: bytes | memoryview) -> None:
        super().__init__()
        self._size = size
        self._start = start
        self._data = memoryview(data)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._at + size, self._size)
        first, last = self._at - self._start, end - self._start
        if first < 0 or last > len(self._data):
            raise OSError(f"bytes {self._at} to {end} are not at hand")
        self._at = end
        return bytes(self._data[first:last])


class ParquetFooter:
    """A verified footer: decodes row groups out of their bytes alone."""

    def __init__(self, kind: str, ref: ManifestRef, footer: bytes | memoryview) -> None:
        """``footer``: the last ``ref.footer_bytes`` bytes. Raises DamagedStore, UnknownFeature."""
        self.ref = ref
        self.key = keys.manifest(ref.digest)
        self._start = ref.size - ref.footer_bytes
        if len(footer) != ref.footer_bytes or hex_digest_of(footer) != ref.footer_digest:
            raise DamagedStore(
                self.key,
                max(0, self._start),
                f"expected a footer of {ref.footer_bytes} bytes with BLAKE3 {ref.footer_digest}",
            )
        try:
            # What a footer says does not depend on where it stands, so it can be parsed as a file of its own.
            self._metadata = pq.read_metadata(pa.BufferReader(b"".join((_MAGIC, footer))))
            values = self._metadata.metadata or {}
            found = values[_KIND].decode()
            envelope = json.loads(values[_ENVELOPE])
            entries = json.loads(values[_ROW_GROUPS])
            self.entries = tuple(
                RowGroupEntry(offset, length, digest, tuple(bounds))
                for offset, length, digest, *bounds in entries
            )
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DamagedStore(
                self.key, max(0, self._start), f"expected a manifest's footer: {error}"
            ) from error
        if found != kind:
            raise DamagedStore(self.key, self._start, f"expected a manifest of {kind}, found one of {found}")
        check_readable(self.key, envelope["requires"])
        check_envelope(
            self.key,
            digest_kind=envelope["digest_kind"],
            key_id=envelope["key_id"],
            cipher=envelope["cipher"],
        )
        if self._metadata.num_rows != ref.rows or self._metadata.num_row_groups != len(self.entries):
            raise DamagedStore(
                self.key, self._start, f"expected {ref.rows} rows in {len(self.entries)} row groups"
            )

    def read(
        self,
        number: int,
        data: bytes | memoryview,
        *,
        dictionary: Sequence[str] = (),
        columns: Sequence[str] | None = None,
    ) -> Any:
        """Row group ``number`` as an Arrow table, from its verified bytes; ``columns``: only these.

        Raises DamagedStore.
        """
        entry = self.entries[number]
        if len(data) != entry.length or hex_digest_of(data) != entry.digest:
            raise DamagedStore(
                self.key, entry.offset, f"expected {entry.length} bytes of rows with BLAKE3 {entry.digest}"
            )
        source = _Fragment(self.ref.size, entry.offset, data)
        try:
            file = pq.ParquetFile(source, metadata=self._metadata, read_dictionary=list(dictionary))
            return file.read_row_group(
                number, columns=None if columns is None else list(columns), use_threads=False
            )
        except (pa.ArrowException, OSError) as error:
            raise DamagedStore(self.key, entry.offset, f"expected a row group: {error}") from error


def verify_manifest(kind: str, ref: ManifestRef, data: bytes | memoryview) -> ParquetFooter:
    """The footer of a whole manifest whose bytes are what the reference says; DamagedStore,
    UnknownFeature."""
    if len(data) != ref.size or hex_digest_of(data) != ref.digest:
        raise DamagedStore(
            keys.manifest(ref.digest),
            0,
            f"expected {ref.size} bytes with BLAKE3 {ref.digest}, found {len(data)}",
        )
    return ParquetFooter(kind, ref, memoryview(data)[ref.size - ref.footer_bytes :])


def read_whole(
    kind: str, ref: ManifestRef, data: bytes | memoryview, schema: Any, *, dictionary: Sequence[str] = ()
) -> Any:
    """All rows of a whole manifest as one Arrow table of single chunks; raises DamagedStore,
    UnknownFeature."""
    footer = verify_manifest(kind, ref, data)
    view = memoryview(data)
    parts = [
        footer.read(number, view[entry.offset : entry.offset + entry.length], dictionary=dictionary)
        for number, entry in enumerate(footer.entries)
    ]
    if not parts:
        empty = schema.empty_table()
        for name in dictionary:
            empty = empty.set_column(schema.names.index(name), name, empty.column(name).dictionary_encode())
        return empty
    return pa.concat_tables(parts).unify_dictionaries().combine_chunks()
