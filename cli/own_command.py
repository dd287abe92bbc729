"""The argv that starts this very ``tl`` again, whatever the working directory and however it was started."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def own_command(*arguments: str) -> tuple[str, ...]:
    """``tl ARGUMENTS…`` by this interpreter and this installation."""
    return _command("", arguments)


def attached_command(*arguments: str) -> tuple[str, ...]:
    """The same as a child that does not outlive this process (``restore/attached.py``)."""
    return _command(f"from restore.attached import attach; attach({os.getpid()}); ", arguments)


def _command(first: str, arguments: tuple[str, ...]) -> tuple[str, ...]:
    root = os.fspath(Path(__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {root!r}); {first}from cli.main import main; main()"
    return (sys.executable, "-c", code, *arguments)
