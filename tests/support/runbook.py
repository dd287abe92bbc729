"""RUNBOOK.md as its tests see it: sections, their shell blocks, and what these are said to print.

A ``sh`` block stands below a comment: ``<!-- run: NAME -->``, or ``<!-- run: NAME, exit 4 -->`` where the last command is
to fail so, or ``<!-- not run: WHY -->``. A ``text`` block right after it is what a reader will see: each of its lines
must be in the output, figures apart; ``…`` stands for anything.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.postgres import PostgresServer

RUNBOOK = Path(__file__).parents[2] / "RUNBOOK.md"
_LINE = re.compile(
    r"^## (?P<heading>[^\n]+)$|^<!-- run: (?P<run>[\w-]+)(?:, exit (?P<code>\d+))? -->$|^<!-- not run: (?P<why>[^\n]+) -->$"
    r"|^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_FIGURE = re.compile(r"\d(?:[\d,.:/]*\d)?")
_BLOCK_SECONDS = 240


@dataclass(frozen=True, slots=True)
class Block:
    """One shell block."""

    section: str
    """The heading, as a link names it."""
    name: str | None
    """``None``: it is not run."""
    reason: str | None
    """Why it is not run."""
    exit_code: int
    script: str
    shows: tuple[str, ...]
    """Lines that are printed."""


def anchor(heading: str) -> str:
    """What a link calls a heading."""
    return re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")


def read_blocks(text: str) -> tuple[Block, ...]:
    """All shell blocks, in order; raises ValueError for one without a comment, or a text that follows none."""
    blocks: list[Block] = []
    section, said, fresh = "", None, False
    for found in _LINE.finditer(text):
        if found["heading"]:
            section, said, fresh = anchor(found["heading"]), None, False
        elif found["run"] or found["why"]:
            said = found
        elif found["language"] == "sh":
            if said is None:
                raise ValueError(f"{section}: a shell block without a comment: {found['body']}")
            blocks.append(Block(section, said["run"], said["why"], int(said["code"] or 0), found["body"], ()))
            said, fresh = None, True
        elif found["language"] == "text" and fresh and blocks[-1].name is not None:
            blocks[-1] = replace(blocks[-1], shows=tuple(found["body"].splitlines()))
            fresh = False
        elif found["language"] == "text":
            raise ValueError(f"{section}: a text that no block prints: {found['body']}")
    return tuple(blocks)


def is_shown(line: str, output: str) -> bool:
    """Whether a line of the output begins like this one: figures apart, and with anything for each ``…``."""
    pattern = r".*".join(re.escape(_FIGURE.sub("0", part.strip())) for part in line.split("…"))
    pattern = re.sub(r"(\\ )+", r"\\s+", pattern)
    return any(re.match(pattern, _FIGURE.sub("0", each.strip())) is not None for each in output.splitlines())


class Incident:
    """Runs the blocks of one section, in order, as the reader would: in bash, with the variables of the first page."""

    def __init__(self, section: str, directory: Path, environment: Mapping[str, str]) -> None:
        self.section = section
        self.blocks = [
            block for block in read_blocks(RUNBOOK.read_text()) if block.section == section and block.name
        ]
        assert self.blocks, f"RUNBOOK.md has nothing to run about {section}"
        self._left = list(self.blocks)
        self._directory = directory
        self.environment = dict(environment)

    def run(self, name: str) -> str:
        """The next block, which must have that name; what it printed. It must end as the RUNBOOK says, and print what
        the RUNBOOK shows."""
        assert self._left, f"{self.section} has no block {name}"
        block = self._left.pop(0)
        assert block.name == name, f"{self.section}: the next block is {block.name}, not {name}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.script],
            env=self.environment,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_BLOCK_SECONDS,
            check=False,
        )
        assert done.returncode == block.exit_code, f"{name}: {done.returncode}\n{block.script}\n{done.stdout}"
        for line in block.shows:
            assert is_shown(line, done.stdout), f"{name} does not print:\n{line}\nbut:\n{done.stdout}"
        return done.stdout

    def finish(self) -> None:
        """Every block was run."""
        assert self._left == [], f"{self.section}: not run: {[block.name for block in self._left]}"


_SUDO = """#!/bin/sh
# As sudo would, where the tests run as root; else everything is ours anyway.
if [ "$1" = -u ]; then
  [ "$2" = postgres ] || { echo "sudo: unknown user $2" >&2; exit 1; }
  shift 2
  [ "$(id -u)" = 0 ] && exec setpriv --reuid=UID --regid=GID --clear-groups "$@"
fi
exec "$@"
"""

_SYSTEMCTL = """#!/bin/bash
# The service manager for one unit, in a container that has none: the daemon itself is a real one.
set -eu
[ "$2" = tl-daemon ] || { echo "Unit $2.service could not be found." >&2; exit 5; }
# One that has ended may still be waiting for somebody to ask how.
running() { [ -s DIR/pid ] && grep -qs '^State:.[RSDT]' "/proc/$(cat DIR/pid)/status"; }
case "$1" in
  start)
    if running; then exit 0; fi
    tl daemon --log human </dev/null >>DIR/daemon.log 2>&1 &
    echo $! >DIR/pid ;;
  stop)
    if running; then kill -TERM "$(cat DIR/pid)"; fi
    for _ in $(seq 600); do if running; then sleep 0.1; else rm -f DIR/pid; exit 0; fi; done
    exit 1 ;;
  reload) kill -HUP "$(cat DIR/pid)" ;;
  *) echo "Unknown command verb $1." >&2; exit 1 ;;
esac
"""


def make_stand_ins(directory: Path, server: PostgresServer) -> Path:
    """Programs of a usual host that a container lacks: ``sudo`` and ``systemctl``. Returns their directory."""
    directory.mkdir(parents=True)
    texts = {
        "sudo": _SUDO.replace("UID", str(server.user.pw_uid)).replace("GID", str(server.user.pw_gid)),
        "systemctl": _SYSTEMCTL.replace("DIR", str(directory)),
    }
    for name, text in texts.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    return directory


def end_service(directory: Path) -> None:
    """End the daemon that the stand-in may have left running."""
    subprocess.run(
        [str(directory / "systemctl"), "stop", "tl-daemon"],
        env={"PATH": os.environ["PATH"]},
        timeout=90,
        check=True,
    )
