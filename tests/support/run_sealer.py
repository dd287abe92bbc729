"""Sealers that are killed at seeded random moments, one after the other, until stdin is closed.

    python -m tests.support.run_sealer --store URL [--endpoint-url URL] --seed N

Each sealer is a forked child that seals whatever there is, again and again; it dies by SIGKILL. At the end one
line of JSON (SealerReport) goes to stdout. Exit code 1: a sealer ended by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.child import die_with_parent
from timeline.catalog.branch_log import BranchLog
from timeline.clock import SystemClock

# Forked children shall find all that sealing imports late.
from timeline.format import wal_manifest  # noqa: F401
from timeline.maintain.seal import seal
from timeline.store.open import open_store

ROOT = Path(__file__).resolve().parents[2]
LONGEST_LIFE_SECONDS = 1.0
LONGEST_LIFE_S3_SECONDS = 3.0
"""Opening an S3 client alone takes some tenths, a seal through it more."""
LONGEST_PAUSE_SECONDS = 0.5
REST_SECONDS = 0.2
"""After each seal, so that the log grows by few entries."""
_SEALING = 0
_SEALS = 1


@dataclass(frozen=True, slots=True)
class SealerReport:
    """What became of the sealers."""

    kills: int
    kills_in_seal: int
    """Of these, inside an attempt to seal."""
    seals: int
    """Committed ones, as far as their sealers lived to count them."""


class SealerProcess:
    """``with SealerProcess(url, seed, environment) as sealer: …; report = sealer.stop()``."""

    def __init__(
        self, url: str, seed: int, environment: dict[str, str], *, endpoint_url: str | None = None
    ) -> None:
        command = [sys.executable, "-m", "tests.support.run_sealer", "--store", url, "--seed", str(seed)]
        if endpoint_url is not None:
            command += ["--endpoint-url", endpoint_url]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> SealerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def stop(self) -> SealerReport:
        """Kill the last one; the report. Raises RuntimeError when one ended by itself."""
        out, errors = self._process.communicate(timeout=30)
        if self._process.returncode != 0:
            raise RuntimeError(f"a sealer ended by itself:\n{errors}")
        return SealerReport(**json.loads(out))


async def _seal_forever(url: str, endpoint_url: str | None, shared: mmap.mmap) -> None:
    clock = SystemClock()
    store = await open_store(url, endpoint_url=endpoint_url, clock=clock)
    log = BranchLog(store, "main", clock, clock.token(8))
    while True:
        shared[_SEALING] = 1
        sealed = await seal(store, log, clock, force=True)
        shared[_SEALING] = 0
        shared[_SEALS] = min(255, shared[_SEALS] + (sealed is not None))
        await asyncio.sleep(REST_SECONDS)


def main() -> int:
    """Until stdin is closed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--endpoint-url")
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    longest_life = LONGEST_LIFE_SECONDS
    if options.store.startswith("s3:"):
        importlib.import_module("timeline.store.s3")
        importlib.import_module("aiobotocore.session")
        longest_life = LONGEST_LIFE_S3_SECONDS
    kills = in_seal = seals = 0
    told_to_stop = False
    while not told_to_stop:
        shared = mmap.mmap(-1, 2)
        child = os.fork()
        if child == 0:
            die_with_parent()
            asyncio.run(_seal_forever(options.store, options.endpoint_url, shared))
            os._exit(3)
        told_to_stop = _stdin_closed(chance.uniform(0, longest_life))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return 1
        kills += 1
        in_seal += shared[_SEALING]
        seals += shared[_SEALS]
        shared.close()
        told_to_stop = told_to_stop or _stdin_closed(chance.uniform(0, LONGEST_PAUSE_SECONDS))
    print(json.dumps(asdict(SealerReport(kills, in_seal, seals))), flush=True)
    return 0


def _stdin_closed(seconds: float) -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready)


if __name__ == "__main__":
    sys.exit(main())
