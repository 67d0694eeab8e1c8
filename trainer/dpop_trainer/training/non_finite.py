"""When a NaN or an infinity turns up: what is kept for inspection, and how it is told."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpop_trainer.batches import Batch
from dpop_trainer.data.records import TOKEN_COLUMNS
from dpop_trainer.run_folder.files import write_json

logger = logging.getLogger(__name__)


class NonFiniteError(ValueError):
    """A loss, log-prob or gradient was NaN or infinite; training stopped before the optimizer step."""


class MicroBatch(NamedTuple):
    """What is remembered of a micro-batch until its optimizer step: references to tensors that exist anyway."""

    inputs: Batch
    """The collated batch, on the device."""
    is_bad: Tensor
    """[B] bool: a log-prob or loss of the pair is not finite."""
    pair_values: Mapping[str, Tensor]
    """[B] each: losses and log-prob sums of the policy and the reference, in nats, where the trainer has them."""


def save_non_finite(
    folder: Path,
    batches: list[MicroBatch],
    *,
    step: int,
    rank: int,
    what: str,
    dataset: Any = None,
    tokenizer: Any = None,
) -> list[int]:
    """Write the micro-batches that went wrong to `folder` -> ids of their bad pairs.

    Leaves batch_rank<R>.safetensors (the tensors of each micro-batch, under `<number>/<name>`) and report_rank<R>.json
    (step, what was not finite, and for each pair its id, texts, losses and log-prob sums). Where no single pair is to
    blame, a gradient having overflowed, all micro-batches of the step are kept. A disk that is full is logged, and does
    not hide what happened.

    Args:
        folder: made if it is not there.
        batches: all micro-batches of the step on this rank.
        step: the optimizer step, from 1.
        rank: of this process.
        what: what was not finite, in words.
        dataset: the tokenised training pairs, for the texts.
        tokenizer: decodes them.
    """
    suspects = [batch for batch in batches if bool(batch.is_bad.any())] or batches
    tensors: dict[str, Tensor] = {}
    pairs: list[dict[str, Any]] = []
    for number, (inputs, is_bad, values) in enumerate(suspects):
        tensors |= {
            f"{number}/{key}": value.detach().cpu().contiguous().clone()
            for key, value in {**inputs, **values}.items()
            if isinstance(value, Tensor)
        }
        for i, pair_id in enumerate(inputs.pair_ids.tolist()):
            pairs.append(
                {
                    "pair_id": pair_id,
                    "micro_batch": number,
                    "is_bad": bool(is_bad[i]),
                    # as text: JSON has no NaN
                    **{key: str(float(value[i])) for key, value in values.items() if value.dim() == 1},
                    **_texts(pair_id, dataset, tokenizer),
                }
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f"batch_rank{rank}.safetensors")
        write_json(folder / f"report_rank{rank}.json", {"step": step, "rank": rank, "not_finite": what, "pairs": pairs})
    except (OSError, RuntimeError) as error:
        logger.error("%s: the batch could not be saved there (%s).", folder, error)
    return [pair["pair_id"] for pair in pairs if pair["is_bad"]]


def _texts(pair_id: int, dataset: Any, tokenizer: Any) -> dict[str, str]:
    """The pair's prompt and answers as text, by way of its tokens: what the model saw."""
    if not isinstance(dataset, Dataset) or tokenizer is None:
        return {}
    rows = np.flatnonzero(np.asarray(dataset["pair_id"]) == pair_id)
    if not len(rows):
        return {}
    record = dataset[int(rows[0])]
    return {column.removesuffix("_ids"): tokenizer.decode(record[column]) for column in TOKEN_COLUMNS}


def non_finite_message(step: int, what: str, pair_ids: list[int], folder: Path) -> str:
    """What `NonFiniteError` says."""
    named = f"pair ids {pair_ids[:16]}{' ...' if len(pair_ids) > 16 else ''}" if pair_ids else "no pair of this rank"
    return (
        f"step {step}: expected finite values, got a NaN or infinity in {what}, {named}. Nothing of this step was "
        f"applied. The batch, its texts and its reference log-probs are in {folder}. Look at these pairs; if they are "
        "sound, lower learning_rate or dpop_lambda, or train in bf16, not fp16."
    )


def weight_not_finite(model: nn.Module) -> str | None:
    """The name of a trained weight with a NaN or infinity in this process's part of it; None where all are finite.
    One look at the device."""
    names, flags = [], []
    for name, parameter in model.named_parameters():
        value: Any = parameter.detach()
        value = value.to_local() if isinstance(value, DTensor) else value
        if parameter.requires_grad and value.is_floating_point() and value.numel() and not value.is_meta:
            names.append(name)
            flags.append(torch.isfinite(value).all())
    if not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all()):
        return None
    return next(name for name, flag in zip(names, flags, strict=True) if not bool(flag))


def load_non_finite(folder: str | Path, rank: int = 0) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Read back what `save_non_finite` wrote -> the micro-batches' tensors, the report.

    Raises:
        FileNotFoundError: the rank left nothing there.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    report = json.loads((folder / f"report_rank{rank}.json").read_text())
    batches: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(folder / f"batch_rank{rank}.safetensors").items():
        number, name = key.split("/", 1)
        batches.setdefault(int(number), {})[name] = value
    return [batches[number] for number in sorted(batches)], report


def not_finite(gradient_norm: Any, device: torch.device) -> Tensor:
    """Bool scalar on the device, without a sync."""
    return ~torch.isfinite(torch.as_tensor(gradient_norm, device=device))
