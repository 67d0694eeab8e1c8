"""The recipes for accelerate: each file is one that this accelerate takes, and asks for what its name says."""

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from ranks import RECIPES, launcher_arguments

EXPECTED = {
    "single_gpu.yaml": {"num_processes": 1, "multi_gpu": False, "use_fsdp": False, "use_deepspeed": False},
    "ddp_8.yaml": {"num_processes": 8, "num_machines": 1, "multi_gpu": True, "use_fsdp": False},
    "ddp_2x8.yaml": {"num_processes": 16, "num_machines": 2, "multi_gpu": True, "use_fsdp": False},
    "fsdp2_8.yaml": {"num_processes": 8, "num_machines": 1, "use_fsdp": True, "fsdp_version": 2},
    "fsdp2_2x8.yaml": {"num_processes": 16, "num_machines": 2, "use_fsdp": True, "fsdp_version": 2},
    "tp_8.yaml": {"num_processes": 8, "multi_gpu": True, "use_fsdp": False, "parallelism_config_tp_size": 8},
    "zero2_8.yaml": {"num_processes": 8, "use_deepspeed": True, "zero_stage": 2},
    "zero3_8.yaml": {"num_processes": 8, "use_deepspeed": True, "zero_stage": 3, "zero3_save_16bit_model": True},
}


def test_every_recipe_is_tested():
    assert {path.name for path in RECIPES.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_takes_the_recipe(name):
    arguments = launcher_arguments(name)
    assert {key: getattr(arguments, key) for key in EXPECTED[name]} == EXPECTED[name]
    assert arguments.mixed_precision == "bf16"


@pytest.mark.parametrize("name", EXPECTED)
def test_recipe_holds_only_fields_of_accelerate(name):
    values = yaml.safe_load((RECIPES / name).read_text())
    ClusterConfig.from_yaml_file(yaml_file=str(RECIPES / name))  # refuses a field that it does not know
    arguments = launcher_arguments(name)
    for section in ("fsdp_config", "deepspeed_config", "parallelism_config"):
        for key, value in values.get(section, {}).items():
            assert str(getattr(arguments, key)).lower() == str(value).lower(), key


def test_a_field_that_accelerate_lost_would_be_noticed(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text((RECIPES / "ddp_8.yaml").read_text() + "no_such_field: 1\n")
    with pytest.raises(ValueError, match="no_such_field"):
        ClusterConfig.from_yaml_file(yaml_file=str(path))
