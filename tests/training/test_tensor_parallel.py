"""A model whose layers are spread over two ranks is the whole one: log-probs, statistics, gradients, files, adapters.

Whole runs, against one process, are in `test_distributed.py`.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, ParallelismConfig
from dpop_trainer.batches import PairCollator
from dpop_trainer.batches.flat_attention import use_flat_attention
from dpop_trainer.batches.scoring import ScoredModel, forward_inputs
from dpop_trainer.models.loading import Policy, load_model, prepare_policy
from dpop_trainer.models.tensor_parallel import (
    check_adapters_beside,
    check_family,
    check_transformers,
    join_whole_state,
    keep_whole_state,
    knows_tensor_parallelism,
    parallel_kwargs,
    take_whole_weights,
)
from dpop_trainer.reference.choose import Kind, ReferencePlan, reference_model
from dpop_trainer.reference.keys import weights_digest
from dpop_trainer.training.tensor_parallel import check_tensor_parallel
from layout_models import PAD, build, compute_nothing_in_fp32, edge_pairs
from peft import IA3Config, LoraConfig, get_peft_model
from rounding import EQUAL
from sharded import run_ranks
from tiny import tiny_llama, word_tokenizer
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from trainers import config, trainer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dpop_kernels import ScoringHead

knows_them = pytest.mark.skipif(not knows_tensor_parallelism(), reason="refused with an older transformers")
# transformers spreads a model over the accelerators that there are
on_a_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="two ranks of gloo are on the CPU")

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {
    "a head of its own, 61 rows on two ranks": ("LlamaConfig", {}, ("rows", "tree", "flat")),
    "a tied head with a scale": ("CohereConfig", {"logit_scale": 0.5}, ("rows",)),
    "norms of each head": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}, ("rows",)),
}
LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def scores_and_grads(model, layout):
    if layout == "flat":
        use_flat_attention(model)
    head = ScoringHead(model, backend="chunked")
    head.check(model)
    batch = PairCollator(pad_token_id=PAD, layout=layout)(edge_pairs())
    scored = ScoredModel(model, head)
    logps, stats = scored.token_logps(batch, forward_inputs(batch, model), return_stats=True)
    (logps * torch.linspace(-1, 2, len(logps), dtype=logps.dtype)).sum().backward()
    grads = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    head.remove()
    return [logps.detach(), *stats], grads


def check_same(ours, theirs):
    for found, expected in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=EQUAL, atol=EQUAL)
    assert ours[1].keys() == theirs[1].keys()
    norm = torch.cat([grad.flatten() for grad in theirs[1].values()]).norm()
    for name, expected in theirs[1].items():
        assert (ours[1][name] - expected).norm() <= EQUAL * max(expected.norm(), 1e-3 * norm), name


def check_kinds(folder):
    for name, (_, _, layouts) in KINDS.items():
        for layout in layouts:
            alone, spread = (load_model(str(folder / name), kwargs) for kwargs in ({}, parallel_kwargs(2)))
            assert isinstance(spread.lm_head.weight, DTensor)
            check_same(scores_and_grads(spread, layout), scores_and_grads(alone, layout))
            assert weights_digest(spread, with_adapter=True) == weights_digest(alone, with_adapter=True)


def check_files(folder, path):
    """What is saved, and taken up again, is whole: weights, and an optimizer's state after a step."""
    alone, spread, later = (load_model(str(path), kwargs) for kwargs in ({}, parallel_kwargs(2), parallel_kwargs(2)))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False) for model in (alone, spread, later)]
    for optimizer in optimizers[1:]:
        keep_whole_state(optimizer)
    for model, optimizer in zip((alone, spread), optimizers, strict=False):
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = parameter.detach() * (i + 1)
        optimizer.step()
    expected = optimizers[0].state_dict()["state"]
    if dist.get_rank() == 1:  # as one writes a checkpoint, and the other does not
        join_whole_state(optimizers[1])
    state = optimizers[1].state_dict() if dist.get_rank() == 0 else None
    sent = [state]
    dist.broadcast_object_list(sent)
    (state,) = sent
    for key, values in expected.items():
        for name, value in values.items():
            assert torch.equal(state["state"][key][name], value), name
    optimizers[2].load_state_dict(copy.deepcopy(state))  # a file's are its own
    moments = optimizers[2].state[later.lm_head.weight]["exp_avg"].to_local()
    assert moments.untyped_storage().nbytes() == moments.nbytes  # of the rest nothing stays
    assert len(moments) < later.lm_head.out_features
    take_whole_weights(later)
    later.load_state_dict(alone.state_dict())
    for (name, value), parameter in zip(later.named_parameters(), spread.parameters(), strict=True):
        assert torch.equal(whole(value), whole(parameter)), name
    for model, optimizer in zip((spread, later), optimizers[1:], strict=True):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
    for value, parameter in zip(later.parameters(), spread.parameters(), strict=True):
        assert torch.equal(whole(value), whole(parameter))
    spread.save_pretrained(folder / "saved")
    dist.barrier()
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved")
    assert all(map(torch.equal, map(whole, saved.parameters()), map(whole, later.parameters())))


def check_adapters(folder, path):
    args = config(folder / "run", parallelism_config=ParallelismConfig(tp_size=2), gradient_checkpointing=False)
    args.model_init_kwargs = {"dtype": torch.float64}
    new = prepare_policy(str(path), word_tokenizer(), args, peft_config=LoraConfig(**LORA)).model
    for name, module in new.named_modules():
        if name.endswith("o_proj.lora_A.default"):
            # peft draws A from -1 / √width to 1 / √width; of 2 x 32 numbers one at least is in the outer third
            drawn = whole(module.weight).abs()
            assert 2 / 3 < drawn.max() * 32**0.5 <= 1
            assert not torch.equal(drawn[:, :16], drawn[:, 16:])
    # one that was trained before, on a whole model, and is loaded on both
    spread, alone = (
        prepare_policy(str(folder / "adapter"), word_tokenizer(), one).model
        for one in (args, config(folder / "run", model_init_kwargs={"dtype": torch.float64}))
    )
    check_same(scores_and_grads(spread, "rows"), scores_and_grads(alone, "rows"))
    on_head = LoraConfig(**{**LORA, "target_modules": ["lm_head"]})
    with (
        pytest.warns(UserWarning, match="not supported for LoRA"),
        pytest.raises(ValueError, match=r"LoRA on layers .* got it on .*lm_head, of style 'colwise_gather_output'"),
    ):
        prepare_policy(str(path), word_tokenizer(), args, peft_config=on_head)


def check_copies(folder, path):
    """A reference that is the model as it was: loaded a second time, and not bound to the policy's layers."""
    args = config(folder / "run")
    policy = load_model(str(path), parallel_kwargs(2))
    before = scores_and_grads(policy, "rows")[0]
    reference = reference_model(ReferencePlan(Kind.COPY), Policy(policy, word_tokenizer(), 61), None, args, [])
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(2)
    with torch.no_grad():
        batch = PairCollator(pad_token_id=PAD)(edge_pairs())
        logps = ScoredModel(reference, ScoringHead(reference)).token_logps(batch, forward_inputs(batch, reference))
    torch.testing.assert_close(logps, before[0], rtol=EQUAL, atol=EQUAL)
    with pytest.raises(
        ValueError, match=r"a policy that can be loaded a second time, .* has other weights. Pass the mo"
    ):
        reference_model(ReferencePlan(Kind.COPY), Policy(policy, word_tokenizer(), 61), None, args, [])


def check_all(rank, folder):
    compute_nothing_in_fp32()
    path = folder / next(iter(KINDS))
    check_kinds(folder)
    check_files(folder, path)
    check_adapters(folder, path)
    check_copies(folder, path)


@knows_them
@on_a_cpu
@pytest.mark.forked
def test_two_ranks_are_one(tmp_path):
    for name, (config_class, overrides, _) in KINDS.items():
        build(config_class, {**SHAPE, **overrides}, dtype=torch.float64).save_pretrained(tmp_path / name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / next(iter(KINDS)))
    adapted = get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False))  # B is drawn too
    adapted.save_pretrained(tmp_path / "adapter")
    run_ranks(check_all, tmp_path)


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        (GPT2Config(), 2, "with a tensor-parallel plan in transformers, got GPT2Config without"),
        (LlamaConfig(num_attention_heads=8, num_key_value_heads=4), 8, "of the 8 .* 4 key heads .* Use 1 or 2 or 4"),
        (
            LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=6),
            4,
            "of the 6 .* got 4. Use 1 or 2 or 3, or FSDP2",
        ),
    ],
    ids=["plan", "key_heads", "heads"],
)
def test_a_family_that_cannot_be_spread_is_refused_before_its_weights_are_read(family, size, message):
    with pytest.raises(ValueError, match=f"parallelism_config_tp_size: expected .*{message}"):
        check_family(family, size)


def test_a_family_whose_heads_go_round():
    check_family(LlamaConfig(num_attention_heads=8, num_key_value_heads=4), 4)


@pytest.mark.parametrize(
    ("adapter", "found"),
    [
        (IA3Config(), "IA3Config"),
        (LoraConfig(use_dora=True), "use_dora"),
        (LoraConfig(modules_to_save=["lm_head"]), r"modules_to_save \['lm_head'\]"),
        (LoraConfig(bias="all"), "bias 'all'"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
    ],
    ids=["kind", "dora", "modules_to_save", "bias", "init"],
)
def test_adapters_that_peft_does_not_spread_are_named(adapter, found):
    with pytest.raises(ValueError, match=f"peft_config: expected plain LoRA .*_tp_size 2, got {found}"):
        check_adapters_beside([adapter], 2, are_new=True)


def test_it_is_asked_for_by_accelerates_configuration(tmp_path, monkeypatch):
    assert config(tmp_path).tensor_parallel_size == 1
    assert config(tmp_path, parallelism_config=ParallelismConfig(tp_size=4)).tensor_parallel_size == 4
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")  # as `accelerate launch` says it
    assert config(tmp_path).tensor_parallel_size == 2


@knows_them
def test_a_run_on_other_processes_is_refused_before_anything(tmp_path):
    with pytest.raises(ValueError, match=r"parallelism_config_tp_size: .* got 2 and 1 processes. Start 2 processes"):
        trainer(tmp_path, word_tokenizer(), "no-such-model", parallelism_config=ParallelismConfig(tp_size=2))


PLAIN = {
    "tensor_parallel_size": 4,
    "world_size": 4,
    "parallelism_config": ParallelismConfig(tp_size=4),
    "sequence_parallel_size": 1,
    "deepspeed": None,
    "fsdp": None,
    "distributed_state": SimpleNamespace(distributed_type=DistributedType.MULTI_GPU),
    "tiled_mlp": None,
    "optim": "adamw_torch",
}


@knows_them
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"world_size": 8}, "got 4 and 8 processes"),
        (
            {"parallelism_config": SimpleNamespace(dp_replicate_size=1, dp_shard_size=2, cp_size=1, sp_size=1)},
            "{'parallelism_config_dp_shard_size': 2} beside it",
        ),
        ({"sequence_parallel_size": 2}, "1 with sequence_parallel_size"),
        ({"distributed_state": SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)}, "1 with DeepSpeed"),
        ({"distributed_state": SimpleNamespace(distributed_type=DistributedType.FSDP)}, "1 with FSDP"),
        ({"tiled_mlp": 64}, "1 with tiled_mlp"),
        ({"optim": "adafactor"}, "1 with optim adafactor"),
        ({"sync_ref_model": True}, "1 with sync_ref_model"),
        ({"ref_model_offload": True}, "1 with ref_model_offload"),
    ],
    ids=["ranks", "shards", "sequences", "deepspeed", "fsdp", "tiles", "optim", "moving", "offloaded"],
)
def test_what_does_not_go_beside_it_is_named(settings, message):
    check_tensor_parallel(SimpleNamespace(**PLAIN), "a-name", is_quantised=False)
    with pytest.raises(ValueError, match=f"parallelism_config_tp_size: expected .*{message}"):
        check_tensor_parallel(SimpleNamespace(**{**PLAIN, **settings}), "a-name", is_quantised=False)


@knows_them
def test_models_that_are_not_spread_or_rounded_are_refused():
    with pytest.raises(ValueError, match=r"1 with a base in 4 or 8 bits, .* got 4"):
        check_tensor_parallel(SimpleNamespace(**PLAIN), "a-name", is_quantised=True)
    with pytest.raises(ValueError, match=r"DistributedConfig\(tp_size=4\), got a LlamaForCausalLM over 1 ranks"):
        check_tensor_parallel(SimpleNamespace(**PLAIN), tiny_llama(), is_quantised=False)


@knows_them
def test_an_older_transformers_is_named(monkeypatch):
    check_transformers()
    older = SimpleNamespace(__version__="5.20.2")
    monkeypatch.setattr("dpop_trainer.models.tensor_parallel.transformers", older)
    with pytest.raises(ValueError, match=r"expected transformers 5\.21 or newer, got 5\.20\.2"):
        check_transformers()
