"""docs/paper.md's parts: what `dpop compare` and `benchmarks.paper_gradient` have recorded of the paper's claims."""

import json
from pathlib import Path
from typing import Any

from dpop_trainer.compare.report import Comparison, read_comparison, table_rows, token_shifts, verdict
from dpop_trainer.compare.report import curves as curves_of
from dpop_trainer.plots import plot_logratios, plot_token_shift

from benchmarks.levels import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "paper"
IMAGES = ROOT / "docs" / "images"


def low_edit() -> str:
    """The table and the verdict of the comparison on GSM8K pairs."""
    comparison = _gsm8k()
    first, config = comparison.results[0], comparison.config
    num_seeds = len(comparison.of(first.method))
    titles = ["", "chosen Δ, nats", "rejected Δ, nats", "after the edit, nats/token", "tokens that lost"]
    titles += ["reward accuracy", "ranking accuracy"]
    note = (
        f"{first.num_pairs} held-out pairs, mean ± standard deviation of {num_seeds} seeds; {config['max_steps']} "
        f"steps of {config['per_device_train_batch_size']} pairs, lr {config['learning_rate']:g}, "
        f"β {config['beta']:g}, λ {config['dpop_lambda']:g} where nothing else is said "
        f"(torch {comparison.versions['torch']})."
    )
    said = verdict(comparison)
    return f"{table(titles, table_rows(comparison))}\n\n{note}\n\n> {said}"


def after_edit() -> str:
    """Mean log-prob of the chosen answers' tokens after the edit: figure 4 of the paper in numbers."""
    shifts = token_shifts(_gsm8k())
    ref = next(iter(shifts.values())).after.ref_mean
    rows = [["before training", f"{ref:.2f}"]]
    rows += [[name, f"{shift.after.policy_mean:.2f}"] for name, shift in shifts.items()]
    return table(["", "mean log-prob after the edit, nats per token"], rows)


def gradient() -> str:
    """Which way the first step pushes the tokens after the edit."""
    record: dict[str, Any] = json.loads((RESULTS / "gradient.json").read_text())
    rows = [
        [name.upper(), f"{record[f'{name}_pushes_down_share']:.1%}", f"{record[f'{name}_mean_step']:+.1e}"]
        for name in ("dpo", "dpop")
    ]
    note = (
        f"{record['num_tokens']:,} tokens after the edit of {record['num_pairs']} held-out pairs; "
        f"β {record['beta']:g}, λ {record['dpop_lambda']:g} with the hinge active. "
        f"Mean probability of these tokens after the right beginning {record['mean_p_chosen']:.4f}, "
        f"after the wrong one {record['mean_p_rejected']:.4f}. "
        "Largest difference between autograd's step and the derivation: "
        f"{record['largest_difference_from_theory']:.0e}."
    )
    return f"{table(['', 'tokens pushed down', 'mean step on the logit'], rows)}\n\n{note}"


def draw() -> list[Path]:
    """Write the page's pictures -> their paths."""
    comparison = _gsm8k()
    curves, shift = IMAGES / "paper_curves.png", IMAGES / "paper_token_shift.png"
    # the three values of λ lie on each other
    shown = [method for method in comparison.methods if "λ" not in method]
    plot_logratios({method: curves_of(comparison)[method] for method in shown}, curves)
    plot_token_shift({method: token_shifts(comparison)[method] for method in shown}, shift)
    return [curves, shift]


def _gsm8k() -> Comparison:
    return read_comparison(RESULTS / "gsm8k.json")
