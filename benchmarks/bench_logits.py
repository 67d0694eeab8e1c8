"""Logits that exist: their log-probs, forward and with backward."""

import pytest

from benchmarks.conftest import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_logits(compare, case, peer):
    compare(case, peer)
