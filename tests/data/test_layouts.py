"""The same numbers from every layout as from rows, gradients and training too; and which layout a model can run."""

from dataclasses import replace

import pytest
import torch
import transformers
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.batches import PairCollator, flat_attention
from dpop_trainer.batches.choose_layout import (
    choose_layout,
    laid_out,
    layout_difference,
    tree_obstacle,
)
from dpop_trainer.batches.flat_attention import FLAT_ATTENTION, block_mask, use_flat_attention
from dpop_trainer.batches.scoring import ScoredModel
from dpop_trainer.settings.renamed import enable_checkpointing
from peft import LoraConfig, get_peft_model
from rounding import CONTRACT_NATS, EQUAL
from tiny import UNUSED_ID, VOCAB_SIZE, tiny_llama, token_pairs, word_tokenizer
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpop_kernels import ScoringHead, pair_loss
from dpop_kernels.losses.pair_loss import segment_sums

PAD = 0
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # far from uniform predictions
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "gpt2": ("GPT2Config", {"n_positions": 64}),  # learned positions, tied embeddings
    "mistral_without_window": ("MistralConfig", {"sliding_window": None}),
    "phi": ("PhiConfig", {}),  # half of each head rotated, a head with a bias
    "mixtral": ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),  # routed token by token
}


def build(config_class, overrides, *, attn_implementation="sdpa", seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    arguments = {**SMALL, **overrides}
    if config_class == "GPT2Config":
        for name in ("intermediate_size", "num_key_value_heads", "max_position_embeddings"):
            del arguments[name]
    config = getattr(transformers, config_class)(**arguments)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    if hasattr(config, "num_local_experts"):
        model.set_experts_implementation("eager")  # the grouped product takes no fp64, and torch 2.8's no CPU
    for module in model.modules():  # GPT-2 and Phi are built with dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def family(name, **options):
    return build(*MODELS[name], **options)


def edge_pairs():
    """Every place a branch can be at, in ragged lengths."""
    answers = {
        "branch at the first token": ([5, 6, 7, 8], [9, 6, 7, 8]),
        "branch at the last token": ([5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 11]),
        "identical": ([12, 13, 14], [12, 13, 14]),
        "chosen begins rejected": ([15, 16], [15, 16, 17, 18, 19]),
        "rejected begins chosen": ([20, 21, 22, 23], [20]),
        "low edit": ([24, 25, 26, 27, 28, 29, 30], [24, 25, 31, 27, 28, 29, 30]),
    }
    return [
        {"prompt_ids": [1, *range(32, 33 + i)], "chosen_ids": chosen, "rejected_ids": rejected, "pair_id": i}
        for i, (chosen, rejected) in enumerate(answers.values())
    ]


# ---- exactness


def run(model, collator, records, *, loss_type="dpop", ref_shift=0.0):
    """Segment sums, losses and all parameter gradients of a batch; Δw of every pair is minus `ref_shift`."""
    batch = collator(records)
    head = ScoringHead(model, backend="reference")
    model.zero_grad()
    try:
        logps = ScoredModel(model, head).token_logps(batch)
    finally:
        head.remove()
    sums = segment_sums(logps, batch["cu_seqlens"]).view(-1, 3).detach()
    reference = sums.clone()
    reference[:, 0] += ref_shift  # the shared part: it moves Δw and Δl alike
    reference[:, 2] -= torch.linspace(-1, 1, len(records))  # margins of either sign
    pairs = pair_loss(logps, batch["cu_seqlens"], reference, loss_type=loss_type, backend="reference")
    pairs.losses.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return sums, pairs, grads


def assert_same(ours, theirs, bound=EQUAL):
    """Two layouts are one algorithm in two orders: models of fp64 leave no room to a difference of another kind."""
    sums, pairs, grads = ours
    expected_sums, expected_pairs, expected_grads = theirs
    torch.testing.assert_close(sums, expected_sums, rtol=bound, atol=bound)
    torch.testing.assert_close(pairs.losses, expected_pairs.losses, rtol=bound, atol=bound)
    assert grads.keys() == expected_grads.keys()
    assert grads
    # relative to the gradient as a whole: single parameters may have a gradient that is zero but for rounding
    # (the bias of the keys, which softmax does not see)
    whole = torch.cat([grad.flatten() for grad in expected_grads.values()]).norm()
    for name, grad in grads.items():
        error = (grad - expected_grads[name]).norm()
        assert error <= bound * max(expected_grads[name].norm(), 1e-3 * whole), (name, float(error / whole))


# layout, and the attention under which the model runs it
RUNNABLE = [("tree", "sdpa"), ("tree", "eager"), ("packed", "sdpa"), ("packed", "eager"), ("flat", FLAT_ATTENTION)]


def siblings():
    """Pairs of one prompt: the same chosen answer against two others, and one pair given twice."""
    pair = {"prompt_ids": [1, 40, 41], "chosen_ids": [5, 6, 7, 8], "rejected_ids": [5, 6, 9, 8]}
    return [
        {**pair, "pair_id": 10},
        {**pair, "rejected_ids": [5, 6, 9, 10, 11], "pair_id": 11},
        {**pair, "rejected_ids": [12], "pair_id": 12},
        {**pair, "pair_id": 13},
    ]


@pytest.fixture
def _nothing_in_fp32(monkeypatch):
    """A model of fp64 computes its norms and the eager attention's softmax in fp64 too, where they ask for fp32."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def unchanged(tensor, *args, **kwargs):
        is_cut = tensor.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype"))
        return tensor if is_cut else to(tensor, *args, **kwargs)

    def in_own_dtype(tensor, *args, dtype=None, **kwargs):
        return softmax(tensor, *args, **kwargs, dtype=tensor.dtype if tensor.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.Tensor, "to", unchanged)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: unchanged(tensor, torch.float32))
    monkeypatch.setattr(torch.nn.functional, "softmax", in_own_dtype)


@pytest.mark.usefixtures("_nothing_in_fp32")
@pytest.mark.parametrize("prefix_sharing", [True, False], ids=["prefix", "prompt_only"])
@pytest.mark.parametrize("ref_shift", [0.5, -0.5], ids=["hinge_active", "hinge_inactive"])
@pytest.mark.parametrize(("layout", "attention"), RUNNABLE, ids=["-".join(pair) for pair in RUNNABLE])
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_is_rows(name, layout, attention, ref_shift, prefix_sharing):
    records = edge_pairs() if layout == "tree" else edge_pairs() + siblings()
    model = family(name, attn_implementation="eager" if attention == "eager" else "sdpa", dtype=torch.float64)
    # H = 4 makes rows of one or two pairs the cheapest
    rows = PairCollator(pad_token_id=PAD, prefix_sharing=prefix_sharing, hidden_size=4)
    expected = run(model, rows, records, ref_shift=ref_shift)
    # Δw is minus the shift: the penalty is λ / 2 for every pair, or 0
    penalties = torch.full((len(records),), 50 * max(ref_shift, 0.0))
    torch.testing.assert_close(expected[1].penalties, penalties.double(), rtol=1e-6, atol=0)
    if layout == "flat":
        use_flat_attention(model)
    laid = replace(rows, layout=layout)
    num_rows = len(laid(records)["input_ids"])
    assert num_rows == {"tree": len(records), "flat": 1}.get(layout, num_rows)
    assert layout != "packed" or 1 < num_rows < len(records)
    assert_same(run(model, laid, records, ref_shift=ref_shift), expected)


@pytest.fixture
def flex_without_compiler(monkeypatch):
    """FlexAttention as torch defines it, in eager: no backward, and slow, but the same arithmetic."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda query, key, value, training, **options: flex_attention(query, key, value, **options),
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"gpt2"}))
def test_a_flat_row_under_a_block_mask_is_rows(name, flex_without_compiler, monkeypatch):
    monkeypatch.setattr("dpop_trainer.batches.scoring.flat_mask", lambda ends: block_mask(ends, compiled=False))
    model = family(name)
    records = edge_pairs() + siblings()
    rows = PairCollator(pad_token_id=PAD)
    flat = replace(rows, layout="flat", pad_to_multiple_of=128)
    calls = []
    monkeypatch.setattr(
        "dpop_trainer.batches.flat_attention.flex_attention_forward",
        lambda *args, forward=transformers.integrations.flex_attention.flex_attention_forward, **kwargs: (
            calls.append(args[-1].shape) or forward(*args, **kwargs)
        ),
    )
    use_flat_attention(model)
    head = ScoringHead(model, backend="reference")
    logps = []
    with torch.no_grad():
        for batch in (rows(records), flat(records)):
            logps.append(ScoredModel(model, head).token_logps(batch))
    torch.testing.assert_close(logps[1], logps[0], rtol=0, atol=3 * CONTRACT_NATS)  # two layers in fp32
    assert calls == [(1, 1, 128, 128)] * 2  # both layers, in whole blocks


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_block_mask_under_autocast(flex_without_compiler):
    # fp32 weights in mixed precision: the rotation leaves queries and keys in fp32 beside values in bf16
    model, batch = family("llama"), PairCollator(pad_token_id=PAD, layout="flat", pad_to_multiple_of=128)(edge_pairs())
    use_flat_attention(model)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    masks = [batch["trie_ends"][:, None, None, :], block_mask(batch["trie_ends"], compiled=False)]
    tokens = batch["attention_mask"].bool()
    with torch.no_grad():
        truth = model.model(**inputs, attention_mask=masks[0]).last_hidden_state[tokens]
        with torch.autocast("cpu", torch.bfloat16):
            states = [model.model(**inputs, attention_mask=mask).last_hidden_state[tokens] for mask in masks]
    by_sdpa, by_flex = ((hidden - truth).norm() for hidden in states)
    # errors of independent roundings: three times the norm would be nine times as many
    assert 0 < by_flex <= 3 * by_sdpa


def test_tree_is_rows_in_fp64():
    model = family("gpt2", dtype=torch.float64)  # LayerNorm computes in fp64 too
    rows = PairCollator(pad_token_id=PAD)
    expected = run(model, rows, edge_pairs(), ref_shift=0.5)
    assert_same(run(model, replace(rows, layout="tree"), edge_pairs(), ref_shift=0.5), expected, 1e-12)
    assert_same(run(model, replace(rows, layout="packed", hidden_size=8), edge_pairs(), ref_shift=0.5), expected, 1e-12)
    use_flat_attention(model)
    assert_same(run(model, replace(rows, layout="flat"), edge_pairs(), ref_shift=0.5), expected, 1e-12)


def test_bf16_errs_as_rows_in_bf16():
    weights = family("llama", dtype=torch.bfloat16).state_dict()
    truth = family("llama", dtype=torch.float64)  # to about 1e-7, and bf16 errs by 1e-2
    truth.load_state_dict(weights)
    model = family("llama", dtype=torch.bfloat16)
    rows = PairCollator(pad_token_id=PAD)
    expected, _, expected_grads = run(truth, rows, edge_pairs(), ref_shift=0.5)
    errors = {}
    for layout in ("rows", "tree", "packed", "flat"):
        if layout == "flat":
            use_flat_attention(model)
        sums, _, grads = run(model, replace(rows, layout=layout), edge_pairs(), ref_shift=0.5)
        grad_error = sum((grads[name] - grad).square().sum() for name, grad in expected_grads.items()).sqrt()
        errors[layout] = torch.stack([(sums.double() - expected).norm(), grad_error])
    assert (errors["rows"] > 0).all()
    for layout in ("tree", "packed", "flat"):
        assert (errors[layout] <= 3 * errors["rows"]).all(), (layout, errors)  # as above


@pytest.mark.parametrize("layout", ["tree", "packed", "flat"])
def test_padding_changes_nothing(layout):
    model, collator = family("gpt2", dtype=torch.float64), PairCollator(pad_token_id=PAD, layout=layout)
    if layout == "flat":
        use_flat_attention(model)
    expected = run(model, collator, edge_pairs(), ref_shift=0.5)
    padded = replace(collator, pad_to_multiple_of=64)
    assert padded(edge_pairs())["input_ids"].shape[1] > collator(edge_pairs())["input_ids"].shape[1]
    assert_same(run(model, padded, edge_pairs(), ref_shift=0.5), expected)


@pytest.mark.usefixtures("_nothing_in_fp32")
@pytest.mark.parametrize(("layout", "attention"), RUNNABLE, ids=["-".join(pair) for pair in RUNNABLE])
def test_lora_and_gradient_checkpointing(layout, attention):
    def adapted():
        torch.manual_seed(3)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        base = family("llama", attn_implementation="eager" if attention == "eager" else "sdpa", dtype=torch.float64)
        if layout == "flat":
            use_flat_attention(base)
        model = get_peft_model(base, lora)
        for parameter in model.parameters():
            parameter.data = parameter.data.double()
        model.enable_input_require_grads()
        return model.train()

    rows = PairCollator(pad_token_id=PAD)
    expected = run(adapted(), rows, edge_pairs(), ref_shift=0.5)
    assert all("lora" in name for name in expected[2])
    model = adapted()
    enable_checkpointing(model)
    assert_same(run(model, replace(rows, layout=layout), edge_pairs(), ref_shift=0.5), expected)


def test_under_the_flat_attention_a_model_is_as_before():
    model, other = family("llama").eval(), family("llama").eval()
    use_flat_attention(other)
    ids = torch.tensor([[PAD, PAD, 5, 6, 7], [4, 5, 6, 7, 8]])
    mask = (ids != PAD).long()
    with torch.no_grad():
        torch.testing.assert_close(
            other(input_ids=ids, attention_mask=mask).logits,
            model(input_ids=ids, attention_mask=mask).logits,
            rtol=0,
            atol=0,
        )
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(other.generate(ids, **options), model.generate(ids, **options))
    assert FLAT_ATTENTION not in other.config.to_json_string()  # what is saved names no attention of ours


# ---- choice


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


@pytest.mark.usefixtures("_nothing_in_fp32")
@pytest.mark.parametrize("config_class", ["MistralConfig", "Gemma2Config"])
def test_a_window_longer_than_any_sequence_is_no_obstacle(config_class):
    # the longest of the pairs' sequences is the low edit's: 7 prompt and 7 answer tokens
    attention = "eager" if config_class == "Gemma2Config" else "sdpa"  # its capped scores are eager's alone
    model = build(
        config_class, {"sliding_window": 14, "head_dim": 8}, attn_implementation=attention, dtype=torch.float64
    )
    assert tree_obstacle(model, max_length=14) is None
    assert "sliding" in str(tree_obstacle(model, max_length=15))
    assert "sliding" in str(tree_obstacle(model))
    rows = PairCollator(pad_token_id=PAD)
    expected = run(model, rows, edge_pairs(), ref_shift=0.5)
    tree = replace(rows, layout="tree")
    assert tree(edge_pairs())["input_ids"].shape[1] == 14 + 5  # a tail of 5 more: longer than the window
    assert_same(run(model, tree, edge_pairs(), ref_shift=0.5), expected)


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


# ---- training


def train(tmp_path, layout, *, model=None, records=None, **overrides):
    settings = {
        "output_dir": str(tmp_path / layout),
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **overrides,
    }
    trainer = DPOPTrainer(
        model if model is not None else tiny_llama(),
        args=DPOPConfig(layout=layout, **settings),
        train_dataset=Dataset.from_list(records if records is not None else token_pairs()),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("loss_type", ["dpo", "dpop"])
def test_training_is_the_same_in_any_layout(tmp_path, loss_type):
    rows = train(tmp_path, "rows", loss_type=loss_type)
    expected = [line["loss"] for line in rows]
    assert expected[-1] != pytest.approx(expected[0], rel=1e-2)  # it did train
    for layout in ("tree", "packed", "flat"):
        run = train(tmp_path, layout, loss_type=loss_type)
        assert [line["loss"] for line in run] == pytest.approx(expected, rel=1e-4), layout
        # policy and reference ran in the same layout: no log-ratio before the first update, no hinge active by rounding
        assert run[0]["dpop/step_0_max_logratio"] == run[0]["dpop/active_fraction"] == 0.0, layout
        for key in ("logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy", "logits/chosen"):
            assert run[0][key] == pytest.approx(rows[0][key], rel=1e-5), (layout, key)


def test_auto_trains_as_it_should_in_either_case(tmp_path, caplog):
    # tiny_llama runs trees, here under gradient checkpointing; the same model in a window of 8 runs rows
    expected = [line["loss"] for line in train(tmp_path, "rows", max_steps=3)]
    auto = train(tmp_path, "auto", max_steps=3, gradient_checkpointing=True)
    assert [line["loss"] for line in auto] == pytest.approx(expected, rel=1e-4)
    assert auto[0]["tokens/computed_ratio"] < 1
    windowed = train(tmp_path, "auto", model=build("MistralConfig", {"sliding_window": 8}), max_steps=1)
    assert windowed[0]["tokens/computed_ratio"] == 1
    assert "Layout: two rows per pair, not a tree: mistral attends within a sliding window of 8" in caplog.text


def test_reference_columns_hold_for_any_layout(tmp_path):
    # a reference away from the policy, so that no pair is at the hinge's tie
    records = [{**record, "ref_chosen_logps": -20.0, "ref_rejected_logps": -21.0} for record in token_pairs()]
    rows, tree = (train(tmp_path, layout, records=records, max_steps=3) for layout in ("rows", "tree"))
    assert [line["loss"] for line in tree] == pytest.approx([line["loss"] for line in rows], rel=1e-4)


def test_tokens_are_counted(tmp_path):
    # pair 0: prompt 3, answers of 4 that part after 1, so 3 + 1 + 3 + 3 of 14; pair 1: 4, 6, 2: 4 + 2 + 4 + 4 of 20
    records = token_pairs(2)
    settings = {"records": records, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    tree, rows = (train(tmp_path, layout, **settings) for layout in ("tree", "rows"))
    assert [line["num_tokens"] for line in tree] == [line["num_tokens"] for line in rows] == [34, 68]
    assert [line["num_computed_tokens"] for line in tree] == [24, 48]
    assert tree[0]["tokens/computed_ratio"] == pytest.approx(24 / 34)
    assert tree[0]["tokens/padding_share"] == pytest.approx(4 / 28)  # two rows of 14
    assert rows[0]["tokens/computed_ratio"] == 1.0
    assert rows[0]["tokens/padding_share"] == pytest.approx(6 / 40)  # four rows of 10


def test_trainer_refuses_a_tree_by_name(tmp_path):
    config = DPOPConfig(output_dir=str(tmp_path), layout="tree", use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"layout: expected models that can run 'tree'.*sliding window of 8"):
        DPOPTrainer(
            build("MistralConfig", {"sliding_window": 8}),  # max_length is 1024
            args=config,
            train_dataset=Dataset.from_list(token_pairs()),
            processing_class=word_tokenizer(),
        )
