"""Layouts: tree rows written out by hand, and the same numbers from trees as from rows, gradients and training too."""

from dataclasses import replace

import pytest
import torch
import transformers
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.data import PairCollator, PairTree, tree_mask, tree_rows
from dpop_trainer.data.layouts import cheaper_layout
from dpop_trainer.layout import ScoredModel, choose_layout, forward_inputs, layout_difference, tree_obstacle
from peft import LoraConfig, get_peft_model
from tiny import UNUSED_ID, VOCAB_SIZE, tiny_llama, token_pairs, word_tokenizer
from transformers import AutoModelForCausalLM

from dpop_kernels import ScoringHead, pair_loss
from dpop_kernels.pair_loss import segment_sums

PAD = 0
# answers that part after one token; one answer that is the beginning of the other
FORKED = PairTree([11, 12], [21], [31, 32], [41])
NESTED = PairTree([13], [22], [], [42])

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


# ---- tensors


def test_tree_rows_by_hand():
    batch = tree_rows([FORKED, NESTED], pad_token_id=PAD)
    expected = {
        "input_ids": [[11, 12, 21, 31, 32, 41], [13, 22, 42, PAD, PAD, PAD]],
        "attention_mask": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]],
        # 41 stands where 31 stands: right after 21
        "position_ids": [[0, 1, 2, 3, 4, 3], [0, 1, 2, 0, 0, 0]],
        "branches": [[3, 5], [2, 2]],
        # rows begin at 0 and 6. 21 is predicted by 12; 31 and 32 by 21 and 31; 41 by 21 again. 22 by 13, 42 by 22
        "score_positions": [1, 2, 3, 2, 6, 7],
        "target_ids": [21, 31, 32, 41, 22, 42],
        "cu_seqlens": [0, 1, 3, 4, 5, 5, 6],
        # 5 + 4 and 2 + 3 tokens in rows of their own; 6 and 3 here
        "token_counts": [14, 9],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected


def test_tree_mask_by_hand():
    seen = tree_mask(torch.tensor([[3, 5], [2, 2]]), 6)
    assert seen.shape == (2, 1, 6, 6)
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],  # 41 sees the prompt, 21 and itself, and not 31 32
    ]
    assert torch.equal(seen[1, 0], torch.ones(6, 6).tril().bool())  # no chosen tail: plain causal, padding included
    assert seen.diagonal(dim1=-2, dim2=-1).all()
    added = tree_mask(torch.tensor([[3, 5], [2, 2]]), 6, torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, seen)
    assert (added[~seen] == torch.finfo(torch.bfloat16).min).all()


def test_tree_without_a_shared_prefix_shares_the_prompt():
    record = {"prompt_ids": [11, 12], "chosen_ids": [21, 31, 32], "rejected_ids": [21, 41], "pair_id": 0}
    batch = PairCollator(pad_token_id=PAD, layout="tree", prefix_sharing=False)([record])
    assert batch["input_ids"].tolist() == [[11, 12, 21, 31, 32, 21, 41]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch["score_positions"].tolist() == [1, 2, 3, 1, 5]
    assert batch["token_counts"].tolist() == [9, 7]


def test_tree_of_no_pairs():
    batch = tree_rows([], pad_token_id=PAD)
    assert batch["input_ids"].shape == (0, 0)
    assert batch["branches"].shape == (0, 2)
    assert tree_mask(batch["branches"], 0).shape == (0, 1, 0, 0)


def test_unknown_layout_is_named():
    with pytest.raises(ValueError, match=r"layout: expected one of \('rows', 'tree', 'auto'\), got 'flat'"):
        PairCollator(pad_token_id=PAD, layout="flat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout: expected 'auto', 'rows' or 'tree', got 'flat'"):
        DPOPConfig(layout="flat")


# ---- cost


@pytest.mark.parametrize(("prompt_length", "expected"), [(16, "rows"), (17, "tree")])
def test_cheaper_layout_breaks_even_where_derived(prompt_length, expected):
    # tails t = 100 each, H = 192: tree where 6 H m + m² >= 2 t², 1152 m + m² >= 20000: m = 17 gives 19873 and
    # 18 gives 21060, so that it needs one shared token besides a prompt of 17
    tree = PairTree([1] * prompt_length, [2], [3] * 100, [4] * 100)
    assert cheaper_layout([tree], hidden_size=192) == expected


def test_without_attention_every_shared_token_pays():
    assert cheaper_layout([PairTree([1], [], [3] * 100, [4] * 100)]) == "tree"


def test_padding_counts_in_the_cost():
    # H = 10: T positions cost T + T²/60. A tree of 1 + 10 + 10 costs 28.4, two rows of 11 cost 2 · 13.0
    long_tails = PairTree([1], [], [3] * 10, [4] * 10)
    assert cheaper_layout([long_tails], hidden_size=10) == "rows"
    # rounded up, a row is as long as a tree: 30.1 against 2 · 30.1
    assert cheaper_layout([long_tails], hidden_size=10, pad_to_multiple_of=22) == "tree"
    # beside a pair whose tree has 33 tokens and whose rows have 32: 51.2 against 2 · 49.1
    long_prompt = PairTree([1] * 31, [], [3], [4])
    assert cheaper_layout([long_tails, long_prompt], hidden_size=10) == "tree"


def test_sharing_more_never_costs_more():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        prompt, shared, chosen, rejected = torch.randint(0, 40, (4,), generator=generator).tolist()
        whole = PairTree([1] * (prompt + 1), [], [2] * (shared + chosen), [2] * (shared + rejected))
        split = PairTree([1] * (prompt + 1), [2] * shared, [2] * chosen, [2] * rejected)
        assert sum(map(len, split)) == sum(map(len, whole)) - shared
        assert cheaper_layout([whole]) == cheaper_layout([split]) == "tree"
        if cheaper_layout([whole], hidden_size=8) == "tree":
            assert cheaper_layout([split], hidden_size=8) == "tree"


def test_collator_takes_the_cheaper_layout_of_each_batch():
    collator = PairCollator(pad_token_id=PAD, layout="auto", hidden_size=2)
    low_edit = {"prompt_ids": [1] * 20, "chosen_ids": [5, 6], "rejected_ids": [5, 7], "pair_id": 0}
    # 12 m + m² = 13 against 2 · 10² = 200
    long_tails = {"prompt_ids": [1], "chosen_ids": [5] * 10, "rejected_ids": [6] * 10, "pair_id": 1}
    assert "branches" in collator([low_edit])
    assert "branches" not in collator([long_tails])


# ---- exactness


def run(model, collator, records, *, loss_type="dpop", ref_shift=0.0):
    """Segment sums, losses and all parameter gradients of a batch; Δw of every pair is minus `ref_shift`."""
    batch = collator(records)
    head = ScoringHead(model, backend="reference")
    model.zero_grad()
    try:
        logps = head.token_logps(model, batch["score_positions"], batch["target_ids"], **forward_inputs(batch, model))
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


def assert_same(ours, theirs, bound):
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


@pytest.mark.parametrize("prefix_sharing", [True, False], ids=["prefix", "prompt_only"])
@pytest.mark.parametrize("ref_shift", [0.5, -0.5], ids=["hinge_active", "hinge_inactive"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_tree_is_rows(name, attn_implementation, ref_shift, prefix_sharing):
    model = family(name, attn_implementation=attn_implementation)
    rows = PairCollator(pad_token_id=PAD, prefix_sharing=prefix_sharing)
    expected = run(model, rows, edge_pairs(), ref_shift=ref_shift)
    # Δw is minus the shift: the penalty is λ / 2 for every pair, or 0
    penalties = torch.full((len(edge_pairs()),), 50 * max(ref_shift, 0.0))
    torch.testing.assert_close(expected[1].penalties, penalties, rtol=1e-3, atol=0)
    ours = run(model, replace(rows, layout="tree"), edge_pairs(), ref_shift=ref_shift)
    assert_same(ours, expected, 1e-5)


def test_tree_is_rows_in_fp64():
    model = family("gpt2", dtype=torch.float64)  # the others' RMSNorm computes in fp32 whatever the dtype
    rows = PairCollator(pad_token_id=PAD)
    expected = run(model, rows, edge_pairs(), ref_shift=0.5)
    assert_same(run(model, replace(rows, layout="tree"), edge_pairs(), ref_shift=0.5), expected, 1e-12)


def test_tree_in_bf16_errs_as_rows_in_bf16():
    weights = family("llama", dtype=torch.bfloat16).state_dict()
    truth = family("llama", dtype=torch.float64)  # to about 1e-7, and bf16 errs by 1e-2
    truth.load_state_dict(weights)
    model = family("llama", dtype=torch.bfloat16)
    rows = PairCollator(pad_token_id=PAD)
    expected, _, _ = run(truth, rows, edge_pairs())
    errors = [
        (run(model, replace(rows, layout=layout), edge_pairs())[0].double() - expected).norm()
        for layout in ("rows", "tree")
    ]
    assert 0 < errors[1] <= 1.5 * errors[0]


def test_padding_of_a_tree_changes_nothing():
    model, tree = family("gpt2"), PairCollator(pad_token_id=PAD, layout="tree")
    expected = run(model, tree, edge_pairs(), ref_shift=0.5)
    assert_same(run(model, replace(tree, pad_to_multiple_of=32), edge_pairs(), ref_shift=0.5), expected, 1e-5)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_tree_under_lora_and_gradient_checkpointing(attn_implementation):
    def adapted():
        torch.manual_seed(3)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(family("llama", attn_implementation=attn_implementation), lora)
        model.enable_input_require_grads()
        return model.train()

    rows = PairCollator(pad_token_id=PAD)
    expected = run(adapted(), rows, edge_pairs(), ref_shift=0.5)
    assert all("lora" in name for name in expected[2])
    model = adapted()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(run(model, replace(rows, layout="tree"), edge_pairs(), ref_shift=0.5), expected, 1e-5)


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


def test_auto_takes_trees_where_they_are_right(caplog):
    assert choose(family("llama")) == "auto"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("Layout: trees, one row per pair, wherever they are cheaper")
    assert choose(family("gpt2", attn_implementation="eager"), "tree") == "tree"
    assert choose(family("llama"), "rows") == "rows"


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
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dpop_trainer.layout"]
    assert line.startswith(f"Layout: two rows per pair, not a tree: {reason}")
    with pytest.raises(ValueError, match=f"layout: expected models that can run 'tree', got one that cannot: {reason}"):
        choose(model, "tree")


def test_a_window_that_is_not_used_is_no_obstacle():
    assert tree_obstacle(build("Qwen2Config", {"sliding_window": 8, "use_sliding_window": False})) is None


@pytest.mark.parametrize("config_class", ["MistralConfig", "Gemma2Config"])
def test_a_window_longer_than_any_sequence_is_no_obstacle(config_class):
    # the longest of the pairs' sequences is the low edit's: 7 prompt and 7 answer tokens
    model = build(config_class, {"sliding_window": 14, "head_dim": 8})
    assert tree_obstacle(model, max_length=14) is None
    assert "sliding" in str(tree_obstacle(model, max_length=15))
    assert "sliding" in str(tree_obstacle(model))
    rows = PairCollator(pad_token_id=PAD)
    expected = run(model, rows, edge_pairs(), ref_shift=0.5)
    tree = replace(rows, layout="tree")
    assert tree(edge_pairs())["input_ids"].shape[1] == 14 + 5  # a tail of 5 more: longer than the window
    assert_same(run(model, tree, edge_pairs(), ref_shift=0.5), expected, 1e-5)


def test_attention_without_a_mask_of_its_own_uses_rows(caplog):
    model = family("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert choose(model) == "rows"
    assert "attn_implementation 'flash_attention_2' takes no mask of its own" in caplog.text


def test_reference_of_another_attention_or_kind_uses_rows(caplog):
    assert choose(family("llama"), reference=family("llama", seed=1)) == "auto"
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
    scored.head.remove()
    assert choose(model) == "rows"
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
    assert choose(model, records=records) == "auto"
    assert model.training


def test_weights_that_are_not_loaded_cannot_be_compared(caplog):
    with torch.device("meta"):
        model = family("llama")
    assert choose(model) == "rows"
    assert "the weights are not loaded yet" in caplog.text
    assert choose(model, "tree") == "tree"


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
    rows, tree = (train(tmp_path, layout, loss_type=loss_type) for layout in ("rows", "tree"))
    losses = [[line["loss"] for line in run] for run in (rows, tree)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] != pytest.approx(losses[0][0], rel=1e-2)  # it did train
    # policy and reference ran in the same layout: no log-ratio before the first update, no hinge active by rounding
    assert tree[0]["dpop/step_0_max_logratio"] == tree[0]["dpop/active_fraction"] == 0.0
    for key in ("logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy", "logits/chosen"):
        assert tree[0][key] == pytest.approx(rows[0][key], rel=1e-5)


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
