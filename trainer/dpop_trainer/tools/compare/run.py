"""Train every method with every seed, measure each on the same held-out pairs, and keep what was measured.

A run's folder holds comparison.json once it is finished; a comparison that was interrupted goes on from there.
"""

import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from dpop_trainer.inputs.model_setup import with_model_folder
from dpop_trainer.models.quantised import as_trained
from dpop_trainer.models.trained import load_trained
from dpop_trainer.report.terminal import Terminal
from dpop_trainer.run_folder.files import write_atomically
from dpop_trainer.run_folder.private import without_secrets
from dpop_trainer.run_folder.run_files import read_metrics
from dpop_trainer.run_folder.versions import versions
from dpop_trainer.settings.arguments import ComparisonArguments, DataArguments, ModelArguments, arguments_of, run_config
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.terminal import say
from dpop_trainer.tools.compare.answers import Grading
from dpop_trainer.tools.compare.held_out import HeldOut, NeutralTexts
from dpop_trainer.tools.compare.methods import Method, parse_methods
from dpop_trainer.tools.compare.page import write_comparison
from dpop_trainer.tools.compare.report import Comparison, RunResult, format_comparison
from dpop_trainer.training.runs import run_train

logger = logging.getLogger(__name__)

RESULT_FILE = "comparison.json"


class PlannedRun(NamedTuple):
    """One training of the comparison."""

    method: Method
    seed: int
    values: dict[str, Any]
    """Its whole configuration, as config.yaml holds it but with its secrets."""

    @property
    def folder(self) -> Path:
        return Path(self.values["output_dir"])


def run_comparison(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    config: DPOPConfig,
    comparison: ComparisonArguments,
) -> Comparison:
    """Run what is not finished yet, and write the report of everything into config.output_dir.

    Every configuration is checked before the first run begins.

    Raises:
        ValueError: a method or a seed cannot be used, there are no held-out pairs, or a run fails on its input.
    """
    model_arguments = with_model_folder(model_arguments)
    plan = plan_runs(model_arguments, data_arguments, config, comparison)
    folder = Path(config.output_dir)  # type: ignore[arg-type]
    results: list[RunResult] = []
    held_out = HeldOut(comparison.max_eval_pairs, _grading(comparison), _neutral(comparison))
    with doing("reading what is held out"):
        held_out.check(plan[0].values)
    for number, run in enumerate(plan, 1):
        title = f"Run {number} of {len(plan)}: {run.method.name}, seed {run.seed}"
        with doing(f"reading what {title.lower()} left in {run.folder}"):
            result = _finished(run, comparison)
        say(f"{title}{' (finished before)' if result else ''}")
        with doing(f"at {title.lower()} in {run.folder}", run.folder):
            results.append(result or _train_and_measure(run, held_out, comparison))
    written = Comparison(
        methods=[method.name for method in parse_methods(comparison.methods)],
        results=results,
        config=without_secrets(run_config(model_arguments, data_arguments, config)),
        versions=versions(),
    )
    with doing(f"writing the report to {folder}", folder):
        write_comparison(written, folder)
    say(format_comparison(written, Terminal.of(sys.stdout)))
    say(f"Written to {folder}/: compare.html (open it), its figures, compare.json")
    return written


def plan_runs(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    config: DPOPConfig,
    comparison: ComparisonArguments,
) -> list[PlannedRun]:
    """Seeds within methods, each with its checked configuration and a folder of its own.

    Raises:
        ValueError: see `run_comparison`.
    """
    if not comparison.seeds or len(set(comparison.seeds)) < len(comparison.seeds):
        raise ValueError(f"seeds: expected at least one, each once, got {comparison.seeds}.")
    for name in ("max_eval_pairs", "max_neutral_texts"):
        if getattr(comparison, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(comparison, name)}.")
    if not data_arguments.eval_dataset_name and not data_arguments.dataset_test_split:
        raise ValueError(
            "eval_dataset_name: expected pairs to measure on that no run trains on, got none. Pass --eval_dataset_name "
            "or --dataset_test_split."
        )
    if data_arguments.eval_datasets:
        raise ValueError("eval_datasets: expected none in a comparison, which measures on one, got some. Name one set.")
    values = run_config(model_arguments, data_arguments, config)
    if config.eval_strategy == "no":
        # eight points for the curves; below 1 the steps are a share of the run
        values |= {"eval_strategy": "steps", "eval_steps": 0.125}
    plan = []
    for method in parse_methods(comparison.methods):
        for seed in comparison.seeds:
            folder = Path(values["output_dir"]) / method.slug / f"seed-{seed}"
            run = {**method.run_values(values), "seed": seed, "output_dir": str(folder), "run_name": None}
            arguments_of(run, DPOPConfig)  # refuses what cannot be, before anything is trained
            plan.append(PlannedRun(method, seed, run))
    return plan


def _train_and_measure(run: PlannedRun, held_out: HeldOut, comparison: ComparisonArguments) -> RunResult:
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # else every run tells again that it loads and saves
    try:
        run_train(*arguments_of(run.values, DPOPConfig), max_eval_pairs=comparison.max_eval_pairs)
    finally:
        transformers.utils.logging.set_verbosity(level)
    gc.collect()
    # from what the run left, so that one that was finished but not measured is not trained again
    trained = load_trained(str(run.folder), quantization_config=as_trained(run.values))
    measured = held_out.measure(trained, run.values)
    lines = read_metrics(run.folder)
    evaluated = [line for line in lines if "eval_dpop/chosen_logratio" in line]
    history = {
        "step": [0, *(line["step"] for line in evaluated)],
        "chosen": [0.0, *(line["eval_dpop/chosen_logratio"] for line in evaluated)],
        "rejected": [0.0, *(line["eval_dpop/rejected_logratio"] for line in evaluated)],
    }
    logged = [line for line in lines if "grad_norm" in line]
    runtime = next(line["train_runtime"] for line in reversed(lines) if "train_runtime" in line)
    result = RunResult(
        method=run.method.name,
        seed=run.seed,
        num_pairs=measured.num_pairs,
        evaluation=measured.evaluation,
        history=history,
        seconds=runtime,
        gradients={key: [line[key] for line in logged] for key in ("step", "grad_norm")},
        neutral_text=measured.neutral_text,
    )
    if measured.answered is not None and measured.ref_answered is not None:
        result = result._replace(
            answers=measured.answered.graded,
            ref_answers=measured.ref_answered.graded,
            writing=measured.answered.writing,
            ref_writing=measured.ref_answered.writing,
        )
    record = {"config": _identity(run, comparison), **result.as_dict()}
    write_atomically(run.folder / RESULT_FILE, json.dumps(record, indent=2))
    if not comparison.keep_models:
        for path in run.folder.rglob("*.safetensors"):
            path.unlink()
    return result


def _finished(run: PlannedRun, comparison: ComparisonArguments) -> RunResult | None:
    """The result of a run that was finished before with the same configuration.

    Raises:
        ValueError: it was finished with another.
    """
    path = run.folder / RESULT_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before, result = without_secrets(record.pop("config")), RunResult.from_dict(record)
        keys = set(before)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected what a finished run measured, got what cannot be read ({error}). Remove the file: the "
            "run is then measured again."
        ) from error
    now = json.loads(json.dumps(_identity(run, comparison)))
    changed = sorted(key for key in keys | set(now) if before.get(key) != now.get(key))
    if changed:
        raise ValueError(
            f"{path}: expected a run with this configuration, got one with other values of {', '.join(changed)}. "
            "Remove the folder to run it again, or choose another output_dir."
        )
    return result


def _identity(run: PlannedRun, comparison: ComparisonArguments) -> dict[str, Any]:
    """What decides the result."""
    training = {key: value for key, value in run.values.items() if key not in ("output_dir", "logging_dir")}
    measured = ["max_eval_pairs"]
    if comparison.matcher:
        measured += ["matcher", "answer_regex", "max_answers", "max_new_tokens"]
    if comparison.neutral_texts:
        measured += ["neutral_texts", "neutral_texts_split", "max_neutral_texts"]
    return without_secrets(training) | {name: getattr(comparison, name) for name in measured}


def _grading(comparison: ComparisonArguments) -> Grading | None:
    if comparison.matcher is None:
        return None
    return Grading(
        comparison.matcher,
        comparison.answer_regex,
        comparison.max_answers,
        comparison.max_new_tokens,
        comparison.answer_batch_size,
    )


def _neutral(comparison: ComparisonArguments) -> NeutralTexts | None:
    if comparison.neutral_texts is None:
        return None
    return NeutralTexts(comparison.neutral_texts, comparison.neutral_texts_split, comparison.max_neutral_texts)
