"""MLPs over tiles of tokens: the model's own losses and gradients, at no product more under checkpointing."""

import copy

import families
import pytest
import torch
from counted import CountedProducts
from dpop_trainer import DPOPConfig
from dpop_trainer.models import tiled_mlp
from dpop_trainer.models.loading import disable_dropout
from dpop_trainer.models.tiled_mlp import NEIGHBOURS, check_tiles, tile_mlps, tile_tokens
from dpop_trainer.settings.renamed import enable_checkpointing
from dpop_trainer.tools.plan.tape import Tape
from experts import EXPERT_FAMILIES, experts
from families import SMALL
from rounding import EQUAL, GRADIENT
from tiny import tiny_llama, token_pairs, word_tokenizer
from torch._subclasses.fake_tensor import FakeTensorMode
from trainers import adapted, logged, trainer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

IDS = torch.randint(3, 61, (2, 10), generator=torch.Generator().manual_seed(0))
TILE = 3  # of 20 tokens: seven tiles, the last one of two
OTHER_FAMILIES = ("gpt2", "gpt_neox", "falcon", "cohere", "granite")
"""Whose MLP goes alone."""


def family(name):
    """One by its `model_type`, in fp64."""
    torch.manual_seed(0)
    if name not in NEIGHBOURS:
        return families.build(name, torch.float64)
    config = AutoConfig.for_model(name, **{**SMALL, "head_dim": 8, "initializer_range": 0.2})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64)


def step(model, **inputs):
    """-> the scores of one forward, and the gradients that they leave."""
    output = model(input_ids=IDS, use_cache=False, **inputs)
    loss = output.logits.log_softmax(-1)[..., 5].sum()
    if inputs.get("output_router_logits"):
        loss = loss + output.aux_loss
    loss.backward()
    return output.logits.detach(), families.grads_of(model)


def assert_same(found, expected, *, gemma=False):
    logits, grads = found
    expected_logits, expected_grads = expected
    assert (logits - expected_logits).norm() <= EQUAL * expected_logits.norm()
    assert grads.keys() == expected_grads.keys()
    # what a whole gradient comes to is the measure: of a bias in front of a softmax it is nothing but rounding
    scale = max(float(grad.norm()) for grad in expected_grads.values())
    for name, grad in expected_grads.items():
        # Gemma's norms add up their weights' gradients in fp32, whatever the model's dtype
        bound = GRADIENT if gemma and "norm" in name else EQUAL
        assert float((grads[name] - grad).norm()) <= bound * scale, name


def calls_of(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", [*NEIGHBOURS, *OTHER_FAMILIES])
def test_a_family_s_gradients_are_its_own(name):
    model = family(name).train()
    disable_dropout(model)
    expected = step(model)
    tile_mlps(model, TILE)
    assert_same(step(model), expected, gemma="gemma" in name)
    enable_checkpointing(model)
    assert_same(step(model), expected, gemma="gemma" in name)
    tile_mlps(model, None)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", EXPERT_FAMILIES)
def test_experts_are_tiled_and_routers_are_not(name):
    model = experts(name).double().train()
    model.set_experts_implementation("eager")  # the grouped product takes no fp64
    expected = step(model, output_router_logits=True)
    routed = calls_of(next(m for path, m in model.named_modules() if path.endswith((".gate", ".router"))))
    tile_mlps(model, TILE)
    assert_same(step(model, output_router_logits=True), expected)
    assert len(routed) == 1
    enable_checkpointing(model)
    assert_same(step(model, output_router_logits=True), expected)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=["lora", "dora", "dropout"])
def test_adapters_inside(more):
    """With dropout, the masks of a tile are those of its forward, whether the layer is run again for them or not."""
    options = {"target_modules": "all-linear", **more}
    model = adapted(seed=1, model=tiny_llama().double(), **options).double().train()
    if "lora_dropout" not in more:
        expected = step(model)
    tile_mlps(model, TILE)
    tiles = calls_of(model.get_base_model().model.layers[0].mlp.down_proj)
    torch.manual_seed(5)
    found = step(model)
    assert len(tiles) == 14  # seven in the forward, seven in the backward
    if "lora_dropout" in more:
        model.enable_input_require_grads()
        enable_checkpointing(model)
        torch.manual_seed(5)
        expected = step(model)
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("name", "checkpointing", "plain", "tiled"),
    [  # 3 forward, 6 backward. A checkpointed Llama layer is run again up to what down_proj keeps, its input: 2
        # products. In tiles the layer's own second run ends before the MLP; each tile has its 3 again
        ("llama", False, 9, 12),
        ("llama", True, 11, 12),
        # and where a norm follows, which keeps the MLP's output, it goes with the MLP
        ("gemma2", True, 12, 12),
        # frozen weights have 3 in the backward, and LoRA on down_proj keeps what comes after its product. LoRA's own
        # with a side of the MLP's width are two of B and one of A, of rank over hidden size = 1/16: 3 + 3 + 6 of them
        ("lora", True, 9 + 12 / 16, 9 + 12 / 16),
    ],
)
def test_products_by_hand(name, checkpointing, plain, tiled):
    if name == "lora":
        model = adapted(seed=1, model=family("llama").float(), target_modules="all-linear").train()
        model.enable_input_require_grads()
    else:
        model = family(name).float().train()
    if checkpointing:
        enable_checkpointing(model)
    num_layers, width = SMALL["num_hidden_layers"], SMALL["intermediate_size"]
    for tokens, products in ((None, plain), (TILE, tiled)):
        tile_mlps(model, tokens)
        with CountedProducts(IDS.numel(), SMALL["hidden_size"], width, of_head_alone=True) as counted:
            step(model)
        assert counted.products == pytest.approx(num_layers * products), tokens


def mlp_peak(width, num_tokens, tokens):
    """Bytes that a frozen MLP takes at its worst moment with the norm before it, over the states that it is given."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    with FakeTensorMode():
        model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=width)).requires_grad_(False)
        tile_mlps(model, tokens)
        layer = model.model.layers[0]
        states = torch.empty(1, num_tokens, 64, requires_grad=True)
        grad = torch.empty(1, num_tokens, 64)
        with Tape([*model.parameters(), states, grad]) as tape:
            layer.mlp(layer.post_attention_layernorm(states)).backward(grad)
            tape.enter("after")
    return max(moment.total for moment in tape.moments().values())


def test_what_a_tile_holds_does_not_grow_with_the_width(monkeypatch):
    monkeypatch.setitem(tiled_mlp.TILE_BYTES, "cpu", 64 << 20)
    for num_tokens, width in ((8192, 512), (8192, 2048), (16384, 1024)):
        states = 4 * 64 * num_tokens
        # the output, and the gradient of the states; beside them one tile
        assert mlp_peak(width, num_tokens, "auto") <= 2 * states + (64 << 20)
        assert mlp_peak(width, num_tokens, None) >= 4 * 4 * width * num_tokens  # gate, up, act and their product


def test_tokens_of_a_tile_by_hand():
    # Llama-3-8B in bf16: gate and up of 14336 and down of 4096, four tensors of 2 bytes: 2^18 bytes a token
    assert tile_tokens(2 * 14336 + 4096, 2, on_gpu=True) == (2 << 30) // 2**18 == 8192
    assert tile_tokens(2 * 14336 + 4096, 4, on_gpu=False) == (256 << 20) // 2**19 == 512
    assert tile_tokens(1 << 24, 2, on_gpu=False) == 256  # below which products get slow


@pytest.mark.parametrize(
    ("layout", "lora", "checkpointing"),
    [
        ("rows", False, False),
        ("tree", True, False),
        ("flat", False, True),
        ("packed", True, True),
    ],
)
def test_a_run_is_the_run_without(tmp_path, layout, lora, checkpointing):
    """In fp64, where sums in another order differ by less than Adam's epsilon can make of it."""
    options = {"layout": layout, "gradient_checkpointing": checkpointing, "max_steps": 3, "records": token_pairs(3)}
    options |= {"gradient_accumulation_steps": 1}
    losses = []
    for tokens in (None, 4):
        model = tiny_llama().double()
        if lora:
            model = adapted(seed=2, model=model, target_modules="all-linear").double()
        run = trainer(tmp_path / str(tokens), word_tokenizer(), model, tiled_mlp=tokens, **options)
        run.train()
        assert logged(run, "dpop/step_0_max_logratio") == [0.0]
        losses.append(logged(run, "loss"))
    assert losses[0][-1] != pytest.approx(losses[0][0], rel=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)


def test_a_mixture_s_run_is_the_run_without(tmp_path):
    runs = []
    for tokens in (None, 4):
        run = trainer(tmp_path / str(tokens), word_tokenizer(), experts(), tiled_mlp=tokens, max_steps=2)
        run.train()
        runs.append(run)
    for key in ("loss", "aux_loss"):
        assert logged(runs[1], key) == pytest.approx(logged(runs[0], key), rel=1e-5)


def test_copies_and_later_trainers_are_on_their_own(tmp_path):
    model = tiny_llama().double()
    tile_mlps(model, TILE)
    twin = copy.deepcopy(model)
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    assert_same(step(twin), step(tiny_llama().double()))
    run = trainer(tmp_path, word_tokenizer(), model)  # without tiles, on a model that had them
    assert not any("forward" in module.__dict__ for module in run.model.model.modules())


def test_a_family_of_another_form_is_told(monkeypatch):
    """Olmo's norm behind its attention has the name of Llama's norm before the MLP."""
    monkeypatch.setitem(NEIGHBOURS, "olmo2", ("post_attention_layernorm", "mlp"))
    model = family("olmo2")
    tile_mlps(model, TILE)
    with pytest.raises(ValueError, match="tiled_mlp: expected Olmo2MLP to be given what the module before it gave"):
        model(input_ids=IDS)


def test_what_cannot_be_tiled_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"tiled_mlp: expected a model whose layers have an mlp.*MambaForCausalLM"):
        check_tiles(families.build("mamba_casts_to_the_weight"))
    for value in (0, -1, "half", True):
        with pytest.raises(ValueError, match="tiled_mlp: expected 'auto', 'none' or the tokens of a tile, at least 1"):
            DPOPConfig(output_dir=str(tmp_path), use_cpu=True, tiled_mlp=value)
    for name in ("torch_compile", "ref_model_offload"):
        with pytest.raises(ValueError, match=f"tiled_mlp: expected 'none' with {name}"):
            DPOPConfig(output_dir=str(tmp_path), use_cpu=True, tiled_mlp=8, **{name: True})
    for value, meant in (("auto", "auto"), ("none", None), ("64", 64)):
        assert DPOPConfig(output_dir=str(tmp_path), use_cpu=True, tiled_mlp=value).tiled_mlp == meant
    monkeypatch.setattr("dpop_trainer.training.base.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"tiled_mlp: expected weights that are whole while a layer runs.*ZeRO-3"):
        trainer(tmp_path, word_tokenizer(), tiled_mlp=8, records=token_pairs(2))
