"""A drill as one HTML page that needs nothing else: inline style and SVG, no scripts, no references. Pure.

Every text from outside goes through ``html.escape``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

from timeline.clock import Micros
from timeline.format.evidence import FAILED, PASSED, SKIPPED, Check, Evidence, Step

PAST_DRILLS = 30
"""Bars of the history chart, this drill among them."""
_WIDTH = 760
_LABEL = 170
_ROW = 24
_COLOURS = {PASSED: "#1a7f37", SKIPPED: "#9a6700"}
_BAD = "#cf222e"
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2328;max-width:860px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.25em .6em;vertical-align:top;
border-bottom:1px solid #d1d9e0}th{font-weight:600;white-space:nowrap}
.result{padding:.6em 1em;border-left:6px solid;background:#f6f8fa;overflow-wrap:anywhere}
.figures{display:flex;gap:1em;flex-wrap:wrap}.figures div{background:#f6f8fa;padding:.6em 1em;min-width:9em}
.figures b{display:block;font-size:1.5em}small,.dim{color:#59636e}ul{margin:.2em 0;padding-left:1.2em}
td{overflow-wrap:anywhere}svg{max-width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:#1f2328}
"""


@dataclass(frozen=True, slots=True)
class _Bar:
    label: str
    value: float
    text: str
    colour: str


def page(evidence: Evidence, past: Sequence[Evidence]) -> bytes:
    """The page, UTF-8. ``past``: earlier drills of the store, newest first."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Recovery drill {escape(_time(evidence.started))}: {escape(evidence.result)}</title>",
        f"<style>{_STYLE}</style></head><body>",
        "<h1>Recovery drill</h1>",
        f'<p class="result" style="border-color:{_colour(evidence.result)}"><b>{escape(evidence.result)}</b> '
        f"(exit code {evidence.exit_code})<br>{escape(evidence.message)}</p>",
        _figures(evidence),
        _facts(evidence),
        _damages(evidence),
        "<h2>Time of each step</h2>",
        _bars(
            "Seconds of each step",
            [
                _Bar(step.name, step.elapsed_micros, _seconds(step.elapsed_micros), _colour(step.outcome))
                for step in evidence.steps
            ],
        ),
        "<h2>Bytes fetched from the store by each step</h2>",
        _bars(
            "Bytes fetched by each step",
            [_Bar(step.name, step.fetched_bytes, _fetched(step), "#0969da") for step in evidence.steps],
        ),
        _history([evidence, *past][:PAST_DRILLS]),
        _checks(evidence.checks),
        _remarks(evidence),
        f'<p class="dim">{escape(evidence.version)}, drill {escape(evidence.id)}</p>',
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part).encode("utf-8", "replace")


def _figures(evidence: Evidence) -> str:
    found, point = evidence.recovery_time, evidence.recovery_point
    boxes = [
        ("RTO, first query", _seconds(found.first_query_micros), _objective(found.objective_micros)),
    ]
    if found.full_micros is not None or found.full_objective_micros is not None:
        boxes.append(("RTO, full copy", _seconds(found.full_micros), _objective(found.full_objective_micros)))
    if point is not None:
        lost = f", {point.rpo_bytes:,} bytes of WAL" if point.rpo_bytes is not None else ""
        boxes.append(("RPO", _seconds(point.rpo_micros), _objective(point.objective_micros) + lost))
    counts = [f"{len(evidence.checks_with(kind))} {kind}" for kind in (PASSED, FAILED, SKIPPED)]
    boxes.append(("Checks", str(len(evidence.checks)), ", ".join(counts)))
    inner = "".join(
        f"<div><small>{escape(title)}</small><b>{escape(value)}</b><small>{escape(more)}</small></div>"
        for title, value, more in boxes
    )
    return f'<div class="figures">{inner}</div>'


def _facts(evidence: Evidence) -> str:
    rows = [
        ("Store", f"{evidence.store_url} ({evidence.store_id or 'id not known'})"),
        ("Began", f"{_time(evidence.started)}, on {evidence.host} as {evidence.account}"),
        ("Ended", _time(evidence.finished)),
        ("Asked for", evidence.asked + (f", seed {evidence.seed}" if evidence.seed is not None else "")),
    ]
    target = evidence.target
    if target is not None:
        rows += [
            ("Recovered to", f"{target.lsn} on tli {target.tli}, {_time(target.time)}"),
            ("Last commit in it", _time(target.last_commit_time)),
            (
                "From",
                f"snapshot {target.snapshot_id} at {target.snapshot_lsn}, {target.replayed_bytes:,} bytes of WAL replayed",
            ),
        ]
    if evidence.server_version is not None:
        rows.append(("Server", f"{evidence.server_version} ({evidence.recovery_time.mode})"))
    if evidence.recovery_point is not None:
        point = evidence.recovery_point
        rows.append(("RPO found by", point.method))
        rows.append(("Head of the store", f"{point.head}, complete up to {_time(point.head_time)}"))
        if point.source_lsn is not None:
            rows.append(("Source", f"WAL flushed up to {point.source_lsn}"))
    return _table(rows)


def _damages(evidence: Evidence) -> str:
    if not evidence.damages:
        return ""
    rows = [
        (
            damage.key,
            f"bytes {damage.offset} to {damage.offset + damage.length}"
            if damage.length is not None
            else f"from byte {damage.offset}",
            "; ".join([damage.expectation, *damage.holds]),
        )
        for damage in evidence.damages
    ]
    return "<h2>Damage in the store</h2>" + _table(
        rows, ("object", "range", "what was expected, what lies there")
    )


def _checks(checks: Sequence[Check]) -> str:
    if not checks:
        return ""
    lines = [
        "<h2>Checks</h2><table><tr><th>check</th><th>database</th><th>outcome</th><th>what was found</th></tr>"
    ]
    for check in checks:
        more = "".join(f"<li>{escape(finding)}</li>" for finding in check.findings)
        if check.findings_total > len(check.findings):
            more += f"<li>… {check.findings_total - len(check.findings)} more</li>"
        lines.append(
            f"<tr><td>{escape(check.group)}: {escape(check.name)}</td><td>{escape(check.database or '')}</td>"
            f'<td style="color:{_colour(check.outcome)}">{escape(check.outcome)}</td>'
            f"<td>{escape(check.message)}{f'<ul>{more}</ul>' if more else ''}</td></tr>"
        )
    return "\n".join([*lines, "</table>"])


def _remarks(evidence: Evidence) -> str:
    if not evidence.warnings:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in evidence.warnings)
    return f"<h2>Warnings</h2><ul>{items}</ul>"


def _history(drills: Sequence[Evidence]) -> str:
    rto, rpo = [], []
    for drill in drills:
        label, colour = _time(drill.started), _colour(drill.result)
        first = drill.recovery_time.first_query_micros
        point = drill.recovery_point.rpo_micros if drill.recovery_point is not None else None
        rto.append(_Bar(label, first or 0, _seconds(first), colour))
        rpo.append(_Bar(label, point or 0, _seconds(point), colour))
    return (
        "<h2>RTO of this and earlier drills (first query)</h2>"
        + _bars("RTO by drill", rto)
        + "<h2>RPO of this and earlier drills</h2>"
        + _bars("RPO by drill", rpo)
    )


def _bars(title: str, bars: Sequence[_Bar]) -> str:
    if not bars:
        return "<p>nothing to show</p>"
    largest = max(max(bar.value for bar in bars), 1)
    room = _WIDTH - _LABEL - 170
    lines = [
        f'<svg role="img" viewBox="0 0 {_WIDTH} {_ROW * len(bars)}" width="{_WIDTH}" height="{_ROW * len(bars)}">'
        f"<title>{escape(title)}</title>"
    ]
    for number, bar in enumerate(bars):
        top = number * _ROW
        width = max(1.0, room * bar.value / largest)
        lines.append(
            f'<text x="{_LABEL - 8}" y="{top + 16}" text-anchor="end">{escape(bar.label)}</text>'
            f'<rect x="{_LABEL}" y="{top + 4}" width="{width:.1f}" height="{_ROW - 8}" fill="{bar.colour}"></rect>'
            f'<text x="{_LABEL + width + 6:.1f}" y="{top + 16}">{escape(bar.text)}</text>'
        )
    return "\n".join([*lines, "</svg>"])


def _table(rows: Sequence[Sequence[str]], headings: Sequence[str] = ()) -> str:
    lines = ["<table>"]
    if headings:
        lines.append("<tr>" + "".join(f"<th>{escape(text)}</th>" for text in headings) + "</tr>")
    for row in rows:
        first = f"<td>{escape(row[0])}</td>" if headings else f"<th>{escape(row[0])}</th>"
        lines.append(f"<tr>{first}" + "".join(f"<td>{escape(text)}</td>" for text in row[1:]) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _objective(micros: int | None) -> str:
    return f"objective {micros / 1e6:g} s" if micros is not None else "no objective"


def _colour(outcome: str) -> str:
    return _COLOURS.get(outcome, _BAD)


def _seconds(micros: int | None) -> str:
    return "not measured" if micros is None else f"{micros / 1e6:.2f} s"


def _fetched(step: Step) -> str:
    return f"{step.fetched_bytes:,} in {step.requests} requests"


def _time(micros: Micros | None) -> str:
    if micros is None:
        return "not known"
    return datetime.fromtimestamp(micros // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
