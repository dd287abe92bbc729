"""Names and identifiers, and the rules they obey."""

from __future__ import annotations

import re

from timeline.errors import UsageError

MAIN = "main"
"""Id and name of the branch that is the archived server itself."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")


def branch_name(text: str) -> str:
    """The text, if it may name a branch; raises UsageError otherwise."""
    if _NAME.fullmatch(text) is None or ".." in text:
        raise UsageError(
            f"invalid branch name {text!r}",
            hint="1 to 63 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit",
        )
    return text


def new_branch_name(text: str) -> str:
    """As ``branch_name``, and not ``main``, which is the archived server and no branch of ours."""
    if text == MAIN:
        raise UsageError("'main' is the archived server; no branch can take its name")
    return branch_name(text)
