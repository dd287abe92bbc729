"""Runs a composite GitHub action's shell steps the way a runner does, as far as its action.yml makes use of it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_EXPRESSION = re.compile(r"\$\{\{\s*(.+?)\s*\}\}")


@dataclass(frozen=True, slots=True)
class ActionRun:
    """One run of an action."""

    returncode: int
    """Of the first step that failed; 0 when none did."""
    outputs: dict[str, str]
    log: str
    summary: str


def run_action(
    directory: Path,
    workspace: Path,
    inputs: dict[str, str],
    environment: dict[str, str],
    *,
    pull_request: int | None,
) -> ActionRun:
    """Run its steps in order until one fails; raises KeyError for an expression that is not understood."""
    action: dict[str, Any] = yaml.safe_load((directory / "action.yml").read_text())
    unknown = inputs.keys() - action["inputs"].keys()
    if unknown:
        raise KeyError(f"no inputs {unknown}")
    known = {f"inputs.{name}": inputs.get(name, each["default"]) for name, each in action["inputs"].items()}
    known["github.event.pull_request.number"] = "" if pull_request is None else str(pull_request)
    runner = workspace / "runner"
    runner.mkdir(exist_ok=True)
    summary = runner / "summary"
    summary.write_text("")
    log, code = "", 0
    for number, step in enumerate(action["runs"]["steps"]):
        assert step["shell"] == "bash"
        output, script = runner / f"output-{number}", runner / f"step-{number}.sh"
        output.write_text("")
        # Expressions inside a script would be parts of its text.
        assert _EXPRESSION.search(step["run"]) is None
        script.write_text(step["run"])
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)],
            cwd=workspace,
            env={
                **environment,
                **{name: _filled(str(value), known) for name, value in step.get("env", {}).items()},
                "GITHUB_ACTION_PATH": str(directory),
                "GITHUB_OUTPUT": str(output),
                "GITHUB_STEP_SUMMARY": str(summary),
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        log += done.stdout + done.stderr
        for line in output.read_text().splitlines():
            name, _, value = line.partition("=")
            known[f"steps.{step.get('id')}.outputs.{name}"] = value
        code = done.returncode
        if code != 0:
            break
    outputs = {
        name: known[found[1]]
        for name, each in action["outputs"].items()
        if (found := _EXPRESSION.fullmatch(each["value"])) is not None and found[1] in known
    }
    return ActionRun(code, outputs, log, summary.read_text())


def _filled(text: str, known: dict[str, str]) -> str:
    return _EXPRESSION.sub(lambda found: known[found[1]], text)
