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
def bytes_progress(label: str, *, stays: bool = False) -> Iterator[Tell]:
    """A bar of bytes, with rate and time left. ``stays``: on the screen when all is done."""
    if not on_terminal():
        yield _silent
        return
    from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    with _bar(label, None, stays, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as tell:
        yield tell


@contextlib.contextmanager
def count_progress(label: str, *, total: int | None = None, lines: bool = False) -> Iterator[Tell]:
    """A bar of things, with the time taken; ``total`` as far as it is known at first.

    ``lines``: where there is no terminal, a line for each.
    """
    if not on_terminal():
        yield _line if lines else _silent
        return
    from rich.progress import MofNCompleteColumn, TimeElapsedColumn

    with _bar(label, total, False, MofNCompleteColumn(), TimeElapsedColumn()) as tell:
        yield tell


def _silent(doing: str, done: int, total: int | None) -> None:
    """Nobody looks."""


def _line(doing: str, done: int, total: int | None) -> None:
    note(f"{done} of {total}: {doing}")


@contextlib.contextmanager
def _bar(label: str, total: int | None, stays: bool, *columns: ProgressColumn) -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    # What is said may hold brackets, which are no markup.
    said = TextColumn("{task.description}", markup=False)
    with Progress(
        TextColumn(label), BarColumn(), *columns, said, console=Console(stderr=True), transient=not stays
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda doing, done, of: bar.update(task, description=doing, completed=done, total=of)
