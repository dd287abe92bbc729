"""``tl.json``: what a store is; written once, never changed (SPEC.md, chapter 2)."""

from __future__ import annotations

from dataclasses import dataclass

from timeline.clock import Micros
from timeline.errors import DamagedStore, UnknownFeature
from timeline.format import keys, sealed_json, value_json
from timeline.format.digest import DIGEST_KIND
from timeline.format.features import check_envelope, check_readable

FORMAT_VERSION = 1
_MAGIC = "timeline store"


@dataclass(frozen=True, slots=True)
class StoreMeta:
    """What every reader and writer checks first."""

    store_id: str
    """Random, 32 hex digits; every chunk and pack repeats it."""
    format_version: int
    read_features: tuple[str, ...]
    """Whoever does not know all of them cannot read the store."""
    write_features: tuple[str, ...]
    """Whoever does not know all of them may read, and must not write."""
    key_id: str | None
    """Reserved: id of the data key."""
    created: Micros
    digest_kind: str = DIGEST_KIND


def encode_meta(meta: StoreMeta) -> bytes:
    """The object ``tl.json``."""
    return sealed_json.encode({"magic": _MAGIC, **value_json.to_json(meta)})


def decode_meta(data: bytes, key: str = keys.META) -> StoreMeta:
    """Verified meta data.

    Raises DamagedStore, and UnknownFeature when this version cannot read the store. Whoever writes must call
    ``features.check_writable`` with the write features too.
    """
    members = sealed_json.decode(data, key)
    if members.get("magic") != _MAGIC:
        raise DamagedStore(key, 0, f"expected the member magic to be {_MAGIC!r}")
    if members.get("format_version") != FORMAT_VERSION:
        raise UnknownFeature(key, f"format {members.get('format_version')}")
    try:
        meta = value_json.from_json(StoreMeta, members)
    except ValueError as error:
        raise DamagedStore(key, 0, str(error)) from error
    check_readable(key, meta.read_features)
    check_envelope(key, digest_kind=meta.digest_kind, key_id=meta.key_id, cipher=None)
    return meta
