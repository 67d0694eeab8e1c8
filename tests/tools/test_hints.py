"""A hint is given where it helps: for slips of the hand and parts of a name, and for no other name."""

import pytest
from dpop_trainer.settings.arguments import DataArguments, ModelArguments
from dpop_trainer.settings.command_parser import did_you_mean
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.settings.hints import closest
from dpop_trainer.settings.run_parser import RunParser
from dpop_trainer.settings.trl_fields import FORMER_NAMES, NOT_OFFERED, name_hint

FIELDS = list(RunParser((ModelArguments, DataArguments, DPOPConfig), "dpop train").field_actions())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("dpop_lamda", "dpop_lambda"),
        ("dpop_lam", "dpop_lambda"),
        ("learning_rte", "learning_rate"),
        ("learningrate", "learning_rate"),
        ("data_set_name", "dataset_name"),
        ("max_lenght", "max_length"),
        ("lora_target_module", "lora_target_modules"),
        ("gradient_accumulation", "gradient_accumulation_steps"),
        ("num_epochs", "num_train_epochs"),
        ("outputdir", "output_dir"),
        ("grad_accumulation_steps", "gradient_accumulation_steps"),
        ("beta1", "adam_beta1"),
    ],
)
def test_what_was_meant(name, meant):
    assert closest(name, FIELDS) == meant


@pytest.mark.parametrize(
    "name",
    [
        "group_by_length",  # is not group_by_prompt
        "eos_token",  # is not pad_token
        "bos_token",
        "lora_rank",  # is not lora_task
        "max_prompt",  # is neither max_length nor max_steps
        "eval_on_end",  # is not eval_on_start
        "min_length",  # is not max_length
        "load_in_2bit",  # is not load_in_4bit
        "fp8",
        "temperature",
        "num_gpus",
    ],
)
def test_another_name_is_no_slip(name):
    assert closest(name, FIELDS) is None


@pytest.mark.parametrize("name", [*FORMER_NAMES, *NOT_OFFERED])
def test_a_name_that_is_known_of_elsewhere_gets_its_answer(name):
    assert name not in FIELDS
    assert "Did you mean" not in name_hint(name, FIELDS, "otherwise") != "otherwise"


def test_fields_that_exist_name_what_takes_their_place():
    for name, answer in NOT_OFFERED.items():
        words = answer.replace(".", " ").replace(",", " ").split()
        assert not any("_" in word and word not in [*FIELDS, "group_by_length"] for word in words), name


def test_commands_and_flags():
    assert did_you_mean("trian", ["train", "plan"]) == " Did you mean 'train'?"
    assert did_you_mean("--paris", ["--pairs", "--base"]) == " Did you mean '--pairs'?"
    assert did_you_mean("--base_dir", ["--pairs_dir"]) == ""
