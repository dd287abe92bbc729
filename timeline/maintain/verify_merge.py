"""One report from those of the parts of a store. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from timeline.lsn import Lsn
from timeline.maintain.lost_ranges import merged
from timeline.maintain.verify_report import MAX_PROBLEMS, DataChecked, LsnRange, VerifyReport


def merge_reports(reports: Sequence[VerifyReport]) -> VerifyReport:
    """What one run over all parts would have said; ``reports``: one of each part, the first part's first.

    Each part looked at the whole structure, so what is wrong there is in all of them, and counts once. A moment can
    be had if it can in every part's view: that depends on the newest usable snapshot before it, which all parts agree
    on, and on holes in the WAL after that, each of which some part found. Where a part had more problems than it
    named, the count is the least there can be.
    """
    first = reports[0]
    problems = tuple(dict.fromkeys(problem for report in reports for problem in report.problems))
    data = [report.data for report in reports if report.data is not None]
    restorable = first.restorable
    for report in reports[1:]:
        restorable = _common(restorable, report.restorable)
    numbers = [report.log_number for report in reports]
    known = [number for number in numbers if number is not None]
    return VerifyReport(
        store=first.store,
        store_id=first.store_id,
        branch=first.branch,
        log_number=min(known) if len(known) == len(numbers) else None,
        checked=first.checked,
        data=_summed(data) if len(data) == len(reports) else None,
        problems=problems[:MAX_PROBLEMS],
        problem_count=max(len(problems), *(report.problem_count for report in reports)),
        unrestorable=_joined(lost for report in reports for lost in report.unrestorable),
        restorable=restorable,
        gaps=first.gaps,
        remarks=tuple(dict.fromkeys(text for report in reports for text in report.remarks)),
    )


def _summed(parts: Sequence[DataChecked]) -> DataChecked:
    never = sum(part.never for part in parts)
    oldest = [part.oldest for part in parts if part.oldest is not None]
    return DataChecked(
        packs=sum(part.packs for part in parts),
        chunks=sum(part.chunks for part in parts),
        bytes=sum(part.bytes for part in parts),
        pages=sum(part.pages for part in parts),
        packs_total=sum(part.packs_total for part in parts),
        bytes_total=sum(part.bytes_total for part in parts),
        never=never,
        oldest=None if never else min(oldest, default=None),
        complete=all(part.complete for part in parts),
    )


def _common(some: Iterable[LsnRange], others: Sequence[LsnRange]) -> tuple[LsnRange, ...]:
    """The moments that are in both."""
    return tuple(
        LsnRange(one.tli, Lsn(max(one.start, other.start)), Lsn(min(one.end, other.end)))
        for one in some
        for other in others
        if one.tli == other.tli and max(one.start, other.start) < min(one.end, other.end)
    )


def _joined(ranges: Iterable[LsnRange]) -> tuple[LsnRange, ...]:
    """The moments that are in any, each once."""
    found = list(ranges)
    return tuple(
        LsnRange(tli, Lsn(start), Lsn(end))
        for tli in sorted({each.tli for each in found})
        for start, end in merged((each.start, each.end) for each in found if each.tli == tli)
    )
