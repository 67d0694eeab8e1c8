"""DPOP in a loop of one's own: from preference pairs to a trained model with the kernels, in plain PyTorch.

    python examples/bare_loop.py --model Qwen/Qwen2.5-0.5B-Instruct --pairs pairs.jsonl --out trained

`pairs.jsonl` holds one object per line: the texts `prompt`, `chosen` and `rejected`. The answers are appended to the
prompt as they are, so let them begin with the space that is to stand between.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpop_kernels import dpop_loss, linear_token_logps


class Sequence(NamedTuple):
    ids: Tensor  # [T] prompt, answer, end of sequence
    num_prompt: int


class Step(NamedTuple):
    loss: float
    chosen_change: float  # log π(y_w|x) - log π_ref(y_w|x), nats per answer, mean over the batch
    rejected_change: float


def encode(tokenizer, prompt: str, answer: str) -> Sequence:
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Sequence(torch.tensor([*prompt_ids, *answer_ids, tokenizer.eos_token_id]), len(prompt_ids))


def pair_logps(model, chosen: list[Sequence], rejected: list[Sequence]) -> Tensor:
    """Log-prob of every answer, summed over its tokens, in nats -> [2, B], chosen answers first."""
    sequences = chosen + rejected
    # padding stands on the right, where causal attention does not look
    ids = pad_sequence([sequence.ids for sequence in sequences], batch_first=True).to(model.device)
    hidden_states = model.base_model(input_ids=ids).last_hidden_state  # [2B, T, H]

    # token t is predicted by the hidden state of token t - 1; only the answers' tokens ever reach the head
    lengths = [len(sequence.ids) - sequence.num_prompt for sequence in sequences]
    rows = torch.arange(len(sequences)).repeat_interleave(torch.tensor(lengths))
    places = torch.cat([torch.arange(sequence.num_prompt, len(sequence.ids)) for sequence in sequences])
    # a model that caps or scales its logits wants softcap= or logit_scale= here; dpop_kernels.ScoringHead knows which
    head = model.get_output_embeddings()
    token_logps = linear_token_logps(hidden_states[rows, places - 1], head.weight, ids[rows, places], bias=head.bias)
    return torch.stack([part.sum() for part in token_logps.split(lengths)]).view(2, -1)


def train(model, tokenizer, pairs: list[dict[str, str]], options: argparse.Namespace) -> list[Step]:
    """Train in place -> what was printed."""
    chosen = [encode(tokenizer, pair["prompt"], pair["chosen"]) for pair in pairs]
    rejected = [encode(tokenizer, pair["prompt"], pair["rejected"]) for pair in pairs]

    def logps_of(batch: Tensor) -> Tensor:
        return pair_logps(model, [chosen[i] for i in batch], [rejected[i] for i in batch])

    # dropout off, for the reference and for the policy: before the first step they are the same model
    model.eval()
    with torch.no_grad():
        batches = torch.arange(len(pairs)).split(options.batch_size)
        reference = torch.cat([logps_of(batch) for batch in tqdm(batches, desc="Reference")], dim=1)  # [2, all pairs]

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    log = []
    for _ in range(options.epochs):
        for batch in torch.randperm(len(pairs)).split(options.batch_size):
            logps, ref_logps = logps_of(batch), reference[:, batch]
            loss = dpop_loss(*logps, *ref_logps, beta=options.beta, dpop_lambda=options.dpop_lambda)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

            step = Step(loss.item(), *(logps - ref_logps).mean(dim=1).tolist())
            log.append(step)
            print(
                f"{len(log):5}  loss {step.loss:.4f}  "
                f"chosen {step.chosen_change:+.3f}  rejected {step.rejected_change:+.3f} nats",
                flush=True,
            )
    return log


def main(argv: list[str] | None = None) -> list[Step]:
    parser = argparse.ArgumentParser(description="Train a causal LM on preference pairs with DPOP.")
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--pairs", required=True, type=Path, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--out", help="folder for the trained model")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=8, help="pairs per step")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--beta", type=float, default=0.3)
    parser.add_argument("--dpop_lambda", type=float, default=50.0, help="0 is DPO")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # AdamW's steps are too small for bf16 weights to notice
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    pairs = [json.loads(line) for line in options.pairs.read_text(encoding="utf-8").splitlines() if line.strip()]
    log = train(model, tokenizer, pairs, options)
    if options.out:
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
    return log


if __name__ == "__main__":
    main()
