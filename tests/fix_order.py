"""The order of the tests: random (pytest-randomly), but what takes longest begins first, so that no worker is left alone with
it at the end."""

from __future__ import annotations

import pytest

LONGEST = ("test_soak.py", "test_runbook.py", "test_snapshot_chain.py", "test_fidelity.py")
"""Files, each of which one worker runs."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort them."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
