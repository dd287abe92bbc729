"""What this process calls itself to servers, so that access logs and bills tell which command made a request."""

from __future__ import annotations

_PRODUCT = "timeline"
_command = ""


def name_command(command: str) -> None:
    """Say once, before a store is opened, which command of ``tl`` this process and all it forks are."""
    global _command
    _command = command


def user_agent() -> str:
    """``timeline`` or, where a command was named, ``timeline/archive``."""
    return f"{_PRODUCT}/{_command}" if _command else _PRODUCT
