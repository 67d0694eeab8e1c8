"""The whole head of a DPO step: reference pass, policy pass, loss, gradients."""

import pytest

from benchmarks.conftest import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_dpo(compare, case, peer):
    compare(case, peer)
