"""The code of docs/scoring-head.md gives the log-probs that the model's own logits give."""

import re
from pathlib import Path

import torch
from tiny import tiny_llama

from dpop_kernels import ScoringHead

PAGE = Path(__file__).parents[2] / "docs" / "scoring-head.md"


def test_the_pages_code():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    model = tiny_llama().double().eval()
    names = {"torch": torch, "ScoringHead": ScoringHead, "model": model}
    exec(code, names)
    logps = model(input_ids=names["ids"]).logits.log_softmax(-1)
    expected = torch.stack([logps[0, 1, 7], logps[0, 2, 8], logps[1, 1, 10], logps[1, 2, 11]])
    torch.testing.assert_close(names["logps"], expected, rtol=1e-12, atol=1e-12)
    assert all(parameter.grad is not None for parameter in model.parameters())
