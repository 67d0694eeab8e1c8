"""`dpop inspect`: hold a trained model against its reference on preference pairs, token by token.

Reads what a run left (its config.yaml names the model that training started from; its checkpoints give curves) and
writes inspect.html, its charts as files in figures/, and inspect.json.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from rapidfuzz.distance import Levenshtein
from transformers import PreTrainedTokenizerBase

from dpop_trainer.data import read_pairs, tokenise_pairs
from dpop_trainer.data.edits import edit_regions
from dpop_trainer.data.source_path import expanded
from dpop_trainer.measure.pairs_under_model import PairEvaluation, PairTokenLogps, evaluate_pairs, pair_token_logps
from dpop_trainer.models.quantised import as_trained
from dpop_trainer.models.trained import load_trained, read_run_config
from dpop_trainer.reference.of_run import RunReference, reference_of_run
from dpop_trainer.report.plots import checkpoint_panels, token_shift_panels
from dpop_trainer.report.svg import write_svg
from dpop_trainer.report.terminal import Terminal
from dpop_trainer.report.token_text import token_texts
from dpop_trainer.run_folder.files import write_atomically
from dpop_trainer.run_folder.versions import versions
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.terminal import say
from dpop_trainer.tools.inspect.report import AnswerTokens, Inspection, PairChange, format_inspection, write_inspection


class Subject(NamedTuple):
    """What is inspected, found out from a folder or a name."""

    policy: str
    """Folder of a model or an adapter, or a hub id."""
    reference: RunReference
    checkpoints: list[tuple[int, str]]
    """Steps and folders, in the order of training."""
    max_length: int | None
    truncation_mode: str


def subject_of(model: str, ref_model: str | None = None) -> Subject:
    """What a run, a model or an adapter is to be held against, and how its run cut the data.

    Args:
        model: folder of a run (with config.yaml), of one of its checkpoints, of a model or of an adapter, or a hub id.
        ref_model: the reference, where it is not the run's own (`reference_of_run`).

    Raises:
        ValueError: the reference is neither given nor known.
    """
    folder = expanded(model)
    config = read_run_config(folder)
    checkpoints = [(int(path.name.partition("-")[2]), str(path)) for path in folder.glob("checkpoint-[0-9]*")]
    return Subject(
        policy=model,
        reference=reference_of_run(model, ref_model),
        checkpoints=sorted(checkpoints),
        max_length=config.get("max_length", 1024),
        truncation_mode=config.get("truncation_mode", "keep_start"),
    )


def run_inspect(
    model: str,
    *,
    pairs: str,
    ref_model: str | None = None,
    out: str | None = None,
    limit: int = 256,
    batch_size: int = 16,
    max_length: int | None = None,
    num_worst: int = 8,
    checkpoints: bool = True,
) -> Inspection:
    """Score pairs under a model, its checkpoints and its reference; print a table, write JSON, figures and a page.

    Args:
        model: see `subject_of`.
        pairs: preference pairs, as `read_pairs` takes them.
        ref_model: see `subject_of`.
        out: folder for the results; the model's own by default.
        limit: look at the first so many pairs.
        batch_size: pairs per forward.
        max_length: cut to so many tokens; by default as the run did, else 1024.
        num_worst: how many of the pairs that lost most are shown in full.
        checkpoints: score the run's checkpoints too.

    Raises:
        ValueError: a model or the pairs cannot be loaded, the reference is not known, or there is no pair to look at.
    """
    for name, value, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("num_worst", num_worst, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}.")
    subject = subject_of(model, ref_model)
    folder = expanded(out or model)
    if out is None and not folder.is_dir():
        raise ValueError(f"out: expected a folder for the results of a model from the hub, got None for {model!r}.")
    with doing(f"reading the pairs {pairs}"):
        dataset = read_pairs(pairs)
    with doing(f"loading the model {model!r}"):
        rounding = as_trained(read_run_config(expanded(model)))
        policy, tokenizer = load_trained(model, quantization_config=rounding)
    with doing(f"tokenising the pairs {pairs}"):
        dataset, counts = tokenise_pairs(
            dataset.select(range(min(limit, len(dataset)))),
            tokenizer,
            max_length=max_length or subject.max_length,
            truncation_mode=subject.truncation_mode,  # type: ignore[arg-type]
            on_bad_record="skip",
        )
    say(counts.summary())

    score: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "batch_size": batch_size}
    with doing(f"scoring the pairs {pairs} under {model!r}"):
        policy_logps = pair_token_logps(policy, dataset, desc="Policy", **score)
    del policy
    gc.collect()
    with doing(f"scoring the pairs {pairs} under the reference {subject.reference.shown!r}"):
        ref_logps = pair_token_logps(subject.reference.load(), dataset, desc="Reference", **score)
    history = {}
    for step, path in subject.checkpoints if checkpoints else []:
        gc.collect()
        with doing(f"scoring the pairs {pairs} under the checkpoint {path}"):
            logps = pair_token_logps(
                load_trained(path, quantization_config=rounding).model, dataset, desc=f"Checkpoint {step}", **score
            )
        history[step] = evaluate_pairs(logps, ref_logps, dataset)

    inspection = Inspection(
        name=Path(model).name,
        reference=subject.reference.shown,
        pairs=pairs,
        counts=counts,
        evaluation=evaluate_pairs(policy_logps, ref_logps, dataset),
        history=history,
        worst=_worst(policy_logps, ref_logps, dataset, tokenizer, num_worst),
    )
    with doing(f"writing to {folder}", folder):
        _write(inspection, folder)
    say(format_inspection(inspection, Terminal.of(sys.stdout)))
    say(f"Written to {folder}/: inspect.html (open it), its figures, inspect.json")
    return inspection


def evaluation_as_dict(evaluation: PairEvaluation) -> dict[str, Any]:
    """Plain values, for JSON."""
    values = evaluation._asdict()
    for side, shift in (("", values.pop("shift")), ("rejected_", values.pop("rejected_shift"))):
        values.update({f"{side}{region}_edit": getattr(shift, region)._asdict() for region in shift._fields[:3]})
    return {key: value._asdict() if hasattr(value, "_asdict") else value for key, value in values.items()}


def _write(inspection: Inspection, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "name": inspection.name,
        "reference": inspection.reference,
        "pairs": inspection.pairs,
        "num_pairs": inspection.counts.num_pairs,
        **inspection.counts.as_metrics(),
        **evaluation_as_dict(inspection.evaluation),
        "checkpoints": [{"step": step, **evaluation_as_dict(value)} for step, value in inspection.history.items()],
        "worst": [pair.as_dict() for pair in inspection.worst],
        "versions": versions(),
    }
    write_atomically(folder / "inspect.json", json.dumps(record, indent=2))
    panels = [
        ("The chosen answers, token by token", token_shift_panels({inspection.name: inspection.evaluation.shift}))
    ]
    if inspection.history:
        panels.append(("Over the run's checkpoints", checkpoint_panels(inspection.history)))
    for _, of_heading in panels:
        for panel in of_heading:
            write_svg(panel, folder / "figures")
    write_inspection(inspection, panels, folder / "inspect.html")


def _worst(
    policy: list[PairTokenLogps],
    reference: list[PairTokenLogps],
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    num_worst: int,
) -> list[PairChange]:
    """The pairs whose chosen answers lost most, in nats per answer."""
    lost = [float(p.chosen.sum() - r.chosen.sum()) for p, r in zip(policy, reference, strict=True)]
    pairs = []
    for index in map(int, np.argsort(lost, kind="stable")[:num_worst]):
        record: Any = dataset[index]
        chosen_ids, rejected_ids = record["chosen_ids"], record["rejected_ids"]

        def answer(ids, other_ids, after, before, prompt_ids=record["prompt_ids"]) -> AnswerTokens:
            texts = token_texts(tokenizer, ids, prompt_ids)
            return AnswerTokens(texts, before.tolist(), after.tolist(), edit_regions(ids, other_ids))

        pairs.append(
            PairChange(
                pair_id=record["pair_id"],
                prompt=_prompt_text(tokenizer, record["prompt_ids"]),
                chosen=answer(chosen_ids, rejected_ids, policy[index].chosen, reference[index].chosen),
                rejected=answer(rejected_ids, chosen_ids, policy[index].rejected, reference[index].rejected),
                distance=Levenshtein.normalized_distance(chosen_ids, rejected_ids),
            )
        )
    return pairs


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]) -> str:
    """The prompt less the BOS, whose Latin letters would turn the direction of Arabic or Hebrew text."""
    begins = prompt_ids[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.decode(prompt_ids[1:] if begins else prompt_ids))
