"""Reading any manifest from its first byte to its last in little memory, every byte verified.

The footer comes first; then the rest in pieces of about PIECE_BYTES, one ahead of the reader. Row groups are
decoded as they come, and the digest of the whole object is computed in passing [MAN-4].
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from timeline.catalog.parallel import in_order
from timeline.errors import DamagedStore
from timeline.format import keys
from timeline.format.digest import hasher
from timeline.format.manifest import ManifestRef
from timeline.format.page_manifest import open_footer
from timeline.format.parquet_file import MANIFEST_MAX_BYTES, PAGES, ParquetFooter
from timeline.store.base import Store

PIECE_BYTES = 8 << 20
"""Fetched at once, but for a row group that is longer by itself."""
_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Rows:
    """One row group."""

    number: int
    offset: int
    """Of its first byte in the object."""
    table: Any
    """An Arrow table of the columns asked for, dictionaries unified."""


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    end: int
    first: int
    """Number of the first row group in it."""
    last: int
    """Just after the last one."""


async def scan_manifest(
    store: Store, kind: str, ref: ManifestRef, columns: Sequence[str], dictionary: Sequence[str] = ()
) -> AsyncGenerator[Rows, None]:
    """The row groups of a manifest, in order; raises NotFound, DamagedStore, UnknownFeature.

    What was handed over before an error is verified by itself. Close the iterator (``contextlib.aclosing``) when it is
    not read to its end.
    """
    key = keys.manifest(ref.digest)
    if not 0 < ref.footer_bytes <= ref.size <= MANIFEST_MAX_BYTES:
        raise DamagedStore(key, 0, f"expected a reference to at most {MANIFEST_MAX_BYTES} bytes")
    tail = await store.get(key, ref.size - ref.footer_bytes, ref.footer_bytes)
    footer = await asyncio.to_thread(_open, kind, ref, tail)
    digest = hasher()

    async def fetch(piece: _Piece) -> tuple[_Piece, bytes]:
        return piece, await store.get(key, piece.start, piece.end - piece.start)

    async with aclosing(in_order(_pieces(footer, key), fetch, limit=_AHEAD)) as pieces:
        async for piece, data in pieces:
            await asyncio.to_thread(digest.update, data)
            view = memoryview(data)
            for number in range(piece.first, piece.last):
                entry = footer.entries[number]
                part = view[entry.offset - piece.start :][: entry.length]
                table = await asyncio.to_thread(_decode, footer, number, part, columns, dictionary)
                yield Rows(number, entry.offset, table)
    digest.update(tail)
    if digest.hexdigest() != ref.digest:
        raise DamagedStore(key, 0, f"expected {ref.size} bytes with BLAKE3 {ref.digest}")


def _open(kind: str, ref: ManifestRef, tail: bytes) -> ParquetFooter:
    if kind == PAGES:
        open_footer(ref, tail)  # also looks at the bounds that only page manifests have
    return ParquetFooter(kind, ref, tail)


def _decode(
    footer: ParquetFooter, number: int, data: memoryview, columns: Sequence[str], dictionary: Sequence[str]
) -> Any:
    table = footer.read(number, data, dictionary=dictionary, columns=columns)
    return table.unify_dictionaries().combine_chunks()


def _pieces(footer: ParquetFooter, key: str) -> Iterator[_Piece]:
    """All of the object before its footer, cut between row groups."""
    end = footer.ref.size - footer.ref.footer_bytes
    start = at = first = 0
    for number, entry in enumerate(footer.entries):
        if entry.offset < at or entry.length < 0 or entry.offset + entry.length > end:
            raise DamagedStore(
                key, end, f"expected row group {number} within the object, after the one before"
            )
        if number > first and entry.offset + entry.length - start > PIECE_BYTES:
            yield _Piece(start, at, first, number)
            start, first = at, number
        at = entry.offset + entry.length
    if end > start:
        yield _Piece(start, end, first, len(footer.entries))
