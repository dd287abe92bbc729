"""Progress bars of long work, on a terminal's stderr.

rich is imported only where a bar is drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cli.output import note, on_terminal

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

Tell = Callable[[str, int, int | None], None]
"""(what is being done, how much of it is done, how much there is; ``None``: nobody knows)."""


@contextlib.contextmanager
def bytes_progress(label: str) -> Iterator[Tell]:
    """A bar of bytes, with rate and time left."""
    if not on_terminal():
        yield _silent
        return
    from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    with _bar(label, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as tell:
        yield tell


@contextlib.contextmanager
def count_progress(label: str, *, lines: bool = False) -> Iterator[Tell]:
    """A bar of things, with the time taken. ``lines``: where there is no terminal, a line for each."""
    if not on_terminal():
        yield _line if lines else _silent
        return
    from rich.progress import MofNCompleteColumn, TimeElapsedColumn

    with _bar(label, MofNCompleteColumn(), TimeElapsedColumn()) as tell:
        yield tell


def _silent(doing: str, done: int, total: int | None) -> None:
    """Nobody looks."""


def _line(doing: str, done: int, total: int | None) -> None:
    note(f"{done} of {total}: {doing}")


@contextlib.contextmanager
def _bar(label: str, *columns: ProgressColumn) -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    said = TextColumn("{task.description}")
    with Progress(
        TextColumn(label), BarColumn(), *columns, said, console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda doing, done, total: bar.update(task, description=doing, completed=done, total=total)
