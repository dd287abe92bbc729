"""The golden stores of format 1, as committed: where they are, what is what in them, and the second reader's
view."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restore import rescue
from tests.golden.reading import GoldenReader
from timeline.format import branch_state, keys

_HERE = Path(__file__).parent
NEVER_READ_BY_RESCUE = frozenset(
    {"built file listing", "delta manifest", "boot manifest", "mark", "pin", "evidence"}
)
"""Kinds of objects that recovering from a base backup does not need."""


@dataclass(frozen=True, slots=True)
class GoldenStore:
    """One of them. It never changes; what the format gains after it goes into another one."""

    name: str

    @property
    def directory(self) -> Path:
        """The objects, as files named by their keys."""
        return _HERE / f"store-{self.name}"

    @property
    def expectation(self) -> Path:
        """All that is in it, as GoldenReader tells."""
        return _HERE / f"expected-{self.name}.json"

    @property
    def damage(self) -> Path:
        """By kind of object and way to damage it: its key and the errors of the codecs and of rescue.py."""
        return _HERE / f"damage-{self.name}.json"

    @property
    def objects(self) -> Mapping[str, bytes]:
        """All objects by key."""
        return _load_once(self.directory)

    @property
    def expected(self) -> dict[str, Any]:
        """The expectation."""
        found: dict[str, Any] = json.loads(self.expectation.read_text())
        return found

    @property
    def cases(self) -> dict[str, dict[str, str | None]]:
        """The ways to damage it."""
        found: dict[str, dict[str, str | None]] = json.loads(self.damage.read_text())
        return found


V1 = GoldenStore("v1")
"""As the format began."""
V1B = GoldenStore("v1b")
"""With what it had gained before its first release: built snapshots, retention, merging, collection, drills."""
STORES = (V1, V1B)


def load(directory: Path) -> dict[str, bytes]:
    """All objects by key."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@functools.cache
def _load_once(directory: Path) -> dict[str, bytes]:
    return load(directory)


def choose(objects: Mapping[str, bytes]) -> dict[str, str]:
    """One object of every kind that the store holds, such that rescue needs it too, if it reads that kind at all."""
    newest = min(key for key in objects if keys.parse_log_entry(key))
    state, _ = GoldenReader(objects).read_log()
    base = next(snapshot for snapshot in state.snapshots if snapshot.kind == branch_state.BASE)
    built = state.snapshots[-1]
    assert built.kind == branch_state.BUILT and built.boot is not None
    wal = [key for key in objects if key.startswith("packs/") and b'"kind":"wal"' in objects[key][:300]]
    extents = [
        key for key in objects if key.startswith("packs/") and b'"kind":"extents"' in objects[key][:300]
    ]
    chosen = {
        "meta": keys.META,
        "log entry": newest,
        "file listing": keys.manifest(base.files.digest),
        "page manifest": keys.manifest(base.pages[0].digest),
        "extent pack": max(extents, key=lambda key: len(objects[key])),
        "WAL manifest": keys.manifest(state.sealed[-1].manifest.digest),
        "WAL pack": max(wal, key=lambda key: len(objects[key])),
        "chunk": max(key for key in objects if key.startswith("wal/main/2/")),
        "built file listing": keys.manifest(built.files.digest),
        "delta manifest": keys.manifest(built.pages[-1].digest),
        "boot manifest": keys.manifest(built.boot.digest),
    }
    for key in objects:
        if keys.parse_mark(key) is not None:
            chosen["mark"] = key
        elif keys.parse_pin(key) is not None:
            chosen["pin"] = key
        elif key.startswith(keys.DRILLS) and key.endswith("/evidence.json"):
            chosen["evidence"] = key
    return chosen


def rescue_error(objects: Mapping[str, bytes]) -> str | None:
    """What rescue.py says of a store as its last word, ``None`` when it is content."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "store"
        for key, data in objects.items():
            (source / key).parent.mkdir(parents=True, exist_ok=True)
            (source / key).write_bytes(data)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = rescue.main([str(source), str(Path(directory) / "new")])
    return said.getvalue().strip().split("\n")[-1] if code else None
