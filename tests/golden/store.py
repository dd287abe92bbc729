"""The golden store of format 1, as committed: where it is, what is what in it, and the second reader's
view."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path

from restore import rescue
from tests.golden.reading import GoldenReader
from timeline.format import keys

STORE = Path(__file__).parent / "store-v1"
EXPECTED = Path(__file__).parent / "expected-v1.json"
DAMAGE = Path(__file__).parent / "damage-v1.json"


def load(directory: Path) -> dict[str, bytes]:
    """All objects by key."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def choose(objects: Mapping[str, bytes]) -> dict[str, str]:
    """One object of every kind, such that rescue needs it too."""
    newest = min(key for key in objects if keys.parse_log_entry(key))
    state, _ = GoldenReader(objects).read_log()
    base = state.snapshots[0]
    wal = [key for key in objects if key.startswith("packs/") and b'"kind":"wal"' in objects[key][:300]]
    extents = [
        key for key in objects if key.startswith("packs/") and b'"kind":"extents"' in objects[key][:300]
    ]
    return {
        "meta": keys.META,
        "log entry": newest,
        "file listing": keys.manifest(base.files.digest),
        "page manifest": keys.manifest(base.pages[0].digest),
        "extent pack": max(extents, key=lambda key: len(objects[key])),
        "WAL manifest": keys.manifest(state.sealed[-1].manifest.digest),
        "WAL pack": max(wal, key=lambda key: len(objects[key])),
        "chunk": max(key for key in objects if key.startswith("wal/main/2/")),
    }


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
