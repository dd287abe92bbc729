"""tl.toml: text ↔ values. Pure but for reading the file; every complaint names file, table and key.

``cli/tl.toml.example`` is the reference, key by key.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.operations import (
    DAILY,
    AlertPlan,
    ArchivePlan,
    BackupPlan,
    BranchPlan,
    DaemonPlan,
    DrillPlan,
    HookPlan,
    Operations,
    RetentionPlan,
    SnapshotPlan,
    VerifyPlan,
)
from cli.quantities import parse_duration, parse_size
from cli.schedule import Schedule, parse_schedule
from timeline.errors import UsageError

LONGEST_LIST = 100
"""Entries of a list."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """One ``[cluster.NAME]`` table of tl.toml."""

    name: str
    store: str | None
    endpoint_url: str | None
    region: str | None
    source: str | None
    operations: Operations = field(default_factory=Operations)


@dataclass(frozen=True, slots=True)
class Document:
    """A whole tl.toml."""

    clusters: tuple[Cluster, ...]
    daemon: DaemonPlan


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a table: how its value is read, and the field it becomes."""

    read: Callable[[object], object]
    """Raises ValueError saying what is expected."""
    field: str


def read_document(path: Path) -> Document:
    """The file's content; raises UsageError naming the file, the table and the key that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    return parse_document(text, str(path))


def parse_document(text: str, path: str) -> Document:
    """As ``read_document``; ``path`` is for messages only."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: {error}") from error
    for key in document:
        if key not in ("cluster", "daemon"):
            near = difflib.get_close_matches(key, ("cluster", "daemon"), 1)
            raise UsageError(
                f"{path}: unknown key {key!r}",
                hint=(f"did you mean {near[0]!r}? " if near else "")
                + "clusters are tables [cluster.NAME], the daemon's own is [daemon]",
            )
    tables = document.get("cluster", {})
    if not isinstance(tables, dict):
        raise UsageError(f"{path}: 'cluster' is not a table", hint="clusters are tables [cluster.NAME]")
    clusters = tuple(_cluster(path, name, body) for name, body in tables.items())
    return Document(clusters, _daemon(path, document.get("daemon", {})))


def _cluster(path: str, name: str, body: object) -> Cluster:
    where = f"cluster.{name}"
    if not name:
        raise UsageError(f"{path}: a cluster has an empty name")
    table = _table(path, where, body)
    _known(path, where, table, (*CLUSTER_KEYS, *SUB_TABLES))
    values = _values(path, where, table, CLUSTER_KEYS)
    found: dict[str, Any] = {}
    for sub, (keys, make) in SUB_TABLES.items():
        inner = f"{where}.{sub}"
        if sub not in table:
            continue
        content = _table(path, inner, table[sub])
        _known(path, inner, content, tuple(keys))
        found[sub] = _made(path, inner, make, _values(path, inner, content, keys))
    whole = dict.fromkeys(CLUSTER_KEYS, None) | values
    return Cluster(name, **whole, operations=Operations(**found))


def _daemon(path: str, body: object) -> DaemonPlan:
    table = _table(path, "daemon", body)
    _known(path, "daemon", table, (*DAEMON_KEYS, "hooks"))
    values = _values(path, "daemon", table, DAEMON_KEYS)
    if "hooks" in table:
        hooks = _table(path, "daemon.hooks", table["hooks"])
        _known(path, "daemon.hooks", hooks, tuple(HOOK_KEYS))
        values["hooks"] = HookPlan(**_values(path, "daemon.hooks", hooks, HOOK_KEYS))
    return DaemonPlan(**values)


def _table(path: str, where: str, body: object) -> dict[str, object]:
    if not isinstance(body, dict):
        raise UsageError(f"{path}: {where} is not a table", hint=f"write [{where}] on a line of its own")
    return body


def _known(path: str, where: str, table: Mapping[str, object], names: tuple[str, ...]) -> None:
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            raise UsageError(
                f"{path}: unknown key {key!r} in [{where}]",
                hint=f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}",
            )


def _values(path: str, where: str, table: Mapping[str, object], keys: Mapping[str, Key]) -> dict[str, Any]:
    values = {}
    for name, key in keys.items():
        if name in table:
            try:
                values[key.field] = key.read(table[name])
            except ValueError as error:
                raise UsageError(f"{path}: {where}.{name}: {error}") from None
    return values


def _made(path: str, where: str, make: Callable[..., Any], values: dict[str, Any]) -> Any:
    try:
        return make(**values)
    except ValueError as error:
        raise UsageError(f"{path}: [{where}]: {error}") from None


def _text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"text is expected, not {value!r}")
    return value


def _name(value: object) -> str | None:
    return _text(value) or None


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"true or false is expected, not {value!r}")
    return value


def _span(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
        return 0.0
    return parse_duration(_text(value))


def _positive_span(value: object) -> float:
    seconds = _span(value)
    if seconds <= 0:
        raise ValueError("it must be longer than nothing")
    return seconds


def _span_or_off(value: object) -> float | None:
    return None if value == "off" else _positive_span(value)


def _bytes(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return parse_size(_text(value))


def _bytes_or_off(value: object) -> int | None:
    if value == "off":
        return None
    count = _bytes(value)
    if count == 0:
        raise ValueError('it must be more than nothing; "off" means no limit')
    return count


def _schedule(value: object) -> Schedule | None:
    return parse_schedule(_text(value))


def _words(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > LONGEST_LIST:
        raise ValueError(f"a list of at most {LONGEST_LIST} texts is expected, not {value!r}")
    return tuple(_text(word) for word in value)


def _count(lowest: int, highest: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            raise ValueError(f"a number from {lowest} to {highest} is expected, not {value!r}")
        return value

    return read


def _one_of(*names: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if value not in names:
            near = difflib.get_close_matches(str(value), names, 1)
            raise ValueError(
                f"one of {', '.join(names)} is expected, not {value!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        return str(value)

    return read


def _url(value: object) -> str | None:
    text = _text(value)
    if text and not text.startswith(("http://", "https://")):
        raise ValueError("a URL is expected: https://…")
    return text or None


def _address(value: object) -> str | None:
    text = _text(value)
    if not text or text == "off":
        return None
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError("HOST:PORT is expected, for example 127.0.0.1:9187")
    return text


def _zone(value: object) -> str | None:
    from zoneinfo import ZoneInfo

    text = _text(value)
    if text:
        try:
            ZoneInfo(text)
        except (OSError, ValueError, KeyError):
            raise ValueError(f"no zone {text!r} is known on this host; write Europe/Berlin or UTC") from None
    return text or None


def _retention(**values: Any) -> RetentionPlan:
    plan = RetentionPlan(**({"schedule": DAILY} | values))
    if not plan.keep_all_seconds <= plan.hourly_seconds <= plan.daily_seconds:
        raise ValueError("keep_all, hourly and daily are ages: none may be above the next")
    return plan


CLUSTER_KEYS = {name: Key(_name, name) for name in ("store", "endpoint_url", "region", "source")}
_TIMEOUT = {"timeout": Key(_positive_span, "timeout_seconds")}
HOOK_KEYS = {"on_failure": Key(_words, "on_failure"), "on_recovery": Key(_words, "on_recovery"), **_TIMEOUT}
SUB_TABLES: dict[str, tuple[dict[str, Key], Callable[..., Any]]] = {
    "archive": (
        {
            "enabled": Key(_flag, "enabled"),
            "max_delay": Key(_span, "max_delay_seconds"),
            "slot": Key(_name, "slot"),
            "no_slot": Key(_flag, "no_slot"),
            "unbounded_slot": Key(_flag, "unbounded_slot"),
            "allow_gap": Key(_flag, "allow_gap"),
            "rate_limit": Key(_bytes_or_off, "rate_limit_bytes"),
            "fast_checkpoint": Key(_flag, "fast_checkpoint"),
            "application_name": Key(_text, "application_name"),
            "standbys": Key(_words, "standbys"),
        },
        ArchivePlan,
    ),
    "branch": (
        {
            "run": Key(_words, "run"),
            "run_database": Key(_text, "run_database"),
            "run_timeout": Key(_positive_span, "run_timeout_seconds"),
            "stop_when_idle": Key(_span_or_off, "stop_when_idle_seconds"),
        },
        BranchPlan,
    ),
    "snapshots": (
        {
            "every": Key(_bytes, "every_bytes"),
            "after": Key(_positive_span, "after_seconds"),
            "schedule": Key(_schedule, "schedule"),
            **_TIMEOUT,
        },
        SnapshotPlan,
    ),
    "backup": (
        {
            "schedule": Key(_schedule, "schedule"),
            "rate_limit": Key(_bytes_or_off, "rate_limit_bytes"),
            "fast_checkpoint": Key(_flag, "fast_checkpoint"),
            **_TIMEOUT,
        },
        BackupPlan,
    ),
    "retention": (
        {
            "schedule": Key(_schedule, "schedule"),
            "window": Key(_span_or_off, "window_seconds"),
            "grace": Key(_span, "grace_seconds"),
            "min_bases": Key(_count(1, 1000), "min_bases"),
            "keep_all": Key(_span, "keep_all_seconds"),
            "hourly": Key(_span, "hourly_seconds"),
            "daily": Key(_span, "daily_seconds"),
            **_TIMEOUT,
        },
        _retention,
    ),
    "verify": (
        {
            "structure": Key(_schedule, "structure"),
            "data": Key(_schedule, "data"),
            "budget": Key(_bytes, "budget_bytes"),
            **_TIMEOUT,
        },
        VerifyPlan,
    ),
    "drill": (
        {
            "schedule": Key(_schedule, "schedule"),
            "at": Key(_text, "at"),
            "rto": Key(_span_or_off, "rto_seconds"),
            "rpo": Key(_span_or_off, "rpo_seconds"),
            "sql": Key(_words, "sql"),
            "full": Key(_flag, "full"),
            **_TIMEOUT,
        },
        DrillPlan,
    ),
    "alerts": (
        {
            "heartbeat_url": Key(_url, "heartbeat_url"),
            "heartbeat_method": Key(_one_of("GET", "POST"), "heartbeat_method"),
            "heartbeat_every": Key(_positive_span, "heartbeat_every_seconds"),
            "heartbeat_timeout": Key(_positive_span, "heartbeat_timeout_seconds"),
            "fresh_within": Key(_positive_span, "fresh_within_seconds"),
        },
        AlertPlan,
    ),
    "hooks": (HOOK_KEYS, HookPlan),
}
"""Sub-tables of a cluster: their keys, and what they become."""
DAEMON_KEYS = {
    "metrics": Key(_address, "metrics"),
    "log": Key(_one_of("auto", "json", "human"), "log"),
    "concurrency": Key(_count(1, 64), "concurrency"),
    "jitter": Key(_span, "jitter_seconds"),
    "zone": Key(_zone, "zone"),
    "expire": Key(_schedule, "expire"),
    "stop_grace": Key(_positive_span, "stop_grace_seconds"),
}
