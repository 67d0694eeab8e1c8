"""What makes a run the run it is: the fields that decide its numbers, its data, and how many processes share it."""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dpop_trainer.data.pair_weights import WEIGHT_COLUMN
from dpop_trainer.data.records import REF_COLUMNS, TOKEN_COLUMNS
from dpop_trainer.run_folder.private import without_secrets

if TYPE_CHECKING:
    from datasets import Dataset

# Fields that change what a run writes, says or how fast it is, and none of its numbers.
_FREE_PREFIXES = ("logging_", "log_", "save_", "eval_", "hub_", "dataloader_num", "dataloader_p", "ddp_", "trackio")
_FREE_FIELDS = frozenset(
    {
        "output_dir",
        "run_name",
        "report_to",
        "project",
        "disable_tqdm",
        "push_to_hub",
        "resume_from_checkpoint",
        "per_device_eval_batch_size",
        "dataset_num_proc",
        "dataset_test_split",
        "eval_dataset_name",
        "prediction_loss_only",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "chosen_logratio_warning",
        "include_for_metrics",
        "include_num_input_tokens_seen",
        "skip_memory_metrics",
        "restore_callback_states_from_checkpoint",
        "batch_eval_metrics",
        "torch_empty_cache_steps",
        "do_train",
        "do_eval",
        "do_predict",
        "debug",
        "enable_jit_checkpoint",
        "activation_offloading",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "precompute_ref_batch_size",
        "ref_cache_dir",
        "ref_model_offload",
        "max_eval_pairs",
    }
)
_OF_A_MACHINE = frozenset({"output_dir", "ref_cache_dir", "run_name", "local_rank", "logging_dir", "disable_tqdm"})
# A run may be made longer or shorter; its schedule is then counted anew.
LENGTH_FIELDS = frozenset({"max_steps", "num_train_epochs"})


def identity_of(
    config: Mapping[str, Any], *, num_processes: int, dataset: Any = None, model: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Plain values that tell a run from another.

    Args:
        config: all fields of the run. Its secrets are left out: a run is the same under a new token.
        num_processes: ranks of the run; another number deals the pairs out differently.
        dataset: the tokenised training pairs; None leaves them out.
        model: what it begins with, as "config" (what decides its numbers) and "base" (a digest of what stays frozen).
    """
    from datasets import Dataset

    digest = data_digest(dataset) if isinstance(dataset, Dataset) else None
    known = {"config": without_secrets(config), "num_processes": num_processes, "data": digest}
    return known if model is None else known | {"model": dict(model)}


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What decides a run's numbers and differs between two identities -> field: (before, now). Length is let pass."""
    old, new = (without_secrets(one.get("config") or {}) for one in (before, now))  # old records may still have some
    changes = {
        key: (old[key], new[key])
        for key in sorted(old.keys() & new.keys())
        if key not in _FREE_FIELDS | LENGTH_FIELDS
        and not key.startswith(_FREE_PREFIXES)
        and _as_text(old[key]) != _as_text(new[key])
    }
    model_before, model_now = before.get("model") or {}, now.get("model") or {}
    changes |= {
        f"{key} of the model": (old, new)
        for key, old, new in _in_both(model_before.get("config"), model_now.get("config"))
        if _as_text(old) != _as_text(new)
    }
    for told, old, new in (
        ("number of processes", before.get("num_processes"), now.get("num_processes")),
        ("training data (digest)", before.get("data"), now.get("data")),
        ("base under the adapter (digest)", model_before.get("base"), model_now.get("base")),
    ):
        if old is not None and new is not None and old != new:
            changes[told] = (old, new)
    return changes


def _in_both(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[tuple[str, Any, Any]]:
    """Key, value before, value now; of what one of the two does not know, another version, nothing is said."""
    before, now = before or {}, now or {}
    return [(key, before[key], now[key]) for key in sorted(before.keys() & now.keys())]


def differences_of_ranks(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two processes of one run have and that is not the same: all fields but places on a machine's own disk."""
    fields = {
        key: (old, new)
        for key, old, new in _in_both(first["config"], other["config"])
        if key not in _OF_A_MACHINE and _as_text(old) != _as_text(new)
    }
    return changed_fields(first, other) | fields


def describe_changes(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """One phrase: each field with both of its values."""
    return ", ".join(f"{key}: {before!r} before, {now!r} now" for key, (before, now) in changes.items())


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)  # one of the two has been through JSON


def data_digest(dataset: "Dataset") -> str:
    """Hex digest of the pairs' tokens, reference log-probs and weights, in order. Reads each column once, at memory
    speed."""
    import pyarrow.compute as pc

    digest = hashlib.blake2b(digest_size=8)
    columns = [column for column in (*TOKEN_COLUMNS, *REF_COLUMNS, WEIGHT_COLUMN) if column in dataset.column_names]
    for batch in dataset.with_format("arrow").iter(batch_size=10_000):
        for column in columns:
            values = batch[column]  # type: ignore[index]
            if column in TOKEN_COLUMNS:
                digest.update(pc.list_value_length(values).to_numpy().tobytes())  # type: ignore[attr-defined]
                values = pc.list_flatten(values)  # type: ignore[attr-defined]
            digest.update(values.to_numpy().tobytes())
    return digest.hexdigest()
