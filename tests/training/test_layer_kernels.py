"""Liger's kernels in the layers of policy and reference, and not in the place of the head.

In Triton's interpreter its rotary kernel runs, its norms and gated MLPs do not: those are looked at where they stand.
"""

import os

import pytest
from dpop_trainer.models.layer_kernels import use_layer_kernels
from families import build
from tiny import tiny_llama, token_pairs, word_tokenizer
from trainers import adapted, config, logged, trainer
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

HEAD_OFF = {"fused_linear_cross_entropy": False, "cross_entropy": False}


@pytest.fixture(autouse=True)
def own_rotary(monkeypatch):
    """Liger changes it in the module of the family: put back afterwards."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    for name in ("LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))


@pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="on a CPU in Triton's interpreter alone")
@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_a_run_with_the_layers_kernels_is_the_run_without(tmp_path, layout):
    # two steps: the second one's loss is that of the first one's gradient
    options = {"layout": layout, "max_steps": 2, "learning_rate": 1e-2, "gradient_accumulation_steps": 1}
    options |= {"records": token_pairs(2), "per_device_train_batch_size": 2}
    plain = trainer(tmp_path / "plain", word_tokenizer(), **options)
    plain.train()
    own = modeling_llama.apply_rotary_pos_emb
    given = {"rms_norm": False, "swiglu": False}
    run = trainer(tmp_path / "liger", word_tokenizer(), use_liger_kernel=True, liger_kernel_config=given, **options)
    assert run.args.liger_kernel_config == {**given, **HEAD_OFF}
    run.train()
    assert modeling_llama.apply_rotary_pos_emb is not own
    for model in (run.model, run.ref_model):
        assert model.forward.__func__ is LlamaForCausalLM.forward
    assert logged(run, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert logged(run, "dpop/step_0_max_logratio") == [0.0]


@pytest.mark.parametrize("make", [tiny_llama, adapted], ids=["model", "adapter"])
def test_norms_and_mlps_are_liger_s_and_the_head_is_not(make):
    model = make()
    use_layer_kernels(model, HEAD_OFF)
    base = model.get_base_model() if make is adapted else model
    layer = base.model.layers[0]
    for module in (base.model.norm, layer.input_layernorm, layer.mlp):
        assert module.forward.__func__.__module__.startswith("liger_kernel")
    assert base.forward.__func__ is LlamaForCausalLM.forward


def test_a_family_without_kernels_is_said(caplog):
    use_layer_kernels(build("gpt_neox"), HEAD_OFF)
    assert "use_liger_kernel=True has no effect: Liger has no kernels for gpt_neox." in caplog.text


def test_what_cannot_be_is_named(tmp_path, monkeypatch):
    for name in HEAD_OFF:
        with pytest.raises(ValueError, match=f"liger_kernel_config: expected {name} to be false, got true"):
            config(tmp_path, use_liger_kernel=True, liger_kernel_config={name: True})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="use_liger_kernel: expected a GPU, which its kernels are for, found none"):
        config(tmp_path, use_liger_kernel=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="use_liger_kernel: expected liger-kernel to be installed, and it is not"):
        config(tmp_path, use_liger_kernel=True)
