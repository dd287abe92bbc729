"""What a server's log tells of its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from restore.compute import Instance, _Again, _explain

RESTORED = '2026-01-20 10:00:00.000 UTC [7] LOG:  restored log file "000000010000000000000001" from archive\n'
ANEW = "2026-01-20 10:00:09.000 UTC [7] LOG:  all server processes terminated; reinitializing\n"
LOST = (
    "2026-01-20 10:00:08.000 UTC [7] LOG:  checkpointer process (PID 9) was terminated by signal 9: Killed\n"
)


def instance(log: Path) -> Instance:
    return Instance(cast(Any, None), cast(Any, None), log.parent, log)


def test_a_recovery_begun_anew_is_seen_however_much_was_logged_before(tmp_path: Path) -> None:
    log = tmp_path / "postgres.log"
    log.write_text(ANEW + RESTORED * 3000)
    again = _Again(log, len(ANEW))
    assert not again.happened(), "what an earlier start logged"
    with log.open("a") as file:
        file.write(ANEW[:70])
        file.flush()
        assert not again.happened()
        file.write(ANEW[70:] + RESTORED * 3000)
    assert again.happened()
    assert again.happened(), "for good"


def test_the_reason_is_found_behind_a_long_recovery(tmp_path: Path) -> None:
    log = tmp_path / "postgres.log"
    log.write_text(RESTORED * 3000 + LOST)
    assert "checkpointer process (PID 9) was terminated by signal 9" in _explain(instance(log), 0, 1).message
    log.write_text(RESTORED * 3000 + "2026-01-20 [7] FATAL:  no room\n2026-01-20 [7] HINT:  make some\n")
    assert _explain(instance(log), 0, 1).message == "Postgres could not start: no room (make some)"
    log.write_text("2026-01-20 [7] FATAL:  no room\n")
    assert _explain(instance(log), 0, 1).message == "Postgres could not start: no room"
    ended = "FATAL:  could not restore file from archive: child process was terminated by signal 3: Quit\n"
    log.write_text(LOST + ended)
    assert "checkpointer process (PID 9) was terminated by signal 9" in _explain(instance(log), 0, 1).message
    log.write_text("PANIC:  no page\n" + LOST)
    assert _explain(instance(log), 0, 1).message == "Postgres could not start: no page"
