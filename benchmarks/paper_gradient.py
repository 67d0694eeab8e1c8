"""Which way DPO and DPOP push the tokens after the edit, on real pairs: `python -m benchmarks.paper_gradient --help`.

Let t be the token at a position after the edit, the same in both answers, and p_w and p_l its probability after the
chosen and after the rejected beginning. If both contexts share the logit of t (which is what the paper's theorem
assumes; in a network they share the weights), then one step of gradient descent moves it by

    DPO                      β σ(-z) · ((1 - p_w) - (1 - p_l))             = β σ(-z) · (p_l - p_w)
    DPOP, hinge active       β σ(-z) · ((1 + λ) (1 - p_w) - (1 - p_l))

times the learning rate. A model that finds t likelier after the right beginning, p_w > p_l, is thus pushed *away* from
t by DPO, the more the better it knew; DPOP pushes towards it wherever (1 + λ)(1 - p_w) > 1 - p_l.

The two expressions are not taken on trust: autograd gives the gradient of the loss with respect to the logits of both
rows, and the record holds the largest difference.

Source: Pal et al. 2024, arXiv:2402.13228, section 3 and its theorem on pairs that differ in one token.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from dpop_trainer.data import load_pairs, tokenise_pairs
from dpop_trainer.data.edits import edit_regions
from dpop_trainer.models.loading import load_model, load_tokenizer, prepare_tokenizer
from dpop_trainer.run_folder.versions import versions
from torch import Tensor
from tqdm.auto import tqdm

from dpop_kernels import dpo_loss, dpop_loss

BETA, LAMBDA = 0.3, 50.0

# The chosen answer's log-prob against a reference that gave it this much more, so that the hinge is active; and for
# DPO the tie of the first step
DEFICIT_NATS = 1.0


def answer_logits(model: Any, prompt_ids: list[int], answer_ids: list[int]) -> Tensor:
    """[T, V] fp64, a leaf: what the model predicts each answer token from."""
    ids = torch.tensor([prompt_ids + answer_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
    return logits.double().requires_grad_()


def pair_figures(model: Any, record: dict[str, Any]) -> dict[str, Tensor]:
    """Per token after the edit: p_w, p_l, and the step on the shared logit under both losses, by autograd."""
    chosen_ids, rejected_ids = record["chosen_ids"], record["rejected_ids"]
    rows = [answer_logits(model, record["prompt_ids"], ids) for ids in (chosen_ids, rejected_ids)]
    count = len(chosen_ids) - edit_regions(chosen_ids, rejected_ids).end
    targets = torch.tensor(chosen_ids[len(chosen_ids) - count :])
    places = [(torch.arange(len(row) - count, len(row)), targets) for row in rows]
    logps = [
        row.log_softmax(-1)[range(len(ids)), ids] for row, ids in zip(rows, (chosen_ids, rejected_ids), strict=True)
    ]
    chosen, rejected = (values.sum()[None] for values in logps)
    steps = {}
    for name, loss in (
        ("dpo", dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=BETA)),
        (
            "dpop",
            dpop_loss(
                chosen, rejected, chosen.detach() + DEFICIT_NATS, rejected.detach(), beta=BETA, dpop_lambda=LAMBDA
            ),
        ),
    ):
        grads = torch.autograd.grad(loss, rows, retain_graph=True)
        steps[name] = -torch.stack([grad[place] for grad, place in zip(grads, places, strict=True)]).sum(0)
    p_chosen, p_rejected = (row.detach().softmax(-1)[place] for row, place in zip(rows, places, strict=True))
    return {"p_chosen": p_chosen, "p_rejected": p_rejected, **steps}


def expected_steps(p_chosen: Tensor, p_rejected: Tensor) -> dict[str, Tensor]:
    """The two expressions of this module's head."""
    z_dpop = BETA * (-DEFICIT_NATS - LAMBDA * DEFICIT_NATS)
    weight_dpop = BETA * torch.sigmoid(torch.tensor(-z_dpop, dtype=torch.float64))
    return {
        "dpo": BETA / 2 * (p_rejected - p_chosen),  # z = 0 at the first step
        "dpop": weight_dpop * ((1 + LAMBDA) * (1 - p_chosen) - (1 - p_rejected)),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.paper_gradient", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the model that preference training starts from")
    parser.add_argument("--pairs", required=True, help="low-edit pairs")
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--max_length", type=int, default=512)
    options = parser.parse_args(argv)
    tokenizer = load_tokenizer(options.model)
    prepare_tokenizer(tokenizer)
    dataset = load_pairs(options.pairs)
    dataset, counts = tokenise_pairs(
        dataset.select(range(min(options.limit, len(dataset)))), tokenizer, max_length=options.max_length
    )
    model = load_model(options.model).eval()
    records: Any = dataset
    parts = [pair_figures(model, record) for record in tqdm(records, desc="Gradients")]
    tokens = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    expected = expected_steps(tokens["p_chosen"], tokens["p_rejected"])
    record = {
        "num_pairs": counts.num_pairs,
        "num_tokens": len(tokens["p_chosen"]),
        "beta": BETA,
        "dpop_lambda": LAMBDA,
        "mean_p_chosen": tokens["p_chosen"].mean().item(),
        "mean_p_rejected": tokens["p_rejected"].mean().item(),
        "dpo_pushes_down_share": (tokens["dpo"] < 0).double().mean().item(),
        "dpo_mean_step": tokens["dpo"].mean().item(),
        "dpop_pushes_down_share": (tokens["dpop"] < 0).double().mean().item(),
        "dpop_mean_step": tokens["dpop"].mean().item(),
        "largest_difference_from_theory": max(
            (tokens[name] - expected[name]).abs().max().item() for name in ("dpo", "dpop")
        ),
        "versions": versions(),
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
