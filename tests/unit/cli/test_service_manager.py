"""sd_notify against a real datagram socket."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

import cli
from cli.service_manager import ServiceManager
from cli.unit_file import unit_text
from tests.support.manual_clock import ManualClock

ROOT = Path(cli.__file__).parents[1]


@pytest.mark.parametrize("abstract", [False, True])
def test_datagrams(tmp_path: Path, abstract: bool) -> None:
    clock = ManualClock()
    name = f"@tl-test-{os.getpid()}" if abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0"))
        listener.settimeout(10)
        manager = ServiceManager({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "60000000"}, clock)
        assert manager.feed_seconds == 30
        clock.advance(5)
        manager.ready("up")
        manager.say("up")
        manager.say("two\nlines")
        manager.reloading()
        for _ in range(61):
            manager.feed()
            clock.advance(1)
        manager.stopping("bye")
        manager.close()
        manager.say("never sent")
        heard = [listener.recv(4096).decode() for _ in range(7)]
        assert heard == [
            "READY=1\nSTATUS=up",
            "STATUS=two lines",
            "RELOADING=1\nMONOTONIC_USEC=5000000",
            *["WATCHDOG=1"] * 3,
            "STOPPING=1\nSTATUS=bye",
        ]


def test_nobody_there_is_no_failure(tmp_path: Path) -> None:
    clock = ManualClock()
    for environment in ({}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}, {"NOTIFY_SOCKET": "relative"}):
        manager = ServiceManager(environment, clock)
        manager.ready("x")
        manager.feed()
        manager.close()


def test_a_watchdog_of_another_process_is_not_fed() -> None:
    assert ServiceManager({"WATCHDOG_USEC": "10", "WATCHDOG_PID": "1"}, ManualClock()).feed_seconds is None
    assert ServiceManager({"WATCHDOG_USEC": "x"}, ManualClock()).feed_seconds is None


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "tl-daemon.service"
    unit.write_text(unit_text(Path("/etc/tl/a b%.toml")))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tl-daemon.service" not in done.stderr


def test_the_unit_has_the_right_command() -> None:
    (line,) = [line for line in unit_text(Path("/x/t.toml")).splitlines() if line.startswith("ExecStart=")]
    words = line.removeprefix("ExecStart=").split()
    assert words[-3:] == ["daemon", "--config", "/x/t.toml"]
    assert Path(words[0]).exists()


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "cli" / "Containerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def test_the_container_file_copies_what_there_is() -> None:
    """Images cannot be built in every place that runs tests; what can be known without, is."""
    found = instructions()
    assert {name for name, _ in found} <= {
        *(
            "FROM",
            "RUN",
            "COPY",
            "ENV",
            "USER",
            "VOLUME",
            "EXPOSE",
            "HEALTHCHECK",
            "STOPSIGNAL",
            "ENTRYPOINT",
            "CMD",
        )
    }
    copied = [rest.split() for name, rest in found if name == "COPY" and "--from" not in rest]
    sources = [source for words in copied for source in words[:-1]]
    assert {"pyproject.toml", "timeline", "restore", "cli"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
    names = [name for name, _ in found]
    # The image's user is the last word before it runs, and is not root.
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert dict(found)["USER"] not in ("root", "0")
    assert dict(found)["ENTRYPOINT"] == '["tl", "daemon"]'
