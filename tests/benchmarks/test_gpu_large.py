"""The step of a 72B model on one GPU, rehearsed on the CPU with TRL beside it; its random base, and its prediction."""

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[qlora]'")

from dpop_trainer.models.quantised import four_bit_config

from benchmarks import random_base, records
from benchmarks.gpu import large, runner
from benchmarks.gpu.work import Work
from benchmarks.shapes import model_size

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TRL's and what it imports
def test_rehearsal_measures_every_trainer_on_the_same_numbers(tmp_path):
    work = Work(tmp_path, "large", seconds=600.0, rehearse=True)
    for candidate in large.CANDIDATES:
        large.run(work, f"Qwen-72B/{candidate}")
    assert work.code == runner.COMPLETE
    found = {record["predicted"]["candidate"]: record for record in records.read(work.path) if "begun" not in record}
    assert list(found) == ["flat", "rows", "trl"]
    for record in found.values():
        assert record["device"].endswith("interpreted")  # never to be taken for a GPU's figure
        assert len(record["all_s"]) == 4
        assert record["first_chosen_logp"] == pytest.approx(found["flat"]["first_chosen_logp"], rel=1e-5)
        assert record["first_chosen_logp"] == pytest.approx(-17 * 5.77, rel=0.1)  # 16 tokens and an EOS, log 320 each
        assert record["peak_gib"] is None  # torch's allocator tells nothing of a CPU
    # 7 tokens of prompt, 8 of the answer before the edit, 2 tails of 8 and an EOS each: 33 of 48 in rows
    assert found["flat"]["computed_ratio"] == pytest.approx(33 / 48)


def tiny_base(**overrides):
    size = large.TINY
    settings = {"device": CPU, "dtype": torch.float32, "max_length": 64, "report": lambda line: None}
    return random_base.random_base(size, four_bit_config(torch.float32, nested=True), **settings | overrides)


def test_random_base_is_an_ordinary_4_bit_model():
    import bitsandbytes as bnb

    size, model = large.TINY, tiny_base()
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 7 * 3
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.is_loaded_in_4bit
    assert model.hf_quantizer.is_trainable
    assert type(model.lm_head) is torch.nn.Linear
    assert not torch.equal(layers[0].weight.data, layers[7].weight.data)  # each drawn anew
    values = bnb.functional.dequantize_4bit(layers[0].weight.data, layers[0].weight.quant_state)
    assert float(values.std()) == pytest.approx(random_base.DEVIATION, rel=0.05)  # of 4096 values: 1.1 % off at 1 sigma
    rotary = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(rotary, 10000.0 ** -(torch.arange(0, 16, 2) / 16))
    stored = sum(
        module.weight.nbytes + module.weight.quant_state.absmax.nbytes + module.weight.quant_state.state2.absmax.nbytes
        for module in layers
    )
    # a layer's last 256 scales may be fewer, and have an fp32 of their own all the same
    assert stored == pytest.approx(random_base.linear_bytes(size, nested=True), rel=2e-3)
    assert model(input_ids=torch.arange(6)[None]).logits.isfinite().all()


def test_never_more_than_one_weight_in_full(monkeypatch):
    """What is drawn is rounded before the next is drawn; of a layer's weights none is left in full."""
    in_full = []
    drawn = random_base.torch.Tensor.normal_

    def watched(values, *args, **kwargs):
        if not values.is_meta:
            in_full.append(values.shape)
        return drawn(values, *args, **kwargs)

    monkeypatch.setattr(random_base.torch.Tensor, "normal_", watched)
    model = tiny_base()
    size = large.TINY
    assert len(in_full) == 7 * 3 + 2  # each linear map once; embedding and head
    kept = {name for name, p in model.named_parameters() if p.ndim == 2 and p.is_floating_point()}
    assert kept == {"model.embed_tokens.weight", "lm_head.weight"}
    assert sum(p.numel() for p in model.model.layers.parameters() if not p.is_floating_point()) * 2 == (
        size.num_layers * size.layer_weights
    )


def test_a_base_that_would_take_too_long_is_given_up():
    with pytest.raises(TimeoutError, match=r"2 of 3 layers took \d+ s, all would take over -1 s"):
        tiny_base(seconds=-1.0)


def test_the_pair_has_its_length_and_one_edit():
    plan = large.one_pair_plan(152064, 1024, rank=64)
    assert plan.num_steps == 4
    prompt, chosen, rejected = (plan.pairs[0][name].split() for name in ("prompt", "chosen", "rejected"))
    assert len(prompt) + len(chosen) + 1 == len(prompt) + len(rejected) + 1 == 1024
    assert [i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b] == [len(chosen) // 2]


def test_the_prediction_is_the_sum_of_its_parts():
    """Qwen-72B by hand: 80 layers of 4 maps of 8192² and 3 of 8192 x 24576 in 4.127 bits; two of 152064 x 8192."""
    linear = 80 * (4 * 8192**2 + 3 * 8192 * 24576)
    ends = 2 * 152064 * 8192
    norms = 161 * 8192  # counted like the rest, at the mean bytes of a weight
    size, plan = model_size("Qwen-72B"), large.one_pair_plan(152064, 1024, rank=64)
    found = large.on_paper(size, plan, "rows")
    parts = found["gib_by_part"]
    nf4 = 0.5 + (1 + 4 / 256) / 64
    assert parts["weights"] * 2**30 == pytest.approx(linear * nf4 + ends * 2 + norms * 0.6, rel=1e-4)
    adapter = 64 * 80 * (4 * 2 * 8192 + 3 * (8192 + 24576))
    assert parts["trained"] * 2**30 == adapter * 16  # weight, gradient and two moments in fp32
    assert large.on_paper(size, plan, "trl")["gib_by_part"]["trained"] * 2**30 == adapter * 8  # in bf16
    assert parts["widened"] * 2**30 == 2 * 8192 * 24576
    assert found["gib"] == pytest.approx(sum(parts.values()))
    assert found["gib"] < 78  # what an H100 of 80 GB has to give
    # products at 790 TFLOP/s; each of 4 passes reads the weights in half a byte and writes them in two
    assert found["seconds"] == pytest.approx(found["tflop"] / 790 + 4 * linear * 2.5 / 4.3e12)
