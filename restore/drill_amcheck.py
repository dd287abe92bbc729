"""pg_amcheck on the recovered server: heaps and B-trees, database by database.

The extension is created in the drill's own branch, which is thrown away. What is missing on this host is a
reason to skip, never to pass. Bounds: DATABASE_SECONDS each, JOBS connections, MAX_OUTPUT_BYTES of output.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from psycopg.conninfo import make_conninfo

from restore.binaries import Binaries
from restore.drill_checks import Database
from restore.isolation import Endpoint
from timeline.clock import Clock
from timeline.format.evidence import FAILED, MAX_FINDINGS, PASSED, SKIPPED, Check

DATABASE_SECONDS = 6 * 3600.0
"""For one database."""
JOBS = 2
MAX_OUTPUT_BYTES = 8 << 20
"""Of what pg_amcheck says: more of it is read and dropped."""
_LINE_CHARACTERS = 500
_CORRUPT = 2
"""Its exit code when it has found damage (src/bin/pg_amcheck/pg_amcheck.c)."""
_NO_OPTIONS = "-c session_preload_libraries= -c local_preload_libraries="


def amcheck_program(binaries: Binaries) -> Path | None:
    """pg_amcheck of that installation, if it is there."""
    path = binaries.directory / "pg_amcheck"
    return path if path.exists() else None


def skipped(database: Database, reason: str) -> Check:
    """The check that could not run."""
    return Check("amcheck", "heap and btree", database.name, SKIPPED, reason, 0)


async def check_database(
    database: Database,
    endpoint: Endpoint,
    binaries: Binaries,
    clock: Clock,
    *,
    heap_all_indexed: bool,
) -> Check:
    """Heaps and B-trees of one database; ``heap_all_indexed``: also that every row is in every index."""
    program = amcheck_program(binaries)
    if program is None:
        return skipped(database, f"there is no pg_amcheck in {binaries.directory}")
    if not database.connectable:
        return skipped(database, "it does not allow connections")
    began = clock.monotonic()
    options = _NO_OPTIONS + (" -c event_triggers=off" if binaries.major >= 17 else "")
    process = await asyncio.create_subprocess_exec(
        program,
        *("--host", endpoint.sockets, "--port", str(endpoint.port), "--username", endpoint.superuser),
        *("--no-password", "--install-missing", "--jobs", str(JOBS)),
        *(("--heapallindexed",) if heap_all_indexed else ()),
        # A bare name with an equals sign in it would be taken for more than a name.
        make_conninfo(dbname=database.name),
        env={**binaries.environment(), "PGOPTIONS": options, "PGCLIENTENCODING": "UTF8"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(DATABASE_SECONDS):
            said = await _output(process)
            code: int | None = await process.wait()
    except TimeoutError:
        said, code = "", None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    elapsed = int((clock.monotonic() - began) * 1e6)
    lines = [line.strip()[:_LINE_CHARACTERS] for line in said.splitlines() if line.strip()]
    if code == 0:
        how = ", every row looked up in every index" if heap_all_indexed else ""
        outcome, message = PASSED, f"pg_amcheck found nothing wrong in heaps and B-trees{how}"
    elif code is None:
        outcome, message = FAILED, f"pg_amcheck did not end within {DATABASE_SECONDS:.0f} s"
    elif code == _CORRUPT:
        outcome, message = FAILED, f"pg_amcheck found damage: {' '.join(lines[:2])}"
    else:
        outcome, message = FAILED, f"pg_amcheck ended with {code}: {' '.join(lines[:2])}"
    findings = () if code == 0 else tuple(lines[:MAX_FINDINGS])
    return Check(
        "amcheck",
        "heap and btree",
        database.name,
        outcome,
        message,
        elapsed,
        findings,
        0 if code == 0 else len(lines),
    )


async def _output(process: asyncio.subprocess.Process) -> str:
    if process.stdout is None:
        return ""
    kept = bytearray()
    while part := await process.stdout.read(64 << 10):
        kept += part[: MAX_OUTPUT_BYTES - len(kept)]
    return kept.decode(errors="replace")
