"""The soak, in its short form: `make soak` is the long one."""

from __future__ import annotations

import os
import random

import pytest

from tests.soak.plan import SoakPlan
from tests.soak.run import soak, table


@pytest.mark.xdist_group("soak")
@pytest.mark.timeout(1500)
@pytest.mark.fuse
def test_everything_at_once_for_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    """P1, P4, P6, P9, EDGE 3, 9, 15, 18, 42, 60: nothing acknowledged is missing, nothing is left behind.

    Another schedule each time; TL_SOAK_SEED repeats one.
    """
    seed = int(os.environ.get("TL_SOAK_SEED") or random.SystemRandom().randrange(1 << 32))
    report = soak(SoakPlan(seed, 3.0))
    with capsys.disabled():
        print(f"\n{table(report)}\n{report.to_json()}")
    assert report.passed, [one for one in report.checks if not one.passed]
