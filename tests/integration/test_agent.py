"""The agent: one per user and state directory, tiny start-up, little memory, nothing lost when it is killed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from restore import agent, agent_server, mount_table
from restore.mount_spec import MountSpec, encode_spec, read_stats
from restore.overlay import Overlay
from tests.support.lazy_branch import agent_state, wait_until
from tests.support.plain_snapshot import store_directory
from tests.support.postgres import scratch
from timeline.clock import SystemClock
from timeline.format import keys
from timeline.format.branch_state import Snapshot
from timeline.format.file_listing import write_file_listing
from timeline.format.manifest import FileRow
from timeline.lsn import Lsn
from timeline.store.local import LocalStore

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse"),
]


class Place:
    """A store with a small snapshot, and directories for mounts of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        source = directory / "source"
        (source / "base").mkdir(parents=True)
        (source / "base" / "1").write_bytes(b"content" * 100_000)
        (source / "PG_VERSION").write_text("15\n")

        self.snapshot = self.put(lambda store: store_directory(store, source, SystemClock()))
        self._made = 0

    def put(self, work: Callable[[LocalStore], Awaitable[Snapshot]]) -> Snapshot:
        """Run something on the store."""

        async def run() -> Snapshot:
            store = LocalStore(self.store)
            try:
                return await work(store)
            finally:
                await store.aclose()

        return asyncio.run(run())

    def spec(self, **changes: object) -> Path:
        """A new mount.json with an overlay and a mount point of its own."""
        self._made += 1
        directory = self.directory / str(self._made)
        (directory / "data").mkdir(parents=True)
        Overlay.create(directory / "overlay")
        spec = MountSpec(
            store_url=str(self.store),
            snapshot=self.snapshot,
            overlay=str(directory / "overlay"),
            mountpoint=str(directory / "data"),
            uid=os.geteuid(),
            gid=os.getegid(),
            durable=True,
            log=str(directory / "mount.log"),
            stats=str(directory / "stats.json"),
        )
        path = directory / "mount.json"
        path.write_bytes(encode_spec(replace(spec, **changes)))  # type: ignore[arg-type]
        return path


@pytest.fixture
def place() -> Iterator[Place]:
    directory = scratch("tl-agent-")
    yield Place(directory)
    for mounted in mount_table.mounted():
        if mounted.mountpoint.startswith(f"{directory}/"):
            mount_table.unmount(mounted.mountpoint, detach=True)
    shutil.rmtree(directory)


@pytest.fixture
def state() -> Iterator[Path]:
    with agent_state() as directory:
        yield directory


def data_of(spec: Path) -> Path:
    return spec.parent / "data"


def test_mount_and_unmount(place: Place, state: Path) -> None:
    spec = place.spec()
    assert agent.ping(state) is None
    pid = agent.mount(state, spec)
    assert (data_of(spec) / "PG_VERSION").read_text() == "15\n"
    assert agent.mount(state, spec) == pid
    assert agent.mounts(state) == (agent.AgentMount(str(data_of(spec)), pid, str(spec)),)
    agent.unmount(state, data_of(spec))
    assert agent.mounts(state) == ()
    assert not os.path.exists(f"/proc/{pid}")
    assert os.listdir(data_of(spec)) == []
    agent.unmount(state, data_of(spec))
    stats = read_stats(spec.parent / "stats.json")
    assert stats is not None
    assert not stats.mounted


def test_socket_is_private_and_may_lie_deep(place: Place) -> None:
    with agent_state() as shallow:
        deep = shallow / ("d" * 100) / ("e" * 100)
        deep.mkdir(parents=True)
        spec = place.spec()
        agent.mount(deep, spec)
        assert (deep / agent.SOCKET).stat().st_mode & 0o777 == 0o600
        pid = agent.ping(deep)
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not os.path.exists(f"/proc/{pid}"))


def test_it_runs_outside_the_callers_session(place: Place, state: Path) -> None:
    pid = agent.mount(state, place.spec())
    server = agent.ping(state)
    assert server is not None
    for found in (pid, server):
        assert os.getsid(found) != os.getsid(0)
        assert os.readlink(f"/proc/{found}/cwd") == "/"
    assert int(Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[1]) != os.getpid()


def test_callers_at_once_start_one_agent(place: Place, state: Path) -> None:
    specs = [place.spec() for _ in range(4)]
    program = (
        "import sys; from pathlib import Path; from restore import agent\n"
        "agent.mount(Path(sys.argv[1]), Path(sys.argv[2])); print(agent.ping(Path(sys.argv[1])))"
    )
    callers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(state), str(spec)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        for spec in specs
    ]
    pids = {caller.communicate(timeout=60)[0] for caller in callers}
    assert len(pids) == 1
    assert len(agent.mounts(state)) == 4


def test_it_ends_after_the_last_mount(place: Place, state: Path) -> None:
    spec = place.spec()
    agent.mount(state, spec)
    pid = agent.ping(state)
    agent.unmount(state, data_of(spec))
    assert agent.ping(state) == pid
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), agent_server.LINGER_SECONDS + 5)
    assert not (state / agent.SOCKET).exists()
    agent.mount(state, spec)
    assert agent.ping(state) not in (pid, None)


def test_killed_agent_leaves_its_mounts(place: Place, state: Path) -> None:
    one, two = place.spec(), place.spec()
    first = agent.mount(state, one)
    server = agent.ping(state)
    assert server is not None
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: agent.ping(state) is None)
    assert (data_of(one) / "PG_VERSION").read_text() == "15\n"
    agent.mount(state, two)
    agent.unmount(state, data_of(one))
    assert mount_table.find(data_of(one)) is None
    wait_until(lambda: not os.path.exists(f"/proc/{first}"))
    assert (data_of(two) / "PG_VERSION").read_text() == "15\n"


def test_killed_mount_is_mounted_again(place: Place, state: Path) -> None:
    spec = place.spec()
    pid = agent.mount(state, spec)
    (data_of(spec) / "mine").write_text("kept")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not agent.mounts(state))
    assert mount_table.find(data_of(spec)) is not None
    agent.mount(state, spec)
    assert (data_of(spec) / "mine").read_text() == "kept"
    assert sum(m.mountpoint == str(data_of(spec)) for m in mount_table.mounted()) == 1


def test_killed_mount_can_be_unmounted(place: Place, state: Path) -> None:
    spec = place.spec()
    pid = agent.mount(state, spec)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not agent.mounts(state))
    agent.unmount(state, data_of(spec))
    assert os.listdir(data_of(spec)) == []


def test_why_a_mount_fails_is_told(place: Place, state: Path) -> None:
    missing = place.spec(overlay="/nonexistent")
    with pytest.raises(agent.AgentError, match="holds no overlay"):
        agent.mount(state, missing)
    nowhere = place.spec(mountpoint="/nonexistent/data")
    with pytest.raises(agent.AgentError, match="cannot mount /nonexistent/data") as refused:
        agent.mount(state, nowhere)
    assert refused.value.hint is not None
    damaged = place.spec(
        snapshot=replace(place.snapshot, files=replace(place.snapshot.files, digest="0" * 64))
    )
    with pytest.raises(agent.AgentError, match="object is missing") as lost:
        agent.mount(state, damaged)
    assert lost.value.exit_code == 4
    broken = place.spec()
    broken.write_text("{}")
    with pytest.raises(agent.AgentError, match="format is not 1"):
        agent.mount(state, broken)
    assert agent.mounts(state) == ()


def test_agent_of_older_code_gives_way(place: Place, state: Path, tmp_path: Path) -> None:
    """After an upgrade of tl, what is mounted stays mounted."""
    root = Path(agent.__file__).parents[1]
    for package in ("restore", "timeline"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (tmp_path / "restore").iterdir():
        os.utime(file, (1_000_000, 1_000_000))
    one, two = place.spec(), place.spec()
    program = (
        "import sys; from pathlib import Path; from restore import agent\n"
        "agent.mount(Path(sys.argv[1]), Path(sys.argv[2])); print(agent.ping(Path(sys.argv[1])))"
    )
    caller = subprocess.run(
        [sys.executable, "-c", program, str(state), str(one)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    old = int(caller.stdout)
    agent.mount(state, two)
    new = agent.ping(state)
    assert new not in (old, None)
    assert (data_of(one) / "PG_VERSION").read_text() == "15\n"
    agent.unmount(state, data_of(one))
    wait_until(lambda: not os.path.exists(f"/proc/{old}"), agent_server.LINGER_SECONDS + 5)
    assert (data_of(two) / "PG_VERSION").read_text() == "15\n"


def test_expired_branches_have_their_command_run(place: Place, state: Path) -> None:
    """A branch without a mount keeps the agent too, until its expiry unregisters it."""
    now = SystemClock().now()
    ran = state / "ran"
    agent.register(state, "later", now + 3600 * 1_000_000, ["false"])
    assert agent.ping(state) is not None
    agent.register(
        state, "soon", now + 1_500_000, [sys.executable, "-c", f"open({str(ran)!r}, 'a').write('x')"]
    )
    assert not ran.exists()
    wait_until(ran.exists, 10)
    time.sleep(agent_server.LINGER_SECONDS + 1)
    assert ran.read_text() == "x"
    assert agent.ping(state) is not None
    agent.unregister(state, "soon")
    agent.unregister(state, "later")


def test_start_up_is_tiny(place: Place, state: Path) -> None:
    """Milliseconds with a running agent; the imports are paid once."""
    agent.mount(state, place.spec())
    times = []
    for _ in range(5):
        spec = place.spec()
        began = time.perf_counter()
        agent.mount(state, spec)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.1, times


def test_memory(place: Place, state: Path) -> None:
    """P9: a mount below 150 MB, an idle further one below 30 MB of its own."""
    first, further = place.spec(), place.spec()
    pid = agent.mount(state, first)
    other = agent.mount(state, further)
    (data_of(first) / "base" / "1").read_bytes()
    time.sleep(1.5)
    assert memory_of(pid)["Rss"] < 150_000
    idle = memory_of(other)
    assert idle["Private_Dirty"] + idle["Private_Clean"] < 30_000


def memory_of(pid: int) -> dict[str, int]:
    """kB by kind."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name.rstrip(":"): int(value) for name, value, *_ in (line.split() for line in lines)}


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far (proc(5), fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


FILES = 100_000


def test_a_hundred_thousand_files(place: Place, state: Path) -> None:
    """P9: memory does not grow with the files of a database; listing a directory of them is no wait."""

    async def put_listing(store: LocalStore) -> Snapshot:
        rows = [
            FileRow("base", "d", 0, 0o700, None, None, Lsn(0)),
            FileRow("base/5", "d", 0, 0o700, None, None, Lsn(0)),
        ]
        rows += [FileRow(f"base/5/{n}", "f", 8192, 0o600, None, None, Lsn(0)) for n in range(FILES)]
        data, ref = write_file_listing(rows)
        await store.create(keys.manifest(ref.digest), data)
        return replace(place.snapshot, files=ref)

    spec = place.spec(snapshot=place.put(put_listing))
    pid = agent.mount(state, spec)
    directory = data_of(spec) / "base" / "5"
    before = memory_of(pid)["Rss"]
    began = processor_seconds(pid)
    names = os.listdir(directory)
    taken = processor_seconds(pid) - began
    assert len(set(names)) == FILES
    # Its own time: a busy machine does not count.
    assert taken < 8
    (directory / "17").unlink()
    (directory / "new").write_text("x")
    (directory / "18").rename(directory / "moved")
    changed = set(os.listdir(directory))
    assert changed == set(names) - {"17", "18"} | {"new", "moved"}
    assert all((directory / str(n)).stat().st_size == 8192 for n in range(20, FILES, 500))
    assert memory_of(pid)["Rss"] - before < 20_000


def test_imports_of_a_mount() -> None:
    """Whatever is imported is paid by the first branch: nothing that a mount does not need."""
    program = "import sys, restore.agent_server, restore.mount_process; print(*sorted(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env
    )
    modules = set(found.stdout.split())
    assert "restore.mount_process" in modules
    unwanted = (
        *("numba", "llvmlite", "aiobotocore", "botocore", "boto3", "psycopg", "click", "rich", "pandas"),
        *("pyarrow.dataset", "pyarrow.compute", "pyarrow.flight", "pyarrow.acero"),
    )
    assert [name for name in unwanted if name in modules] == []


def test_client_imports_little() -> None:
    program = "import sys, restore.agent; print(*sorted(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env
    )
    assert [n for n in ("pyfuse3", "pyarrow", "numpy", "zstandard") if n in found.stdout.split()] == []


def test_no_thread_and_no_loop_before_the_fork(place: Place, state: Path) -> None:
    agent.mount(state, place.spec())
    server = agent.ping(state)
    assert len(os.listdir(f"/proc/{server}/task")) == 1


def test_many_requests_at_once(place: Place, state: Path) -> None:
    specs = [place.spec() for _ in range(6)]
    agent.register(state, "keep", SystemClock().now() + 10**12, ["true"])
    failures: list[BaseException] = []

    def work(spec: Path) -> None:
        try:
            for _ in range(3):
                agent.mount(state, spec)
                (data_of(spec) / "x").write_text("x")
                agent.unmount(state, data_of(spec))
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(spec,)) for spec in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert agent.mounts(state) == ()
