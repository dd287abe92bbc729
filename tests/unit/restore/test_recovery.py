"""What Postgres is told at a first start."""

from __future__ import annotations

import pytest

from restore.recovery import Recovery, recovery_from_feed, recovery_in_place
from tests.unit.restore.test_plan import MIB, plan

MADE = plan(7 * MIB + 24)


@pytest.mark.parametrize("recovery", [recovery_in_place(MADE), recovery_from_feed(MADE, "false")])
def test_nobody_reads_during_replay(recovery: Recovery) -> None:
    """EDGE 56: said where no file can overrule it."""
    assert [each.value for each in recovery.options if each.name == "hot_standby"] == ["off"]
