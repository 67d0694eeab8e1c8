"""The same numbers from every layout as from rows, gradients too, whatever the attention and the dtype."""

from dataclasses import replace

import pytest
import torch
import transformers
from dpop_trainer.batches import PairCollator
from dpop_trainer.batches.choose_layout import tree_obstacle
from dpop_trainer.batches.flat_attention import FLAT_ATTENTION, block_mask, use_flat_attention
from dpop_trainer.batches.scoring import ScoredModel
from dpop_trainer.settings.renamed import enable_checkpointing
from layout_models import MODELS, PAD, build, compute_nothing_in_fp32, edge_pairs, family
from peft import LoraConfig, get_peft_model
from rounding import CONTRACT_NATS, EQUAL

from dpop_kernels import ScoringHead, pair_loss
from dpop_kernels.losses.pair_loss import segment_sums


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
    compute_nothing_in_fp32(monkeypatch.setattr)


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
