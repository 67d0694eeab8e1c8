"""`dpop export`: merge, save, check what was saved, write the card; and only if asked, push."""

import gc
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from dpop_trainer.delivery.card import model_card, read_run_config, shown_model
from dpop_trainer.delivery.merge import Merged, largest_change, merge_run, probe_logps
from dpop_trainer.loading import load_model

# largest change of a probability between the run and what was saved, by the dtype that was saved
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def run_export(
    run: str,
    *,
    out: str,
    base: str | None = None,
    dtype: str | None = None,
    license_id: str | None = None,
    name: str | None = None,
    evaluation: str | None = None,
    device: str | None = None,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """A run as a folder that anyone can load: safetensors, tokenizer, chat template, model card.

    Args:
        run: the output_dir of a run, a checkpoint in it, or a hub id.
        out: the folder to write; it must not hold a model.
        base: see `merge_run`.
        dtype: dtype to merge and save in; None: that of the base's checkpoint.
        license_id: the hub's id of the licence.
        name: the model's name on its card; None: the folder's.
        evaluation: results.json of `dpop eval`, or its folder, for the card.
        device: where to merge.
        max_shard_size: of the weight files.
        trust_remote_code: run model code that comes with the weights.
        push_to_hub: hub id to upload the folder to; None sends nothing.
        private: whether that repository is made private.

    Returns:
        The folder.

    Raises:
        ValueError: something cannot be loaded or merged, the folder is taken, or the saved model does not answer as the
            run did.
    """
    folder = Path(out)
    if (folder / "config.json").exists():
        raise ValueError(f"out: expected a folder without a model, found one in {out!r}. Give another, or remove it.")
    evaluation_file = _evaluation_file(evaluation)
    kwargs = {"dtype": dtype, "trust_remote_code": trust_remote_code or None}
    init_kwargs = {key: value for key, value in kwargs.items() if value is not None}
    print(f"Loading {run}", flush=True)
    merged = merge_run(run, base=base, init_kwargs=init_kwargs, device=device)
    folder.mkdir(parents=True, exist_ok=True)
    merged.model.save_pretrained(folder, max_shard_size=max_shard_size)
    merged.tokenizer.save_pretrained(folder)
    saved_dtype = next(merged.model.parameters()).dtype
    logps, base = merged.probe_logps, merged.base
    note = _merge_note(merged, run, saved_dtype)
    del merged
    gc.collect()
    change = _check_saved(folder, logps, saved_dtype, init_kwargs, device)
    note += f" Reloaded, it gives the run's probabilities to {change:.1e} ({str(saved_dtype).removeprefix('torch.')})."
    card = model_card(
        Path(run),
        name=name or (push_to_hub or folder.resolve().name).rpartition("/")[2],
        base=base,
        license_id=license_id,
        merge_note=note,
        evaluation=evaluation_file,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    config = read_run_config(Path(run))
    if config:
        (folder / "training_config.yaml").write_text(
            yaml.safe_dump(_shareable(config), sort_keys=True), encoding="utf-8"
        )
    if evaluation_file is not None:
        shutil.copy(evaluation_file, folder / "evaluation.json")
    print(f"{note}\nWritten: {folder}")
    if push_to_hub is not None:
        print(f"Pushed: {push(folder, push_to_hub, private=private)}")
    return folder


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload an exported folder through huggingface_hub, with the login that it knows -> the repository's address.

    Raises:
        ValueError: the hub refuses: what it says.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload model")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise ValueError(
            f"push_to_hub: expected to upload to {repo_id!r}, could not: {error}. The exported folder is complete in "
            f"{str(folder)!r}; log in with `hf auth login` and upload it, or run the same again with another --out."
        ) from error
    return str(address)


def _check_saved(
    folder: Path, logps: torch.Tensor, dtype: torch.dtype, init_kwargs: dict[str, Any], device: str | None
) -> float:
    """Read the folder back as its user will -> the largest change of a probability."""
    saved: Any = load_model(str(folder.resolve()), init_kwargs)
    change = largest_change(logps, probe_logps(saved.to(device or "cpu").eval()))
    tolerance = TOLERANCES.get(dtype, max(TOLERANCES.values()))
    if not change <= tolerance:
        raise ValueError(
            f"out: expected the saved model to give the run's probabilities to {tolerance:g}, got a difference of "
            f"{change:g}. The weights were written but are not to be trusted; with a 16-bit base try --dtype float32."
        )
    return change


def _merge_note(merged: Merged, run: str, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if merged.base is None:
        return f"The weights are the run's, in {name}."
    note = f"The adapter is merged into `{shown_model(merged.base)}`, in {name}."
    if read_run_config(Path(run)).get("load_in_4bit"):
        note += (
            " Training saw this base rounded to 4 bits; the merge is into its full-precision weights, so that answers "
            "differ from those in training by that rounding."
        )
    return note


def _evaluation_file(evaluation: str | None) -> Path | None:
    if evaluation is None:
        return None
    path = Path(evaluation)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"evaluation: expected results.json of `dpop eval` or its folder, found none at {evaluation!r}."
        )
    return path


def _shareable(config: dict[str, Any]) -> dict[str, Any]:
    """Without tokens, and of paths on this machine the last part alone."""

    def value(entry: Any) -> Any:
        is_path = isinstance(entry, str) and (Path(entry).is_absolute() or entry.startswith(("~", "..")))
        return Path(entry).name if is_path else entry

    return {key: value(entry) for key, entry in config.items() if not key.endswith("_token")}
