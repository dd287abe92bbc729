"""What people and machines get to read: results on stdout, everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from timeline.clock import Micros
from timeline.errors import TimelineError
from timeline.lsn import Lsn


def iso(micros: Micros | None) -> str | None:
    """An instant as ISO 8601 in UTC, with the microseconds Postgres keeps."""
    if micros is None:
        return None
    moment = datetime.fromtimestamp(micros // 1_000_000, UTC).replace(microsecond=micros % 1_000_000)
    return moment.isoformat().replace("+00:00", "Z")


def local_time(micros: Micros | None) -> str:
    """An instant in the reader's own zone, zone named."""
    if micros is None:
        return "-"
    moment = datetime.fromtimestamp(micros // 1_000_000, UTC).replace(microsecond=micros % 1_000_000)
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S.%f %Z")


def duration_text(seconds: float) -> str:
    """A span of time for people."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def plain(value: Any) -> Any:
    """A value as JSON can hold it: LSNs as text, dataclasses as objects."""
    if isinstance(value, Lsn):
        return str(value)
    if isinstance(value, Enum):
        return value.name.lower()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    return value


def emit_json(value: Any) -> None:
    """One JSON document on one line of stdout."""
    print(json.dumps(plain(value), ensure_ascii=False), flush=True)


def say(text: str) -> None:
    """A line for people on stdout."""
    print(text, flush=True)


def note(text: str) -> None:
    """A line for people on stderr: progress, warnings."""
    print(text, file=sys.stderr, flush=True)


def warn(warnings: Iterable[str]) -> None:
    """Warnings, one a line, on stderr."""
    for text in warnings:
        note(f"warning: {text}")


def fail(error: TimelineError, *, as_json: bool) -> int:
    """Say what went wrong and how to cure it; returns the exit code."""
    if as_json:
        emit_json(
            {
                "error": error.message,
                "hint": error.hint,
                "kind": type(error).__name__,
                "exit_code": error.exit_code,
            }
        )
    note(f"tl: {error.message}")
    if error.hint:
        note(f"hint: {error.hint}")
    return error.exit_code


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns of text on stdout, as wide as they need to be."""
    lines = [tuple(headings), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def on_terminal() -> bool:
    """Whether a person is watching stderr."""
    return sys.stderr.isatty()
