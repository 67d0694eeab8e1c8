"""A script may say gradient_checkpointing or activation_checkpointing, under any transformers: both are one switch."""

import pytest
from dpop_trainer import DPOPConfig
from dpop_trainer.settings.renamed import enable_checkpointing
from tiny import tiny_llama

NAMES = ("activation_checkpointing", "gradient_checkpointing")
KWARGS = {"use_reentrant": False, "every_n_layers": 2}


def switches(config):
    return [getattr(config, name) for name in NAMES], [getattr(config, f"{name}_kwargs") for name in NAMES]


def test_checkpointing_is_on_by_default(tmp_path):
    assert switches(DPOPConfig(output_dir=str(tmp_path))) == ([True, True], [None, None])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("as_json", [False, True], ids=["python", "command_line"])
def test_either_name_is_taken_and_both_tell_the_same(tmp_path, name, as_json):
    kwargs = '{"use_reentrant": false, "every_n_layers": 2}' if as_json else KWARGS
    for value in (True, False):
        config = DPOPConfig(output_dir=str(tmp_path), **{name: value, f"{name}_kwargs": kwargs})
        assert switches(config) == ([value, value], [KWARGS, KWARGS])


def test_what_was_written_is_read_back(tmp_path):
    written = DPOPConfig(output_dir=str(tmp_path), gradient_checkpointing=False)
    fields = {f"{name}{suffix}": getattr(written, f"{name}{suffix}") for name in NAMES for suffix in ("", "_kwargs")}
    assert switches(DPOPConfig(output_dir=str(tmp_path), **fields)) == switches(written)


def test_contradictions_name_both(tmp_path):
    with pytest.raises(ValueError, match="activation_checkpointing: expected the same as gradient_checkpointing"):
        DPOPConfig(output_dir=str(tmp_path), activation_checkpointing=True, gradient_checkpointing=False)
    with pytest.raises(ValueError, match="activation_checkpointing_kwargs: expected the same as gradient_checkpoint"):
        DPOPConfig(
            output_dir=str(tmp_path), activation_checkpointing_kwargs=KWARGS, gradient_checkpointing_kwargs={"a": 1}
        )


def test_a_model_is_told_under_its_own_name():
    model = tiny_llama()
    enable_checkpointing(model)
    assert model.model.layers[0].gradient_checkpointing


def test_deprecations_between_libraries_are_dropped_and_ours_are_not():
    namespace = {}
    for path, source in {
        "/lib/one.py": "import warnings\ndef old():\n    warnings.warn('old name', FutureWarning)\n",
        "/lib/other.py": "def uses_old():\n    old()\n",
    }.items():
        exec(compile(source, path, "exec"), namespace)
    namespace["uses_old"]()
    with pytest.raises(FutureWarning, match="old name"):
        namespace["old"]()
