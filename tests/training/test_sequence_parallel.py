"""A batch that several ranks run together is the batch that one runs: log-probs, statistics, gradients.

Whole runs of trainers, against one process, are in `test_distributed.py`.
"""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, ParallelismConfig
from dpop_trainer.batches import Batch, PairCollator
from dpop_trainer.batches.flat_attention import block_mask, use_flat_attention
from dpop_trainer.batches.routers import RouterLoss
from dpop_trainer.batches.scoring import ScoredModel, attention_of, forward_inputs
from dpop_trainer.batches.sequence_group import SequenceGroup, join_group
from dpop_trainer.batches.sequence_obstacles import check_shared_model, shared_difference
from dpop_trainer.batches.sequence_shares import share_out, to_run_together
from dpop_trainer.batches.shared_attention import share_attention
from dpop_trainer.settings.renamed import enable_checkpointing
from dpop_trainer.training.sequence_parallel import check_sequence_parallel
from layout_models import PAD, build, compute_nothing_in_fp32, edge_pairs, family
from rounding import CONTRACT_NATS, EQUAL
from sharded import run_ranks
from tiny import token_pairs, word_tokenizer
from torch import distributed as dist
from torch.nn.attention.flex_attention import flex_attention
from trainers import config, trainer
from transformers.integrations import flex_attention as flex

from benchmarks.measure import peak_bytes
from dpop_kernels import ScoringHead

# kind of model -> its configuration, and the layouts in which it runs
ON_TWO = {
    "a key head for each rank": ("LlamaConfig", {}, ("rows", "tree", "flat")),
    "one key head for both": ("LlamaConfig", {"num_key_value_heads": 1}, ("rows", "flat")),
    "as many key heads as heads, learned positions": ("GPT2Config", {"n_positions": 64}, ("rows", "tree", "flat")),
    "a window that ends on the other rank": ("MistralConfig", {"sliding_window": 5}, ("rows",)),
    "heads of other sizes for keys and values": (
        "MiniCPM3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 4,
        },
        ("rows",),
    ),
    "experts, chosen token by token": ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}, ("flat",)),
}
ON_THREE = {
    "two key heads for three": ("LlamaConfig", {"num_attention_heads": 6, "hidden_size": 48}, ("rows", "tree", "flat")),
}


# a rank has nothing to score
FAR_ANSWERS = [{"prompt_ids": [*range(1, 31)], "chosen_ids": [40, 41], "rejected_ids": [40, 42], "pair_id": 0}]


def sharing(model, layout="rows"):
    if layout == "flat":
        use_flat_attention(model)
    share_attention(model)
    return ScoredModel(model, ScoringHead(model, backend="reference"))


def scores_and_grads(scored, batch):
    """Log-probs, their statistics, and what a loss of them leaves in each parameter: weights of either sign."""
    model = scored.model
    model.zero_grad()
    router = RouterLoss(model) if hasattr(model, "num_experts") else None
    with router.recording() if router else nullcontext():
        logps, stats = scored.token_logps(batch, forward_inputs(batch, model), return_stats=True)
    loss = (logps * torch.linspace(-1, 2, len(logps), dtype=logps.dtype)).sum()
    balance = router.take(batch) if router else torch.zeros(())
    (loss + 10 * balance).backward()
    return [logps, balance, *stats], {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def check_models(rank, models):
    compute_nothing_in_fp32()
    group = join_group(dist.get_world_size())
    for config_class, overrides, layouts in models.values():
        for layout in layouts:
            model = build(config_class, overrides, dtype=torch.float64)
            if layout == "flat":
                enable_checkpointing(model)  # computed again in backward, columns are exchanged again
                model.train()
            scored = sharing(model, layout)
            collate = PairCollator(pad_token_id=PAD, layout=layout, pad_to_multiple_of=group.size)
            for batch in (collate(edge_pairs()), collate(FAR_ANSWERS)):
                check_batch(scored, batch, group, layout)
                if layout == "rows":
                    check_batch(scored, padded_left(batch), group, "padded on the left")


def padded_left(batch):
    """As a collator of the user's may have it. Positions stay those of the columns."""
    length = batch.input_ids.shape[1]
    shifts = length - batch.attention_mask.sum(1)
    columns = (torch.arange(length) - shifts[:, None]) % length
    return Batch(
        {
            **batch,
            "input_ids": batch.input_ids.gather(1, columns),
            "attention_mask": batch.attention_mask.gather(1, columns),
            "score_positions": batch.score_positions + shifts[batch.score_positions // length],
        }
    )


def check_batch(scored, batch, group, layout):
    shared = to_run_together(share_out(batch, group), group)
    expected, expected_grads = scores_and_grads(scored, batch)
    found, grads = scores_and_grads(scored, shared)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=EQUAL, atol=EQUAL)
    whole = torch.cat([grad.flatten() for grad in expected_grads.values()]).norm()
    for name, expected_grad in expected_grads.items():
        dist.all_reduce(grads[name])  # as data parallelism does, which then divides by the ranks
        error = (grads[name] / group.size - expected_grad).norm()
        assert error <= EQUAL * max(expected_grad.norm(), 1e-3 * whole), (type(scored.model), layout, name)


@pytest.mark.forked
@pytest.mark.parametrize(("world_size", "models"), [(2, ON_TWO), (3, ON_THREE)], ids=["two", "three"])
def test_together_is_alone(world_size, models):
    run_ranks(check_models, models, world_size=world_size)


def test_every_token_is_one_ranks_own():
    """Two pairs in rows of six columns, three a rank. Tokens are predicted one column before their own."""
    records = [
        # shared: 5; chosen: 6 7; rejected: 8. Predicted in chosen row 0 by columns 1, 2, 3, in rejected row 2 by 2
        {"prompt_ids": [1, 2], "chosen_ids": [5, 6, 7], "rejected_ids": [5, 8], "pair_id": 0},
        # nothing shared; chosen: 9, in row 1 by column 3; rejected: 10 11, in row 3 by columns 3 and 4
        {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [9], "rejected_ids": [10, 11], "pair_id": 1},
    ]
    batch = PairCollator(pad_token_id=PAD, pad_to_multiple_of=2)(records)
    assert batch.input_ids.shape == (4, 6)
    assert batch.target_ids.tolist() == [5, 6, 7, 8, 9, 10, 11]
    own = [share_out(batch, SequenceGroup(None, rank, 2)).own_tokens.tolist() for rank in range(2)]
    assert own == [[0, 1, 3], [2, 4, 5, 6]]
    assert share_out(batch, SequenceGroup(None, 2, 3)).own_tokens.tolist() == [6]  # column 4 alone is in the last two
    inside = share_out(Batch({**batch, "mismatched": batch}), SequenceGroup(None, 0, 2))
    assert inside.mismatched.own_tokens.tolist() == own[0]


def test_rows_that_do_not_divide_are_refused_with_the_length_that_does():
    batch = PairCollator(pad_token_id=PAD)(token_pairs_with_ids(2))
    length = batch.input_ids.shape[1]
    wrong = next(size for size in (2, 3, 4, 5) if length % size)
    with pytest.raises(ValueError, match=rf"data_collator: expected rows of a multiple .* {wrong}, got {length} col"):
        share_out(batch, SequenceGroup(None, 0, wrong))


def test_rows_of_a_run_are_filled_up_to_what_both_ask_for(tmp_path):
    assert config(tmp_path).row_multiple is None
    assert config(tmp_path, pad_to_multiple_of=8).row_multiple == 8
    assert config(tmp_path, sequence_parallel_size=3).row_multiple == 3
    assert config(tmp_path, pad_to_multiple_of=8, sequence_parallel_size=6).row_multiple == 24


def token_pairs_with_ids(num_pairs):
    return [{**pair, "pair_id": i} for i, pair in enumerate(token_pairs(num_pairs))]


def test_a_model_that_is_shared_runs_alone_as_before():
    model, batch = family("llama"), PairCollator(pad_token_id=PAD, layout="flat")(edge_pairs())
    use_flat_attention(model)
    scored = ScoredModel(model, ScoringHead(model, backend="reference"))
    expected = scored.token_logps(batch)
    share_attention(model)
    share_attention(model)  # again is the same
    assert attention_of(model) == "dpop_flat"
    assert torch.equal(scored.token_logps(batch), expected)
    prompt = torch.tensor([[1, 5, 6]])
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)
    assert torch.equal(
        generated,
        family("llama").generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False),
    )


def check_strangers(rank):
    """What is not known by its kind: a forward without exchanges, and one that looks at neighbours by itself."""
    group = join_group(2)
    batch = PairCollator(pad_token_id=PAD, pad_to_multiple_of=2)(edge_pairs())
    shared = to_run_together(share_out(batch, group), group)
    model = family("llama")
    head = ScoringHead(model, backend="reference")
    with pytest.raises(RuntimeError, match="LlamaForCausalLM: expected attentions that exchange columns"):
        ScoredModel(model, head).token_logps(shared)
    head.remove()
    scored = sharing(model)
    assert shared_difference(scored, shared, forward_inputs(shared, model)) < 1e-5
    mlp = model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda module, args: (args[0] + args[0].roll(1, dims=1),))
    assert shared_difference(scored, shared, forward_inputs(shared, model)) > 0.01


@pytest.mark.forked
def test_a_model_whose_tokens_meet_elsewhere_is_found_out():
    run_ranks(check_strangers)


def check_on_a_gpu(rank):
    """What a GPU does, as far as a CPU can: a flat row under FlexAttention's own mask, and mixed precision."""
    group = join_group(2)
    model = family("llama")
    scored = sharing(model, "flat")
    batch = PairCollator(pad_token_id=PAD, layout="flat", pad_to_multiple_of=128)(edge_pairs())
    shared = to_run_together(share_out(batch, group), group)
    masks = []

    def by_definition(query, key, value, *, block_mask, training, **options):
        masks.append(block_mask.shape)
        return flex_attention(query, key, value, block_mask=block_mask, **options)

    flex.compile_friendly_flex_attention = by_definition
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        truth = scored.token_logps(batch)
        inputs = {**forward_inputs(batch, model), "attention_mask": block_mask(batch.trie_ends, compiled=False)}
        by_flex = scored.token_logps(shared, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            alone, together = scored.token_logps(batch), scored.token_logps(shared)
    assert masks == [(1, 1, 128, 128)] * 2  # in both layers, of all columns
    torch.testing.assert_close(by_flex, truth, rtol=0, atol=3 * CONTRACT_NATS)  # two layers in fp32
    # errors of independent roundings: three times the norm would be nine times as many
    assert 0 < (together - truth).norm() <= 3 * (alone - truth).norm()


@pytest.mark.forked
def test_a_block_mask_and_mixed_precision():
    run_ranks(check_on_a_gpu)


KINDS = {
    "heads": (
        "LlamaConfig",
        {},
        {"size": 3},
        r"a divisor of the 4 attention heads of LlamaForCausalLM, got 3. Use 1 or 2 or 4",
    ),
    "dynamic": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {"longest": 66},
        r"its positions \(dynamic\) depend on a row's length beyond 64 tokens, and max_length allows 66",
    ),
    "convolutions": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, {}, "layers of another kind: conv"),
    "alibi": ("FalconConfig", {"alibi": True, "num_kv_heads": 4}, {}, "takes positions from the columns"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_model_is_refused_by_name(kind):
    config_class, overrides, run, message = KINDS[kind]
    with pytest.raises(ValueError, match=message):
        check_shared_model(build(config_class, overrides), **{"size": 2, "longest": 64, **run})


def test_a_kind_that_goes_by_lengths_within_which_it_does_not():
    rotation = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    check_shared_model(build("LlamaConfig", {"rope_parameters": rotation}), 2, longest=64)
    check_shared_model(build("MistralConfig", {"sliding_window": 8}), 2)


def test_an_attention_that_is_not_shared_is_refused_by_name():
    with pytest.raises(ValueError, match="attn_implementation 'sdpa' beside it, got 'eager'"):
        share_attention(family("llama", attn_implementation="eager"))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (2, r"expected a divisor of the 1 processes of this run, got 2. Use 1, or start a multiple of 2 processes"),
        (0, "expected at least 1, got 0"),
    ],
)
def test_a_run_that_cannot_be_grouped_is_refused_before_anything(tmp_path, size, message):
    with pytest.raises(ValueError, match=f"sequence_parallel_size: {message}"):
        trainer(tmp_path, word_tokenizer(), "no-such-model", sequence_parallel_size=size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"world_size": 6, "sequence_parallel_size": 4},
            "of the 6 processes of this run, got 4. Use 1 or 2 or 3 or 6, or",
        ),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, r"accelerate's ParallelismConfig of {'tp_size': 2}"),
        ({"distributed_state": SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)}, "1 with DeepSpeed.*FSDP2"),
        ({"accelerator_config": SimpleNamespace(split_batches=True)}, r"accelerator_config.split_batches"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
    ],
    ids=["ranks", "tensor_parallel", "deepspeed", "split_batches", "neftune"],
)
def test_what_does_not_go_beside_it_is_named(settings, message):
    plain = {
        "sequence_parallel_size": 2,
        "world_size": 4,
        "deepspeed": None,
        "distributed_state": SimpleNamespace(distributed_type=DistributedType.MULTI_GPU),
        "parallelism_config": None,
        "accelerator_config": SimpleNamespace(split_batches=False),
        "neftune_noise_alpha": None,
    }
    check_sequence_parallel(SimpleNamespace(**plain))
    with pytest.raises(ValueError, match=f"sequence_parallel_size: expected .*{message}"):
        check_sequence_parallel(SimpleNamespace(**{**plain, **settings}))


LONG = 1024


def peak_of(scored, batch):
    def step():
        scored.token_logps(batch).sum().backward()

    step()  # gradients are there from now on
    return peak_bytes(step, torch.device("cpu"))


def check_memory(rank):
    """One long pair in rows: as much of all activations as there are columns, and a fifth more at most of it all."""
    group = join_group(2)
    ids = torch.arange(LONG).remainder(50).add(3).tolist()
    record = {
        "prompt_ids": ids[: LONG // 2],
        "chosen_ids": ids[LONG // 2 :],
        "rejected_ids": ids[: LONG // 2],
        "pair_id": 0,
    }
    batch = PairCollator(pad_token_id=PAD)([record])
    assert batch.input_ids.shape == (2, LONG)
    model = build("LlamaConfig", {"hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": LONG})
    scored = sharing(model)
    alone = peak_of(scored, batch)
    together = peak_of(scored, to_run_together(share_out(batch, group), group))
    assert together <= 0.6 * alone, (rank, together, alone)


@pytest.mark.forked
def test_peak_memory_of_a_long_pair_on_two_ranks():
    run_ranks(check_memory)
