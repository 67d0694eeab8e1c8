"""The script that measures the step of a 72B model on one GPU: rehearsed on the CPU, TRL included; its random base, its
prediction, and what it does when memory or time runs out."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[qlora]'")

from dpop_trainer.models.quantised import four_bit_config

from benchmarks import gpu_large, random_base

CPU = torch.device("cpu")


def records(folder):
    return {
        record["candidate"]: record for record in map(json.loads, (folder / "gpu_large.jsonl").read_text().splitlines())
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TRL's and what it imports
def test_rehearsal_measures_every_trainer_on_the_same_numbers(tmp_path):
    assert gpu_large.main([str(tmp_path), "--rehearse"]) == 0
    found = records(tmp_path)
    assert list(found) == ["rows", "trl", "tree"]
    for record in found.values():
        assert record["device"] == "cpu, interpreted"  # never to be taken for a GPU's figure
        assert len(record["all_s"]) == 3
        assert record["first_chosen_logp"] == pytest.approx(found["rows"]["first_chosen_logp"], rel=1e-5)
        assert record["first_chosen_logp"] == pytest.approx(-17 * 5.77, rel=0.1)  # 16 tokens and an EOS, log 320 each
        assert record["peak_gib"] is None  # torch's allocator tells nothing of a CPU
    assert list(found["rows"]["phases_gib"]) == [
        "weights",
        "trainer built",
        "before the step",
        "policy's forward",
        "reference's forward",
        "backward and update",
    ]
    # 8 tokens of prompt, 8 of the answer before the edit, 2 tails of 8 and an EOS each: 33 of 48 in rows
    assert found["tree"]["computed_ratio"] == pytest.approx(33 / 48)


def tiny_base(**overrides):
    size = gpu_large.SHAPES["tiny"]
    settings = {"device": CPU, "dtype": torch.float32, "max_length": 64, "report": lambda line: None}
    return random_base.random_base(size, four_bit_config(torch.float32, nested=True), **settings | overrides)


def test_random_base_is_an_ordinary_4_bit_model():
    import bitsandbytes as bnb

    size, model = gpu_large.SHAPES["tiny"], tiny_base()
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
    size = gpu_large.SHAPES["tiny"]
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
    plan = replace(gpu_large.REHEARSAL, num_tokens=1024, shape="qwen-72b")
    pair = gpu_large.the_pair(plan)
    prompt, chosen, rejected = (pair[name].split() for name in ("prompt", "chosen", "rejected"))
    assert len(prompt) + len(chosen) + 1 == len(prompt) + len(rejected) + 1 == 1024
    assert [i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b] == [len(chosen) // 2]


def test_the_prediction_is_the_sum_of_its_parts():
    """Qwen-72B by hand: 80 layers of 4 maps of 8192² and 3 of 8192 x 24576 in 4.127 bits; two of 152064 x 8192."""
    linear = 80 * (4 * 8192**2 + 3 * 8192 * 24576)
    ends = 2 * 152064 * 8192
    norms = 161 * 8192  # counted like the rest, at the mean bytes of a weight
    found = gpu_large.predict("rows", gpu_large.Plan())["memory_gib"]
    nf4 = 0.5 + (1 + 4 / 256) / 64
    assert found["weights"] * 2**30 == pytest.approx(linear * nf4 + ends * 2 + norms * 0.6, rel=1e-4)
    adapter = 64 * 80 * (4 * 2 * 8192 + 3 * (8192 + 24576))
    assert found["trained"] * 2**30 == adapter * 16  # weight, gradient and two moments in fp32
    assert gpu_large.predict("trl", gpu_large.Plan())["memory_gib"]["trained"] * 2**30 == adapter * 8  # in bf16
    assert found["widened"] * 2**30 == 2 * 8192 * 24576
    assert found["total"] == pytest.approx(sum(value for name, value in found.items() if name != "total"))
    assert found["total"] < 78  # what an H100 of 80 GB has to give


RUN = {
    "median_s": 3.0,
    "making_s": 9.0,
    "tokens_per_s": 680.0,
    "peak_gib": 55.0,
    "first_loss": 0.6931472,
    "first_chosen_logp": -100.0,
}


def compared(folder, monkeypatch, results, seconds=280.0):
    def measured(candidate, plan, left):
        assert 0 < left <= seconds
        if isinstance(results[candidate], Exception):
            raise results[candidate]
        return RUN | results[candidate]

    monkeypatch.setattr(gpu_large, "in_a_process", measured)
    status = gpu_large.compare(gpu_large.Plan(seconds=seconds), folder, CPU, in_this_process=False)
    return status, records(folder)


def test_a_peer_that_runs_out_of_memory_is_a_result(tmp_path, monkeypatch, capsys):
    results = {"rows": {}, "trl": RuntimeError("torch.OutOfMemoryError: tried to allocate 2 GiB"), "tree": {}}
    status, found = compared(tmp_path, monkeypatch, results)
    assert status == 0
    assert found["trl"]["failed"] == "RuntimeError: torch.OutOfMemoryError: tried to allocate 2 GiB"
    assert found["trl"]["predicted"]["memory_gib"]["total"] > 40
    assert "rows  3.00 s per step, 55.0 GiB (54.5 GiB on paper), 680 tokens/s, 398 TFLOP/s" in capsys.readouterr().out


def test_wrong_numbers_get_no_time(tmp_path, monkeypatch):
    results = {"rows": {}, "trl": {"first_loss": 0.71}, "tree": {"first_chosen_logp": -100.3}}
    status, found = compared(tmp_path, monkeypatch, results)
    assert status == 1
    assert found["trl"]["refused"].startswith("the first loss is 0.710000, not log 2")
    assert found["tree"]["refused"] == "the chosen answer's log-prob differs by 3.0e-03 of its value"
    assert "median_s" not in found["tree"]
    assert gpu_large.wrong(RUN | {"first_loss": float("nan")}, RUN, gpu_large.Plan())


def test_what_there_is_no_time_for_is_said(tmp_path, monkeypatch):
    status, found = compared(tmp_path, monkeypatch, {}, seconds=50.0)
    assert status == 0
    assert {record["skipped"] for record in found.values()} == {"50 s are left"}


def test_ours_failing_fails_the_command(tmp_path, monkeypatch):
    results = {"rows": RuntimeError("no kernel"), "trl": {}, "tree": {}}
    status, found = compared(tmp_path, monkeypatch, results)
    assert status == 1
    assert found["rows"]["failed"] == "RuntimeError: no kernel"
    assert found["tree"]["median_s"] == 3.0


def test_a_step_beyond_the_time_ends_training():
    from transformers import TrainerControl

    control, watch = TrainerControl(), gpu_large.Watch(CPU, gpu_large.Phases(CPU), deadline=0.0)
    watch.on_step_begin(None, None, control)
    watch.on_step_end(None, None, control)
    assert control.should_training_stop
    assert len(watch.seconds) == 1


def test_a_process_that_fails_says_why(monkeypatch):
    def failed(command, **kwargs):
        assert command[-4:] == ["--tokens", "1024", "--seconds", "90.0"]
        assert kwargs["timeout"] == 100.0
        return subprocess.CompletedProcess(command, 1, "20 of 80 layers, 2.0 s\n", "...\nOutOfMemoryError: CUDA\n")

    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(RuntimeError, match=r"20 of 80 layers, 2\.0 s\n\.\.\.\nOutOfMemoryError: CUDA"):
        gpu_large.in_a_process("rows", gpu_large.Plan(), 100.0)


def test_the_report_shows_what_was_measured(tmp_path, monkeypatch):
    from benchmarks import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.large().count("–") == 3 * len(gpu_large.TABLE)
    compared(tmp_path, monkeypatch, {"rows": {}, "trl": RuntimeError("torch.OutOfMemoryError: ..."), "tree": {}})
    first = [cell.strip() for cell in report.large().splitlines()[2].strip("|").split("|")]
    assert first[:2] == ["qwen-72b", "1,024 tokens"]
    assert first[3::2] == ["55.0 GiB, 3.00 s", "55.0 GiB, 3.00 s", "out of memory"]  # rows, tree, TRL


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script would measure it")
def test_refuses_to_measure_without_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_large.main([str(tmp_path)])
    assert "no CUDA device here. Pass --rehearse" in capsys.readouterr().err
