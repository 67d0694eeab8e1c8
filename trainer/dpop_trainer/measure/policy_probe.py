"""Log-probs of a few tokens under the live policy, written beside every save of it; what is made of it is held to them.

What is loaded again may be another model than the one that trained, and agree with itself. The tokens are spread over
the vocabulary, the same for every model of its size: none is of the data.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpop_trainer.batches.scoring import ScoredModel, forward_inputs
from dpop_trainer.run_folder.files import write_json

PROBE_FILE = "policy_probe.json"
NUM_TOKENS = 32

# nats between what a policy gave and what is made of it: the largest of a token in fp32, whose sums differ in order
# alone; the mean where weights or products are rounded to 16 bits
_FP32_NATS = 1e-3
_ROUNDED_NATS = 0.1


class PolicyProbe(NamedTuple):
    """What a policy gave."""

    input_ids: list[int]
    logps: list[float]
    """Of all tokens but the first, in nats."""
    is_rounded: bool
    """It was computed in 16 bits."""

    def write(self, folder: Path) -> None:
        """Into the folder that holds the policy."""
        write_json(folder / PROBE_FILE, self._asdict())

    @torch.no_grad()
    def check(self, model: Any, *, is_rounded: bool) -> float:
        """-> the largest difference of a token's log-prob under a model, in nats.

        Args:
            model: a causal LM in evaluation mode.
            is_rounded: its weights are of 16 bits.

        Raises:
            ValueError: it is another model than the policy was.
        """
        ids = torch.tensor([self.input_ids], device=model.device)
        logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        differences = logps.gather(1, ids[0, 1:, None])[:, 0].cpu().double() - torch.tensor(self.logps).double()
        rounded = is_rounded or self.is_rounded or torch.get_float32_matmul_precision() != "highest"
        found, bound = float(differences.abs().max()), _FP32_NATS
        if rounded:
            found, bound = float(differences.abs().mean()), _ROUNDED_NATS
        if not found <= bound:
            raise ValueError(
                f"run: expected a model that gives the log-probs that the policy had when it was saved ({PROBE_FILE}) "
                f"to {bound:g} nats, got a difference of {found:.3g}: what was saved is not what was trained. The "
                "weights were written but are not to be trusted."
            )
        return float(differences.abs().max())


def probe_policy(
    policy: ScoredModel, collator: Callable[[list[dict[str, Any]]], Any], device: torch.device, *, is_rounded: bool
) -> PolicyProbe:
    """Score the probe's tokens with the very model, head and layout that train.

    Args:
        policy: in evaluation mode.
        collator: of the training.
        device: where the policy runs.
        is_rounded: its weights or products are of 16 bits.
    """
    config = policy.model.config.get_text_config()
    vocab_size = policy.model.get_input_embeddings().weight.shape[0]
    num_tokens = min(NUM_TOKENS, getattr(config, "max_position_embeddings", None) or NUM_TOKENS)
    ids = [int(i * 7919 % vocab_size) for i in range(1, num_tokens + 1)]
    rejected = [*ids[1:-1], (ids[-1] + 1) % vocab_size]
    record = {"pair_id": 0, "prompt_ids": ids[:1], "chosen_ids": ids[1:], "rejected_ids": rejected}
    batch = collator([record]).to(device)
    with torch.no_grad():
        logps = policy.token_logps(batch, forward_inputs(batch, policy.model))
    # of a pair what both answers begin with, then the rest of the chosen one; of a completion all
    end = batch.cu_seqlens.tolist()[2 if len(batch.cu_seqlens) == 4 else 1]
    return PolicyProbe(ids, logps[:end].double().tolist(), is_rounded)


def read_probe(folder: Path) -> PolicyProbe | None:
    """What was written beside a policy; None where nothing was."""
    try:
        return PolicyProbe(**json.loads((folder / PROBE_FILE).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
