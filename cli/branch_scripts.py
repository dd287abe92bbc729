"""Which scripts a new branch runs: those of tl.toml first, so that nobody forgets to mask, then ``--run``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.config import Settings, config_path, read_clusters
from cli.duration import Duration
from timeline.errors import UsageError

if TYPE_CHECKING:
    from restore.branch_scripts import Scripts

F = TypeVar("F", bound=Callable[..., Any])


def script_options(command: F) -> F:
    """``--run`` and what belongs to it."""
    for option in (
        click.option(
            "--run-timeout", type=Duration(), metavar="DURATION", help="For all scripts together (10m)."
        ),
        click.option("--run-database", metavar="NAME", help="Where the scripts run (postgres)."),
        click.option(
            "--no-run", is_flag=True, help="Leave out the scripts that tl.toml names, masking among them."
        ),
        click.option(
            "--run",
            "run",
            multiple=True,
            metavar="FILE.sql",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Run it before the branch is reachable, after those of tl.toml; may be repeated.",
        ),
    ):
        command = option(command)
    return command


def chosen_scripts(
    settings: Settings,
    run: tuple[Path, ...],
    *,
    no_run: bool,
    database: str | None,
    timeout_seconds: float | None,
) -> Scripts:
    """Read what is to be run; raises UsageError for a script that cannot be read."""
    plan = settings.operations.branch
    configured: tuple[Path, ...] = ()
    file = config_path()
    if not no_run and settings.cluster is None and settings.store is not None and file is not None:
        _refuse_to_guess(file, settings.store)
    if plan.run and not no_run:
        beside = file.absolute().parent if file is not None else Path.cwd()
        configured = tuple(beside / path for path in plan.run)
    from restore.branch_scripts import read_scripts

    return read_scripts(
        (*configured, *run),
        database=database or plan.run_database,
        timeout_seconds=max(1, round(timeout_seconds or plan.run_timeout_seconds)),
    )


def _refuse_to_guess(file: Path, store: str) -> None:
    """Raise UsageError when several clusters have that store and scripts: to choose none would be not to mask."""
    same = [each for each in read_clusters(file) if (each.store or "").rstrip("/") == store.rstrip("/")]
    if any(each.operations.branch.run for each in same):
        raise UsageError(
            f"{file}: several clusters have this store, and scripts to run in its branches",
            hint=f"choose with --cluster: {', '.join(each.name for each in same)}; or say --no-run",
        )
