"""`dpop export`: merge, save, check what was saved, write the card; and only if asked, push."""

import functools
import gc
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from dpop_trainer.measure.policy_probe import PolicyProbe, read_probe
from dpop_trainer.models.adapters import adapter_base
from dpop_trainer.models.loading import load_model
from dpop_trainer.models.quantised import as_trained
from dpop_trainer.models.trained import read_run_config
from dpop_trainer.report.markdown import code
from dpop_trainer.run_folder.files import filled_at_once, write_json
from dpop_trainer.run_folder.private import shareable
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.terminal import say
from dpop_trainer.tools.delivery.card import model_card, shown_model
from dpop_trainer.tools.delivery.inputs import check_out, check_shard_size, evaluation_file
from dpop_trainer.tools.delivery.merge import Merged, largest_change, merge_run, probe_logps

# largest change of a probability between the run and what was saved, by the dtype that was saved
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def run_export(
    run: str,
    *,
    out: str,
    base: str | None = None,
    merge_into: str | None = None,
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
        merge_into: of a run on a 4-bit base: "rounded", the weights that training saw, widened, which gives the policy
            that was trained; or "full", the base's full-precision ones. None: rounded, where the base was.
        dtype: dtype to merge and save in; None: that of the base's checkpoint, into rounded weights that of the run.
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
    check_out(out)
    check_shard_size(max_shard_size)
    results = evaluation_file(evaluation)
    run_config = read_run_config(Path(run))
    if merge_into not in (None, "rounded", "full"):
        raise ValueError(f"merge_into: expected 'rounded' or 'full', got {merge_into!r}.")
    if merge_into == "rounded" and not run_config.get("load_in_4bit"):
        raise ValueError(
            f"merge_into: expected a run on a 4-bit base for 'rounded', got {run!r}, whose records tell of none. "
            "Leave it out."
        )
    rounding = None if merge_into == "full" else as_trained(run_config)
    kwargs = {"dtype": dtype, "trust_remote_code": trust_remote_code or None}
    init_kwargs = {key: value for key, value in kwargs.items() if value is not None}
    load_kwargs = dict(init_kwargs)
    if rounding is not None and run_config.get("dtype"):  # weights in another dtype would be rounded otherwise
        load_kwargs["dtype"] = run_config["dtype"]
    is_other_base = base is not None
    card = functools.partial(
        _card,
        run,
        name=name or (push_to_hub or folder.resolve().name).rpartition("/")[2],
        base=base or adapter_base(run),
        license_id=license_id,
        evaluation=results,
    )
    card(merge_note="")  # what is wrong with the records is told before a weight is loaded
    say(f"Loading {run}")
    with doing(f"merging {run}"):
        merged = merge_run(run, base=base, init_kwargs=load_kwargs, device=device, quantization_config=rounding)
        if rounding is not None and isinstance(getattr(torch, dtype or "", None), torch.dtype):
            merged.model.to(getattr(torch, dtype or ""))
    with doing(f"saving the model of {run} to {folder}", folder), filled_at_once(folder, last="config.json") as part:
        merged.model.save_pretrained(part, max_shard_size=max_shard_size)
        merged.tokenizer.save_pretrained(part)
        saved_dtype = next(merged.model.parameters()).dtype
        logps, is_chat = merged.probe_logps, bool(merged.tokenizer.chat_template)
        note = _merge_note(merged, run_config, saved_dtype, is_rounded=rounding is not None)
        del merged
        gc.collect()
        init_kwargs["dtype"] = saved_dtype
        is_other_base = is_other_base or (rounding is None and bool(run_config.get("load_in_4bit")))
        probe = None if is_other_base or run_config.get("load_in_8bit") else read_probe(Path(run))
        change, difference = _check_saved(part, logps, saved_dtype, init_kwargs, device, probe)
        note += f" Reloaded, it gives the run's probabilities to {change:.1e} ({_name(saved_dtype)})"
        if difference is not None:
            note += f", and the log-probs that the policy had when it was saved to {difference:.1e} nats."
        else:
            note += "; of the policy as it trained, on these weights, nothing is recorded to hold it against."
        (part / "README.md").write_text(card(merge_note=note, is_chat=is_chat), encoding="utf-8")
        if run_config:
            (part / "training_config.yaml").write_text(yaml.safe_dump(shareable(run_config)), encoding="utf-8")
        if results is not None:
            write_json(part / "evaluation.json", shareable(json.loads(results.read_text(encoding="utf-8"))))
    say(f"{note}\nWritten: {folder}")
    if push_to_hub is not None:
        with doing(f"uploading {folder} to {push_to_hub}"):
            say(f"Pushed: {push(folder, push_to_hub, private=private)}")
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
    folder: Path,
    logps: torch.Tensor,
    dtype: torch.dtype,
    init_kwargs: dict[str, Any],
    device: str | None,
    probe: PolicyProbe | None,
) -> tuple[float, float | None]:
    """Read the folder back as its user will -> the largest change of a probability against the run as it loads, and of
    a log-prob against the policy as it was when it was saved, where that is recorded."""
    saved: Any = load_model(str(folder.resolve()), init_kwargs)
    saved = saved.to(device or "cpu").eval()
    change = largest_change(logps, probe_logps(saved))
    tolerance = TOLERANCES.get(dtype, max(TOLERANCES.values()))
    if not change <= tolerance:
        raise ValueError(
            f"out: expected the saved model to give the run's probabilities to {tolerance:g}, got a difference of "
            f"{change:g}. Nothing was kept; with a 16-bit base try --dtype float32."
        )
    return change, None if probe is None else probe.check(saved, is_rounded=dtype.itemsize < 4)


def _card(run: str, *, evaluation: Path | None, **options: Any) -> str:
    """
    Raises:
        ValueError: the run's records, or those of its evaluation, are not what was written.
    """
    try:
        return model_card(Path(run), evaluation=evaluation, **options)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        others = "" if evaluation is None else f" and {evaluation}"
        raise ValueError(
            f"run: expected records that a card can be made of in {run}{others}, got some that cannot be read "
            f"({type(error).__name__}: {error}). Mend them, or move them out of the folder."
        ) from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _merge_note(merged: Merged, run_config: dict[str, Any], dtype: torch.dtype, *, is_rounded: bool) -> str:
    name = _name(dtype)
    if merged.base is None:
        return f"The weights are the run's, in {name}."
    note = f"The adapter is merged into {code(shown_model(merged.base))}, in {name}."
    if is_rounded:
        note += (
            " The base is rounded to 4 bits, as it was in training, and stored widened: the policy that was trained."
        )
    elif run_config.get("load_in_4bit") or run_config.get("load_in_8bit"):
        bits = 4 if run_config.get("load_in_4bit") else 8
        note += (
            f" Training saw this base rounded to {bits} bits; the merge is into its full-precision weights, so that "
            "answers differ from those in training by that rounding."
        )
    return note
