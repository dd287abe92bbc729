"""Frozen dataclasses ↔ JSON, by their annotations, so that no field of the branch log can be forgotten.

Understands what the format's values are made of: ``int``, ``str``, ``bool``, ``Lsn`` (an integer), ``X |
None``, ``tuple[X, ...]`` (an array) and dataclasses (an object). Unknown members are ignored and absent ones
take the field's default: additions that an old reader may ignore need no new feature, all others do (SPEC.md,
[FEA-3]).
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Hashable

from timeline.lsn import Lsn

Json = typing.Any
"""What ``json`` makes of JSON."""

T = typing.TypeVar("T")


def to_json(value: object) -> Json:
    """The value as JSON; raises TypeError for what the format has no form for."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {
            name: to_json(getattr(value, name)) for name in _field_names(typing.cast(Hashable, type(value)))
        }
    raise TypeError(f"no JSON form for {type(value).__name__}")


def from_json(kind: type[T], value: Json) -> T:
    """The value of that type; raises ValueError that says where and what was expected."""
    result: T = _decoder(typing.cast(Hashable, kind))(value, kind.__name__)
    return result


_Decode = Callable[[Json, str], typing.Any]


@functools.cache
def _field_names(kind: Hashable) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(typing.cast(typing.Any, kind)))


@functools.cache
def _decoder(kind: typing.Any) -> _Decode:
    if kind is Lsn:
        return _decode_lsn
    if kind in (int, str, bool):
        return _plain_decoder(kind)
    origin = typing.get_origin(kind)
    if origin is tuple:
        return _tuple_decoder(_decoder(typing.get_args(kind)[0]))
    if origin in (types.UnionType, typing.Union):
        inner = [arm for arm in typing.get_args(kind) if arm is not types.NoneType]
        if len(inner) == 1:
            return _optional_decoder(_decoder(inner[0]))
    if dataclasses.is_dataclass(kind):
        return _object_decoder(kind)
    raise TypeError(f"no JSON form for {kind}")


def _decode_lsn(value: Json, where: str) -> Lsn:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{where}: expected an LSN as an integer, found {value!r}")
    return Lsn(value)


def _plain_decoder(kind: type) -> _Decode:
    def decode(value: Json, where: str) -> typing.Any:
        if type(value) is not kind:
            raise ValueError(f"{where}: expected {kind.__name__}, found {value!r}")
        return value

    return decode


def _tuple_decoder(item: _Decode) -> _Decode:
    def decode(value: Json, where: str) -> typing.Any:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected an array, found {value!r}")
        return tuple([item(element, where) for element in value])

    return decode


def _optional_decoder(inner: _Decode) -> _Decode:
    def decode(value: Json, where: str) -> typing.Any:
        return None if value is None else inner(value, where)

    return decode


def _object_decoder(kind: typing.Any) -> _Decode:
    hints = typing.get_type_hints(kind)
    fields = [
        (
            field.name,
            f"{kind.__name__}.{field.name}",
            _decoder(hints[field.name]),
            field.default is not dataclasses.MISSING,
        )
        for field in dataclasses.fields(kind)
    ]

    def decode(value: Json, where: str) -> typing.Any:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, found {value!r}")
        members = {}
        for name, path, inner, optional in fields:
            if name in value:
                members[name] = inner(value[name], path)
            elif not optional:
                raise ValueError(f"{path}: missing")
        return kind(**members)

    return decode
