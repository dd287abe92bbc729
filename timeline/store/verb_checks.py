"""Which verbs a store grants, and whether create-if-absent holds: tried on one object of our own.

The object has one key and one content in every store, so that a store which lets nobody delete keeps one such
object, and no more, however often this runs.
"""

from __future__ import annotations

from timeline.errors import CheckFailed, NotFound, TimelineError, Unavailable
from timeline.findings import Finding, Severity
from timeline.store.base import Store

PROBE_KEY = "probe/doctor"
PROBE = b"tl doctor was here\n"
_OTHER = b"tl doctor writes other bytes\n"
_AREA = "store"


async def check_verbs(store: Store, *, known_key: str, read_only: bool) -> list[Finding]:
    """List, read (``known_key``, which every store in use has), and unless ``read_only`` create, create again, delete.

    A store that does not answer is one finding, the last one.
    """
    found: list[Finding] = []
    try:
        found += await _check_reading(store, known_key)
        if not read_only:
            found += await _check_writing(store)
    except Unavailable as error:
        found.append(
            Finding(
                _AREA,
                Severity.ERROR,
                "store-unreachable",
                error.message,
                error.hint or "check the network, the end point and whether the server runs",
            )
        )
    return found


async def _check_reading(store: Store, known_key: str) -> list[Finding]:
    found = []
    try:
        await store.list("tl", limit=1)
        found.append(Finding(_AREA, Severity.OK, "store-list", f"{store.url} can be listed"))
    except Unavailable:
        raise
    except TimelineError as error:
        found.append(_refused("store-list", error, "grant listing: nothing can be read without it"))
    try:
        await store.get(known_key)
        found.append(Finding(_AREA, Severity.OK, "store-read", "objects can be read"))
    except Unavailable:
        raise
    except NotFound:
        found.append(
            Finding(
                _AREA,
                Severity.NOTE,
                "store-empty",
                f"{store.url}: there is no store yet",
                "make one with `tl init`",
            )
        )
    except TimelineError as error:
        found.append(_refused("store-read", error, "grant reading"))
    return found


async def _check_writing(store: Store) -> list[Finding]:
    try:
        mine = await store.create(PROBE_KEY, PROBE)
    except Unavailable:
        raise
    except TimelineError as error:
        cure = "grant it to whoever archives; for a host that only makes branches use --read-only"
        return [_refused("store-create", error, cure)]
    if not mine:
        what = f"{PROBE_KEY} holds other bytes than this check writes: something overwrote them"
        return [_overwrites(what), await _remove(store)]
    found = [Finding(_AREA, Severity.OK, "store-create", "objects can be created")]
    try:
        overwritten = await store.create(PROBE_KEY, _OTHER)
        kept = await store.get(PROBE_KEY)
    except Unavailable:
        raise
    except CheckFailed as error:
        found.append(_refused("conditional-create", error, "use a server that honours If-None-Match"))
    except TimelineError as error:
        found.append(_refused("conditional-create", error, "grant reading and creating"))
    else:
        if overwritten or kept != PROBE:
            found.append(_overwrites("a second create with other bytes overwrites the first"))
        else:
            what = "a second create with other bytes is refused"
            found.append(Finding(_AREA, Severity.OK, "conditional-create", what))
    found.append(await _remove(store))
    return found


async def _remove(store: Store) -> Finding:
    try:
        refused = await store.delete([PROBE_KEY])
        reason = refused[0].reason if refused else None
    except Unavailable:
        raise
    except TimelineError as error:
        reason = error.message
    if reason is not None:
        return Finding(
            _AREA,
            Severity.NOTE,
            "store-delete",
            f"objects cannot be deleted ({reason}); {PROBE_KEY} ({len(PROBE)} bytes) stays, and serves the next check",
            "none needed: only garbage collection deletes, and may run elsewhere",
        )
    return Finding(
        _AREA, Severity.OK, "store-delete", "objects can be deleted, which only garbage collection needs"
    )


def _overwrites(what: str) -> Finding:
    return Finding(
        _AREA,
        Severity.ERROR,
        "conditional-create",
        what,
        "use a server that honours 'If-None-Match: *' on PutObject: a store on this one would lose data",
    )


def _refused(code: str, error: TimelineError, cure: str) -> Finding:
    return Finding(_AREA, Severity.ERROR, code, error.message, error.hint or cure)
