"""``tl drill``: prove that recovery works, and keep the evidence."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.branch import local_zone, resolve_now
from cli.config import Settings, source_option, store_options
from cli.duration import Duration
from cli.output import duration_text, emit_json, iso, local_time, note, plain, say, table, warn
from timeline.errors import TimelineError, Unavailable, UsageError

if TYPE_CHECKING:
    from restore.drill import DrillRequest
    from restore.drill_files import PastDrills
    from restore.drill_workshop import Workshop
    from restore.host import Host
    from timeline.clock import Clock
    from timeline.format.evidence import Evidence

T = TypeVar("T")


class Objective(Duration):
    """A duration that may be zero: an RPO of zero is what a synchronous archiver promises."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        return 0.0 if str(value).strip() in ("0", "0s") else super().convert(value, param, ctx)


@click.command("drill")
@click.option("--at", "at", metavar="WHEN", help="As for `tl branch`.")
@click.option("--random", "at_random", is_flag=True, help="A random moment of the recoverable history.")
@click.option("--latest", is_flag=True, help="The newest moment in the store (the default).")
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=(1 << 63) - 1),
    metavar="N",
    help="Of --random: draw that moment again.",
)
@click.option("--tli", type=int, metavar="N", help="Look on the line that leads to this Postgres timeline.")
@click.option("--mode", type=click.Choice(["auto", "lazy", "copy"]), default="auto", show_default=True)
@click.option("--full", is_flag=True, help="Also make a complete copy, and let stock Postgres recover it.")
@click.option("--heapallindexed", "heap_all_indexed", is_flag=True, help="Look every row up in every B-tree.")
@click.option(
    "--sql",
    "sql",
    multiple=True,
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A statement that must give one row with true first; `-- database: NAME` in it says where.",
)
@click.option(
    "--assert",
    "statements",
    multiple=True,
    metavar="SQL",
    help="The same, as text (default: sql of tl.toml).",
)
@click.option(
    "--statement-timeout",
    type=Duration(),
    default="5m",
    show_default=True,
    metavar="DURATION",
    help="Of each --sql.",
)
@click.option(
    "--rto",
    type=Objective(),
    metavar="DURATION",
    help="Fail when the first query takes longer (default: tl.toml).",
)
@click.option(
    "--full-rto", type=Objective(), metavar="DURATION", help="Fail when the full copy takes longer."
)
@click.option(
    "--rpo",
    type=Objective(),
    metavar="DURATION",
    help="Fail when more than this would be lost (default: tl.toml).",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write the evidence to DIR/<id>/, too.",
)
@click.option("--history", is_flag=True, help="List past drills instead.")
@click.option(
    "--limit", type=click.IntRange(min=1, max=1000), default=20, show_default=True, help="Of --history."
)
@source_option
@store_options
def drill_command(
    *,
    settings: Settings,
    at: str | None,
    at_random: bool,
    latest: bool,
    seed: int | None,
    tli: int | None,
    mode: str,
    full: bool,
    heap_all_indexed: bool,
    sql: tuple[Path, ...],
    statements: tuple[str, ...],
    statement_timeout: float,
    rto: float | None,
    full_rto: float | None,
    rpo: float | None,
    output: Path | None,
    history: bool,
    limit: int,
) -> int:
    """Recover from the store alone, check what came back, measure, and leave nothing but the evidence.

    A throw-away branch answers its first query; then its catalogs, your own --sql assertions and pg_amcheck are
    looked at. The evidence (JSON, HTML, JUnit XML) is kept in the store under drills/, or in --output where the store
    may only be read. Production is asked for its position at most.

    \b
    Exit codes: 0 passed, 3 target unreachable, 4 store damaged, 6 a check failed or
    an objective was missed, 7 store or host did not answer.
    """
    if history:
        _show_history(settings, limit)
        return 0
    if sum((at is not None, at_random, latest)) > 1:
        raise UsageError("--at, --random and --latest exclude one another")
    if seed is not None and not at_random:
        raise UsageError("--seed belongs to --random")
    if full_rto is not None and not full:
        raise UsageError("--full-rto belongs to --full")
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make {output}: {error.strerror}") from error
    stop = _Stop()
    from timeline.clock import SystemClock

    asked = "random" if at_random else at or "latest"
    if asked.strip().lower() == "now":
        asyncio.run(stop.guard(resolve_now(settings)))
        asked = "latest"
    clock = SystemClock()
    began = clock.monotonic()
    from restore.agent_fork import prepare_libraries

    prepare_libraries()
    from importlib.metadata import version

    from restore.branch_request import StoreAddress
    from restore.drill import DrillRequest, Objectives
    from restore.drill_checks import read_assertion

    plan = settings.operations.drill
    request = DrillRequest(
        store=StoreAddress(settings.need_store(), settings.endpoint_url, settings.region),
        version=f"tl {version('timeline-postgres')}",
        host_name=socket.gethostname(),
        asked=asked,
        seed=seed,
        zone=local_zone(),
        tli=tli,
        mode=mode,
        full=full,
        heap_all_indexed=heap_all_indexed,
        assertions=(
            *(read_assertion(path.name, path.read_bytes()) for path in sql),
            *(
                read_assertion(f"assertion {number}", statement.encode())
                for number, statement in enumerate(statements or plan.sql, 1)
            ),
        ),
        statement_seconds=statement_timeout,
        source=settings.source,
        objectives=Objectives(
            _micros(rto if rto is not None else plan.rto_seconds),
            _micros(full_rto),
            _micros(rpo if rpo is not None else plan.rpo_seconds),
        ),
    )
    evidence, problems = _drill(request, stop, clock, began, os.environ)
    written = asyncio.run(stop.guard(_keep(settings, evidence, output)))
    if settings.json:
        emit_json(_document(evidence) | {"written": written})
    else:
        _print(evidence, written)
    if evidence.exit_code:
        note(f"tl: the drill did not pass: {evidence.message}")
    for problem in problems:
        note(f"tl: not all of the drill could be cleared up: {problem.message}")
    return evidence.exit_code or bool(problems)


def _drill(
    request: DrillRequest, stop: _Stop, clock: Clock, began: float, environ: Mapping[str, str]
) -> tuple[Evidence, list[TimelineError]]:
    """The drill, in a workshop that is gone when this returns or raises; and what could not be cleared up."""
    from restore.agent_fork import fork_agent
    from restore.drill import run_drill
    from restore.drill_workshop import open_workshop
    from restore.host import find_host

    host = find_host(environ)
    stop.put_off()
    workshop = open_workshop(host, clock, environ)
    problems: list[TimelineError] = []
    try:
        stop.listen()
        if request.mode != "copy":
            fork_agent(workshop.environ, request.store.url)
        drilling = run_drill(
            request, workshop, clock, began=began, report=lambda text: note(f"drill: {text}")
        )
        evidence = asyncio.run(stop.guard(drilling))
    finally:
        stop.put_off()
        problems += asyncio.run(_clear(workshop, host, clock, environ))
        if sys.exc_info()[0] is not None:
            warn(problem.message for problem in problems)
    stop.listen()
    return evidence, problems


async def _clear(
    workshop: Workshop, host: Host, clock: Clock, environ: Mapping[str, str]
) -> list[TimelineError]:
    """Clear up after this drill, and after those that were killed; what stood in the way."""
    from restore.drill_workshop import clear, debris

    problems = []
    for place in itertools.chain([workshop], debris(host, environ)):
        try:
            await clear(place, clock)
        except TimelineError as error:
            problems.append(error)
    return problems


class _Stop:
    """SIGTERM and SIGINT: end the work, but let the clearing up finish. For the main thread."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._putting_off = False
        self._asked = False
        # Not the loop's own handlers: they go with the loop, and then a second signal would kill us.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def put_off(self) -> None:
        """From now on a signal is only remembered."""
        self._putting_off = True

    def listen(self) -> None:
        """A signal stops the work again; raises Unavailable for one that came meanwhile."""
        self._putting_off = False
        if self._asked:
            raise _stopped()

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it; raises Unavailable when a signal ended it."""
        task = self._task = asyncio.ensure_future(work)
        try:
            result: T = await task
        except asyncio.CancelledError:
            raise _stopped() from None
        finally:
            self._task = None
        return result

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._putting_off or self._asked:
            self._asked = True
            return
        self._asked = True
        if self._task is None:
            raise _stopped()
        self._task.get_loop().call_soon_threadsafe(self._task.cancel)


def _stopped() -> Unavailable:
    return Unavailable("the drill was stopped", hint="nothing of it was kept")


async def _keep(settings: Settings, evidence: Evidence, output: Path | None) -> dict[str, str | None]:
    """Write the evidence to the store, and to a directory when asked or when the store cannot be written."""
    from restore.drill_files import evidence_files, past_drills, save_evidence, store_evidence
    from restore.drill_page import PAST_DRILLS
    from restore.host import find_host
    from timeline.clock import SystemClock
    from timeline.store.open import open_store

    store = await open_store(
        settings.need_store(), endpoint_url=settings.endpoint_url, region=settings.region, clock=SystemClock()
    )
    key: str | None = None
    try:
        past: tuple[Evidence, ...] = ()
        try:
            found = await past_drills(store, limit=PAST_DRILLS)
            past = found.drills
            warn(found.warnings)
        except TimelineError as error:
            warn([f"the page shows no earlier drills: {error.message}"])
        files = evidence_files(evidence, past)
        try:
            key = await store_evidence(store, evidence, files)
        except TimelineError as error:
            warn([f"the evidence could not be written to the store: {error.message}"])
    finally:
        await store.aclose()
    place = output
    if place is None and key is None:
        place = find_host(os.environ).state / "drills"
    directory = None if place is None else str(await asyncio.to_thread(save_evidence, place, evidence, files))
    return {"store": key, "directory": directory}


def _show_history(settings: Settings, limit: int) -> None:
    found = asyncio.run(_past(settings, limit))
    warn(found.warnings)
    if settings.json:
        emit_json([_summary(drill) for drill in found.drills])
        return
    if not found.drills:
        say("no drills in this store; make one with `tl drill`")
        return
    table(
        ("began", "asked for", "recovered to", "result", "RTO", "full copy", "RPO", "failed checks"),
        (
            (
                local_time(drill.started),
                drill.asked,
                str(drill.target.lsn) if drill.target is not None else "-",
                drill.result,
                _span(drill.recovery_time.first_query_micros),
                _span(drill.recovery_time.full_micros),
                _span(drill.recovery_point.rpo_micros if drill.recovery_point is not None else None),
                ", ".join(_failed(drill)) or "-",
            )
            for drill in found.drills
        ),
    )


async def _past(settings: Settings, limit: int) -> PastDrills:
    from restore.drill_files import past_drills
    from timeline.catalog.meta import read_meta
    from timeline.clock import SystemClock
    from timeline.store.open import open_store

    store = await open_store(
        settings.need_store(), endpoint_url=settings.endpoint_url, region=settings.region, clock=SystemClock()
    )
    try:
        await read_meta(store)
        return await past_drills(store, limit=limit)
    finally:
        await store.aclose()


def _summary(evidence: Evidence) -> dict[str, Any]:
    """One drill of the history."""
    target = evidence.target
    return {
        "id": evidence.id,
        "started": iso(evidence.started),
        "asked": evidence.asked,
        "lsn": str(target.lsn) if target is not None else None,
        "time": iso(target.time) if target is not None else None,
        "result": evidence.result,
        "exit_code": evidence.exit_code,
        "message": evidence.message,
        **_measures(evidence),
        "failed_checks": _failed(evidence),
    }


def _document(evidence: Evidence) -> dict[str, Any]:
    """The evidence as it is stored, and its figures in seconds."""
    document: dict[str, Any] = plain(evidence)
    return document | _measures(evidence)


def _measures(evidence: Evidence) -> dict[str, Any]:
    point = evidence.recovery_point
    return {
        "rto_seconds": _of_micros(evidence.recovery_time.first_query_micros),
        "full_rto_seconds": _of_micros(evidence.recovery_time.full_micros),
        "rpo_seconds": _of_micros(point.rpo_micros) if point is not None else None,
        "rpo_bytes": point.rpo_bytes if point is not None else None,
        "rpo_method": point.method if point is not None else None,
    }


def _print(evidence: Evidence, written: Mapping[str, str | None]) -> None:
    """The drill for people."""
    warn(evidence.warnings)
    point, target = evidence.recovery_point, evidence.target
    say(f"drill      {evidence.result}: {evidence.message}")
    if target is not None:
        drawn = f" (random, seed {evidence.seed})" if evidence.seed is not None else ""
        say(f"target     {target.lsn}{f', {local_time(target.time)}' if target.time else ''}{drawn}")
    say(
        f"RTO        {_span(evidence.recovery_time.first_query_micros)} to the first query ({evidence.recovery_time.mode})"
    )
    if evidence.recovery_time.full_micros is not None:
        say(f"           {_span(evidence.recovery_time.full_micros)} to a full copy under stock Postgres")
    if point is not None:
        lost = f", {point.rpo_bytes} bytes of WAL" if point.rpo_bytes is not None else ""
        say(f"RPO        {_span(point.rpo_micros)}{lost}: {point.method}")
    counts = [f"{len(evidence.checks_with(kind))} {kind}" for kind in ("passed", "failed", "skipped")]
    say(f"checks     {', '.join(counts)}")
    for check in evidence.checks:
        if check.outcome != "passed":
            where = f" [{check.database}]" if check.database is not None else ""
            say(f"  {check.outcome:8} {check.group}: {check.name}{where}: {check.message}")
    for damage in evidence.damages:
        end = f" to {damage.offset + damage.length}" if damage.length is not None else ""
        say(
            f"damaged    {damage.key}, bytes {damage.offset}{end}: {'; '.join([damage.expectation, *damage.holds])}"
        )
    for name, place in written.items():
        if place is not None:
            say(f"evidence   {name}: {place}")


def _failed(evidence: Evidence) -> list[str]:
    """Names of the checks that failed."""
    return [
        f"{check.name} [{check.database}]" if check.database is not None else check.name
        for check in evidence.checks_with("failed")
    ]


def _span(micros: int | None) -> str:
    return "not measured" if micros is None else duration_text(micros / 1e6)


def _of_micros(micros: int | None) -> float | None:
    return None if micros is None else micros / 1e6


def _micros(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1_000_000)
