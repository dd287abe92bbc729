"""Whether a store keeps the one promise that everything rests on: create-if-absent."""

from __future__ import annotations

import asyncio

from timeline.clock import Clock
from timeline.errors import CheckFailed, TimelineError
from timeline.store.base import Store

_HINT = (
    "the server must honour 'If-None-Match: *' on PutObject, as AWS S3, Cloudflare R2, MinIO, Ceph and "
    "SeaweedFS do in their present versions; a store on this server would lose data"
)


async def check_conditional_create(store: Store, clock: Clock) -> str | None:
    """Create different contents under one key, one after the other and at once, and see that one stays.

    Leaves nothing behind where it may delete; where it may not (object lock), the answer is one line that
    says what stays. Raises CheckFailed naming the cure when the second create won.
    """
    token = clock.token(16)
    one_by_one, at_once = f"probe/{token}", f"probe/{token}-race"
    first, second = f"{token} first".encode(), f"{token} second".encode()
    try:
        if not await store.create(one_by_one, first):
            raise CheckFailed(f"{store.url}: a key that nobody has is said to be taken", hint=_HINT)
        overwritten = await store.create(one_by_one, second)
        if overwritten or await store.get(one_by_one) != first:
            raise CheckFailed(f"{store.url}: the server overwrites objects instead of refusing", hint=_HINT)
        won = await asyncio.gather(store.create(at_once, first), store.create(at_once, second))
        kept = await store.get(at_once)
        if won.count(True) != 1 or kept != (first if won[0] else second):
            raise CheckFailed(f"{store.url}: two creates of one key at once both succeeded", hint=_HINT)
    except CheckFailed:
        await _remove(store, one_by_one, at_once)
        raise
    return await _remove(store, one_by_one, at_once)


async def _remove(store: Store, *keys: str) -> str | None:
    try:
        refused = await store.delete(keys)
    except TimelineError as error:
        return f"{' and '.join(keys)} (a few bytes) stay, for they cannot be deleted: {error.message}"
    if refused:
        names = " and ".join(one.key for one in refused)
        return f"{names} (a few bytes) stay, for they cannot be deleted: {refused[0].reason}"
    return None
