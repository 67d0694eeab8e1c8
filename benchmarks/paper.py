"""docs/paper.md's parts: what `dpop compare` and `benchmarks.paper_gradient` have recorded of the paper's claims."""

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dpop_trainer.report.plots import logratio_panels, token_shift_panels
from dpop_trainer.report.signed import minus, signed
from dpop_trainer.report.svg import Panel
from dpop_trainer.tools.compare.answers import Answers
from dpop_trainer.tools.compare.report import (
    WRITING,
    Comparison,
    RunResult,
    has_writing,
    read_comparison,
    seeds,
    table_rows,
    table_titles,
    token_shifts,
    verdict,
)
from dpop_trainer.tools.compare.report import curves as curves_of
from dpop_trainer.tools.evaluation.compare import as_markdown

from benchmarks.levels import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "paper"

LOSSES = ["DPO", "IPO", "SLIC", "DPOP"]
LAMBDAS = ["DPOP, λ = 5", "DPOP, λ = 500"]
BETAS = ["DPO, β = 0.1", "DPO", "DPO, β = 1.0", "DPOP, β = 0.1", "DPOP", "DPOP, β = 1.0"]
_SHOWN = {"smollm2": ["DPO", "DPO + SFT", "IPO", "DPOP"], "conversations": ["DPO", "DPO + SFT", "DPOP"]}
"""In the pictures; of the other comparisons `LOSSES`, since the values of λ would lie on each other."""
_FAST = ["DPO, lr = 0.0008", "DPOP, lr = 0.0008"]
_MORE = ["DPO", "SLIC", "DPOP", "DPOP, λ = 5"]
"""With one seed on the chat model, beside the two that the table has with all."""
_FIRST_STEPS = range(2, 11)
"""Without the first: the policy still is the reference, and no method's hinge is active."""


def chat_model() -> str:
    """The table and the verdict of the comparison on a chat model, which answers problems too."""
    return _results("smollm2", _SHOWN["smollm2"])


def fast() -> str:
    """The same at four times the learning rate."""
    return _results("smollm2_fast", _FAST)


def more() -> str:
    """SLiC and other λ on the chat model, one seed."""
    return _results("smollm2", _MORE, of_seeds=[0])


def choices() -> str:
    """Multiple-choice accuracy of models of which some answer hardly a problem any more, as `dpop eval` writes it."""
    record = json.loads((RESULTS / "smollm2_eval.json").read_text())
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("lm-eval", "torch"))
    return f"{as_markdown(record).partition(chr(10) * 2)[2].strip()}\n\n{versions}; computed in bf16."


def own_mistakes() -> str:
    """Trained on the chat model's own wrong answers."""
    return _results("smollm2_own", ["DPO", "DPOP"])


def conversations() -> str:
    """The tables and the verdict of the comparison on a chat model's conversations, and how it then writes."""
    return _results("conversations", [*_SHOWN["conversations"], *_FAST])


def neutral() -> str:
    """What became of texts that no pair is about, as far as that was measured."""
    rows, first = [], None
    for name, title in (("smollm2_fast", "GSM8K pairs"), ("conversations", "conversations")):
        recorded = read_comparison(RESULTS / f"{name}.json")
        for method in recorded.methods:
            texts = [run.neutral_text for run in recorded.of(method) if run.neutral_text is not None]
            if texts:
                first = first or texts[0]
                changes = [text.mean_change for text in texts]
                spread = f" ± {statistics.stdev(changes):.3f}" if len(changes) > 1 else ""
                error = statistics.fmean(text.error for text in texts)
                rows.append(
                    [
                        title,
                        method,
                        f"{signed(statistics.fmean(changes), 3)}{spread}",
                        f"{error:.3f}",
                        str(len(changes)),
                    ]
                )
    assert first is not None
    note = (
        f"{first.num_texts} texts of HellaSwag (WikiHow and ActivityNet) with their right endings, "
        f"{first.num_tokens:,} tokens; after SFT they have {minus(f'{first.ref_mean:.2f}')} nats per token. "
        "Mean ± standard deviation over seeds; error: over texts, of one seed."
    )
    return f"{table(['pairs', 'method', 'neutral text Δ, nats/token', 'error', 'seeds'], rows)}\n\n{note}"


def low_edit() -> str:
    """The table and the verdict of the comparison on GSM8K pairs."""
    return _results("gsm8k", [*LOSSES, *LAMBDAS])


def high_edit() -> str:
    """The same on pairs of two different answers."""
    parts = [f"**{title}**\n\n{_results(name, [*LOSSES, *LAMBDAS])}" for title, name in _HIGH_EDIT.items()]
    return "\n\n".join(parts)


_HIGH_EDIT = {"ARC": "arc", "HellaSwag": "hellaswag"}


def after_edit() -> str:
    """Mean log-prob of the chosen answers' tokens after the edit: figure 4 of the paper in numbers."""
    shifts = token_shifts(_comparison("gsm8k", [*LOSSES, *LAMBDAS]))
    ref = next(iter(shifts.values())).after.ref_mean
    means = {"before training": ref} | {name: shift.after.policy_mean for name, shift in shifts.items()}
    rows = [[name, minus(f"{mean:.2f}")] for name, mean in means.items()]
    return table(["", "mean log-prob after the edit, nats per token"], rows)


def beta() -> str:
    """DPO and DPOP under three values of β, on GSM8K pairs."""
    comparison = _comparison("gsm8k", BETAS)
    columns: dict[str, Callable[[RunResult], float]] = {
        "chosen Δ, nats": lambda run: run.evaluation.chosen_logratio,
        "Δ apart, nats": lambda run: run.evaluation.chosen_logratio - run.evaluation.rejected_logratio,
        "after the edit, nats/token": lambda run: run.evaluation.shift.after.mean_change,
    }
    default = comparison.config["beta"]
    rows = []
    for method in BETAS:
        name = method if "β" in method else f"{method}, β = {default:g}"
        rows.append([name, *(_spread([value(run) for run in comparison.of(method)]) for value in columns.values())])
    return table(["", *columns], rows)


def guidance() -> str:
    """What λ, its warm-up, the dead zone and the learning rate do: the demo's problems solved, over several models."""
    comparisons = [read_comparison(path) for path in sorted((RESULTS / "guidance").glob("*.json"))]
    methods = [m for m in comparisons[0].methods if all(m in other.methods for other in comparisons)]
    columns: dict[str, tuple[Callable[[RunResult], float], str]] = {
        "chosen Δ, nats": (lambda run: run.evaluation.chosen_logratio, "+.2f"),
        "rejected Δ, nats": (lambda run: run.evaluation.rejected_logratio, "+.2f"),
        "answers right, after − before": (_right_gained, "+.1f"),
        f"gradient norm, steps {_FIRST_STEPS.start} to {_FIRST_STEPS.stop - 1}": (_first_norm, ".3g"),
        "last steps": (_last_norm, ".3g"),
    }
    rows = []
    for method in methods:
        cells = [method]
        for value, form in columns.values():
            of_models = [statistics.fmean(map(value, comparison.of(method))) for comparison in comparisons]
            cells.append(minus(f"{statistics.fmean(of_models):{form}}"))
            if form != ".3g":
                cells[-1] += f" ± {statistics.stdev(of_models):{form.lstrip('+')}}"
        rows.append(cells)
    config, first = comparisons[0].config, comparisons[0].results[0]
    before = [_right(comparison.results[0].ref_answers) for comparison in comparisons]
    assert first.answers is not None
    note = (
        f"Mean ± standard deviation of {len(comparisons)} models, each trained on its own pairs; "
        f"{config['max_steps']} steps of {config['per_device_train_batch_size']} pairs, "
        f"lr {config['learning_rate']:g}, β {config['beta']:g}, λ {config['dpop_lambda']:g} where nothing else is said "
        f"(torch {comparisons[0].versions['torch']}). {first.answers.num_prompts} held-out problems each, answered "
        f"greedily, in points; before, {_listed(f'{share:.1f}' for share in sorted(before))} % were right. "
        "Gradient norms are medians before clipping."
    )
    return f"{table(['', *columns], rows)}\n\n{note}"


def _right(answers: Answers | None) -> float:
    assert answers is not None
    return 100 * answers.right_share


def _right_gained(run: RunResult) -> float:
    return _right(run.answers) - _right(run.ref_answers)


def _listed(texts: Iterable[str]) -> str:
    *most, last = texts
    return f"{', '.join(most)} and {last}"


def gradient() -> str:
    """Which way the first step pushes the tokens after the edit."""
    record: dict[str, Any] = json.loads((RESULTS / "gradient.json").read_text())
    rows = [
        [name.upper(), f"{record[f'{name}_pushes_down_share']:.1%}", minus(f"{record[f'{name}_mean_step']:+.1e}")]
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


def pictures() -> list[Panel]:
    """The page's."""
    found = []
    for name in ("smollm2", "conversations", "gsm8k", *_HIGH_EDIT.values()):
        comparison = _comparison(name, _SHOWN.get(name, LOSSES))
        found += [_named(panel, name) for panel in logratio_panels(curves_of(comparison))]
    shifts = token_shift_panels(token_shifts(_comparison("gsm8k", LOSSES)))
    return found + [_named(panel, "gsm8k") for panel in shifts]


def _named(panel: Panel, name: str) -> Panel:
    return panel._replace(name=f"paper_{name}_{panel.name}")


def _results(name: str, methods: list[str], *, of_seeds: Iterable[int] | None = None) -> str:
    comparison = _comparison(name, methods, of_seeds)
    parts = [table(table_titles(comparison), table_rows(comparison)), f"{_setting(comparison)}."]
    if has_writing(comparison):
        parts.append(table(table_titles(comparison, WRITING), table_rows(comparison, WRITING)))
    return "\n\n".join([*parts, f"> {verdict(comparison)}"])


def _setting(comparison: Comparison) -> str:
    first, config = comparison.results[0], comparison.config
    by_method = {method: len(comparison.of(method)) for method in comparison.methods}
    num_seeds = max(by_method.values())
    spread = f"mean ± standard deviation of {num_seeds} seeds" if num_seeds > 1 else seeds(num_seeds)
    fewer = [f"{seeds(count)} of {method}" for method, count in by_method.items() if count < num_seeds]
    spread += f" ({', '.join(fewer)})" if fewer else ""
    return (
        f"{first.num_pairs} held-out pairs, {spread}; "
        f"{config['max_steps']} steps of {config['per_device_train_batch_size']} pairs, "
        f"lr {config['learning_rate']:g}, β {config['beta']:g}, λ {config['dpop_lambda']:g} where nothing else is said "
        f"(torch {comparison.versions['torch']})"
    )


def _comparison(name: str, methods: list[str], seeds: Iterable[int] | None = None) -> Comparison:
    """Some methods of a recorded comparison, with all seeds or some."""
    recorded = read_comparison(RESULTS / f"{name}.json")
    runs = [run for run in recorded.results if run.method in methods and (seeds is None or run.seed in seeds)]
    return recorded._replace(methods=methods, results=runs)


def _first_norm(run: RunResult) -> float:
    return statistics.median(_norms(run)[step] for step in _FIRST_STEPS)


def _last_norm(run: RunResult) -> float:
    return statistics.median(list(_norms(run).values())[-len(_FIRST_STEPS) :])


def _norms(run: RunResult) -> dict[float, float]:
    return dict(zip(run.gradients["step"], run.gradients["grad_norm"], strict=True))


def _spread(values: list[float]) -> str:
    return f"{signed(statistics.fmean(values))} ± {statistics.stdev(values):.2f}"
