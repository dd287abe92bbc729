"""A recovery drill: from the store alone to evidence that recovery works, or to the reason why not.

Stages: resolve the target; a branch in the drill's own workshop; its first answer (the recovery time); the
recovery point against the source; whether the archived WAL hangs together; catalogs; the user's assertions;
pg_amcheck; and with ``full`` a complete copy under stock Postgres. A stage that fails is recorded, and those that
do not need it go on.

Needs read and list permission on the store only (P10), no root, no route to the source. Whoever calls opens and
clears the workshop. Bounds: DRILL_SECONDS for all of it, the stages' own below and in their modules.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, tzinfo
from pathlib import Path

from restore.binaries import Binaries
from restore.branch import HostBranches
from restore.branch_request import AUTO, BranchRequest, StoreAddress
from restore.damage_place import describe_damage, undescribed
from restore.drill_amcheck import amcheck_program, check_database, skipped
from restore.drill_checks import Assertion, Counted, Database, SqlChecks
from restore.drill_full import check_full_room, full_copy
from restore.drill_point import measure_point
from restore.drill_workshop import LIFE_SECONDS, Workshop
from restore.isolation import Endpoint
from restore.lazy_data import mount_stats
from restore.local_branch import LAZY
from restore.metered_store import MeteredStore
from restore.mount_damage import met_damage
from timeline.catalog.history import History
from timeline.catalog.line import incarnation_at
from timeline.catalog.partial import describe_missing
from timeline.catalog.target import Target
from timeline.catalog.when import AtLsn, When, parse_when
from timeline.clock import Clock
from timeline.errors import DamagedStore, TargetUnreachable, TimelineError, Unavailable, UsageError
from timeline.format import keys
from timeline.format.evidence import (
    DAMAGED,
    FAILED,
    MAX_CHECKS,
    MAX_DAMAGES,
    MAX_FINDINGS,
    PASSED,
    SKIPPED,
    UNAVAILABLE,
    UNREACHABLE,
    Check,
    Damage,
    DrillTarget,
    Evidence,
    RecoveryPoint,
    RecoveryTime,
    Step,
    drill_id,
)
from timeline.lsn import Lsn
from timeline.store.open import open_store

DRILL_SECONDS = 24 * 3600.0
STATEMENT_SECONDS = 300.0
"""For one assertion, unless asked otherwise."""
HOLE_SECONDS = 10.0
"""How long an upload under way may leave a hole in the chain of chunks."""
MAX_WARNINGS = 100
RANDOM = "random"
_POLL_SECONDS = 0.5
_NAME = "drill"
_EXIT_CODES = {PASSED: 0, UNREACHABLE: 3, DAMAGED: 4, FAILED: 6, UNAVAILABLE: 7}


@dataclass(frozen=True, slots=True)
class Objectives:
    """What recovery must achieve, in microseconds; ``None``: nothing is asked."""

    first_query_micros: int | None = None
    full_micros: int | None = None
    point_micros: int | None = None


@dataclass(frozen=True, slots=True)
class DrillRequest:
    """One drill."""

    store: StoreAddress
    version: str
    """Of this program, for the evidence."""
    host_name: str
    asked: str = "latest"
    """A WHEN, or ``random``."""
    seed: int | None = None
    """For ``random``; drawn when ``None``."""
    zone: tzinfo = UTC
    tli: int | None = None
    mode: str = AUTO
    full: bool = False
    heap_all_indexed: bool = False
    assertions: tuple[Assertion, ...] = ()
    statement_seconds: float = STATEMENT_SECONDS
    source: str | None = None
    """Conninfo, for the recovery point."""
    objectives: Objectives = Objectives()


@dataclass(frozen=True, slots=True)
class _Recovered:
    """The branch, running."""

    directory: Path
    mode: str
    endpoint: Endpoint
    binaries: Binaries


async def run_drill(
    request: DrillRequest,
    workshop: Workshop,
    clock: Clock,
    *,
    began: float | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Evidence:
    """The evidence, whatever came out. ``began``: when the drill started, by ``clock.monotonic``.

    Raises UsageError for what is wrong with the request or this host (no such store, no binaries, no room for a
    full copy, with the numbers).
    """
    address = request.store
    store = MeteredStore(
        await open_store(address.url, endpoint_url=address.endpoint_url, region=address.region, clock=clock)
    )
    return await _Drill(request, store, workshop, clock, began, report).run()


class _Drill:
    """One run."""

    def __init__(
        self,
        request: DrillRequest,
        store: MeteredStore,
        workshop: Workshop,
        clock: Clock,
        began: float | None,
        report: Callable[[str], None],
    ) -> None:
        self._request = request
        self._store = store
        self._workshop = workshop
        self._clock = clock
        self._report = report
        self._began = clock.monotonic() if began is None else began
        self._started = clock.now() - int((clock.monotonic() - self._began) * 1e6)
        self._id = drill_id(self._started, clock.token(4))
        self._branches = HostBranches(workshop.host, clock, workshop.environ)
        self._history: History | None = None
        self._target: Target | None = None
        self._seed: int | None = None
        self._recovered: _Recovered | None = None
        self._mode: str | None = None
        self._maker_traffic = (0, 0)
        self._full_traffic = (0, 0)
        self._version: str | None = None
        self._first_query: int | None = None
        self._full: int | None = None
        self._counted: tuple[Counted, ...] | None = None
        self._databases: tuple[Database, ...] = ()
        self._point: RecoveryPoint | None = None
        self._steps: list[Step] = []
        self._checks: list[Check] = []
        self._damages: list[DamagedStore] = []
        self._described: tuple[Damage, ...] = ()
        self._failures: list[TimelineError] = []
        self._warnings: list[str] = []

    async def run(self) -> Evidence:
        """All of it; closes the store."""
        try:
            try:
                async with asyncio.timeout(DRILL_SECONDS):
                    await self._stages()
            except TimeoutError:
                self._failures.append(TimelineError(f"the drill was not over within {DRILL_SECONDS:.0f} s"))
            self._judge_objectives()
            self._described = await self._describe()
        finally:
            await self._store.aclose()
        return self._evidence()

    async def _stages(self) -> None:
        request = self._request
        # What the program itself took until here: imports, the workshop, its agent.
        self._steps.append(Step("start", 0, int((self._clock.monotonic() - self._began) * 1e6), 0, 0, PASSED))
        if not await self._stage("resolve the target", self._resolve):
            return
        alive = await self._stage("make the branch", self._make_branch)
        alive = alive and await self._stage("first query", self._ask_first)
        await self._stage("recovery point", self._measure_point)
        await self._stage("archived WAL", self._check_chain)
        if alive:
            await self._stage("catalogs", self._check_catalogs)
            if request.assertions:
                await self._stage("assertions", self._check_assertions)
            await self._stage("amcheck", self._check_heaps)
        if self._recovered is not None:
            await self._stage("remove the branch", self._remove_branch)
        if request.full:
            await self._stage("full copy", self._make_full)

    async def _stage(self, name: str, work: Callable[[], Awaitable[None]]) -> bool:
        """Run it as one step; whether it could be carried out."""
        self._report(name)
        began, (requests, fetched) = self._clock.monotonic(), self._traffic()
        failed_before = sum(check.outcome == FAILED for check in self._checks)
        outcome, message = PASSED, ""
        try:
            await work()
        except UsageError:
            raise
        except DamagedStore as error:
            self._damages.append(error)
            outcome, message = DAMAGED, error.message
        except TimelineError as error:
            self._failures.append(error)
            outcome, message = FAILED, error.message
        self._meet_damage()
        went_well = outcome == PASSED
        if went_well and sum(check.outcome == FAILED for check in self._checks) > failed_before:
            outcome = FAILED
        after, fetched_after = self._traffic()
        self._steps.append(
            Step(
                name,
                int((began - self._began) * 1e6),
                int((self._clock.monotonic() - began) * 1e6),
                max(0, after - requests),
                max(0, fetched_after - fetched),
                outcome,
                message,
            )
        )
        return went_well

    # The stages.

    async def _resolve(self) -> None:
        history = self._history = await History.load(self._store)
        when = await self._when(history)
        self._target = await history.resolve(when, tli=self._request.tli)
        if self._request.full:
            await check_full_room(history, self._target, self._workshop)

    async def _when(self, history: History) -> When:
        asked = self._request.asked
        if asked != RANDOM:
            relative = asked.strip().lower().endswith("ago")
            return parse_when(asked, self._request.zone, await history.source_clock() if relative else None)
        tli = history.state.current_tli if self._request.tli is None else self._request.tli
        ranges = [each for each in await history.reachable() if each.tli == tli and not each.abandoned]
        if not ranges:
            raise TargetUnreachable("nothing can be recovered from the store yet", hint="see `tl status`")
        seed = self._request.seed
        self._seed = int(self._clock.token(7), 16) if seed is None else seed
        at = random.Random(self._seed).randrange(sum(each.last - each.first + 1 for each in ranges))
        for each in ranges:
            if at <= each.last - each.first:
                return AtLsn(Lsn(each.first + at))
            at -= each.last - each.first + 1
        raise AssertionError("unreachable")

    async def _make_branch(self) -> None:
        target = self._need_target()
        made = await self._branches.create(
            BranchRequest(
                store=self._request.store,
                name=_NAME,
                when=AtLsn(target.lsn),
                tli=target.tli,
                ttl_seconds=LIFE_SECONDS,
                mode=self._request.mode,
            )
        )
        branch = self._branches.registry.get(_NAME)
        server = branch.server
        if server is None:
            raise TimelineError("the drill's branch has no server")
        self._mode = branch.mode
        self._recovered = _Recovered(
            directory=self._branches.registry.directory(branch.id),
            mode=branch.mode,
            endpoint=Endpoint(server.sockets, server.port, server.superuser),
            binaries=Binaries(server.major, Path(server.bin_directory)),
        )
        self._warn(*made.warnings)
        mounted = self._mount_traffic()
        self._maker_traffic = (
            max(0, made.requests - mounted[0]),
            max(0, made.fetched_bytes - mounted[1]),
        )

    async def _ask_first(self) -> None:
        self._version = await self._sql().first_query()
        self._first_query = int((self._clock.monotonic() - self._began) * 1e6)

    async def _measure_point(self) -> None:
        self._point, warnings = await measure_point(
            self._store,
            self._request.source,
            self._clock,
            objective_micros=self._request.objectives.point_micros,
        )
        self._warn(*warnings)

    async def _check_chain(self) -> None:
        """Whether a chunk is missing below later ones: what lies beyond cannot be recovered (EDGE 63)."""
        began = self._clock.monotonic()
        while True:
            history = await History.load(self._store)
            state = history.state
            tail = await history.tail(state.current_tli)
            if not tail.detached or self._clock.monotonic() - began >= HOLE_SECONDS:
                break
            await self._clock.sleep(_POLL_SECONDS)
        gaps = [f"gap on tli {gap.tli} from {gap.start} to {gap.end}: {gap.reason}" for gap in state.gaps]
        if tail.detached:
            missing = keys.chunk(state.branch, tail.tli, tail.end)
            outcome = FAILED
            message = (
                f"{missing} is missing: the store does not hold WAL of tli {tail.tli} from {tail.end} to "
                f"{tail.detached[0]}, and {len(tail.detached)} later chunks cannot be reached (an object was lost, "
                "or an archiver was stopped between two uploads and has not come back)"
            )
        else:
            outcome = PASSED
            message = f"WAL of tli {tail.tli} hangs together up to {tail.end}; {len(gaps)} recorded gaps"
        elapsed = int((self._clock.monotonic() - began) * 1e6)
        if self._request.asked == RANDOM and (lost := self._need_history().missing):
            # Any moment must do, and some do not. (Who names a moment of an incomplete copy knows of it.)
            self._add(Check("history", "nothing is missing", None, FAILED, describe_missing(lost), 0))
        self._add(
            Check(
                "history",
                "chain of chunks",
                None,
                outcome,
                message,
                elapsed,
                tuple(gaps[:MAX_FINDINGS]),
                len(gaps),
            )
        )

    async def _check_catalogs(self) -> None:
        sql = self._sql()
        self._databases = await sql.databases()
        self._add(*await sql.server())
        for database in self._databases:
            self._add(*await sql.database(database))
        if self._request.full:
            self._counted = await sql.count(self._databases)

    async def _check_assertions(self) -> None:
        sql = self._sql()
        for assertion in self._request.assertions:
            self._add(await sql.assertion(assertion, timeout_seconds=self._request.statement_seconds))

    async def _check_heaps(self) -> None:
        server = self._need_server()
        reason = None
        if amcheck_program(server.binaries) is None:
            reason = f"there is no pg_amcheck in {server.binaries.directory}"
        elif not await self._sql().has_amcheck():
            reason = "the extension amcheck is not installed on this host (package postgresql-contrib)"
        for database in self._databases:
            if reason is not None:
                self._add(skipped(database, reason))
                continue
            self._add(
                await check_database(
                    database,
                    server.endpoint,
                    server.binaries,
                    self._clock,
                    heap_all_indexed=self._request.heap_all_indexed,
                )
            )

    async def _remove_branch(self) -> None:
        # What the mount fetched counts on after it is gone.
        requests, fetched = self._mount_traffic()
        self._maker_traffic = (self._maker_traffic[0] + requests, self._maker_traffic[1] + fetched)
        self._recovered = None
        await self._branches.delete(_NAME)

    async def _make_full(self) -> None:
        target, history = self._need_target(), self._need_history()
        began = self._clock.monotonic()
        copy = await full_copy(
            self._request.store,
            target,
            incarnation_at(history.state, target.lsn),
            self._workshop,
            self._clock,
        )
        self._full = copy.first_query_micros
        self._full_traffic = (copy.requests, copy.fetched_bytes)
        elapsed = int((self._clock.monotonic() - began) * 1e6)
        self._warn(*copy.warnings)
        total = sum(each.relations for each in copy.counted)
        told = f"{len(copy.counted)} databases with {total} relations, {copy.replayed_bytes} bytes of WAL replayed"
        if self._counted is None:
            outcome, message = SKIPPED, f"{told}; there was no branch to compare with"
        elif self._counted != copy.counted:
            outcome, message = FAILED, f"{told}, and the branch holds something else: {self._counted}"
        else:
            outcome, message = PASSED, f"{told}, as on the branch"
        self._add(Check("full", "same relations as the branch", None, outcome, message, elapsed))

    # What came out.

    def _judge_objectives(self) -> None:
        wanted = self._request.objectives
        point = self._point.rpo_micros if self._point is not None else None
        for name, objective, found in (
            ("RTO, first query", wanted.first_query_micros, self._first_query),
            ("RTO, full copy", wanted.full_micros if self._request.full else None, self._full),
            ("RPO", wanted.point_micros, point),
        ):
            if objective is None:
                continue
            if found is None:
                outcome, message = FAILED, f"not measured; the objective is {objective / 1e6:g} s"
            else:
                outcome = PASSED if found <= objective else FAILED
                message = f"{found / 1e6:.3f} s; the objective is {objective / 1e6:g} s"
            self._add(Check("objective", name, None, outcome, message, 0))

    def _meet_damage(self) -> None:
        """What the mount met behind Postgres's back."""
        if self._recovered is None:
            return
        known = {(error.key, error.offset) for error in self._damages}
        met = met_damage(self._recovered.directory / "mount.log")
        self._damages += [error for error in met if (error.key, error.offset) not in known]

    async def _describe(self) -> tuple[Damage, ...]:
        described = []
        for error in self._damages[:MAX_DAMAGES]:
            if self._history is None or self._target is None:
                described.append(undescribed(error))
                continue
            try:
                described.append(await describe_damage(error, self._history, self._target))
            except TimelineError as more:
                self._warn(f"what {error.key} holds was not found out: {more.message}")
                described.append(undescribed(error))
        return tuple(described)

    def _result(self) -> tuple[str, str]:
        """The result, and one line that says why."""
        if self._described:
            damage = self._described[0]
            end = f" to {damage.offset + damage.length}" if damage.length is not None else ""
            return DAMAGED, f"{damage.key}: bytes {damage.offset}{end}: {damage.expectation}"
        for error in self._failures:
            if isinstance(error, TargetUnreachable):
                return UNREACHABLE, error.message
        for check in self._checks:
            if check.outcome == FAILED:
                where = f" in database {check.database}" if check.database is not None else ""
                return FAILED, f"{check.group} {check.name}{where}: {check.message}"
        for error in self._failures:
            if not isinstance(error, Unavailable):
                return FAILED, error.message
        for error in self._failures:
            return UNAVAILABLE, error.message
        passed = sum(check.outcome == PASSED for check in self._checks)
        return PASSED, f"recovery works: {passed} checks passed, {len(self._checks) - passed} could not run"

    def _evidence(self) -> Evidence:
        result, message = self._result()
        request, target = self._request, self._target
        wanted = request.objectives
        return Evidence(
            id=self._id,
            store_id=self._history.meta.store_id if self._history is not None else None,
            store_url=self._store.url,
            version=request.version,
            host=request.host_name,
            account=pwd.getpwuid(os.geteuid()).pw_name,
            started=self._started,
            finished=self._clock.now(),
            seed=self._seed,
            asked=request.asked,
            target=None
            if target is None
            else DrillTarget(
                asked=request.asked,
                tli=target.tli,
                lsn=target.lsn,
                time=target.time,
                last_commit_time=target.last_commit.time if target.last_commit is not None else None,
                snapshot_id=target.snapshot.id,
                snapshot_lsn=target.snapshot.lsn,
                replayed_bytes=sum(span.end - span.start for span in target.spans),
            ),
            server_version=self._version,
            result=result,
            exit_code=_EXIT_CODES[result],
            message=message,
            recovery_time=RecoveryTime(
                first_query_micros=self._first_query,
                mode=self._mode,
                full_micros=self._full,
                objective_micros=wanted.first_query_micros,
                full_objective_micros=wanted.full_micros,
            ),
            recovery_point=self._point,
            steps=tuple(self._steps),
            checks=tuple(self._checks),
            damages=self._described,
            warnings=tuple(self._warnings[:MAX_WARNINGS]),
        )

    # Small things.

    def _add(self, *checks: Check) -> None:
        if len(self._checks) + len(checks) > MAX_CHECKS:
            raise TimelineError(f"more than {MAX_CHECKS} checks: too many databases for one drill")
        self._checks += checks

    def _warn(self, *warnings: str) -> None:
        self._warnings += warnings

    def _traffic(self) -> tuple[int, int]:
        """Requests to the store so far, and bytes that came."""
        store = self._store
        parts = (
            (store.requests, store.fetched_bytes),
            self._maker_traffic,
            self._mount_traffic(),
            self._full_traffic,
        )
        return sum(part[0] for part in parts), sum(part[1] for part in parts)

    def _mount_traffic(self) -> tuple[int, int]:
        if self._recovered is None or self._recovered.mode != LAZY:
            return 0, 0
        stats = mount_stats(self._recovered.directory)
        return (stats.requests, stats.fetched_bytes) if stats is not None else (0, 0)

    def _sql(self) -> SqlChecks:
        server = self._need_server()
        return SqlChecks(server.endpoint, server.binaries.major, self._clock)

    def _need_server(self) -> _Recovered:
        if self._recovered is None:
            raise RuntimeError("the branch is not there")
        return self._recovered

    def _need_target(self) -> Target:
        if self._target is None:
            raise RuntimeError("the target is not resolved yet")
        return self._target

    def _need_history(self) -> History:
        if self._history is None:
            raise RuntimeError("the history is not loaded yet")
        return self._history
