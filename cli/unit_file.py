"""The systemd unit: ``cli/tl-daemon.service`` with this installation's command in it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

_COMMAND = "ExecStart=/usr/local/bin/tl daemon"


def unit_text(config: Path | None) -> str:
    """The unit for the ``tl`` that runs now, and for this tl.toml (``None``: found at the start, in the usual places)."""
    text = Path(__file__).with_name("tl-daemon.service").read_text(encoding="utf-8")
    if _COMMAND not in text:
        raise AssertionError("the unit has lost its ExecStart")
    words = [*_installed(), "daemon", *(["--config", str(config)] if config is not None else [])]
    # systemd reads quotes as a shell does, and expands % and $ on its own.
    command = " ".join(shlex.quote(word).replace("%", "%%").replace("$", "$$") for word in words)
    return text.replace(_COMMAND, f"ExecStart={command}")


def _installed() -> list[str]:
    beside = Path(sys.executable).with_name("tl")
    if beside.exists():
        return [str(beside)]
    return [sys.executable, "-m", "cli.main"]
