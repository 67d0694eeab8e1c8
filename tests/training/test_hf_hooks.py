"""What the trainers change inside of transformers' Trainer is still there, called, and takes what it is passed."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from dpop_trainer.batches import Batch
from dpop_trainer.training.base import HeadTrainer
from dpop_trainer.training.hf_hooks import HfHooks
from transformers import Trainer, TrainingArguments

# private method of transformers -> the parameters that are passed on or read here, by hand
USED = {
    "_get_dataloader": ["dataset", "description", "batch_size"],
    "_get_eval_sampler": ["eval_dataset"],
    "_remove_unused_columns": ["dataset", "description"],
    "_get_collator_with_removed_columns": ["data_collator", "description"],
    "_prepare_inputs": ["inputs"],
    "_run_epoch": [],
    "_get_num_items_in_batch": ["batch_samples", "device"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_track_num_input_tokens": ["inputs"],
    "_save_checkpoint": ["model", "trial"],
    "_get_output_dir": ["trial"],
    "_save": ["output_dir", "state_dict"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
}
SOURCE = inspect.getsource(Trainer)


def test_the_table_is_of_all_that_is_overridden():
    own = {name for name, value in vars(HfHooks).items() if inspect.isfunction(value) and name.startswith("_")}
    assert own == set(USED)


@pytest.mark.parametrize("name", USED)
def test_each_still_takes_what_it_is_passed(name):
    theirs = list(inspect.signature(getattr(Trainer, name)).parameters)[1:]
    assert theirs[: len(USED[name])] == USED[name]
    ours = inspect.signature(getattr(HfHooks, name)).parameters.values()
    if all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in ours):
        # whoever calls it by name or in order meets the same parameters, and no more are asked for
        assert [parameter.name for parameter in ours][1:] == theirs
    named = [parameter.name for parameter in ours if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert set(named[1:]) <= set(USED[name])


@pytest.mark.parametrize("name", USED)
def test_each_is_still_called(name):
    """An override that nothing calls any more would change nothing, and nobody would notice."""
    assert re.search(rf"self\.{name}\b", SOURCE), name


@pytest.mark.parametrize("name", ["_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"])
def test_the_sums_are_still_kept_under_these_names(name):
    assert re.search(rf"self\.{name} (=|\+=) ", inspect.getsource(Trainer._run_epoch) + SOURCE)


def test_the_device_is_still_cached_under_this_name():
    assert "_setup_devices" in vars(TrainingArguments)


def test_deepspeed_does_not_round_the_reference():
    """transformers makes every float of a batch what the weights are: -1000.3 would be -1000 in bf16."""
    trainer = HfHooks.__new__(HfHooks)
    trainer.args = SimpleNamespace(device=torch.device("cpu"))  # type: ignore[assignment]
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    logps = torch.tensor([[0.0, -1000.3, -7.0]])
    batch = trainer._prepare_inputs({"ref_segment_logps": logps, "pair_ids": torch.tensor([3])})
    assert type(batch) is Batch
    assert torch.equal(batch["ref_segment_logps"], logps)
    assert Trainer._prepare_inputs(trainer, {"logps": logps})["logps"][0, 1] == -1000  # what it is kept from


def test_no_trainer_overrides_a_private_name_elsewhere():
    for cls in HeadTrainer.__mro__:
        if cls.__module__.startswith("dpop_trainer") and cls is not HfHooks:
            both = {name for name in vars(cls) if name.startswith("_") and not name.startswith("__")} & set(
                dir(Trainer)
            )
            assert not both, (cls, both)
