"""The alert rules: valid, about metrics that exist, firing when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from cli.metric_families import FAMILIES, SUMMARY
from cli.status import ALERTS, status_command

CASES = Path(__file__).with_name("alerts_test.yml")
_METRIC = re.compile(r"\btl_[a-z_]+\b")
_MATCHER = re.compile(r"(tl_[a-z_]+)\{([^}]*)\}")
_LABEL = re.compile(r"([a-z_]+)\s*(?:=~|!~|!=|=)")


def rules() -> list[dict[str, Any]]:
    """All rules of the file."""
    document = yaml.safe_load(ALERTS.read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def promtool() -> str:
    """Prometheus's own checker."""
    beside = shutil.which("promtool", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not here: .ci/setup takes it from the Debian package prometheus")
    return found


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_rules(promtool: str) -> None:
    run(promtool, "check", "rules", str(ALERTS))


def test_every_rule_fires_when_it_should_and_not_before(promtool: str) -> None:
    """EDGE 8, 10: the slot is told of before it is lost."""
    run(promtool, "test", "rules", str(CASES))


def test_every_rule_has_a_case() -> None:
    cases = CASES.read_text()
    assert {rule["alert"] for rule in rules() if f"{rule['alert']}" not in cases} == set()


def test_every_metric_and_label_that_a_rule_names_exists() -> None:
    labels = {}
    for family in FAMILIES:
        for name in [family.name, f"{family.name}_sum", f"{family.name}_count"][
            : 3 if family.kind == SUMMARY else 1
        ]:
            labels[name] = set(family.labels)
    for rule in rules():
        named = _METRIC.findall(rule["expr"])
        assert named, rule["alert"]
        assert set(named) <= set(labels), rule["alert"]
        for metric, matchers in _MATCHER.findall(rule["expr"]):
            assert set(_LABEL.findall(matchers)) <= labels[metric], rule["alert"]
        used = set(re.findall(r"\$labels\.([a-z_]+)", str(rule["annotations"])))
        assert all(used <= labels[metric] for metric in named), rule["alert"]


def test_every_rule_says_what_it_means_and_how_grave_it_is() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"].endswith((".", "?"))


def test_the_command_prints_them() -> None:
    done = CliRunner().invoke(status_command, ["--alerts"])
    assert (done.exit_code, done.output) == (0, ALERTS.read_text())
