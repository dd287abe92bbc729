"""``tl verify``: whether the store is whole, and what damage endangers."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.config import Settings, store_options
from cli.executor import Place
from cli.executor_open import PlaceType
from cli.footprint import keep_small
from cli.output import duration_text, emit_json, note, say
from cli.progress import bytes_progress, count_progress
from timeline.errors import DamagedStore, UsageError
from timeline.size_text import size_text

if TYPE_CHECKING:
    from cli.executor import Outcome
    from timeline.maintain.verify_report import DataChecked, LsnRange, Problem, VerifyReport

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_SHOWN = 20
"""Problems printed for people; JSON has them all."""
_FILES_SHOWN = 5


@click.command("verify")
@click.option("--data", is_flag=True, help="Read every byte and check every digest and page checksum.")
@click.option(
    "--budget",
    metavar="SIZE",
    help="With --data: read about this much in one run (e.g. 50GB), and go on there in the next.",
)
@click.option(
    "--part",
    metavar="K/N",
    help="With --data: read only the packs whose names fall into the K-th of N parts; the structure is checked in each.",
)
@click.option(
    "--executor",
    "place",
    type=PlaceType(),
    metavar="WHERE",
    help="With --data: in parts, by processes of this host (local:N) or Dask workers (tcp://HOST:PORT); one report.",
)
@store_options
def verify_command(
    *, settings: Settings, data: bool, budget: str | None, part: str | None, place: Place | None
) -> int:
    """Check that everything the log names is there, and enough to restore from. Only reads.

    Without --data only the structure is checked: log, manifests, sizes of packs, chunk headers, and that the WAL has no
    hole. Exit code 4 and a list of what is endangered when something is wrong.
    """
    for name, value in (("--budget", budget), ("--part", part), ("--executor", place)):
        if value is not None and not data:
            raise UsageError(f"{name} is for --data", hint="add --data")
    if part is not None and place is not None:
        raise UsageError("--executor makes the parts itself", hint="leave --part out")
    # Packs come and go by the hundred; what is freed of them goes back to the system.
    keep_small()
    budget_bytes = None if budget is None else parse_size(budget)
    if place is not None:
        return asyncio.run(_verify_in_parts(settings, place, budget=budget_bytes))
    return asyncio.run(_verify(settings, data=data, budget=budget_bytes, part=part))


def parse_size(text: str) -> int:
    """Bytes, from ``50GB`` and the like, in powers of 1024; raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not (size := int(float(match[1]) * _UNITS[match[2].lower()])):
        raise UsageError(f"not a size: {text!r}", hint="write for example 500MB or 50GB")
    return size


async def _verify(settings: Settings, *, data: bool, budget: int | None, part: str | None) -> int:
    from restore.host import state_directory
    from timeline.clock import SystemClock
    from timeline.maintain.verify import verify
    from timeline.maintain.verify_part import WHOLE, Part
    from timeline.store.open import open_store

    wanted = Part.parse(part) if part is not None else WHOLE

    clock = SystemClock()
    began = clock.monotonic()
    store = await open_store(
        settings.need_store(), endpoint_url=settings.endpoint_url, region=settings.region, clock=clock
    )
    ledgers = _writable(state_directory(os.environ) / "verify") if data else None
    try:
        with bytes_progress("verify") as tell:
            found = await verify(
                store,
                clock,
                data=data,
                budget=budget,
                part=wanted,
                ledger_directory=ledgers,
                report=lambda at: tell("", at.done_bytes, at.total_bytes),
            )
    finally:
        await store.aclose()
    return _tell(settings, found, clock.monotonic() - began, clock.now())


async def _verify_in_parts(settings: Settings, place: Place, *, budget: int | None) -> int:
    from cli.executor_open import open_executor
    from cli.verify_parts import verify_parts
    from timeline.clock import SystemClock

    clock = SystemClock()
    began = clock.monotonic()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    executor = await open_executor(place, clock)
    try:
        with count_progress("verify, parts", lines=True) as tell:

            def report(outcome: Outcome, done: int, total: int) -> None:
                tell(f"part {outcome.key}: {duration_text(outcome.seconds)} on {outcome.worker}", done, total)

            found = await verify_parts(executor, settings, stop, budget=budget, report=report)
    finally:
        await executor.aclose()
    return _tell(settings, found, clock.monotonic() - began, clock.now())


def _tell(settings: Settings, found: VerifyReport, elapsed: float, now: int) -> int:
    """Print it; the exit code."""
    from cli.verify_document import report_document

    if settings.json:
        emit_json(report_document(found, elapsed, now))
    else:
        _print(found, elapsed, now)
    return DamagedStore.exit_code if found.damaged else 0


def _writable(directory: Path) -> Path | None:
    """The directory, made if need be; ``None``, said so, where this user may not write."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(0, "may not be written", str(directory))
    except OSError as error:
        note(
            f"warning: what was read is not remembered for the next run: {directory}: {error.strerror} (set TL_STATE)"
        )
        return None
    return directory


def _print(found: VerifyReport, elapsed: float, now: int) -> None:
    if found.damaged:
        say(f"DAMAGED: {found.problem_count} problem(s) in {found.store}")
        if found.unrestorable:
            say("cannot be restored:")
            for lost in found.unrestorable:
                say(f"  {_range_text(lost)}")
        elif found.log_number is not None:
            say("every moment can still be reached; the files below are damaged or a spare is lost")
        for problem in found.problems[:_SHOWN]:
            _print_problem(problem)
        if found.problem_count > _SHOWN:
            say(f"… and {found.problem_count - _SHOWN} more (--json names {len(found.problems)})")
        say("")
    else:
        say(f"intact: {found.store}")
    checked = found.checked
    say(
        f"structure  {checked.log_entries} log entries, {checked.manifests} manifests "
        f"({size_text(checked.manifest_bytes)}, {checked.page_rows:,} extents), {checked.snapshots} snapshots, "
        f"{checked.packs} packs ({size_text(checked.pack_bytes)}), {checked.chunks} chunks"
    )
    say(f"WAL        {size_text(checked.wal_bytes)}, {checked.sealed_ranges} sealed ranges")
    for have in found.restorable:
        say(f"reachable  {_range_text(have)}")
    for gap in found.gaps:
        say(f"gap        {_range_text(gap)}, as the log says: nothing in it can be restored")
    if found.data is not None:
        _print_data(found.data, elapsed, now)
    else:
        say("data       not read (--data)")
    for text in found.remarks:
        note(f"warning: {text}")


def _print_data(data: DataChecked, elapsed: float, now: int) -> None:
    from cli.verify_document import oldest_age

    say(
        f"data       {size_text(data.bytes)} read in {duration_text(elapsed)}: {data.packs} of {data.packs_total} packs, "
        f"{data.chunks} chunks, {data.pages:,} page checksums"
    )
    age = oldest_age(data, now)
    if data.never:
        say(f"           {data.never} packs were never read whole by this host; run it again to go on")
    elif age is not None:
        say(f"           no pack was last read longer than {duration_text(age)} ago")


def _print_problem(problem: Problem) -> None:
    say(f"- {problem.key}: at byte {problem.offset}: {problem.expected} ({problem.fault})")
    for hole in problem.holes[:_FILES_SHOWN]:
        say(f"    WAL      {_range_text(hole)}")
    if problem.snapshots:
        what = "unusable" if problem.snapshots_unusable else "blocks of"
        more = f" and {len(problem.snapshots) - 3} more" if len(problem.snapshots) > 3 else ""
        say(f"    {what:<8} {', '.join(problem.snapshots[:3])}{more}")
    for run in problem.files[:_FILES_SHOWN]:
        say(f"    file     {run.path}, blocks {run.first_block} to {run.first_block + run.blocks - 1}")
    if problem.file_runs > _FILES_SHOWN:
        say(f"             … {problem.file_runs} runs of blocks in all")


def _range_text(span: LsnRange) -> str:
    return f"tli {span.tli}, {span.start}..{span.end}"
