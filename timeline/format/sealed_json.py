"""JSON objects that carry their own digest (SPEC.md, [JSN-1] to [JSN-4]).

One line of JSON whose last member is ``"sha256"``: the SHA-256 of every byte before the comma that introduces
it. SHA-256 and not BLAKE3, for every language's standard library has it (P12).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from timeline.errors import DamagedStore

_SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\n')
_SEAL_BYTES = len(b',"sha256":""}\n') + 64


def encode(members: Mapping[str, object]) -> bytes:
    """The sealed object. ``members`` must not be empty nor contain ``sha256``."""
    if not members or "sha256" in members:
        raise ValueError("a sealed object needs members, and its digest is none of them")
    body = compact(members)[:-1]
    return body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def compact(value: object) -> bytes:
    """The JSON of the value without white space, in ASCII."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def decode(data: bytes, key: str) -> dict[str, object]:
    """The members without the digest; raises DamagedStore."""
    match = _SEAL.fullmatch(data, max(0, len(data) - _SEAL_BYTES))
    if match is None:
        raise DamagedStore(
            key, max(0, len(data) - _SEAL_BYTES), "expected the object's SHA-256 as its last member"
        )
    body = data[: match.start()]
    if hashlib.sha256(body).hexdigest().encode() != match[1]:
        raise DamagedStore(key, 0, f"expected {len(body)} bytes with SHA-256 {match[1].decode()}")
    try:
        members = json.loads(body + b"}")
    except ValueError as error:
        raise DamagedStore(key, 0, f"expected JSON: {error}") from error
    if not isinstance(members, dict):
        raise DamagedStore(key, 0, "expected a JSON object")
    return members
