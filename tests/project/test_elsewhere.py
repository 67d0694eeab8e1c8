"""The code of docs/elsewhere.md, in a stand-in for the trainers that it is for."""

import math
import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "elsewhere.md"


# LLaMA-Factory passes the four sums alone, ms-swift and TRL up to 0.24 a loss's name and the model's output too
@pytest.mark.parametrize("more", [(), ("sigmoid", {})], ids=["llama_factory", "ms_swift"])
def test_a_trainer_with_a_method_for_its_loss_trains_with_dpop(more):
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], names)

    class Trainer:
        beta = 0.3

    names["use_dpop"](Trainer)
    chosen = torch.tensor([-3.0, -2.0], requires_grad=True)
    sums = chosen, torch.tensor([-4.0, -1.0]), torch.tensor([-2.5, -2.5]), torch.tensor([-4.0, -2.0])
    losses, chosen_rewards, rejected_rewards = Trainer().dpo_loss(*sums, *more)
    # z = 0.3 (-0.5 - 0 - 50 · 0.5) = -7.65, the chosen answer having fallen; and 0.3 (0.5 - 1) = -0.15
    expected = torch.tensor([math.log1p(math.exp(7.65)), math.log1p(math.exp(0.15))])
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    # -β σ(-z), times 1 + 50 where it fell
    slopes = torch.tensor([-0.3 * 51 / (1 + math.exp(-7.65)), -0.3 / (1 + math.exp(-0.15))])
    torch.testing.assert_close(chosen.grad, slopes)
    torch.testing.assert_close(chosen_rewards, torch.tensor([-0.15, 0.15]))
    torch.testing.assert_close(rejected_rewards, torch.tensor([0.0, 0.3]))
