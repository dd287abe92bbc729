"""The daemon's state as a file: ``daemon.json`` in the state directory (see restore/host.py)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from cli.observed import DaemonState
from timeline.errors import TimelineError
from timeline.format.value_json import from_json, to_json

FORMAT = 1
MOST_BYTES = 4 << 20
"""A longer file is none of ours."""


def state_path(environ: Mapping[str, str]) -> Path:
    """Where this user's daemon keeps its state."""
    from restore.host import find_host

    return find_host(environ).state / "daemon.json"


def write_daemon_state(path: Path, state: DaemonState) -> None:
    """Replace the file; a reader sees the old one or the new one. Raises OSError.

    Not made durable: after a power failure there is no daemon whose state it could be.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"format": FORMAT, **to_json(state)}) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_daemon_state(path: Path) -> DaemonState | None:
    """What a daemon wrote last, whether it still runs or not; ``None``: none ever ran here.

    Raises TimelineError for a file that is not a daemon's, or another version's.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TimelineError(f"{path}: {error.strerror}") from error
    try:
        if len(data) > MOST_BYTES:
            raise ValueError(f"longer than {MOST_BYTES} bytes")
        value = json.loads(data)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        return from_json(DaemonState, value)
    except ValueError as error:
        raise TimelineError(
            f"{path} cannot be read: {error}", hint="another version of tl wrote it; restart `tl daemon`"
        ) from error


def is_running(state: DaemonState) -> bool:
    """Whether a process of the daemon's number lives; it may be another one's, long after."""
    try:
        os.kill(state.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
