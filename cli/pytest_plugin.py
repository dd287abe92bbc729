"""Pytest plugin: a branch of real data for a test, gone when the test is.

Loaded by every pytest that runs where ``tl`` is installed, so nothing is imported here that pytest has not
imported already; the work is done by the installed ``tl``, in processes of its own.

Fixtures: ``tl_branch`` (a fresh branch for each test) and ``tl_branch_session`` (one for the session, or for
each worker of pytest-xdist). All branches of a session show the same moment. They have names of their own and a
time to live, so that workers do not meet and a killed run leaves nothing for long.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

LIFE = "1h"
"""Time to live unless ``tl_ttl`` says otherwise."""
MAKE_SECONDS = 900.0
"""How long `tl branch` may take, scripts included."""
DELETE_SECONDS = 120.0
MOST_DELETIONS = 4
"""Deletions under way at a time while tests go on; the next one waits."""
MOST_TOLD = 10
"""Deletions that failed, in the message about them."""
_LASTING = (2, 3)
"""Exit codes of `tl` that say that asking again is no use: usage, target unreachable."""

_OPTIONS = (
    ("store", "URL", "store that branches are made from (default: TL_STORE, tl.toml)"),
    ("cluster", "NAME", "cluster of tl.toml to branch"),
    ("at", "WHEN", "moment that the branches show (default: latest)"),
    ("ttl", "DURATION", f"time to live of a branch, should nobody delete it (default: {LIFE})"),
)


@dataclass(frozen=True, slots=True)
class TlBranch:
    """A running Postgres with the data of some moment; do with it what you like."""

    name: str
    dsn: str
    """Connection URI of its database ``postgres``, as superuser, without a password."""
    lsn: str
    """The moment that it shows, as ``X/XXXXXXXX``."""
    time: str | None
    """The same on the source's clock, ISO 8601 in UTC, as far as known."""

    def dsn_of(self, database: str) -> str:
        """Connection URI of another database of it."""
        from urllib.parse import quote, urlsplit, urlunsplit

        return urlunsplit(urlsplit(self.dsn)._replace(path="/" + quote(database, safe="")))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options and the ini keys of the same names."""
    group = parser.getgroup("tl", "branches of real data (tl)")
    for name, metavar, text in _OPTIONS:
        group.addoption(f"--tl-{name}", metavar=metavar, default=None, help=text)
        parser.addini(f"tl_{name}", text, default="")
    text = "SQL script to run in every branch before it is reachable; may be repeated"
    group.addoption("--tl-run", metavar="FILE.sql", action="append", default=None, help=text)
    parser.addini(
        "tl_run", f"{text.partition(';')[0]}, one a line, from the ini file's directory", "paths", default=[]
    )
    parser.addini("tl_otherwise", "fail (default) or skip a test that gets no branch", default="fail")


class _Maker:
    """Makes and deletes the branches of one session."""

    def __init__(self, config: pytest.Config) -> None:
        from timeline.clock import SystemClock

        self._config = config
        self._arguments = list(_arguments(config))
        self._run = SystemClock().token(4)
        self._made = 0
        self._lsn: str | None = None
        self._hopeless: str | None = None
        self._failed: list[str] = []
        self._deleting: list[tuple[str, subprocess.Popen[str]]] = []

    @contextlib.contextmanager
    def branch(self) -> Iterator[TlBranch]:
        """A branch inside the block; fails or skips the test that cannot have one."""
        made = self._make()
        try:
            yield made
        finally:
            self._delete(made.name)

    def close(self) -> None:
        """Wait until the last deletion is done; fails when one did not succeed."""
        self._collect(0)
        if self._failed:
            text = "branches could not be deleted (they expire by themselves): " + "; ".join(self._failed)
            pytest.fail(text, pytrace=False)

    def _collect(self, most: int) -> None:
        """Wait until at most so many deletions are under way, and note how the others ended."""
        going = []
        for number, (name, process) in enumerate(self._deleting):
            if process.poll() is None and number >= len(self._deleting) - most:
                going.append((name, process))
                continue
            try:
                _, err = process.communicate(timeout=DELETE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                _, err = process.communicate()
            if process.returncode != 0:
                self._failed = [*self._failed, f"{name}: {_last_line(err, mark='tl: ')}"][:MOST_TOLD]
        self._deleting = going

    def _make(self) -> TlBranch:
        import json

        from cli.own_command import own_command

        if self._hopeless is not None:
            self._give_up(self._hopeless)
        self._made += 1
        name = f"pytest-{self._run}-{self._made}"
        arguments = [name, *self._arguments]
        if self._lsn is not None:
            # "latest" means the same moment for all tests of a session.
            arguments += ["--at", self._lsn]
        try:
            done = subprocess.run(
                own_command("branch", *arguments, "--json"),
                capture_output=True,
                text=True,
                timeout=MAKE_SECONDS,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            self._give_up(str(error))
        if done.returncode != 0:
            reason = _last_line(done.stderr, mark="tl: ")
            if done.returncode in _LASTING:
                self._hopeless = reason
            self._give_up(reason)
        told = json.loads(done.stdout)
        self._lsn = told["lsn"]
        return TlBranch(told["name"], told["dsn"], told["lsn"], told["time"])

    def _delete(self, name: str) -> None:
        """Begin to; the next test need not wait for it."""
        from cli.own_command import own_command

        self._collect(MOST_DELETIONS - 1)
        process = subprocess.Popen(
            own_command("delete", name, "--yes"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the tests; what has begun to go shall go.
            start_new_session=True,
        )
        self._deleting.append((name, process))

    def _give_up(self, reason: str) -> None:
        text = f"tl makes no branch: {reason}"
        if self._config.getini("tl_otherwise") == "skip":
            pytest.skip(text)
        pytest.fail(text, pytrace=False)


@pytest.fixture(scope="session")
def _tl_maker(pytestconfig: pytest.Config) -> Iterator[_Maker]:
    maker = _Maker(pytestconfig)
    yield maker
    maker.close()


@pytest.fixture
def tl_branch(_tl_maker: _Maker) -> Iterator[TlBranch]:
    """A fresh branch for this test alone, deleted afterwards."""
    with _tl_maker.branch() as branch:
        yield branch


@pytest.fixture(scope="session")
def tl_branch_session(_tl_maker: _Maker) -> Iterator[TlBranch]:
    """One branch for all tests of the session; with pytest-xdist one for each worker."""
    with _tl_maker.branch() as branch:
        yield branch


def _arguments(config: pytest.Config) -> Iterator[str]:
    """What every branch is made with."""
    for name, _, _ in _OPTIONS:
        value = config.getoption(f"tl_{name}") or config.getini(f"tl_{name}")
        if value or name == "ttl":
            yield from (f"--{name}", value or LIFE)
    for path in config.getoption("tl_run") or config.getini("tl_run"):
        yield from ("--run", os.fspath(path))


def _last_line(text: str, *, mark: str = "") -> str:
    """What `tl` says is wrong: its line with that mark, else the last one."""
    lines = [line for line in text.splitlines() if line.strip()] or ["nothing said"]
    return next((line.removeprefix(mark) for line in lines if mark and line.startswith(mark)), lines[-1])
