"""What README.md shows is there, and what ``tl demo`` prints is what README.md shows."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.orphans import run_watched
from tests.support.tl_host import TL

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_DEMO_ROWS = 200_000


def said_commands() -> list[str]:
    """Everything README.md tells a reader to type: lines of shell blocks and code spans, without comments."""
    lines = [
        line for language, block in _FENCED.findall(README) if language == "sh" for line in block.splitlines()
    ]
    prose = _FENCED.sub("", README).replace("\n", " ")
    return [line.split("  #")[0].strip() for line in lines] + [span.strip() for span in _SPAN.findall(prose)]


SAID = [line for line in said_commands() if line.startswith("tl ")]


@functools.cache
def help_of(command: str) -> str:
    """What ``tl COMMAND --help`` prints; fails for a command that is not there."""
    done = subprocess.run([TL, command, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"README.md names tl {command}: {done.stderr}"
    return done.stdout


def test_readme_has_commands() -> None:
    assert {"init", "archive", "status", "branch", "psql", "delete", "restore", "detach", "backup"} <= {
        line.split()[1] for line in SAID
    }


@pytest.mark.parametrize("line", sorted(set(SAID)))
def test_a_command_of_the_readme_exists(line: str) -> None:
    command = line.split()[1]
    known = set(_OPTION.findall(help_of(command)))
    assert set(_OPTION.findall(line)) <= known


def test_options_named_alone_exist() -> None:
    commands = {line.split()[1] for line in SAID}
    known = {option for command in commands for option in _OPTION.findall(help_of(command))}
    alone = {option for span in said_commands() if span.startswith("--") for option in _OPTION.findall(span)}
    assert alone
    assert alone <= known


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {line.split()[1] for line in said_commands() if line.startswith("make ")}
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_named_exist() -> None:
    named = {span for span in said_commands() if re.fullmatch(r"(?:timeline|restore|cli)/[\w/.]+", span)}
    assert named
    for path in named:
        assert (ROOT / path).exists(), path


def test_a_detached_survivor_would_be_seen() -> None:
    watched = run_watched(["sh", "-c", "setsid sleep 60 & echo said; exit 3"], grace_seconds=0.1)
    assert (watched.returncode, watched.stdout) == (3, "said\n")
    assert [line.split() for line in watched.survivors] == [["sleep", "60"]]


def test_the_demo_is_what_the_readme_shows_and_leaves_nothing() -> None:
    before = set(Path("/tmp").glob("tl-demo-*"))
    run = run_watched([TL, "demo", "--json", "--rows", str(_DEMO_ROWS)])
    left = set(Path("/tmp").glob("tl-demo-*")) - before
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["rows_back"] == result["rows_lost"] == _DEMO_ROWS + 1
    assert 0 < result["fetched_bytes"] < result["database_bytes"]
    assert 0 < result["branch_seconds"] < result["first_query_seconds"] < result["elapsed_seconds"]
    assert run.survivors == []
    # A mount that stayed would keep its directory.
    assert left == set()
    shown = re.search(r"<!-- demo -->\n```\n(.*?)```\n<!-- /demo -->", README, re.DOTALL)
    assert shown is not None
    # With --json the story is told on stderr, word for word.
    assert shape(shown[1]) == shape(run.stderr)


def shape(text: str) -> list[str]:
    """The lines with every figure, size and time made the same."""
    sized = re.sub(r"\d[\d,.]* (?:B|KiB|MiB|GiB)\b", "SIZE", text.strip())
    return re.sub(r"\d[\d,.:]*\d|\d", "N", sized).splitlines()
