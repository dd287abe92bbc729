"""A drill as JUnit XML: one testcase for each check, and one for recovery itself. Pure."""

from __future__ import annotations

import re
from xml.etree import ElementTree as Xml

from timeline.format.evidence import FAILED, PASSED, SKIPPED, Check, Evidence

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, even escaped."""


def junit(evidence: Evidence) -> bytes:
    """The document, UTF-8."""
    failed, skipped = evidence.checks_with(FAILED), evidence.checks_with(SKIPPED)
    recovery = _recovery_problem(evidence)
    suite = Xml.Element(
        "testsuite",
        name="tl drill",
        id=evidence.id,
        tests=str(len(evidence.checks) + 1),
        failures=str(len(failed) + (recovery is not None)),
        errors="0",
        skipped=str(len(skipped)),
        time=f"{(evidence.finished - evidence.started) / 1e6:.3f}",
        hostname=_clean(evidence.host),
    )
    case = Xml.SubElement(
        suite,
        "testcase",
        classname="drill.recovery",
        name="recovery",
        time=f"{sum(step.elapsed_micros for step in evidence.steps) / 1e6:.3f}",
    )
    if recovery is not None:
        _failure(case, recovery, [f"{damage.key}: {damage.expectation}" for damage in evidence.damages])
    for check in evidence.checks:
        _add(suite, check)
    Xml.indent(suite)
    text: str = Xml.tostring(suite, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'.encode()


def _recovery_problem(evidence: Evidence) -> str | None:
    """What went wrong besides the checks, which stand for themselves."""
    if evidence.result == PASSED or (evidence.result == FAILED and evidence.checks_with(FAILED)):
        broken = [step for step in evidence.steps if step.message]
        return f"{broken[0].name}: {broken[0].message}" if broken else None
    return evidence.message


def _add(suite: Xml.Element, check: Check) -> None:
    name = check.name if check.database is None else f"{check.name} [{check.database}]"
    case = Xml.SubElement(
        suite,
        "testcase",
        classname=f"drill.{check.group}",
        name=_clean(name),
        time=f"{check.elapsed_micros / 1e6:.3f}",
    )
    if check.outcome == SKIPPED:
        Xml.SubElement(case, "skipped", message=_clean(check.message))
    elif check.outcome == FAILED:
        _failure(case, check.message, check.findings)
    elif check.findings:
        Xml.SubElement(case, "system-out").text = _clean("\n".join([check.message, *check.findings]))


def _failure(case: Xml.Element, message: str, findings: list[str] | tuple[str, ...]) -> None:
    failure = Xml.SubElement(case, "failure", message=_clean(message))
    failure.text = _clean("\n".join([message, *findings]))


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("�", text)
