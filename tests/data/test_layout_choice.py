"""Which layout a model can run: what its configuration tells, and what a probe finds out."""

from dataclasses import replace

import pytest
import torch
from dpop_trainer.batches import PairCollator, flat_attention
from dpop_trainer.batches.choose_layout import (
    choose_layout,
    laid_out,
    layout_difference,
    tree_obstacle,
)
from dpop_trainer.batches.flat_attention import FLAT_ATTENTION, block_mask
from dpop_trainer.batches.scoring import ScoredModel
from layout_models import PAD, build, edge_pairs, family
from tiny import UNUSED_ID
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpop_kernels import ScoringHead


def choose(model, asked="auto", reference=None, records=None):
    models = [model] if reference is None else [model, reference]
    scored = [ScoredModel(m, ScoringHead(m, backend="reference")) for m in models]
    try:
        return choose_layout(
            asked,
            scored[0],
            scored[1] if reference is not None else None,
            PairCollator(pad_token_id=PAD),
            records if records is not None else edge_pairs(),
        )
    finally:
        for _, head in scored:
            head.remove()


def attention(model):
    return model.config._attn_implementation


def test_auto_takes_the_best_that_is_right(caplog):
    model = family("llama")
    assert choose(model) == "flat"
    assert attention(model) == FLAT_ATTENTION
    eager = family("llama", attn_implementation="eager")
    assert choose(eager) == "auto"
    assert attention(eager) == "eager"
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "Layout: trees, all of a batch in one flat row; their log-probs are those of two rows.",
        "Layout: trees, one row per pair or packed into rows of several, wherever they are cheaper; their log-probs "
        "are those of two rows. Not flat: attn_implementation 'eager' is not replaced (sdpa is).",
    ]


@pytest.mark.parametrize("layout", ["rows", "tree", "packed", "flat"])
def test_what_is_asked_for_is_taken(layout):
    model = family("gpt2")
    assert choose(model, layout) == layout
    assert attention(model) == (FLAT_ATTENTION if layout == "flat" else "sdpa")


def test_a_model_of_an_earlier_flat_run_is_chosen_for_anew():
    model, reference = family("llama"), family("llama", seed=1)
    assert choose(model) == "flat"
    assert choose(model, "packed", reference=reference) == "packed"
    assert attention(model) == attention(reference) == "sdpa"
    assert choose(model, reference=reference) == "flat"
    assert attention(model) == attention(reference) == FLAT_ATTENTION


def test_a_flat_row_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layout: expected models that can run 'flat'.*'eager' is not replaced"):
        choose(family("llama", attn_implementation="eager"), "flat")


def test_code_that_takes_no_attention_of_ours_runs_trees(caplog, monkeypatch):
    model = family("llama")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    assert choose(model) == "auto"
    assert attention(model) == "sdpa"
    assert "llama does not take an attention function of transformers' interface" in caplog.text


def test_a_model_that_takes_no_block_mask_runs_trees(caplog, monkeypatch):
    # GPT-2's forward asks the mask for its number of dimensions, which a BlockMask does not tell
    monkeypatch.setattr("dpop_trainer.batches.scoring.flat_mask", lambda ends: block_mask(ends, compiled=False))
    model = family("gpt2")
    assert choose(model) == "auto"
    assert attention(model) == "sdpa"
    assert "Not flat: the model's forward does not take one (AttributeError: 'BlockMask'" in caplog.text


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_flat_attention_without_a_backward_is_found_out(flex_without_compiler, caplog, monkeypatch):
    """As compiled FlexAttention has none on a CPU: its log-probs are right; training would fail at its first step."""

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states):
            return states.clone()

        @staticmethod
        def backward(ctx, grad_states):
            raise NotImplementedError("no backward on this device")

    forward = flat_attention.flex_attention_forward

    def without_backward(*args, **kwargs):
        states, nothing = forward(*args, **kwargs)
        return NoBackward.apply(states), nothing

    monkeypatch.setattr(flat_attention, "flex_attention_forward", without_backward)
    monkeypatch.setattr("dpop_trainer.batches.scoring.flat_mask", lambda ends: block_mask(ends, compiled=False))
    model = family("llama")
    assert choose(model) == "auto"
    assert attention(model) == "sdpa"
    assert "Not flat: its attention has no backward here (" in caplog.text
    with pytest.raises(ValueError, match=r"layout: expected models that can run 'flat'.*has no backward here.*'auto'"):
        choose(family("llama"), "flat")


def test_a_flat_attention_with_wrong_gradients_is_found_out(caplog, monkeypatch):
    class WrongBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states):
            return states.clone()

        @staticmethod
        def backward(ctx, grad_states):
            return grad_states * 1.01  # of queries alone, the first of the three gradients that are compared

    forward = flat_attention.flat_attention_forward

    def wrong(module, query, *args, **kwargs):
        return forward(module, WrongBackward.apply(query), *args, **kwargs)

    assert choose(family("llama"), "flat") == "flat"
    monkeypatch.setattr(flat_attention, "flat_attention_forward", wrong)
    assert choose(family("llama")) == "auto"
    assert "Not flat: the gradients of its attention differ by 0.0" in caplog.text
    assert ALL_ATTENTION_FUNCTIONS[FLAT_ATTENTION] is forward  # what the probe put in its place is gone


def test_flat_rows_on_cuda_come_in_whole_blocks(monkeypatch):
    collator = PairCollator(pad_token_id=PAD)
    assert laid_out(collator, "flat", family("llama")).pad_to_multiple_of is None
    monkeypatch.setattr("dpop_trainer.batches.choose_layout._device", lambda model: torch.device("cuda"))
    assert laid_out(collator, "flat", family("llama")).pad_to_multiple_of == 128
    assert laid_out(collator, "tree", family("llama")).pad_to_multiple_of is None
    assert laid_out(replace(collator, pad_to_multiple_of=8), "flat", family("llama")).pad_to_multiple_of == 8


REFUSED = {
    "sliding_window": ("MistralConfig", {"sliding_window": 8}, "sdpa", "mistral attends within a sliding window of 8"),
    "window_in_some_layers": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "sdpa",
        "qwen2 has layers of another kind than full attention: sliding_attention",
    ),
    "local_attention": (
        "GPTNeoConfig",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "eager",
        "gpt_neo has layers of another kind than full attention: local",
    ),
    "state_space": ("MambaConfig", {"state_size": 4}, "eager", "mamba has layers of another kind"),
    "alibi": ("FalconConfig", {"alibi": True}, "eager", "falcon takes its positions from the columns"),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, "eager", "bloom takes its positions from the columns"),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4}, "eager", "mpt takes its positions from"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_a_tree_would_break_use_rows(name, caplog):
    config_class, overrides, attn_implementation, reason = REFUSED[name]
    model = build(config_class, overrides, attn_implementation=attn_implementation)
    assert choose(model) == "rows"
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dpop_trainer.batches.choose_layout"]
    assert line.startswith(f"Layout: two rows per pair, not a tree: {reason}")
    with pytest.raises(ValueError, match=f"layout: expected models that can run 'tree', got one that cannot: {reason}"):
        choose(model, "tree")


def test_a_window_that_is_not_used_is_no_obstacle():
    assert tree_obstacle(build("Qwen2Config", {"sliding_window": 8, "use_sliding_window": False})) is None


def test_attention_without_a_mask_of_its_own_uses_rows(caplog):
    model = family("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert choose(model) == "rows"
    assert "attn_implementation 'flash_attention_2' takes no mask of its own" in caplog.text


def test_reference_of_another_attention_or_kind_uses_rows(caplog):
    reference = family("llama", seed=1)
    assert choose(family("llama"), reference=reference) == "flat"
    assert attention(reference) == FLAT_ATTENTION
    assert choose(family("llama"), reference=family("llama", attn_implementation="eager")) == "rows"
    assert "the reference's attn_implementation is another than the policy's" in caplog.text
    assert choose(family("llama"), reference=build("MistralConfig", {"sliding_window": 8})) == "rows"


def ignores_positions(model):
    rotary, forward = model.model.rotary_emb, model.model.rotary_emb.forward
    rotary.forward = lambda x, position_ids: forward(x, torch.arange(x.shape[1]).unsqueeze(0))


def ignores_the_mask(model):
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
        )


def fails_on_a_tree(model):
    def check(module, args, kwargs):
        if kwargs["attention_mask"].dim() == 4:
            raise RuntimeError("expected a 2-D mask")

    model.model.register_forward_pre_hook(check, with_kwargs=True)


@pytest.mark.parametrize("spoil", [ignores_positions, ignores_the_mask])
def test_the_probe_finds_what_no_configuration_tells(spoil, caplog):
    model = family("llama")
    assert tree_obstacle(model) is None
    spoil(model)
    scored = ScoredModel(model, ScoringHead(model, backend="reference"))
    assert layout_difference(scored, PairCollator(pad_token_id=PAD), edge_pairs()) > 0.05
    assert layout_difference(scored, PairCollator(pad_token_id=PAD), edge_pairs(), layout="packed") > 0.05
    scored.head.remove()
    assert choose(model) == "rows"
    assert attention(model) == "sdpa"
    assert "log-probs in one differ from those in rows by" in caplog.text
    assert "rounding explains 0.001" in caplog.text
    with pytest.raises(ValueError, match=r"differ from those in rows by 0\.\d+ nats per token"):
        choose(model, "tree")


def test_a_forward_that_takes_no_tree_uses_rows(caplog):
    model = family("llama")
    fails_on_a_tree(model)
    assert choose(model) == "rows"
    assert "forward does not take one (RuntimeError: expected a 2-D mask)" in caplog.text


def test_the_probe_leaves_out_what_is_not_finite_anyway():
    model = family("llama").train()
    model.model.embed_tokens.weight.data[UNUSED_ID] = float("nan")
    records = edge_pairs()
    records[2]["prompt_ids"][0] = UNUSED_ID
    assert choose(model, records=records) == "flat"
    assert model.training


def test_weights_that_are_not_loaded_cannot_be_compared(caplog):
    with torch.device("meta"):
        model = family("llama")
    assert choose(model) == "rows"
    assert "the weights are not loaded yet" in caplog.text
    assert choose(model, "tree") == "tree"
    assert choose(model, "flat") == "flat"
    assert attention(model) == FLAT_ATTENTION
