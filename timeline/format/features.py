"""Features a store or an object may require of those who read or write it (SPEC.md, [FEA-1] to [FEA-4])."""

from __future__ import annotations

from collections.abc import Iterable

from timeline.errors import UnknownFeature
from timeline.format.digest import DIGEST_KIND

COLLECTION = "collection"
"""Log entries require it whose state says how far garbage collection has come: a version that does not know it would
drop that by copying the state, and commit what is being deleted."""

READ_FEATURES: frozenset[str] = frozenset({COLLECTION})
"""Read features this version knows."""

WRITE_FEATURES: frozenset[str] = frozenset()
"""Write features this version knows."""


def check_readable(where: str, features: Iterable[str]) -> None:
    """Raises UnknownFeature for the first read feature not known here; ``where`` names the object."""
    for feature in features:
        if feature not in READ_FEATURES:
            raise UnknownFeature(where, feature)


def check_writable(where: str, features: Iterable[str]) -> None:
    """Raises UnknownFeature for the first write feature not known here."""
    for feature in features:
        if feature not in WRITE_FEATURES:
            raise UnknownFeature(where, feature, writing=True)


def check_envelope(where: str, *, digest_kind: object, key_id: object, cipher: object) -> None:
    """Raises UnknownFeature when the reserved fields of an envelope hold anything but format 1's values."""
    if digest_kind != DIGEST_KIND:
        raise UnknownFeature(where, f"digest kind {digest_kind}")
    if cipher is not None:
        raise UnknownFeature(where, f"cipher {cipher}")
    if key_id is not None:
        raise UnknownFeature(where, f"data key {key_id}")
