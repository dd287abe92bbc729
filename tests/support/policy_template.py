"""The part of Terraform's template language that the policies in terraform/ use.

``${name}``, ``%{ if name }`` and ``%{ if name != "" }`` with ``%{ endif }``; anything else is refused, so that
what is rendered here cannot differ from what Terraform makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_TOKEN = re.compile(r"\$\{(?P<value>[^}]*)\}|%\{ *(?P<directive>[^}]*?) *\}")
_NAME = re.compile(r"[a-z_]+")
_IF = re.compile(r'if ([a-z_]+)( != "")?')


def render(text: str, values: Mapping[str, str | bool]) -> str:
    """The text with its values; raises ValueError for what is not understood, KeyError for an unknown name."""
    out: list[str] = []
    open_ifs: list[bool] = []
    at = 0
    for token in _TOKEN.finditer(text):
        shown = all(open_ifs)
        if shown:
            out.append(text[at : token.start()])
        at = token.end()
        if (name := token["value"]) is not None:
            value = values[_checked(name)]
            if not isinstance(value, str):
                raise ValueError(f"{name} is no text")
            if shown:
                out.append(value)
        elif token["directive"] == "endif":
            open_ifs.pop()
        else:
            open_ifs.append(_holds(token["directive"], values))
    if open_ifs:
        raise ValueError("an if without its end")
    rest = text[at:]
    if "${" in rest or "%{" in rest:
        raise ValueError("a directive without its end")
    return "".join(out) + rest


def names_in(text: str) -> frozenset[str]:
    """The names that a template uses."""
    found = set()
    for token in _TOKEN.finditer(text):
        if token["value"] is not None:
            found.add(_checked(token["value"]))
        elif (match := _IF.fullmatch(token["directive"])) is not None:
            found.add(match[1])
    return frozenset(found)


def _checked(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"not the name of a value: {name!r}")
    return name


def _holds(directive: str, values: Mapping[str, str | bool]) -> bool:
    match = _IF.fullmatch(directive)
    if match is None:
        raise ValueError(f"not understood: {directive!r}")
    value = values[match[1]]
    if isinstance(value, bool) == (match[2] is not None):
        raise ValueError(f"{directive!r} asks {value!r} the wrong question")
    return bool(value)
