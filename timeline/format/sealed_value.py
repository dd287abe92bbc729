"""A value as a sealed JSON object of its own: format, required features, members (SPEC.md, chapters 1 and 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from timeline.errors import DamagedStore, UnknownFeature
from timeline.format import sealed_json, value_json
from timeline.format.features import check_readable

FORMAT = 1
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Requires:
    requires: tuple[str, ...] = ()


def encode_value(value: Any) -> bytes:
    """The object of a frozen dataclass."""
    return sealed_json.encode({"format": FORMAT, "requires": [], **value_json.to_json(value)})


def decode_value(kind: type[_T], name: str, data: bytes, key: str) -> _T:
    """The verified value; ``name``: what it is called in errors. Raises DamagedStore, UnknownFeature."""
    members = sealed_json.decode(data, key)
    if members.get("format") != FORMAT:
        raise UnknownFeature(key, f"{name} format {members.get('format')}")
    try:
        check_readable(key, value_json.from_json(_Requires, members).requires)
        return value_json.from_json(kind, members)
    except ValueError as error:
        raise DamagedStore(key, 0, str(error)) from error
