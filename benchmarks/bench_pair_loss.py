"""Token log-probs and segment bounds to DPOP's loss: one launch against the eager fifteen."""

import pytest

from benchmarks.conftest import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_pair_loss(compare, case, peer):
    compare(case, peer)
