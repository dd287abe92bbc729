"""The soak: a daemon and all its jobs beside real servers, for minutes on end, while things break.

    python -m tests.soak.run --minutes 20 --seed 7

Prints a table on stderr and the report as JSON on stdout; exit code 1 when anything did not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from tests.soak.judgement import Check, check, checks_afterwards, checks_at_the_end, orphans_kept
from tests.soak.ledger import Ledger
from tests.soak.load import Bench, Scraper, Visit, Visitor
from tests.soak.memory import MemoryLine, MemorySampler, relatives_of
from tests.soak.place import CLUSTER, Place, soak_place
from tests.soak.plan import Event, SoakPlan
from tests.soak.requests import AGENT, LONG_MINUTES, MOST_OFF, Compared, compare
from tests.soak.watch import JobLine, JobWatch, SizeLine, StoreWatch
from tests.support.daemon_process import DaemonProcess, running_daemon
from tests.support.s3_proxy_state import Fault
from timeline.lsn import Lsn


@dataclass(slots=True)
class SoakReport:
    """What a soak found."""

    seed: int
    minutes: float
    load_seconds: float = 0.0
    daemon_seconds: float = 0.0
    """For so long the daemon was there."""
    events: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    memory: list[MemoryLine] = field(default_factory=list)
    jobs: list[JobLine] = field(default_factory=list)
    sizes: list[SizeLine] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    archiver_starts: int = 0
    requests: dict[str, dict[str, int]] = field(default_factory=dict)
    """By user agent, then by verb and place, until the daemon ended."""
    compared: list[Compared] = field(default_factory=list)
    """The archiver's requests, and what the cost model says of them."""

    @property
    def passed(self) -> bool:
        """Whether everything held."""
        return all(one.passed for one in self.checks) and bool(self.checks)

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"passed": self.passed, **asdict(self)})


def soak(plan: SoakPlan, say: Callable[[str], None] = lambda text: None) -> SoakReport:
    """Run it; what holds and what does not is in the report. Raises what keeps it from running at all."""
    report = SoakReport(plan.seed, plan.minutes)
    with soak_place(plan) as place:
        place.configure(drill_seconds=_drill_seconds(plan))
        with running_daemon(place.host, place.config) as daemon:
            try:
                _under_load(place, daemon, report, say)
            except BaseException:
                say("the daemon's log ends so:\n" + daemon.said()[-6000:])
                raise
    return report


def _drill_seconds(plan: SoakPlan) -> int:
    return 180 if plan.is_long else 60


def _under_load(place: Place, daemon: DaemonProcess, report: SoakReport, say: Callable[[str], None]) -> None:
    began = time.monotonic()
    plan = place.plan
    archiver = daemon.archiver
    begin = Lsn.parse(place.primary.position())
    daemon.wait_for(
        "the first WAL", lambda: (state := archiver(CLUSTER)) is not None and state.phase == "streaming", 120
    )
    daemon.wait_for("the base backup", lambda: "base backup done" in daemon.said(), 120)
    ledger = Ledger(place.conninfo)
    bench, scraper = Bench(place), Scraper(place.metrics_port)
    visitor = Visitor(place, ledger, plan.seed)
    jobs, store = JobWatch(daemon), StoreWatch(place)
    memory = MemorySampler(
        lambda: [daemon.process.pid, *daemon.relatives(), *relatives_of(place.desk.environment["TL_STATE"])]
    )
    workers: list[Ledger | Bench | Scraper | Visitor | JobWatch | StoreWatch | MemorySampler] = [
        ledger,
        bench,
        scraper,
        visitor,
        jobs,
        store,
        memory,
    ]
    for worker in workers:
        worker.start()
    load_began = time.monotonic()
    try:
        ledger.wait_for_more()
        for due in plan.schedule():
            time.sleep(max(0.0, load_began + due.at_seconds - time.monotonic()))
            happened = time.monotonic() - load_began
            if due.event is Event.STALL:
                visitor.stalled.set()
            told = _happen(due.event, place, daemon, ledger)
            report.events.append(f"{happened:6.1f} s  {due.event}{told}")
            say(report.events[-1])
            ledger.wait_for_more()
            visitor.stalled.clear()
            if due.event is Event.FAILOVER:
                kept = check(
                    "what the promoted server lacked is in the line that was left",
                    lambda: orphans_kept(place, ledger),
                )
                report.checks.append(kept)
        time.sleep(max(0.0, load_began + plan.seconds - time.monotonic()))
    finally:
        report.load_seconds = time.monotonic() - load_began
        for stoppable in (visitor, bench, scraper):
            with _told(report, f"{type(stoppable).__name__.lower()} at work to the end"):
                stoppable.stop()
        with _told(report, "the ledger's writer at work to the end"):
            ledger.stop()
        report.jobs = list(jobs.stop())
        report.sizes = list(store.stop())
        report.memory = list(memory.stop(slopes=plan.is_long))
        report.visits = visitor.visits
        report.archiver_starts = jobs.archiver_starts
    say("the load is over; checking")
    report.checks += checks_at_the_end(place, daemon)
    report.daemon_seconds = time.monotonic() - began
    report.requests = place.proxy.stats().by_agent
    end, sessions = (
        Lsn.parse(place.primary.position()),
        report.archiver_starts
        + sum(due.event in (Event.RESTART, Event.CRASH, Event.FAILOVER) for due in plan.schedule()),
    )
    report.compared = list(
        compare(report.requests, seconds=report.daemon_seconds, wal_bytes=end - begin, starts=sessions)
    )
    report.checks += [
        Check(
            f"the cost model's {one.verb}",
            one.off_by <= MOST_OFF,
            f"{one.counted:,} counted, {one.modelled:,.0f} modelled",
        )
        for one in report.compared
        if plan.minutes >= LONG_MINUTES
    ]
    report.checks += checks_afterwards(place, daemon, ledger, visitor, scraper, report.jobs, report.memory)


@contextlib.contextmanager
def _told(report: SoakReport, name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        cause = f": {error.__cause__}" if error.__cause__ is not None else ""
        report.checks.append(Check(name, False, f"{error}{cause}"))
    else:
        report.checks.append(Check(name, True, ""))


def _happen(event: Event, place: Place, daemon: DaemonProcess, ledger: Ledger) -> str:
    """Let it happen; what there is to say of it."""
    match event:
        case Event.RESTART | Event.CRASH:
            place.primary.stop("fast" if event is Event.RESTART else "immediate")
            place.primary.start()
        case Event.FAILOVER:
            fork = place.fail_over(ledger.wait_for_more)
            place.renew_standby()
            return f" at {fork}, and a new standby made"
        case Event.STALL:
            place.proxy.set_faults(Fault("stall"))
            time.sleep(place.plan.stall_seconds)
            place.proxy.set_faults()
            return f" for {place.plan.stall_seconds:g} s"
        case Event.KILL_ARCHIVER:
            state = daemon.archiver(CLUSTER)
            if state is None or state.pid is None:
                return ": there was none"
            os.kill(state.pid, signal.SIGKILL)
            return f" (pid {state.pid})"
        case Event.RELOAD:
            place.configure(
                drill_seconds=_drill_seconds(place.plan) + random.Random(time.monotonic()).randint(1, 9)
            )
            daemon.signal(signal.SIGHUP)
    return ""


def table(report: SoakReport) -> str:
    """For people."""
    lines = [f"soak of {report.minutes:g} minutes, seed {report.seed}", "", *report.events, ""]
    lines += [f"{'memory':10} {'processes':>9} {'peak MB':>8} {'ceiling':>8} {'MB/min':>7}"]
    lines += [
        f"{one.name:10} {one.processes:9} {one.peak_mb:8.0f} {one.ceiling_mb:8.0f} "
        + (f"{one.slope_mb_per_minute:7.2f}" if one.slope_mb_per_minute is not None else "      –")
        for one in report.memory
    ]
    lines += ["", f"{'job':12} {'runs':>5} {'exit codes':24}"]
    lines += [f"{one.name:12} {one.runs:5} {one.codes}" for one in report.jobs]
    good = [visit for visit in report.visits if not visit.problem]
    if good:
        seconds = sorted(visit.seconds for visit in good)
        lines += [
            "",
            f"{len(good)} branches, median {seconds[len(seconds) // 2]:.2f} s, longest {seconds[-1]:.2f} s",
        ]
    if report.sizes:
        lines += ["", f"{'seconds':>8} {'objects':>8} {'MB':>8}"]
        step = max(1, len(report.sizes) // 12)
        lines += [f"{one.seconds:8.0f} {one.objects:8} {one.megabytes:8.1f}" for one in report.sizes[::step]]
    lines += [""]
    for agent, counted in sorted(report.requests.items()):
        verbs: dict[str, int] = {}
        for name, count in counted.items():
            verbs[name.split()[0]] = verbs.get(name.split()[0], 0) + count
        lines.append(f"{agent:20} " + "  ".join(f"{verb} {count:,}" for verb, count in sorted(verbs.items())))
    kinds = sorted(report.requests.get(AGENT, {}).items())
    lines.append("of the archiver: " + ", ".join(f"{name} {count:,}" for name, count in kinds))
    lines += [
        "",
        *(f"{one.verb:5} counted {one.counted:,}, modelled {one.modelled:,.0f}" for one in report.compared),
    ]
    lines += ["", *(f"{'ok  ' if one.passed else 'FAIL'} {one.name}  {one.detail}" for one in report.checks)]
    return "\n".join(lines)


def main() -> None:
    """Entry point of `make soak`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    given = parser.parse_args()
    plan = SoakPlan(given.seed, given.minutes)
    print(f"seed {plan.seed}", file=sys.stderr, flush=True)
    report = soak(plan, lambda text: print(text, file=sys.stderr, flush=True))
    print(table(report), file=sys.stderr)
    print(report.to_json(), flush=True)
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
