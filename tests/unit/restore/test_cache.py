"""The disk cache: bounded, shared, verified, and never in the way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from restore.cache import SHARDS, DiskCache, WouldBlock
from timeline.clock import SystemClock
from timeline.format.digest import digest_of

BOUND = SHARDS * (1 << 20)


def entry(number: int, size: int = 100_000) -> tuple[bytes, bytes]:
    data = number.to_bytes(8, "big") * (size // 8)
    return digest_of(data), data


def cache_in(directory: Path, bound_bytes: int = BOUND) -> DiskCache:
    return DiskCache(directory, bound_bytes, SystemClock())


def file_of(directory: Path, digest: bytes) -> Path:
    name = digest.hex()
    return directory / "v1" / name[:2] / name[2:]


def used_bytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.glob("v1/??/*"))


def test_what_is_stored_is_loaded_by_every_process(tmp_path: Path) -> None:
    digest, data = entry(1)
    cache_in(tmp_path).store(digest, data)
    other = cache_in(tmp_path)
    assert other.has(digest)
    assert other.load(digest) == data
    assert other.load_part(digest, 0, len(data)) == data
    assert other.load_part(digest, 8, 32) == data[8:32]
    assert other.load(entry(2)[0]) is None
    assert other.load_part(entry(2)[0], 0, 8) is None


@pytest.mark.parametrize("damage", ["flip", "shorten", "lengthen", "empty"])
def test_damaged_entry_is_a_miss_and_goes(tmp_path: Path, damage: str) -> None:
    """P5: what a crash or a failing disk left there is never shown."""
    digest, data = entry(1)
    cache = cache_in(tmp_path)
    cache.store(digest, data)
    file = file_of(tmp_path, digest)
    damaged = {
        "flip": data[:500] + bytes([data[500] ^ 1]) + data[501:],
        "shorten": data[:-1],
        "lengthen": data + b"x",
        "empty": b"",
    }[damage]
    file.write_bytes(damaged)
    with pytest.raises(WouldBlock):
        cache.load_part(digest, 0, 10)
    assert cache.load(digest) is None
    assert not file.exists()
    cache.store(digest, data)
    assert cache.load(digest) == data


def test_bounded_by_eviction_of_what_was_not_used(tmp_path: Path) -> None:
    cache = cache_in(tmp_path, SHARDS * 350_000)
    entries = [entry(n) for n in range(SHARDS * 8)]
    kept = entries[:100]
    for number, (digest, data) in enumerate(entries):
        cache.store(digest, data)
        if number % 100 == 0:
            future = (number + 1) * 10**9 + os.stat(tmp_path).st_mtime_ns
            for used, _ in kept:
                if file_of(tmp_path, used).exists():
                    os.utime(file_of(tmp_path, used), ns=(future, future))
    assert used_bytes(tmp_path) <= SHARDS * 350_000
    assert used_bytes(tmp_path) > SHARDS * 200_000
    assert sum(cache.has(digest) for digest, _ in kept) > 90


def test_two_processes_stay_within_the_bound(tmp_path: Path) -> None:
    bound = SHARDS * 250_000
    program = (
        "import sys\n"
        "from tests.unit.restore.test_cache import cache_in, entry\n"
        "from pathlib import Path\n"
        "cache = cache_in(Path(sys.argv[1]), int(sys.argv[2]))\n"
        "for n in range(900): cache.store(*entry(int(sys.argv[3]) * 1000 + n))\n"
    )
    root = Path(__file__).parents[3]
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(bound), str(n)], cwd=root)
        for n in range(2)
    ]
    assert [p.wait(timeout=60) for p in started] == [0, 0]
    assert used_bytes(tmp_path) <= bound * (1 + 2 / 16)
    assert list((tmp_path / "v1" / "tmp").iterdir()) == []


def test_an_unused_entry_that_is_loaded_is_recent_again(tmp_path: Path) -> None:
    digest, data = entry(1)
    cache = cache_in(tmp_path)
    cache.store(digest, data)
    file = file_of(tmp_path, digest)
    os.utime(file, (1_000_000, 1_000_000))
    cache.load_part(digest, 0, 8)
    assert file.stat().st_mtime > 1_700_000_000


def test_full_disk_means_no_storing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """EDGE 51."""
    cache = cache_in(tmp_path)
    digest, data = entry(1)

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        cache.store(digest, data)
        cache.store(*entry(2))
    assert cache.load(digest) is None
    assert caplog.text.count("No space left on device") == 1
    assert list((tmp_path / "v1" / "tmp").iterdir()) == []


def test_unusable_directory_means_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = cache_in(tmp_path / "file" / "cache")
    digest, data = entry(1)
    cache.store(digest, data)
    assert not cache.usable
    assert not cache.has(digest)
    assert cache.load(digest) is None
    assert cache.load_part(digest, 0, 1) is None
    assert not DiskCache(None, BOUND, SystemClock()).usable
    assert not DiskCache(tmp_path, 0, SystemClock()).usable


def test_litter_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    cache_in(tmp_path)
    old, new = tmp_path / "v1" / "tmp" / "1.2.3", tmp_path / "v1" / "tmp" / "1.2.4"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (1_000_000, 1_000_000))
    cache_in(tmp_path)
    assert not old.exists()
    assert new.exists()
