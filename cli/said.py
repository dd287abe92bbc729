"""Why a child failed, in one line, from what it left on stdout and stderr. Pure."""

from __future__ import annotations

import json
import signal

from cli.child_process import STOPPED, Ended
from cli.log_lines import printable
from cli.quantities import write_duration

LONGEST_MESSAGE = 500
"""Characters."""


def failure_message(end: Ended, timeout_seconds: float | None) -> str:
    """The child's own words where it left any: the error document of ``--json``, else its last line."""
    how = _how(end.code)
    if end.timed_out and timeout_seconds is not None:
        how = f"ended after {write_duration(timeout_seconds)}, its time limit"
    said = _document(end.out) or _last_words(end.errors)
    return printable(f"{how}: {said}" if said else how)[:LONGEST_MESSAGE]


def _how(code: int) -> str:
    if code == STOPPED:
        return "could not be run"
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}"


def _last_words(lines: tuple[str, ...]) -> str:
    """The error and its hint as ``tl`` prints them, else the last line."""
    told = [line for line in lines if line.strip()]
    if not told:
        return ""
    if len(told) > 1 and told[-1].startswith("hint: ") and told[-2].startswith("tl: "):
        return f"{told[-2].removeprefix('tl: ')} ({told[-1].removeprefix('hint: ')})"
    return told[-1].removeprefix("tl: ")


def _document(out: tuple[str, ...]) -> str:
    for line in reversed(out):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(error := found.get("error"), str):
            hint = found.get("hint")
            return f"{error} ({hint})" if isinstance(hint, str) else error
    return ""
