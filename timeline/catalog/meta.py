"""``tl.json``: making a store what it is, and reading what it is before anything else."""

from __future__ import annotations

from timeline.clock import Clock
from timeline.errors import NotFound, UsageError
from timeline.format import keys
from timeline.format.features import READ_FEATURES, WRITE_FEATURES, check_writable
from timeline.format.meta import FORMAT_VERSION, StoreMeta, decode_meta, encode_meta
from timeline.store.base import Store


async def create_store(store: Store, clock: Clock) -> StoreMeta:
    """Write ``tl.json`` into an empty place; raises UsageError when a store is there already."""
    meta = StoreMeta(
        store_id=clock.token(16),
        format_version=FORMAT_VERSION,
        read_features=tuple(sorted(READ_FEATURES)),
        write_features=tuple(sorted(WRITE_FEATURES)),
        key_id=None,
        created=clock.now(),
    )
    if not await store.create(keys.META, encode_meta(meta)):
        raise UsageError(
            f"{store.url}: there is a store already", hint="choose another place, or go on with it"
        )
    return meta


async def read_meta(store: Store, *, writing: bool = False) -> StoreMeta:
    """What the store is; ``writing``: also check that this version may write to it.

    Raises UsageError when there is no store, UnknownFeature when this version cannot read (or write) it,
    DamagedStore.
    """
    try:
        data = await store.get(keys.META)
    except NotFound:
        raise UsageError(f"{store.url}: there is no store", hint="make one with `tl init`") from None
    meta = decode_meta(data)
    if writing:
        check_writable(keys.META, meta.write_features)
    return meta
