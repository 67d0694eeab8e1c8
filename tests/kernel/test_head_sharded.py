"""ScoringHead on models whose weights are sharded or replicated over two or three gloo ranks, held against one process.

Each rank has its own batch; the loss is the sum over a rank's tokens, and data-parallel wrappers average gradients over
the ranks. So the expected gradient is the mean of all batches' gradients on the unwrapped model.

ZeRO-3 is not tested (DeepSpeed is not a dependency): like FSDP2 it gathers weights in hooks around a module's call and,
for backward, around its output; both are what the tests here rest on.
"""

import pytest
import torch
from families import VOCAB_SIZE, build
from peft import LoraConfig, get_peft_model
from rounding import MODEL_GRADIENT, TWO_ROADS_NATS
from sharded import run_ranks
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from truth import assert_statistics, relative_error

from dpop_kernels import ScoringHead
from dpop_kernels.backends import reference


def batch_of(rank):
    generator = torch.Generator().manual_seed(10 + rank)
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 10), generator=generator)
    positions = torch.tensor([2, 3, 4, 12, 17])
    return input_ids, positions, input_ids.flatten()[positions + 1]


def model_of(kind):
    """A model with all weights random and trainable, or one with LoRA on its attention and on its head."""
    model = build("gemma2" if kind == "tied" else "llama").train()
    if kind == "frozen_head":
        model.lm_head.requires_grad_(False)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "lm_head"]))
        torch.manual_seed(2)
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.data.normal_(std=0.3)
    return model


def score(model, head, rank):
    input_ids, positions, target_ids = batch_of(rank)
    return head.token_logps(model, positions, target_ids, input_ids=input_ids)


def grads_of(model):
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            grads[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    model.zero_grad()
    return grads


def expected_of(kind, rank):
    """This rank's log-probs, and the mean over all ranks' batches of the gradients of their sums."""
    model = model_of(kind)
    head = ScoringHead(model)
    logps = [score(model, head, other) for other in range(dist.get_world_size())]
    (sum(part.sum() for part in logps) / len(logps)).backward()
    return logps[rank].detach(), grads_of(model)


def check_equals(kind, model, head, rank):
    expected_logps, expected_grads = expected_of(kind, rank)
    for _ in range(2):  # hooks that leave something behind show in the second step
        logps = score(model, head, rank)
        torch.testing.assert_close(logps.detach(), expected_logps, rtol=0, atol=TWO_ROADS_NATS)
        logps.sum().backward()
        grads = grads_of(model)
        assert grads.keys() == expected_grads.keys()
        for name, expected in expected_grads.items():
            assert relative_error(grads[name], expected) <= MODEL_GRADIENT, name
    with torch.no_grad():
        torch.testing.assert_close(score(model, head, rank), expected_logps, rtol=0, atol=TWO_ROADS_NATS)


def check_fsdp(kind, rank, *, own_unit, head_first=False):
    model = model_of(kind)
    head = ScoringHead(model) if head_first else None
    causal_lm = model.base_model.model if kind == "lora" else model
    for layer in causal_lm.model.layers:
        fully_shard(layer)
    if own_unit:
        fully_shard(causal_lm.lm_head)
    fully_shard(model)
    head = head or ScoringHead(model)
    seen = []
    linear = causal_lm.lm_head.base_layer if kind == "lora" else causal_lm.lm_head
    assert isinstance(linear.weight, DTensor)
    linear.register_forward_pre_hook(lambda module, args: seen.append(type(module.weight)))
    check_equals(kind, model, head, rank)
    head.check(model)
    # inside its own call the weight is whole
    assert seen
    assert not any(issubclass(kind_of_weight, DTensor) for kind_of_weight in seen)


def check_ddp(kind, rank, **options):
    model = model_of(kind)
    head = ScoringHead(model)
    check_equals(kind, DistributedDataParallel(model, **options), head, rank)


def check_fully_shard(rank):
    for kind in ("trainable", "frozen_head", "lora"):
        check_fsdp(kind, rank, own_unit=True)
        check_fsdp(kind, rank, own_unit=False)
    check_fsdp("tied", rank, own_unit=False)
    check_fsdp("trainable", rank, own_unit=True, head_first=True)


def check_replicas(rank):
    for kind in ("trainable", "tied", "lora"):
        check_ddp(kind, rank)
    check_ddp("frozen_head", rank, find_unused_parameters=True)
    check_ddp("trainable", rank, static_graph=True)


def check_tensor_parallel(name, rank):
    """The head's rows over all ranks, everything else whole: the same batch on each, so the same loss."""
    plain, model = build(name), build(name)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    logps, grads = [], []
    for candidate in (plain, model):
        head = ScoringHead(candidate)
        head.check(candidate)
        logps.append(score(candidate, head, 0))
        logps[-1].sum().backward()
        grads.append(grads_of(candidate))
        assert candidate(input_ids=batch_of(0)[0]).logits.shape == (2, 10, VOCAB_SIZE)
    torch.testing.assert_close(logps[1], logps[0], rtol=0, atol=TWO_ROADS_NATS)
    assert grads[1].keys() == grads[0].keys()
    for key, expected in grads[0].items():
        assert relative_error(grads[1][key], expected) <= MODEL_GRADIENT, key
    input_ids, positions, target_ids = batch_of(0)
    _, stats = head.token_logps(model, positions, target_ids, input_ids=input_ids, return_stats=True)
    with torch.no_grad():
        logits = plain.double()(input_ids=input_ids).logits.flatten(0, 1)[positions]
    assert_statistics(stats, reference.token_logps(logits, target_ids, with_stats=True)[1])


def check_all(rank):
    check_fully_shard(rank)
    check_replicas(rank)
    for name in ("llama", "phi"):  # without and with a bias; 97 rows make uneven slices
        check_tensor_parallel(name, rank)


@pytest.mark.forked
@pytest.mark.slow
def test_two_ranks_equal_one_process():
    run_ranks(check_all)


def check_thirds(rank):
    check_fsdp("lora", rank, own_unit=True)
    check_ddp("tied", rank)
    check_tensor_parallel("phi", rank)


@pytest.mark.forked
def test_three_ranks_equal_one_process():
    run_ranks(check_thirds, world_size=3)
