"""Importing much at once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """No search for garbage meanwhile: importing makes a quarter of a million objects, all of which stay, and looking through
    them again and again takes a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
