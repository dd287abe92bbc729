"""Terraform's files as values: what a module declares, and what its expressions refer to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hcl2

_REFERENCE = re.compile(r"(?<![\w.\"])(?:(data)\.)?([a-z][a-z0-9_]*)\.([a-z][a-z0-9_]*)")
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
_INNER = re.compile(r"\$\{([^{}]*)\}")
_HEADS = {"var", "local", "module", "path", "each"}
_SETTING = re.compile(r"( *)(\S+|\"[^\"]*\")( +)= ?(\S.*)")


@dataclass(frozen=True, slots=True)
class Declared:
    """A variable or an output."""

    name: str
    description: str
    has_type: bool
    value: object
    """The default of a variable, the value of an output."""


@dataclass(frozen=True, slots=True)
class Module:
    """All files of one directory."""

    directory: Path
    body: dict[str, list[dict[str, Any]]]
    """As the parser gives it, blocks of all files together."""

    @property
    def variables(self) -> dict[str, Declared]:
        """By name."""
        return {name: _declared(name, it, "default") for name, it in self._named("variable")}

    @property
    def outputs(self) -> dict[str, Declared]:
        """By name."""
        return {name: _declared(name, it, "value") for name, it in self._named("output")}

    @property
    def locals(self) -> dict[str, object]:
        """By name."""
        return {name: value for block in self.body.get("locals", ()) for name, value in block.items()}

    @property
    def resources(self) -> dict[str, dict[str, Any]]:
        """By ``type.name``; data sources by ``data.type.name``."""
        return {
            f"{head}{kind}.{name}": it
            for block, head in (("resource", ""), ("data", "data."))
            for kind, named in self._named(block)
            for name, it in named.items()
        }

    def calls(self) -> dict[str, dict[str, Any]]:
        """Modules that it calls, by name."""
        return dict(self._named("module"))

    def references(self) -> frozenset[str]:
        """All that its expressions name: ``var.x``, ``local.x``, ``module.x``, ``type.name``, ``data.type.name``."""
        return frozenset(reference for text in _texts(self.body) for reference in references_in(text))

    def _named(self, block: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for each in self.body.get(block, ()):
            yield from each.items()


def load_module(directory: Path) -> Module:
    """The module in this directory."""
    body: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(directory.glob("*.tf")):
        for block, entries in hcl2.loads(path.read_text()).items():
            body.setdefault(block, []).extend(entries)
    return Module(directory, body)


def references_in(text: str) -> Iterator[str]:
    """References of one value: of the whole of ``${…}``, and of what is between braces in a text."""
    for whole in _expressions(text):
        bare = _TEXT.sub('""', whole)
        for match in _REFERENCE.finditer(bare):
            data, kind, name = match.groups()
            if kind in _HEADS or data or "_" in kind:
                yield f"data.{kind}.{name}" if data else f"{kind}.{name}"
        for inside in _TEXT.findall(whole):
            yield from references_in(inside)


def _expressions(text: str) -> Iterator[str]:
    if text.startswith("${") and text.endswith("}") and text.count("${") == text.count('"${') + 1:
        yield text[2:-1]
    else:
        yield from _INNER.findall(text)


def misformatted(text: str) -> list[str]:
    """What ``terraform fmt`` would change, as far as is known here: indentation, alignment, blanks, the file's end."""
    found = []
    if not text.endswith("\n") or text.endswith("\n\n"):
        found.append("end of file")
    depth = 0
    run: list[tuple[int, int, int]] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        bare = _TEXT.sub('""', line.split(" #")[0]) if not line.lstrip().startswith("#") else ""
        stripped = bare.lstrip(" ")
        closing = len(stripped) - len(stripped.lstrip(")}]"))
        if line != line.rstrip() or "\t" in line:
            found.append(f"{number}: blanks")
        if line and len(line) - len(line.lstrip(" ")) != 2 * (depth - closing):
            found.append(f"{number}: indentation")
        depth += sum(map(bare.count, "([{")) - sum(map(bare.count, ")]}"))
        setting = _SETTING.fullmatch(line)
        place = (number, len(setting[1] + setting[2]), len(setting[3])) if setting is not None else None
        if place is not None and not bare.rstrip().endswith(("{", "[", "(")):
            run.append(place)
            continue
        # What goes over several lines stands alone.
        found += [*_misaligned(run), *_misaligned([place] if place is not None else [])]
        run = []
    return found


def _misaligned(run: list[tuple[int, int, int]]) -> list[str]:
    """Lines of neighbouring settings (number, end of the name, blanks after it) whose ``=`` is not where it belongs."""
    column = max((end for _, end, _ in run), default=0) + 1
    return [f"{number}: alignment" for number, end, blanks in run if end + blanks != column]


def _declared(name: str, it: dict[str, Any], value: str) -> Declared:
    return Declared(name, str(it.get("description", "")), "type" in it, it.get(value))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
