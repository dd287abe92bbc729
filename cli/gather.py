"""Asks store, source and host for their facts, each on its own: one that does not answer takes nothing from the
others.

Bounds: SOURCE_TIMEOUT_SECONDS for the source, STORE_TIMEOUT_SECONDS for the store, SIZE_TIMEOUT_SECONDS more for
its size. Requests: as ``History.reachable`` says; with ``size``, see ``cli.store_size``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from typing import TypeVar

from cli.config import Settings
from cli.facts import (
    Facts,
    GapFacts,
    HostFacts,
    RangeFacts,
    SlotFacts,
    SnapshotFacts,
    SourceFacts,
    StoreFacts,
    StoreSize,
)
from timeline.clock import Clock
from timeline.errors import TimelineError, Unavailable

SOURCE_TIMEOUT_SECONDS = 10.0
STORE_TIMEOUT_SECONDS = 120.0
SIZE_TIMEOUT_SECONDS = 400.0

_T = TypeVar("_T")


async def gather(
    settings: Settings, clock: Clock, *, size: bool, strict: bool = False, store_id: str | None = None
) -> Facts:
    """Everything, as far as it answers. Raises UsageError where no store is named, and with ``strict`` whatever the
    store itself raises. ``store_id``: lets the source be asked for the slot while the store does not answer."""
    url = settings.need_store()
    asking = _bounded(gather_store(settings, clock, url), STORE_TIMEOUT_SECONDS)
    store, store_error = (await asking, None) if strict else await _attempt(asking)
    measured, size_error = None, None
    if size and store is not None:
        measured, size_error = await _attempt(_bounded(_measure(settings, clock, url), SIZE_TIMEOUT_SECONDS))
    source: SourceFacts | None = None
    source_error = None
    identity = store.store_id if store is not None else store_id
    if settings.source is not None and identity is not None:
        source, source_error = await _attempt(gather_source(settings.source, identity))
    host, host_error = await _attempt(gather_host_facts(clock))
    return Facts(
        gathered_at=clock.now(),
        store=store,
        store_error=store_error,
        size=measured,
        size_error=size_error,
        source=source,
        source_error=source_error,
        host=host,
        host_error=host_error,
    )


async def gather_store(settings: Settings, clock: Clock, url: str) -> StoreFacts:
    """What the store alone tells; raises as ``History.load`` and ``reachable``."""
    from timeline.catalog.history import History
    from timeline.store.open import open_store

    store = await open_store(url, endpoint_url=settings.endpoint_url, region=settings.region, clock=clock)
    try:
        history = await History.load(store)
        ranges = await history.reachable()
        tail = await history.tail(history.state.current_tli)
        remarks = await history.remarks()
    finally:
        await store.aclose()
    state = history.state
    return StoreFacts(
        url=store.url,
        store_id=history.meta.store_id,
        current_tli=state.current_tli,
        durable=tail.end,
        ranges=tuple(
            RangeFacts(one.tli, one.first, one.last, one.first_time, one.last_time, one.abandoned)
            for one in ranges
        ),
        snapshots=tuple(
            SnapshotFacts(one.id, one.kind, one.tli, one.lsn, one.time, one.bytes) for one in state.snapshots
        ),
        gaps=tuple(GapFacts(one.tli, one.start, one.end) for one in state.gaps),
        unsealed_bytes=tail.bytes,
        backup_under_way=state.progress is not None,
        remarks=remarks,
    )


async def gather_source(conninfo: str, store_id: str) -> SourceFacts:
    """What the source tells of itself and of the slot; raises UsageError, Unavailable, ServerError."""
    from timeline.archive.slot import keep_limit_bytes, slot_name
    from timeline.archive.source import Source

    try:
        async with asyncio.timeout(SOURCE_TIMEOUT_SECONDS):
            source = await Source.open(conninfo)
            try:
                probe = await source.probe(slot=slot_name(store_id), sender_pid=None)
                limit = await keep_limit_bytes(source.connection)
            finally:
                await source.aclose()
    except TimeoutError as error:
        raise Unavailable(f"the source did not answer within {SOURCE_TIMEOUT_SECONDS:g} s") from error
    slot = probe.slot
    return SourceFacts(
        end=probe.end,
        time=probe.time,
        keep_limit_bytes=limit,
        slot=None
        if slot is None
        else SlotFacts(
            name=slot.name,
            wal_status=str(slot.wal_status) if slot.wal_status is not None else None,
            active=slot.active_pid is not None,
            safe_bytes=slot.safe_bytes,
            warning=slot.warning,
        ),
    )


async def gather_host_facts(clock: Clock) -> HostFacts:
    """This host's branches; raises TimelineError."""
    from cli.host_facts import gather_host

    return await asyncio.to_thread(gather_host, os.environ, clock)


async def _measure(settings: Settings, clock: Clock, url: str) -> StoreSize:
    from cli.store_size import measure
    from timeline.catalog.history import History
    from timeline.store.open import open_store

    store = await open_store(url, endpoint_url=settings.endpoint_url, region=settings.region, clock=clock)
    try:
        return await measure(await History.load(store))
    finally:
        await store.aclose()


async def _bounded(work: Awaitable[_T], seconds: float) -> _T:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError as error:
        raise Unavailable(f"the store did not answer within {seconds:g} s") from error


async def _attempt(work: Awaitable[_T]) -> tuple[_T | None, str | None]:
    try:
        return await work, None
    except TimelineError as error:
        return None, error.message
