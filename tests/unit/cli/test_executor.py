"""Executors: what is asked for, what is begun again, what is told to end."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from cli.each_tasks import chosen_clusters, refuse_named_by_us, row_of, task_for
from cli.executor import (
    LOST,
    MAX_ATTEMPTS,
    STOPPED,
    DaskPlace,
    LocalPlace,
    Outcome,
    Task,
    not_run,
    parse_place,
    worst,
)
from cli.executor_local import LocalExecutor
from cli.tl_toml import Cluster
from tests.support.fake_command import program, until
from timeline.clock import SystemClock
from timeline.errors import UsageError

ROOT = Path(__file__).parents[3]


def outcomes(
    programs: Sequence[str], *, width: int = 2, stop_when: Path | None = None, seconds: float = 60.0
) -> dict[str, Outcome]:
    """Run each program as if it were ``tl``; by key, the programs' numbers."""

    async def run() -> dict[str, Outcome]:
        stop = asyncio.Event()
        executor = LocalExecutor(
            width, environment=os.environ, clock=SystemClock(), command=lambda text: program(text)
        )
        tasks = [Task(str(number), (text,), seconds) for number, text in enumerate(programs)]

        async def stopping() -> None:
            if stop_when is not None:
                await until(stop_when.exists)
                stop.set()

        telling = asyncio.create_task(stopping())
        found = [outcome async for outcome in executor.outcomes(tasks, stop)]
        await telling
        assert len(found) == len(tasks), "one for each"
        return {outcome.key: outcome for outcome in found}

    return asyncio.run(run())


def test_codes_documents_and_last_words() -> None:
    found = outcomes(
        [
            "print('noise'); print('{\"a\": 1}')",
            "import sys; print('tl: broken', file=sys.stderr); sys.exit(4)",
            "print('no document')",
        ]
    )
    assert [found[key].exit_code for key in "012"] == [0, 4, 0]
    assert [found[key].document for key in "012"] == ['{"a": 1}', None, None]
    assert found["1"].message == "exit code 4: broken" and found["1"].lines == ("tl: broken",)
    assert found["0"].message == "" and {outcome.attempts for outcome in found.values()} == {1}


def test_a_long_document_comes_whole() -> None:
    """A report of a thousand problems is one line of megabytes."""
    found = outcomes(["import json; print(json.dumps({'text': 'x' * 3_000_000}))"])
    assert found["0"].document is not None and len(json.loads(found["0"].document)["text"]) == 3_000_000


def test_what_was_killed_is_begun_again_and_not_for_ever(tmp_path: Path) -> None:
    """The first dies once, the second always."""
    mark = tmp_path / "mark"
    once = f"""
import os, pathlib, signal
mark = pathlib.Path({str(mark)!r})
if not mark.exists():
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)
print("{{}}")
"""
    found = outcomes([once, "import os; os.kill(os.getpid(), 9)", "import sys; sys.exit(1)"])
    assert (found["0"].exit_code, found["0"].attempts) == (0, 2)
    assert (found["1"].exit_code, found["1"].attempts) == (LOST, MAX_ATTEMPTS)
    assert found["1"].message == "killed by SIGKILL"
    assert (found["2"].exit_code, found["2"].attempts) == (1, 1), "it came to its end: once is enough"


def test_no_more_at_a_time_than_were_allowed(tmp_path: Path) -> None:
    """Each says how many are there while it runs."""
    text = f"""
import os, pathlib, time
place = pathlib.Path({str(tmp_path)!r})
mine = place / str(os.getpid())
mine.touch()
time.sleep(0.2)
print('{{"at_once": %d}}' % len(list(place.iterdir())))
mine.unlink()
"""
    found = outcomes([text] * 6, width=2)
    counts = [json.loads(outcome.document or "")["at_once"] for outcome in found.values()]
    assert max(counts) <= 2


def test_stop_ends_what_runs_and_begins_nothing(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    text = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(600)"
    found = outcomes([text, text, text], width=1, stop_when=begun)
    assert [found[key].exit_code for key in "012"] == [STOPPED] * 3
    assert [found[key].attempts for key in "012"] == [1, 0, 0]


def test_a_time_limit_is_no_loss() -> None:
    found = outcomes(["import time; time.sleep(600)"], seconds=0.5)
    assert (found["0"].exit_code, found["0"].attempts) == (LOST, 1)
    assert "its time limit" in found["0"].message


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_a_command_does_not_outlive_who_started_it(tmp_path: Path) -> None:
    """Its parent is killed; the command gets SIGTERM and clears up."""
    told = tmp_path / "told"
    child = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from restore.attached import attach; attach(int(sys.argv[1]))\n"
        "import signal, time, pathlib\n"
        f"def end(*_): pathlib.Path({str(told)!r}).write_text('ended'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())]).wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    asyncio.run(until(lambda: told.exists() and told.read_text() == "ended"))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_a_command_whose_parent_is_gone_already_does_not_begin() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from restore.attached import attach; attach(1); print('ran')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (STOPPED, "")


def test_where() -> None:
    assert parse_place("local:3") == LocalPlace(3) and parse_place("local") == LocalPlace(2)
    assert parse_place("tcp://10.0.0.7:8786") == DaskPlace("tcp://10.0.0.7:8786")
    for wrong in ("local:0", "local:65", "local:", "tcp://host", "10.0.0.7:8786", ""):
        with pytest.raises(UsageError, match="not an executor"):
            parse_place(wrong)


def test_the_worst_exit_code() -> None:
    assert worst([]) == 0 and worst([0, 0]) == 0
    assert worst([0, 7, 1]) == 1 and worst([6, 4, 5, 2]) == 4 and worst([0, 99]) == 1


def test_what_goes_over_the_wire_comes_back_the_same() -> None:
    task = Task("a", ("verify",), 1.0)
    assert pickle.loads(pickle.dumps(task)) == task
    outcome = not_run(task, "why")
    assert pickle.loads(pickle.dumps(outcome)) == outcome


def cluster(
    name: str, *, store: str | None = "", url: str | None = None, region: str | None = None
) -> Cluster:
    return Cluster(name, f"file:///{name}" if store == "" else store, url, region, None)


def test_which_clusters() -> None:
    known = [cluster("a"), cluster("b"), cluster("c")]
    assert chosen_clusters(known, (), everything=True) == tuple(known)
    assert chosen_clusters(known, ("c", "a"), everything=False) == (known[0], known[2])
    for names, everything, why in (
        (("x",), False, "no cluster 'x'"),
        ((), False, "no cluster was named"),
        (("a",), True, "exclude"),
    ):
        with pytest.raises(UsageError, match=why):
            chosen_clusters(known, names, everything=everything)
    with pytest.raises(UsageError, match="names no cluster"):
        chosen_clusters([], (), everything=True)
    with pytest.raises(UsageError, match="store is missing"):
        chosen_clusters([cluster("a", store=None)], (), everything=True)


def test_words_of_a_task() -> None:
    """A snapshot needs no tl.toml where it runs; what keeps to a table of it does."""
    there = cluster("a", url="https://s3", region="r")
    assert task_for("verify", ("--data",), there, 5.0) == Task(
        "a",
        (
            *("verify", "--data", "--store", "file:///a", "--json"),
            *("--endpoint-url", "https://s3", "--region", "r"),
        ),
        5.0,
    )
    assert task_for("gc", ("--yes",), cluster("a"), 5.0).argv[-2:] == ("--cluster", "a")
    assert task_for("snapshot", (), cluster("a"), 5.0).argv[-2:] == ("--wait", "1h")
    for word in ("--store", "--store=x", "--cluster", "--json"):
        with pytest.raises(UsageError, match="comes from"):
            refuse_named_by_us((word,))


def test_what_is_said_of_an_outcome() -> None:
    task = Task("a", ("verify",), 1.0)
    document = json.dumps({"snapshots": [{"lsn": "0/5"}], "reason": ""})
    done = Outcome("a", 0, "", (), document, "w", 1.0, 1)
    assert row_of("snapshot", done).said == "1 built, at 0/5"
    assert row_of("gc", done).said == "done"
    assert row_of("gc", not_run(task, "why not")).said == "why not"


def test_dask_is_imported_by_nobody_who_does_not_ask_for_it() -> None:
    """The command line starts fast."""
    code = (
        "import sys, cli.main, cli.each, cli.verify, cli.executor_local\n"
        "heavy = {'dask', 'distributed', 'tornado', 'numpy', 'pyarrow', 'psycopg', 'aiobotocore', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
