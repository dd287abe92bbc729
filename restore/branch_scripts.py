"""SQL scripts that a branch runs before anybody can reach it: masking, seeds, migrations.

All scripts run in one session of the branch's own ``psql``, as its superuser, over the private socket, while
the branch is still being made: it is in no list, its socket directory is closed to others, TCP is not open.
They are one unit. ``--single-transaction`` spans all of them, and whatever fails, the branch is not offered
and nothing of it is left. A script with a statement that no transaction may hold (``VACUUM``) says ``COMMIT;``
before it; from there on its statements commit one by one, and the branch is still all or nothing.

It fails closed against what psql itself lets pass: an error that a script ignores (``\\set ON_ERROR_STOP off``),
and a transaction that a script rolls back or loses (``ROLLBACK``, ``\\connect``).

What is run is kept beside the branch, byte for byte: a reset runs the same again, whatever has become of the
files. Only the named files are kept; what they include is read where it is, from the directory of the script.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from restore.binaries import Binaries
from restore.isolation import Endpoint, find_psql
from restore.local_branch import ScriptRecord, ScriptRun
from timeline.errors import CheckFailed, TimelineError, UsageError
from timeline.format.digest import hex_digest_of

TIMEOUT_SECONDS = 600
"""All scripts of a branch together, unless another time is asked for."""
MOST_SCRIPTS = 100
MOST_BYTES = 64 << 20
"""Of one script: it is held in memory and kept with the branch."""
LOG_BYTES = 4 << 20
"""What psql says is logged up to this size."""
SAID_LINES = 12
"""Last lines of psql that an error shows."""
_SAID_BYTES = 32 << 10
_CONNECT_SECONDS = 30
_DIRECTORY = "scripts"

_BEFORE = r"""\set ON_ERROR_STOP on
select pg_catalog.pg_current_xact_id() as tl_unit \gset
"""
_AFTER = r"""\set ON_ERROR_STOP on
select pg_catalog.pg_xact_status(:'tl_unit'::pg_catalog.xid8) = 'aborted' as tl_lost \gset
\if :tl_lost
do 'begin raise exception $tl$a script has rolled back the transaction of all scripts$tl$; end';
\endif
"""
"""In a failed transaction the very first query of it fails; in one that was rolled back or lost, the last."""
_TOLD = re.compile(r"psql:(?P<file>[^\n]*?):(?P<line>\d+): (?P<what>(?:ERROR|FATAL|PANIC|error):  ?[^\n]*)")


@dataclass(frozen=True, slots=True)
class Script:
    """One script as it was read."""

    path: str
    """Where, absolute."""
    content: bytes

    @property
    def record(self) -> ScriptRecord:
        """What is remembered of it."""
        return ScriptRecord(self.path, hex_digest_of(self.content), len(self.content))


@dataclass(frozen=True, slots=True)
class Scripts:
    """What to run in a new branch, in this order."""

    scripts: tuple[Script, ...] = ()
    database: str = "postgres"
    """To connect to."""
    timeout_seconds: int = TIMEOUT_SECONDS
    """For all of them."""

    @property
    def run(self) -> ScriptRun | None:
        """What is remembered of them; ``None`` when there is nothing to run."""
        if not self.scripts:
            return None
        records = tuple(script.record for script in self.scripts)
        return ScriptRun(records, self.database, self.timeout_seconds)


def read_scripts(paths: Sequence[Path], *, database: str, timeout_seconds: int) -> Scripts:
    """Read all of them; raises UsageError for one that cannot be read, is too large, or for too many."""
    if len(paths) > MOST_SCRIPTS:
        raise UsageError(f"{len(paths)} scripts; at most {MOST_SCRIPTS} are run")
    return Scripts(tuple(_read(path) for path in paths), database, timeout_seconds)


def keep_scripts(directory: Path, scripts: Scripts) -> tuple[Path, ...]:
    """Write them into a branch's directory, readable by its owner only; where each of them lies."""
    place = directory / _DIRECTORY
    place.mkdir(mode=0o700)
    kept = []
    for number, script in enumerate(scripts.scripts, 1):
        path = place / f"{number:03}.sql"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(script.content)
            file.flush()
            os.fsync(file.fileno())
        kept.append(path)
    return tuple(kept)


def kept_scripts(directory: Path, run: ScriptRun | None) -> Scripts:
    """What a branch was made with; raises TimelineError when a kept script is not what was run."""
    if run is None:
        return Scripts()
    found = []
    for number, record in enumerate(run.scripts, 1):
        path = directory / _DIRECTORY / f"{number:03}.sql"
        script = Script(record.path, path.read_bytes() if path.exists() else b"")
        if script.record != record:
            raise TimelineError(
                f"{path} is not the script that the branch was made with ({record.path})",
                hint="delete the branch and make it again with --run",
            )
        found.append(script)
    return Scripts(tuple(found), run.database, run.timeout_seconds)


async def run_scripts(
    scripts: Scripts, directory: Path, endpoint: Endpoint, binaries: Binaries, log: Path
) -> None:
    """Keep and run them; what psql says goes to ``log``.

    Raises CheckFailed with file and line when one fails or the time is up, UsageError when there is no such
    database. Cancelled, it ends psql and all that it started first.
    """
    if not scripts.scripts:
        return
    kept = keep_scripts(directory, scripts)
    process = await asyncio.create_subprocess_exec(
        find_psql(binaries),
        *_arguments(scripts, directory / _DIRECTORY, kept),
        *("-h", endpoint.sockets, "-p", str(endpoint.port), "-U", endpoint.superuser, "-d", scripts.database),
        env=_environment(binaries),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    said = _Said(log)
    try:
        async with asyncio.timeout(scripts.timeout_seconds):
            assert process.stdout is not None
            while part := await process.stdout.read(65536):
                said.take(part)
            await process.wait()
    except TimeoutError:
        raise CheckFailed(
            f"the scripts did not end within {scripts.timeout_seconds} s (--run-timeout)"
            + said.quoted(scripts, kept),
            hint="the branch was not offered, and nothing of it is left",
        ) from None
    finally:
        said.close()
        # A script may have started programs (\!), and they may hold the pipe: the whole session ends.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    _judge(process.returncode or 0, said, scripts, kept)


def _arguments(scripts: Scripts, place: Path, kept: Sequence[Path]) -> list[str]:
    before, after = place / "before.sql", place / "after.sql"
    before.write_text(_BEFORE)
    after.write_text(_AFTER)
    arguments = ["-X", "-q", "-v", "ON_ERROR_STOP=1", "--no-password", "--single-transaction"]
    arguments += ["-f", os.fspath(before)]
    for script, path in zip(scripts.scripts, kept, strict=True):
        origin = os.path.dirname(script.path)
        if os.path.isdir(origin):
            # Neighbours that it includes or copies are found from where the script itself was.
            arguments += ["-c", f"\\cd {_quoted(origin)}"]
        arguments += ["-f", os.fspath(path)]
    return [*arguments, "-f", os.fspath(after)]


def _quoted(text: str) -> str:
    """As an argument of a psql command."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _environment(binaries: Binaries) -> dict[str, str]:
    # What must hold whatever ALTER ROLE and ALTER DATABASE of the source say. Synchronously: a crash of the
    # branch must not bring back what was masked.
    settings = {
        "synchronous_commit": "on",
        "statement_timeout": "0",
        "lock_timeout": "0",
        "idle_in_transaction_session_timeout": "0",
        "default_transaction_read_only": "off",
        "session_preload_libraries": "",
        "lc_messages": "C",
    }
    if binaries.major >= 17:
        settings["transaction_timeout"] = "0"
    return {
        **binaries.environment(),
        "PGOPTIONS": " ".join(f"-c {name}={value}" for name, value in settings.items()),
        "PGCONNECT_TIMEOUT": str(_CONNECT_SECONDS),
        "PGCLIENTENCODING": "UTF8",
        "PGAPPNAME": "tl branch --run",
    }


class _Said:
    """What psql says: all of it to the branch's log up to LOG_BYTES, the end of it and the first error for us."""

    def __init__(self, log: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._log = os.open(log, flags, 0o600)
        self._logged = 0
        self._tail = b""
        self._line = b""
        self.error: re.Match[str] | None = None

    def take(self, part: bytes) -> None:
        """More of it."""
        if self._logged < LOG_BYTES:
            os.write(self._log, part[: LOG_BYTES - self._logged])
            self._logged += len(part)
            if self._logged >= LOG_BYTES:
                os.write(self._log, b"\n... the scripts say more than is logged\n")
        self._tail = (self._tail + part)[-_SAID_BYTES:]
        if self.error is None:
            lines = (self._line + part).split(b"\n")
            self._line = lines.pop()[-_SAID_BYTES:]
            for line in lines:
                self._look(line)

    def close(self) -> None:
        """No more will come."""
        self._look(self._line)
        os.close(self._log)

    def quoted(self, scripts: Scripts, kept: Sequence[Path]) -> str:
        """The last lines, indented, files named as the user knows them; empty when nothing was said."""
        text = self._tail.decode(errors="replace")
        for script, path in zip(scripts.scripts, kept, strict=True):
            text = text.replace(os.fspath(path), script.path)
        lines = [line for line in text.splitlines() if line.strip()][-SAID_LINES:]
        return "".join(f"\n  {line}" for line in lines)

    def _look(self, line: bytes) -> None:
        if self.error is None and b"psql:" in line:
            self.error = _TOLD.match(line.decode(errors="replace"))


def _judge(code: int, said: _Said, scripts: Scripts, kept: Sequence[Path]) -> None:
    """Raise unless psql and the server are content with everything."""
    if code == 0 and said.error is None:
        return
    quoted = said.quoted(scripts, kept)
    if code == 2 and said.error is None:
        if "does not exist" in quoted:
            raise UsageError(
                f"the scripts have no database to run in:{quoted}", hint="name it with --run-database"
            )
        raise CheckFailed(f"the scripts cannot connect to the branch:{quoted}")
    gone = "the branch was not offered, and nothing of it is left"
    if said.error is None:
        raise CheckFailed(f"the scripts failed (psql ended with {code}){quoted}", hint=gone)
    where, line, what = said.error["file"], said.error["line"], said.error["what"]
    names = {os.fspath(path): script.path for script, path in zip(scripts.scripts, kept, strict=True)}
    if where not in names and os.path.dirname(where) == os.path.dirname(os.fspath(kept[0])):
        # Our own check at the end: no single line of the scripts is at fault.
        raise CheckFailed(f"the scripts did not end well: {what}{quoted}", hint=gone)
    if "No such file" in what:
        gone = f"files that a script includes are looked for from its own directory (\\i, not \\ir); {gone}"
    raise CheckFailed(f"{names.get(where, where)}, line {line}: {what}{quoted}", hint=gone)


def _read(path: Path) -> Script:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read the script {path}: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise UsageError(f"the script {path} is larger than {MOST_BYTES >> 20} MiB")
    if b"\0" in content:
        raise UsageError(f"{path} is no SQL script: it holds a zero byte")
    return Script(os.fspath(path.absolute()), content)
