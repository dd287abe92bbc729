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
    # The cost model says what the S3 server counted.
    compared = {one.verb: one for one in report.compared}
    assert compared["PUT"].off_by <= 0.1, compared["PUT"]
    # In the model sealing takes no time. Here it takes seconds, and the next question, which reads all chunks that wait,
    # comes the later: GETs were off by 0.4, 8 and 11 % in three runs on a busy machine, and LISTs are fewer.
    assert compared["GET"].off_by <= 0.2, compared["GET"]
    assert 0 < compared["LIST"].counted <= 1.1 * compared["LIST"].modelled, compared["LIST"]
