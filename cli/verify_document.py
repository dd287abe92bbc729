"""What a verification found ↔ the JSON document that ``tl verify --json`` prints. Pure."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from cli.output import iso, plain
from timeline.clock import Micros
from timeline.lsn import Lsn
from timeline.maintain.verify_report import (
    BlockRun,
    Checked,
    DataChecked,
    Fault,
    LsnRange,
    Problem,
    VerifyReport,
)


def report_document(found: VerifyReport, elapsed: float, now: Micros) -> dict[str, Any]:
    """As JSON has it; ``elapsed`` in seconds, ``now`` by this host's clock."""
    document: dict[str, Any] = plain(found)
    document["damaged"] = found.damaged
    document["elapsed_seconds"] = elapsed
    for problem, item in zip(found.problems, document["problems"], strict=True):
        item["fault"] = str(problem.fault)
    if found.data is not None:
        document["data"]["oldest"] = iso(found.data.oldest)
        document["data"]["oldest_age_seconds"] = oldest_age(found.data, now)
    return document


def oldest_age(data: DataChecked, now: Micros) -> float | None:
    """Seconds since the pack not read for longest was read."""
    return None if data.oldest is None else max(0.0, (now - data.oldest) / 1e6)


def read_report(text: str) -> VerifyReport:
    """The values of a document; raises ValueError saying what is wrong with it."""
    try:
        return _report(json.loads(text))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a report of tl verify: {type(error).__name__}: {error}") from error


def _report(document: dict[str, Any]) -> VerifyReport:
    data = document["data"]
    return VerifyReport(
        store=document["store"],
        store_id=document["store_id"],
        branch=document["branch"],
        log_number=document["log_number"],
        checked=Checked(**document["checked"]),
        data=None if data is None else _data(data),
        problems=tuple(_problem(each) for each in document["problems"]),
        problem_count=int(document["problem_count"]),
        unrestorable=_ranges(document["unrestorable"]),
        restorable=_ranges(document["restorable"]),
        gaps=_ranges(document["gaps"]),
        remarks=tuple(document["remarks"]),
    )


def _data(found: dict[str, Any]) -> DataChecked:
    values = {name: value for name, value in found.items() if name != "oldest_age_seconds"}
    return DataChecked(**values | {"oldest": _micros(values["oldest"])})


def _problem(found: dict[str, Any]) -> Problem:
    return Problem(
        fault=Fault(found["fault"]),
        key=found["key"],
        offset=int(found["offset"]),
        expected=found["expected"],
        holes=_ranges(found["holes"]),
        snapshots=tuple(found["snapshots"]),
        snapshots_unusable=bool(found["snapshots_unusable"]),
        files=tuple(BlockRun(**run) for run in found["files"]),
        file_runs=int(found["file_runs"]),
    )


def _ranges(found: list[dict[str, Any]]) -> tuple[LsnRange, ...]:
    return tuple(LsnRange(each["tli"], Lsn.parse(each["start"]), Lsn.parse(each["end"])) for each in found)


def _micros(text: str | None) -> Micros | None:
    if text is None:
        return None
    moment = datetime.fromisoformat(text)
    # Not by way of a float, which would lose microseconds.
    return int(moment.replace(microsecond=0).timestamp()) * 1_000_000 + moment.microsecond
