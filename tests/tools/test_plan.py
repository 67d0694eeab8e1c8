"""`dpop plan` as a user meets it: recipes, data and lengths, what does not fit, errors that name what is wrong."""

import contextlib
import copy
import functools
import io
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from dpop_trainer.cli import main
from dpop_trainer.models import tiled_mlp
from dpop_trainer.settings.arguments import parse_arguments
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.settings.recipes import FOLDER, recipe_file
from dpop_trainer.tools.plan import devices
from dpop_trainer.tools.plan import search as plan_search
from dpop_trainer.tools.plan.batches import (
    BatchSetting,
    Pairs,
    longest_length,
    make_batches,
    of_statistics,
    stretched,
    worst_case,
)
from dpop_trainer.tools.plan.devices import CPU_UTILISATION, CPU_UTILISATION_16_BIT, DEVICE_NAMES, find_device
from dpop_trainer.tools.plan.known_models import HUB_IDS
from dpop_trainer.tools.plan.paper_model import ModelSetting
from dpop_trainer.tools.plan.planner import Choice, Planner, Run
from dpop_trainer.tools.plan.report import accelerate_file, as_text, setting_yaml
from dpop_trainer.tools.plan.search import RESERVE, longest_pair, search
from dpop_trainer.tools.plan.source import find_config
from peft import LoraConfig
from tiny import text_pairs, tiny_llama, word_tokenizer
from transformers import LlamaConfig

from dpop_kernels.backends import BACKENDS

ROOT = Path(__file__).parents[2]
RECIPES = sorted(FOLDER.glob("*.yaml"))
TINY = LlamaConfig(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
# a step on paper does not depend on how much memory a device has: one of each kind serves all tests
COSTS, SIZES = {}, {}
LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def plan(capsys, *argv):
    code = main(["plan", *argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def run_of(device, *, lora=LORA, pairs=None, **more):
    run = Run(
        config=TINY,
        model=ModelSetting(torch.bfloat16, nested=True, lora=lora),
        pairs=pairs or worst_case(128, num_pairs=100),
        device=device,
        autocast=torch.bfloat16,
        optimizer="adamw_torch_fused",
        reference="adapter off" if lora else "copy",
        reference_config=None,
        max_length=128,
        **more,
    )
    return Planner(run, **({"_costs": COSTS, "_sizes": SIZES} if lora is LORA else {}))


def gpu(mib):
    """A device with so much memory for the run: what is assumed for libraries comes on top."""
    return find_device("own", memory=1 + mib / 1024, tflops=1.0)


@functools.cache
def planned(recipe):
    """A recipe on one H100, or on the CPU that it is for, as JSON -> exit code and result."""
    path = FOLDER / f"{recipe}.yaml"
    device = [] if yaml.safe_load(path.read_text()).get("use_cpu") else ["--device", "h100-80gb"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["plan", "--config", str(path), *device, "--no_search", "--json"])
    return code, json.loads(out.getvalue())


KNOWN = ["--model", "Llama-3-8B"]
ASKED = Choice("auto", 8, 2, False, None, "none", 1)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_planned(recipe):
    code, result = planned(recipe.stem)
    assert code == 0  # each is meant for one GPU, or none
    assert result["fits"]
    assert 0 < result["asked"]["memory"]["total_bytes"] < result["device"]["memory_bytes"]
    assert result["asked"]["memory"]["total_bytes"] == pytest.approx(sum(result["asked"]["memory"]["parts"].values()))
    assert result["asked"]["micro_batch_seconds"] > 0
    assert "table of known models" in result["notes"][0]
    assert not any("kernel_backend" in note for note in result["notes"])


def test_what_is_not_counted_is_told(capsys):
    """A backend that is asked for by name need not run here either: the plan is for another device."""
    flags = [*KNOWN, "--device", "h100-80gb", "--no_search"]
    *_, backend = BACKENDS
    note = f"The kernels' workspace is counted as with kernel_backend auto, not {backend}."
    assert note in plan(capsys, *flags, "--kernel_backend", backend)[1]["notes"]


@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_a_batch_on_several_devices_by_hand(layout):
    """64 tokens of prompt, 64 of either answer, in two rows of 128 or one of 256 as blocks of FlexAttention are."""
    num_tokens = 256

    def outcome(num_layers, ranks):
        planner = run_of(gpu(1000), lora=copy.copy(LORA))
        planner.run = replace(planner.run, config=LlamaConfig(**{**TINY.to_dict(), "num_hidden_layers": num_layers}))
        return planner.outcome(Choice(layout, 1, 1, True, None, "fsdp2", 8, ranks_per_batch=ranks), exact_time=False)

    alone, shared, deeper = outcome(2, 1), outcome(2, 4), outcome(3, 4)
    assert shared.batches.largest.input_ids.numel() == num_tokens
    # tokens of all heads, heads of all tokens; older transformers make the rotary angles by a product of positions and
    # eight frequencies, of which the ranks' share is that of rows
    angles = 2 * 8 * num_tokens
    for kind, at_most in (("layers", angles), ("attention", 0)):
        assert abs(shared.cost.flop[kind] - alone.cost.flop[kind] / 4) <= at_most
    # rows: of either, the third of four ranks has the predictors 64 to 95; flat: the second all but the first of the
    # chosen answer, whose predictor ends the prompt
    num_scored = {"rows": 2 * 32, "flat": 63}[layout]
    assert shared.cost.flop["head"] == (1 + 2) * 2 * num_scored * 500 * 64
    added = deeper.cost.moments["forward"].parts["activations"] - shared.cost.moments["forward"].parts["activations"]
    assert added == num_tokens // 4 * 64 * 2  # a checkpoint of the layer's input
    weights = 2 * 500 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64)
    (held,) = [part.num_bytes for part in shared.memory.parts if part.name == "weights"]
    assert held == (2 * weights + 2 * 8 * 4) / 8  # the rotary embedding's 8 frequencies, and these as they were
    assert shared.choice.global_pairs == 2
    assert shared.device_seconds_per_pair == 4 * shared.time.total
    assert shared.seconds_per_pair == shared.time.total / 2


def test_rows_without_padding_need_no_mask():
    """Two rows of 128 tokens, four heads of 16: a causal kernel's half of the scores, five and a half times."""
    run = run_of(gpu(1000), lora=copy.copy(LORA))
    flop = run.outcome(Choice("rows", 1, 1, False, None, "none", 1), exact_time=False).cost.flop["attention"]
    forwards, backward = 2, 2.5
    assert flop == 2 * (forwards + backward) * 4 * (2 * 4 * 128 * 128 * 16) / 2


def test_engines_are_asked_for_with_commas(tmp_path, capsys):
    TINY.save_pretrained(tmp_path)
    argv = ["--model", str(tmp_path), "--device", "h100", "--max_length", "64", "--no_search", "--dtype", "bfloat16"]
    _, alone = plan(capsys, *argv, "--sharding", "sp4,fsdp2")
    assert (alone["asked"]["setting"]["num_devices"], alone["asked"]["setting"]["sharding"]) == (4, "fsdp2")
    _, two = plan(capsys, *argv, "--sequence_parallel_size", "4", "--devices", "8")
    assert (two["asked"]["setting"]["ranks_per_batch"], two["asked"]["setting"]["sharding"]) == (4, "ddp")
    assert main(["plan", *argv, "--sharding", "sp2"]) == 0
    assert "2 x h100-80gb, ddp, 2 to a batch" in capsys.readouterr().out


def test_a_72b_model_in_four_bits():
    """Weights by hand: 80 layers of 4 h² and 3 h i in 4 bits with nested scales, all else in bf16."""
    _, result = planned("qwen-72b")
    linear = 80 * (4 * 8192**2 + 3 * 8192 * 24576)
    scales = linear // 64
    packed = linear // 2 + scales + 4 * scales // 256
    rest = 2 * 152064 * 8192 + 8192 + 80 * (2 * 8192 + 4 * 8192)  # embeddings, head, norms, biases
    parts = result["asked"]["memory"]["parts"]
    assert parts["weights"] == pytest.approx(packed + 2 * rest, rel=1e-6)
    rank = 64
    adapter = 80 * rank * (4 * 2 * 8192 + 3 * (8192 + 24576))
    assert result["model"]["trained_parameters"] == adapter
    assert (parts["trained weights"], parts["optimizer"]) == (4 * adapter, 8 * adapter)


def test_the_page_shows_what_is_printed(capsys):
    page = (ROOT / "docs" / "plan.md").read_text()
    command = page.partition("$ dpop plan ")[2].partition("\n")[0]
    shown = page.partition(command + "\n")[2].partition("```")[0]
    argv = command.split()
    assert main(["plan", *argv]) == 0
    assert capsys.readouterr().out.strip() == shown.strip()
    for name in DEVICE_NAMES:
        assert f"`{name}`" in page, name


def test_what_does_not_fit_is_said_with_the_nearest_that_does(capsys):
    argv = ["--model", "Llama-3-8B", "--device", "rtx4090", "--use_peft", "true", "--dtype", "bfloat16"]
    argv += ["--max_length", "1024", "--per_device_train_batch_size", "8"]
    assert main(["plan", *argv, "--no_gradient_checkpointing"]) == 3
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert "GiB short of 23.5 GiB on each device" in text
    nearest = text.partition("Nearest setting that fits:")[2]
    assert "gradient_checkpointing: true        # changed" in nearest
    assert "load_in_4bit" not in nearest.partition("Cheapest")[0]  # in 16 bits it fits, so it stays in them


@pytest.mark.parametrize("mib", [12, 60, 130])
def test_the_cheapest_setting_fits_and_keeps_the_step(mib):
    planner = run_of(gpu(mib))
    asked = planner.outcome(ASKED)
    found = search(planner, asked)
    assert found.cheapest is not None
    assert found.cheapest.fits
    assert found.cheapest.choice.global_pairs == ASKED.global_pairs
    reserve = RESERVE * planner.run.device.memory_bytes
    assert found.cheapest.choice.num_pairs == 1 or found.cheapest.spare >= reserve
    assert (found.nearest is None) == asked.fits
    if found.nearest is not None:
        assert found.nearest.fits
        assert found.nearest.choice.global_pairs == ASKED.global_pairs
        assert found.cheapest.device_seconds_per_pair <= 1.001 * found.nearest.device_seconds_per_pair
    # nothing that was left out is cheaper and leaves as much: all batch sizes, with and without checkpointing
    for checkpointing in (False, True):
        for num_pairs in (1, 2, 4, 8, 16):
            other = planner.outcome(Choice("auto", num_pairs, 16 // num_pairs, checkpointing, None, "none", 1))
            eligible = other.spare >= (0 if num_pairs == 1 else reserve)
            if eligible and found.cheapest.choice.bits is None and found.cheapest.choice.num_devices == 1:
                assert found.cheapest.device_seconds_per_pair <= 1.02 * other.device_seconds_per_pair


def test_the_longest_pair_fits_and_a_longer_one_does_not():
    planner = run_of(gpu(40))
    choice = Choice("auto", 1, 1, False, None, "none", 1)
    longest = longest_pair(planner, choice)
    assert longest > 128

    def fits(length):
        pairs = Pairs([stretched(planner.run.pairs.records[0], length)], None, "", is_assumed=True)
        assert longest_length(pairs) == length
        return planner.outcome(choice, pairs=pairs).fits

    assert fits(longest)
    assert not fits(round(1.02 * longest) + 16)
    assert longest_pair(run_of(gpu(0.1)), choice) == 0


def test_a_model_far_smaller_than_its_device_is_planned_at_once(monkeypatch, capsys):
    """The longest pair is looked for up to so many tokens of a micro-batch: of four pairs, a quarter each."""
    monkeypatch.setattr(plan_search, "MOST_TOKENS", 4 * 512)
    planner, choice = run_of(gpu(1000)), Choice("auto", 4, 1, False, None, "none", 1)
    assert longest_pair(planner, choice) == 512
    text = as_text(planner, planner.outcome(choice), None, 512, [])
    assert "longest pair    at least 512 tokens of prompt and answer fit at this setting" in text
    assert "longest pair    496 tokens" in as_text(planner, planner.outcome(choice), None, 496, [])


def test_more_devices_where_one_is_too_small():
    planner = run_of(gpu(1.5))
    asked = planner.outcome(Choice("auto", 1, 4, True, None, "none", 1))
    assert not asked.fits
    found = search(planner, asked)
    for outcome in (found.cheapest, found.nearest):
        assert outcome is None or outcome.choice.num_devices > 1 or outcome.choice.bits == 4
        assert outcome is None or outcome.fits


def test_tiles_then_the_host_s_memory_are_proposed_before_more_devices(monkeypatch):
    monkeypatch.setitem(tiled_mlp.TILE_BYTES, "gpu", 1 << 20)
    asked = Choice("flat", 1, 1, True, None, "none", 1)
    costs = {}
    leaner = [replace(asked, tiled_mlp="auto"), replace(asked, tiled_mlp="auto", offloading=True)]

    def planner_on(num_bytes):
        device = find_device("own", memory=num_bytes / 2**30, tflops=1.0)
        planner = run_of(device, lora=copy.copy(LORA), pairs=worst_case(512))
        planner._costs = costs  # none of another test's, whose tiles are others
        return planner

    sizes = [planner_on(2**40).outcome(choice).memory.total for choice in (asked, *leaner)]
    assert sizes == sorted(sizes, reverse=True)
    for larger, smaller, expected in zip(sizes, sizes[1:], leaner, strict=False):
        planner = planner_on((larger + smaller) / 2)
        found = search(planner, planner.outcome(asked))
        assert found.nearest is not None
        assert found.nearest.choice == expected
        assert found.cheapest is not None
        assert replace(found.cheapest.choice, layout="flat") == expected
    slow, fast = (planner_on(2**40).outcome(choice).time for choice in (leaner[1], leaner[0]))
    assert slow.total == pytest.approx(fast.total + slow.moves)
    assert slow.moves > 0


def test_a_proposed_setting_is_one_that_train_takes(tmp_path):
    choice = Choice("auto", 2, 4, True, 4, "fsdp2", 8, tiled_mlp="auto")
    assert "activation_offloading: true" in setting_yaml(replace(choice, offloading=True))
    assert "sequence_parallel_size: 4" in setting_yaml(replace(choice, ranks_per_batch=4))
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(setting_yaml(choice)) + "\n")
    model, _, config = parse_arguments(DPOPConfig, ["--config", str(path), "--use_cpu", "true"], "dpop train")
    assert (model.load_in_4bit, model.use_bnb_nested_quant, model.bnb_4bit_quant_storage) == (True, True, "bfloat16")
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (2, 4)
    assert (config.gradient_checkpointing, config.layout, config.tiled_mlp) == (True, "auto", "auto")
    for sharding in ("ddp", "fsdp2", "zero2", "zero3"):
        assert recipe_file(str(accelerate_file(Choice("auto", 1, 1, True, None, sharding, 8)))).is_file()
    assert recipe_file(str(accelerate_file(Choice("auto", 1, 1, True, None, "fsdp2", 16)))).is_file()


def test_lengths_are_those_of_the_data(tmp_path, capsys):
    tiny_llama().config.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs(40)))
    argv = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs.jsonl"), "--device", "cpu"]
    argv += ["--per_device_train_batch_size", "4", "--num_train_epochs", "3", "--price", "2", "--layout", "rows"]
    code, result = plan(capsys, *argv, "--no_search")
    assert code == 0
    assert result["pairs"]["num_pairs"] == 40
    assert not result["pairs"]["assumed"]
    # two words of prompt, three of answer and its end, in eight rows; the answers share one word
    assert result["asked"]["batch"] == {"pairs": 4, "positions": 48, "padding": 0, "scored": 4 * (1 + 3 + 3)}
    assert plan(capsys, *argv, "--no_search", "--max_train_pairs", "25")[1]["pairs"]["num_pairs"] == 25
    assert main(["plan", *argv, "--max_train_pairs", "0"]) == 1  # as in training, whose reading it is
    assert "max_train_pairs: expected at least 1, got 0" in capsys.readouterr().err
    assert main(["plan", *argv, "--no_search"]) == 0
    text = capsys.readouterr().out
    assert "epoch" in text
    assert "3 epochs" in text
    assert "at 2 per device-hour" in text


def test_lengths_of_statistics():
    pairs = of_statistics([100, 250, 400], [50], [10], max_length=None, num_pairs=7)
    prompts = sorted(len(record["prompt_ids"]) for record in pairs.records)
    assert sum(prompts) / len(prompts) == pytest.approx(100, rel=0.03)
    assert prompts[round(0.95 * len(prompts))] == pytest.approx(250, rel=0.06)
    assert prompts[-1] == 400
    tree = make_batches(Pairs(pairs.records[:1], 1, "", True), BatchSetting("tree", 1)).largest
    assert tree["input_ids"].shape[1] == len(pairs.records[0]["prompt_ids"]) + 10 + 2 * 40
    cut = of_statistics([100, 250, 400], [50], None, max_length=120, num_pairs=None)
    assert longest_length(cut) == 120


def test_batches_of_a_budget_keep_to_it():
    pairs = of_statistics([20, 40, 60], [10], None, max_length=None, num_pairs=None)
    batches = make_batches(pairs, BatchSetting("flat", 1, budget=512))
    assert batches.largest["input_ids"].numel() <= 512
    assert 0.8 * 512 < batches.positions <= 512
    with pytest.raises(ValueError, match="max_tokens_per_batch: expected at least 90"):
        # thirty of prompt and twice thirty of answer
        make_batches(worst_case(60), BatchSetting("flat", 1, budget=64))


def test_copies_of_a_pair_share_nothing():
    """One pair that stands for eight takes the room of eight, also in a layout that computes equal beginnings once."""
    one, eight = (make_batches(worst_case(64), BatchSetting("flat", count)).largest for count in (1, 8))
    assert eight["input_ids"].numel() == 8 * one["input_ids"].numel()


def test_checkpointing_costs_time_and_saves_memory():
    planner = run_of(gpu(500))
    kept, again = (planner.outcome(Choice("auto", 4, 1, flag, None, "none", 1)) for flag in (False, True))
    assert again.memory.total < kept.memory.total
    assert again.time.total > kept.time.total


@pytest.mark.parametrize(("precision", "planned"), [("fp32", CPU_UTILISATION), ("bf16", CPU_UTILISATION_16_BIT)])
def test_a_cpu_is_planned_as_the_records_have_it(precision, planned):
    record = json.loads((ROOT / "benchmarks" / "results" / "planned_cpu.json").read_text())
    runs = [run for run in record["runs"] if run["precision"] == precision]
    assert {run["model"] for run in runs} == {"Llama 256 x 4", "SmolLM2-135M-Instruct"}
    assert planned == pytest.approx(statistics.fmean(run["share"] for run in runs), abs=0.02)
    for run in runs:  # what a plan is for: it neither promises what does not fit, nor refuses what does
        assert run["planned_gib"] == pytest.approx(run["measured_gib"], rel=0.15)


def test_a_cpu_is_measured_at_the_models_own_products(tmp_path, monkeypatch, capsys):
    tiny_llama().config.save_pretrained(tmp_path)
    rates = {torch.float32: 3e12, torch.bfloat16: 12e12}
    asked = []
    monkeypatch.setattr(devices, "_product_rate", lambda *shape: asked.append(shape[:2]) or rates[shape[2]])
    argv = ["--model", str(tmp_path), "--device", "cpu", "--max_length", "64", "--no_search"]
    config = tiny_llama().config
    sizes = config.hidden_size, config.intermediate_size
    for flags, dtype, share in (
        ([], torch.float32, CPU_UTILISATION),
        (["--bf16", "true", "--use_cpu", "true"], torch.bfloat16, CPU_UTILISATION_16_BIT),
        (["--mfu", "0.5"], torch.float32, 0.5),
    ):
        result = plan(capsys, *argv, *flags)[1]
        assert set(asked) == {sizes}
        asked.clear()
        device, flop = result["device"], result["asked"]["flop"]
        assert (device["tflops"], device["utilisation"]) == (rates[dtype] / 1e12, share)
        # every batch is the largest; the head's products stay in fp32
        seconds = (flop["layers"] + flop["attention"]) / rates[dtype] + flop["head"] / rates[torch.float32]
        assert result["asked"]["products_seconds"] == pytest.approx(seconds / share)
    assert plan(capsys, *argv, "--tflops", "2")[1]["device"]["tflops"] == 2.0
    assert not asked


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (
            ["--device", "h100"],
            1,
            "model: expected a hub id, a folder, a config.json or a known model's name, got none",
        ),
        ([*KNOWN], 1, "device: expected one of a100-40gb, a100-80gb"),
        ([*KNOWN, "--device", "h900"], 1, "got 'h900'. Give --memory (GiB) and --tflops"),
        (["--model", "./no-such", "--device", "h100"], 1, "found none at './no-such'"),
        ([*KNOWN, "--device", "cpu", "--quantization", "8bit"], 1, "load_in_8bit: expected a CUDA device"),
        ([*KNOWN, "--device", "h100", "--load_in_4bit"], 1, "load_in_4bit: expected an adapter to train, got none"),
        ([*KNOWN, "--device", "cpu", "--load_in_8bit", "--use_peft"], 1, "load_in_8bit: expected a CUDA device"),
        ([*KNOWN, "--device", "h100", "--quantization", "3bit"], 1, "one of none, 4bit, 8bit"),
        ([*KNOWN, "--device", "h100", "--sharding", "ddp"], 1, "sharding: expected none on one device"),
        (
            [*KNOWN, "--device", "h100", "--sharding", "ddp,sp8,fsdp2"],
            1,
            "expected one of ddp and fsdp2, which exclude",
        ),
        ([*KNOWN, "--device", "h100", "--sharding", "sp8,ep2"], 1, "or devices to a batch such as sp8"),
        ([*KNOWN, "--device", "h100", "--sharding", "tp8"], 1, "Tensor parallelism is not planned"),
        ([*KNOWN, "--device", "h100", "--sharding", "sp8,zero3"], 1, "sharding: expected sp8 without zero3"),
        ([*KNOWN, "--device", "h100", "--sharding", "sp8", "--devices", "12"], 1, "multiple of the 8 that run a batch"),
        ([*KNOWN, "--device", "h100", "--sharding", "sp3,fsdp2"], 1, "expected a divisor of the 32 attention heads"),
        (
            [*KNOWN, "--device", "h100", "--sharding", "sp8", "--sequence_parallel_size", "4"],
            1,
            "sharding: expected sp4, the run's sequence_parallel_size, got 'sp8'",
        ),
        (
            [*KNOWN, "--device", "h100", "--sharding", "sp8", "--attn_implementation", "flash_attention_2"],
            1,
            "attn_implementation: expected 'sdpa' beside sequence_parallel_size 8",
        ),
        ([*KNOWN, "--device", "h100", "--mfu", "40"], 1, "mfu: expected a part of the peak"),
        ([*KNOWN, "--device", "h100", "--prompt_tokens", "9"], 1, "answer_tokens: expected it together"),
        ([*KNOWN, "--device", "h100", "--prompt_tokens", "9", "5", "--answer_tokens", "5"], 1, "expected the mean"),
        (
            ["--model", "gemma-2-9b", "--device", "h100", "--layout", "flat", "--max_length", "8192"],
            1,
            "layout: expected",
        ),
        (
            [*KNOWN, "--device", "h100", "--devices", "8", "--sharding", "zero3", "--tiled_mlp", "auto"],
            1,
            "tiled_mlp: expected 'none' with zero3",
        ),
        ([*KNOWN, "--device", "cpu", "--activation_offloading"], 1, "activation_offloading: expected a GPU, got cpu"),
        (["--device", "h100", "--modle", "x"], 2, "Did you mean"),
    ],
)
def test_bad_input_is_named(capsys, argv, code, message):
    assert main(["plan", *argv]) == code
    assert message in capsys.readouterr().err


def test_four_bits_are_planned_for_a_cpu_as_they_are_trained_on_one(tmp_path, capsys):
    """Seven layers of either of two blocks are packed, 64 weights to a scale of four bytes."""
    TINY.save_pretrained(tmp_path)
    argv = ["--model", str(tmp_path), "--device", "cpu", "--load_in_4bit", "--use_peft", "--max_length", "128"]
    code, result = plan(capsys, *argv, "--memory", "64", "--no_search")
    assert code == 0
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    rest = 2 * 500 * 64 + 5 * 64  # embeddings, head, norms
    buffers = 2 * 8 * 4  # of the rotary embedding: 8 frequencies, and these as they were
    assert result["asked"]["memory"]["parts"]["weights"] == linear // 2 + 4 * linear // 64 + 4 * rest + buffers


def test_help_begins_with_the_plans_own(capsys):
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.index("--price") < text.index("--model_name_or_path") < text.index("--learning_rate")
    assert "3 it does not" in " ".join(text.split())


def test_an_unknown_model_names_the_close_ones(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("dpop_trainer.tools.plan.source._hub_answers", lambda: False)
    with pytest.raises(ValueError, match=r"Close to it are: .*Qwen/Qwen2.5-72B"):
        find_config("Qwen/Qwen2.5-72B-Instrukt")
    for name in HUB_IDS:
        assert find_config(name).origin.startswith("the table of known models")


def test_a_config_file_is_a_model(tmp_path):
    TINY.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        assert find_config(str(name)).config.hidden_size == 64


def test_every_device_can_be_found():
    for name in DEVICE_NAMES:
        assert find_device(name).memory_gib > 0
    assert find_device("h100").name == "h100-80gb"
    changed = find_device("a100-80gb", memory=60.0, utilisation=0.5)
    assert (changed.memory_gib, changed.utilisation, changed.tflops) == (60.0, 0.5, 312.0)
