"""Observed values as JSON, and the file in which the daemon keeps them. Any version reads any other's: an unknown key
is passed over, a missing one makes the whole unreadable, which is like never having been written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import types
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from cli.observed import DaemonState, JobState
from cli.output import plain
from timeline.errors import UsageError
from timeline.lsn import Lsn

T = TypeVar("T")
LARGEST_BYTES = 16 << 20
"""Of a state file; what is larger is not ours."""


def encode(value: object) -> str:
    """One line."""
    return json.dumps(plain(value), ensure_ascii=False)


def decode(kind: type[T], text: str | bytes) -> T:
    """The value; raises ValueError when the text is not one of that kind."""
    try:
        document = json.loads(text)
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    found: T = _value(kind, document)
    return found


def state_file(state: Path) -> Path:
    """The daemon's file below the state directory."""
    return state / "daemon" / "state.json"


def write_state(path: Path, state: DaemonState) -> None:
    """Put in place at once: a reader sees the old state or the new one. Raises OSError.

    Not forced to the disk: what a power cut takes is a few seconds of counters, and a job may run once more.
    """
    unfinished = path.with_suffix(f".{os.getpid()}.new")
    try:
        unfinished.write_text(encode(state) + "\n", encoding="utf-8")
        unfinished.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()


def read_state(path: Path) -> DaemonState | None:
    """``None``: there is none. Raises ValueError for what cannot be understood, OSError for what cannot be read."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(text) > LARGEST_BYTES:
        raise ValueError("it is larger than any state")
    return decode(DaemonState, text)


def jobs_before(state: DaemonState | None) -> dict[tuple[str, str], JobState]:
    """What an earlier daemon left of its jobs, by (cluster, job)."""
    if state is None:
        return {}
    groups = [(cluster.cluster, cluster.jobs) for cluster in state.clusters]
    groups += [("", state.host_jobs)]
    return {(cluster, job.job): job for cluster, jobs in groups for job in jobs}


@cache
def _fields(kind: type[Any]) -> tuple[tuple[str, Any, bool], ...]:
    hints = get_type_hints(kind)
    return tuple(
        (each.name, hints[each.name], each.default is dataclasses.MISSING)
        for each in dataclasses.fields(kind)
    )


def _value(kind: Any, found: object) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if found is None:
            return None
        (inner,) = (each for each in get_args(kind) if each is not type(None))
        return _value(inner, found)
    if origin is tuple:
        if not isinstance(found, list):
            raise ValueError(f"a list is expected, not {found!r:.100}")
        return tuple(_value(get_args(kind)[0], each) for each in found)
    if dataclasses.is_dataclass(kind):
        if not isinstance(found, dict):
            raise ValueError(f"an object is expected, not {found!r:.100}")
        try:
            return kind(  # type: ignore[operator]
                **{
                    name: _value(inner, found[name])
                    for name, inner, needed in _fields(kind)  # type: ignore[arg-type]
                    if needed or name in found
                }
            )
        except KeyError as error:
            raise ValueError(f"{error} is missing") from None
    if kind is Lsn:
        if not isinstance(found, str):
            raise ValueError(f"an LSN is expected, not {found!r:.100}")
        try:
            return Lsn.parse(found)
        except UsageError as error:
            raise ValueError(error.message) from None
    if kind is float and isinstance(found, int) and not isinstance(found, bool):
        return float(found)
    if type(found) is not kind:
        raise ValueError(f"{kind.__name__} is expected, not {found!r:.100}")
    return found
