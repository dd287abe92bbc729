"""One store verified in parts by an executor: as many parts as it runs at once, and one report of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from cli.config import Settings
from cli.executor import STOPPED, Executor, Outcome, Task
from cli.verify_document import read_report
from timeline.errors import DamagedStore, TimelineError, Unavailable, UsageError
from timeline.maintain.verify_merge import merge_reports
from timeline.maintain.verify_part import MAX_PARTS, Part
from timeline.maintain.verify_report import VerifyReport

_SECONDS = 7 * 86_400.0
"""For one part: a bound, not a plan."""


async def verify_parts(
    executor: Executor,
    settings: Settings,
    stop: asyncio.Event,
    *,
    budget: int | None,
    report: Callable[[Outcome, int, int], None] = lambda outcome, done, total: None,
) -> VerifyReport:
    """Read all of the store, or about ``budget`` bytes of it; ``report``: a part is done, so many of so many are.

    Damage is in the report. Raises what a part failed with where it has no report: without it nothing is known of the
    whole.
    """
    parts = [Part(number + 1, of) for of in (min(MAX_PARTS, await executor.width()),) for number in range(of)]
    tasks = [
        part_task(settings, part, None if budget is None else max(1, budget // part.of)) for part in parts
    ]
    found: dict[str, VerifyReport] = {}
    async with aclosing(executor.outcomes(tasks, stop)) as outcomes:
        async for outcome in outcomes:
            found[outcome.key] = _report(outcome)
            report(outcome, len(found), len(tasks))
    return merge_reports([found[task.key] for task in tasks])


def part_task(settings: Settings, part: Part, budget: int | None) -> Task:
    """``tl verify`` of one part."""
    argv = ["verify", "--data", "--part", str(part), "--json", "--store", settings.need_store()]
    argv += ["--endpoint-url", settings.endpoint_url] if settings.endpoint_url is not None else []
    argv += ["--region", settings.region] if settings.region is not None else []
    argv += ["--budget", str(budget)] if budget is not None else []
    return Task(f"{part.number}-of-{part.of}", tuple(argv), _SECONDS)


def _report(outcome: Outcome) -> VerifyReport:
    if outcome.exit_code in (0, DamagedStore.exit_code) and outcome.document is not None:
        try:
            return read_report(outcome.document)
        except ValueError as error:
            raise TimelineError(f"part {outcome.key} on {outcome.worker}: {error}") from error
    message = (
        f"part {outcome.key} on {outcome.worker} was not verified: {outcome.message or 'it said nothing'}"
    )
    if outcome.exit_code == STOPPED:
        raise Unavailable(message, hint="run it again: nothing was changed")
    if outcome.exit_code == UsageError.exit_code:
        raise UsageError(message)
    raise TimelineError(message)
