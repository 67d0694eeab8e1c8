"""Hidden states and a head: log-probs without logits; reference pass, frozen, trainable."""

import pytest

from benchmarks.conftest import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_head(compare, case, peer):
    compare(case, peer)
