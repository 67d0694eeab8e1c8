"""QLoRA for real: bitsandbytes' 4-bit layers through the trainer, the reference, a resumed run and the export."""

import json

import pytest
import torch
import yaml
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.cli import main
from dpop_trainer.models import quantised
from dpop_trainer.models.loading import load_model
from dpop_trainer.models.quantised import (
    as_arguments,
    as_trained,
    compute_dtype,
    computed_in,
    four_bit_config,
    make_trainable,
    widened,
)
from dpop_trainer.models.trained import load_trained, read_run_config
from dpop_trainer.reference.keys import weights_digest
from dpop_trainer.tools.delivery.merge import largest_change, probe_logps
from peft import LoraConfig, get_peft_model
from rounding import stored
from safetensors.torch import load_file
from tiny import text_pairs, tiny_llama, token_pairs, word_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from dpop_kernels import ScoringHead

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[qlora]'")

FP32 = four_bit_config(torch.float32, nested=True)
# the 16 values of nf4, from the QLoRA paper's appendix E (arXiv:2305.14314)
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Layers of whole blocks: see `test_layers_that_would_be_scaled_wrongly_are_refused`."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = tiny_llama().config.to_dict() | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def lora(**config):
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **config)


def trainer(folder, model, *, quantization_config=None, peft_config="lora", ref_model=None, **overrides):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 5,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return DPOPTrainer(
        model,
        ref_model=ref_model,
        args=DPOPConfig(**settings | overrides),
        train_dataset=Dataset.from_list(token_pairs()),
        processing_class=word_tokenizer(),
        quantization_config=quantization_config,
        peft_config=lora() if peft_config == "lora" else peft_config,
    )


def logged(built, name):
    return [line[name] for line in built.state.log_history if name in line]


def adapter_of(built):
    return {name: p.detach().clone() for name, p in built.model.named_parameters() if p.requires_grad}


def nearest_nf4(weight, *, blocksize=64):
    """Each block of 64 weights over its largest, to the nearest of the 16 values, and back; the scales in fp32."""
    blocks = weight.reshape(-1, blocksize)
    scales = blocks.abs().amax(1, keepdim=True)
    code = torch.tensor(NF4)
    return (code[(blocks / scales).unsqueeze(-1).sub(code).abs().argmin(-1)] * scales).reshape(weight.shape)


def test_the_base_is_rounded_to_nf4_but_for_embedding_and_head(base):
    plain, rounded = load_model(base), load_model(base, None, four_bit_config(torch.float32))
    layers = {name for name, module in rounded.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(layers) == 7 * 2  # q, k, v, o, gate, up, down of two layers
    assert not any("lm_head" in name or "embed" in name for name in layers)
    expected = {name: nearest_nf4(plain.get_submodule(name).weight) for name in layers}
    ordinary = widened(rounded)
    assert ordinary.state_dict().keys() == plain.state_dict().keys()
    for name, weight in expected.items():
        torch.testing.assert_close(ordinary.get_submodule(name).weight, weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_training_is_that_of_the_rounded_weights(base, tmp_path, layout):
    """Against a plain model that holds what the 4-bit one is rounded to: same losses, same adapter."""
    rounded = trainer(tmp_path / "a", base, quantization_config=FP32, layout=layout)
    plain = trainer(tmp_path / "b", widened(load_model(base, None, FP32)), layout=layout)
    plain.model.load_state_dict(adapter_of(rounded), strict=False)  # A is drawn at random
    for built in (rounded, plain):
        built.train()
    assert logged(rounded, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-4)
    assert logged(rounded, "loss")[0] == pytest.approx(0.6931472, abs=1e-6)  # log 2, policy and reference being equal
    assert logged(rounded, "dpop/step_0_max_logratio") == [0.0]
    for name, value in adapter_of(plain).items():
        torch.testing.assert_close(adapter_of(rounded)[name], value, rtol=0, atol=2e-3)  # of 4 steps of AdamW at 1e-2
    assert rounded.reference.has_model
    assert json.loads((tmp_path / "a" / "reference.json").read_text())["reference"] == "the base under the adapter"


def test_a_resumed_run_ends_where_the_whole_one_does(base, tmp_path):
    whole = trainer(tmp_path / "whole", base, quantization_config=FP32, save_strategy="steps", save_steps=2)
    whole.train()
    again = trainer(tmp_path / "whole", base, quantization_config=FP32, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(again, "loss") == logged(whole, "loss")
    for name, value in adapter_of(whole).items():
        assert torch.equal(adapter_of(again)[name], value), name
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")
    assert len(saved) == 7 * 2 * 2
    assert {value.dtype for value in saved.values()} == {torch.float32}


def test_a_resumed_run_on_a_base_rounded_otherwise_is_stopped(base, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, base, quantization_config=FP32, **settings).train()
    other = trainer(tmp_path, base, quantization_config=four_bit_config(torch.float32, quant_type="fp4"), **settings)
    with pytest.raises(ValueError, match="got another bnb_4bit_quant_type: 'nf4' before, 'fp4' now"):
        other.train(resume_from_checkpoint=True)
    # a checkpoint by name takes another configuration, but no other reference
    with pytest.raises(ValueError, match="reference: expected the weights that this run began with"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_evaluation_between_steps_leaves_training_as_it_is(base, tmp_path):
    """bitsandbytes repacks layers in eval mode on a CPU with bf16 instructions; the packed form has no gradient."""
    without = trainer(tmp_path / "a", base, quantization_config=FP32)
    without.train()
    evaluated = trainer(tmp_path / "b", base, quantization_config=FP32)
    evaluated.evaluate(Dataset.from_list(token_pairs(3)))
    evaluated.train()
    assert logged(evaluated, "loss") == logged(without, "loss")


def test_a_layer_that_was_repacked_is_unpacked(monkeypatch):
    """As bitsandbytes leaves it after a forward in eval mode, which only some CPUs make it do."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    before = layer.weight.data.clone()
    packed, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, state
    assert layer.weight.quant_state.packing_format_for_cpu
    assert layer.weight.shape != before.shape
    layer.support_avx512bf16_for_cpu = True
    make_trainable(torch.nn.Sequential(layer))
    assert not layer.support_avx512bf16_for_cpu
    assert not layer.weight.quant_state.packing_format_for_cpu
    assert torch.equal(layer.weight.data, before)


def test_layers_that_would_be_scaled_wrongly_are_refused(tmp_path, monkeypatch):
    """On a CPU bitsandbytes 0.50 gives a weight in a block that goes over the end of its row the next block's scale."""
    rows = torch.arange(1.0, 33).repeat_interleave(64).view(64, 32)
    rounded, state = bnb.functional.quantize_4bit(rows, quant_type="nf4")
    is_right = torch.equal(bnb.functional.dequantize_4bit(rounded, state), rows)
    tiny_llama().save_pretrained(tmp_path)  # of width 32
    if not is_right:
        with pytest.raises(ValueError, match=r"multiple of 64 on a CPU, got 32 in model\.layers\.0\.self_attn\.q_proj"):
            load_model(str(tmp_path), None, FP32)
    monkeypatch.setattr(quantised, "_widens_rightly", lambda width, blocksize: True)  # a version that does it right
    assert computed_in(load_model(str(tmp_path), None, FP32)) == {torch.float32}


def test_a_base_has_one_digest_under_an_adapter_or_not(base):
    rounded = load_model(base, None, FP32)
    alone = weights_digest(rounded, with_adapter=True)
    assert weights_digest(get_peft_model(rounded, lora()), with_adapter=False) == alone
    assert weights_digest(load_model(base), with_adapter=True) != alone
    assert weights_digest(load_model(base, None, four_bit_config(torch.float32)), with_adapter=True) != alone


def test_log_probs_are_kept_apart_by_rounding(base, tmp_path, caplog):
    settings = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache"), "max_steps": 1}
    for i, (quantization_config, known) in enumerate([(FP32, 0), (FP32, 5), (None, 0)]):
        caplog.clear()
        trainer(tmp_path / f"run-{i}", base, quantization_config=quantization_config, **settings).train()
        assert f"{known} of 5 pairs from the cache" in caplog.text


def test_a_4_bit_reference_by_name(base, tmp_path, caplog):
    """In the policy's dtype and nf4; its log-probs are the rounded model's, and step 0 says why they differ."""
    built = trainer(
        tmp_path,
        base,
        peft_config=None,
        ref_model=base,
        ref_model_init_kwargs={"quantization_config": {"load_in_4bit": True}},
        max_steps=1,
    )
    assert computed_in(built.ref_model) == {torch.float32}
    assert built.ref_model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    rounded = widened(load_model(base, None, four_bit_config(torch.float32)))
    torch.testing.assert_close(probe_logps(built.ref_model), probe_logps(rounded), rtol=0, atol=1e-5)
    built.train()
    assert "the reference is quantised, the policy is not" in caplog.text
    assert logged(built, "dpop/step_0_max_logratio")[0] > 0.1


def test_a_4_bit_reference_is_not_offloaded(base, tmp_path):
    with pytest.raises(ValueError, match="ref_model_offload: expected a reference whose weights can be sent"):
        trainer(
            tmp_path,
            base,
            peft_config=None,
            ref_model=base,
            ref_model_offload=True,
            ref_model_init_kwargs={"quantization_config": {"load_in_4bit": True}},
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_head_is_refused_by_name(base, bits):
    skips_nothing = {f"load_in_{bits}bit": True, "llm_int8_skip_modules": ["none"]}
    model = load_model(base, None, BitsAndBytesConfig(**skips_nothing))
    with pytest.raises(ValueError, match=r"linear lm_head, got Linear(4bit|8bitLt) .*Leave the head out of quantis"):
        ScoringHead(model)


def test_products_are_computed_in_the_runs_dtype(base):
    assert compute_dtype("float32") == torch.float32
    assert compute_dtype("bfloat16") == compute_dtype("auto") == torch.bfloat16
    assert compute_dtype("float32", DPOPConfig("unused", bf16=True, use_cpu=True)) == torch.bfloat16
    assert computed_in(load_model(base, None, four_bit_config(torch.bfloat16))) == {torch.bfloat16}
    assert computed_in(load_model(base)) == set()


def test_fewer_bits_in_the_products_do_not_cost_the_layout(base, tmp_path):
    """Weights in fp32, products in bf16: rounding explains a difference that fp32 does not."""
    built = trainer(tmp_path, base, quantization_config=four_bit_config(torch.bfloat16), layout="packed", max_steps=1)
    built.train()
    assert built.data_collator.layout == "packed"


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """`dpop train` on a 4-bit base, far enough that the adapter matters."""
    folder = tmp_path_factory.mktemp("qlora")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    argv = ["train", "--model_name_or_path", base, "--dataset_name", str(folder / "pairs.jsonl"), "--load_in_4bit"]
    argv += ["--use_bnb_nested_quant", "--use_peft", "true", "--output_dir", str(folder / "run"), "--max_steps", "4"]
    argv += ["--learning_rate", "0.02", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "true"]
    assert main([*argv, "--save_strategy", "no", "--disable_tqdm", "true"]) == 0
    return folder / "run"


def rounded_run(run):
    """The policy as it was trained: the adapter on the 4-bit base."""
    return load_trained(str(run), quantization_config=as_trained(read_run_config(run)), device="cpu").model


def test_export_gives_the_policy_that_was_trained(run, base, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trained = probe_logps(rounded_run(run))
    assert largest_change(trained, probe_logps(merged)) < 1e-5
    assert largest_change(trained, probe_logps(load_model(base))) > 0.05  # the run learned
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}
    assert "stored widened: the policy that was trained" in (tmp_path / "out" / "README.md").read_text()
    # into the full-precision weights it is another model, and the card says so
    assert main(["export", str(run), "--out", str(tmp_path / "full"), "--merge_into", "full"]) == 0
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert largest_change(trained, probe_logps(full)) > 1e-2
    assert "Training saw this base rounded to 4 bits" in (tmp_path / "full" / "README.md").read_text()


def test_a_run_from_python_knows_how_its_base_was_rounded(base, tmp_path):
    built = trainer(tmp_path / "run", base, quantization_config=FP32, max_steps=2)
    built.train()
    built.save_model()
    written = read_run_config(tmp_path / "run")
    assert (written["load_in_4bit"], written["bnb_4bit_quant_type"]) == (True, "nf4")
    assert (written["use_bnb_nested_quant"], written["dtype"]) == (True, "float32")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    built.model.eval()
    assert largest_change(probe_logps(built.model), probe_logps(merged)) < 1e-5
    assert as_arguments(load_model(base)) == {}


def test_export_in_another_dtype_rounds_the_base_as_training_did(run, tmp_path):
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    name = "model.layers.0.mlp.down_proj"
    adapter = load_file(run / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    rounded = rounded_run(run).unload()
    layer = rounded.get_submodule(name)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    expected = weight + 2.0 * b @ a  # alpha / r = 32 / 16
    assert (merged.get_submodule(name).weight.double() - expected).abs().max() <= stored(
        torch.bfloat16
    ) * expected.abs().max()


def test_export_into_rounded_weights_needs_a_run_on_them(base, tmp_path, capsys):
    get_peft_model(load_model(base), lora()).save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--merge_into", "rounded"]) == 1
    assert "merge_into: expected a run on a 4-bit base for 'rounded'" in capsys.readouterr().err


@torch.no_grad()
def chosen_change(run):
    """Mean change of the chosen answers' log-probs in nats: the adapter on the rounded base against that base."""
    model = rounded_run(run)
    records = [{key: word_tokenizer()(pair[key]).input_ids for key in pair} for pair in text_pairs()]

    def chosen_logps(model):
        totals = []
        for record in records:
            ids = torch.tensor([[*record["prompt"], *record["chosen"], 2]])
            logps = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            totals.append(logps[len(record["prompt"]) - 1 :].sum())
        return torch.stack(totals)

    return float((chosen_logps(model) - chosen_logps(model.unload())).mean())


def test_inspect_looks_at_the_policy_that_was_trained(run):
    """On the rounded base, against the rounded base: Δ is what training made of it, and not the rounding."""
    assert main(["inspect", str(run), "--pairs", str(run.parent / "pairs.jsonl")]) == 0
    found = json.loads((run / "inspect.json").read_text())
    assert found["chosen_logratio"] == pytest.approx(chosen_change(run), abs=1e-3)


def test_eval_rounds_every_model_as_the_run_did(run, base, tmp_path):
    argv = ["eval", "--models", base, str(run), "--load_in_4bit", "--pairs", str(run.parent / "pairs.jsonl")]
    assert main([*argv, "--out", str(tmp_path), "--device", "cpu"]) == 0
    rows = {row["metric"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows["chosen Δ"]["figures"]["run"]["value"] == pytest.approx(chosen_change(run), abs=1e-3)


def test_compare_measures_the_policies_that_were_trained(base, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    pairs = str(tmp_path / "pairs.jsonl")
    argv = ["compare", "--model_name_or_path", base, "--dataset_name", pairs, "--eval_dataset_name", pairs]
    argv += ["--load_in_4bit", "--use_bnb_nested_quant", "--use_peft", "true", "--use_cpu", "true", "--methods", "dpop"]
    argv += ["--seeds", "0", "--max_steps", "4", "--learning_rate", "0.02", "--keep_models", "--disable_tqdm", "true"]
    assert main([*argv, "--output_dir", str(tmp_path / "out"), "--report_to", "none"]) == 0
    (run,) = json.loads((tmp_path / "out" / "compare.json").read_text())["results"]
    assert run["evaluation"]["chosen_logratio"] == pytest.approx(
        chosen_change(tmp_path / "out" / "dpop" / "seed-0"), abs=1e-3
    )


def test_quantisation_that_cannot_be_is_refused_before_anything_is_loaded(base, tmp_path, capsys, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    argv = ["train", "--model_name_or_path", base, "--dataset_name", str(tmp_path / "pairs.jsonl"), "--use_cpu", "true"]
    argv += ["--output_dir", str(tmp_path / "run")]
    assert main([*argv, "--load_in_4bit"]) == 1
    assert "load_in_4bit: expected an adapter to train, got none" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*argv, "--load_in_8bit", "--use_peft", "true"]) == 1
    assert "load_in_8bit: expected a CUDA device, found none" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["yi-34b", "qwen-72b"])
def test_a_recipe_in_4_bits_runs_in_4_bits(name, base, tmp_path):
    """test_recipes.py runs it with quantisation off; here what the recipe says of its base holds."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    pairs = str(tmp_path / "pairs.jsonl")
    argv = ["train", "--recipe", name, "--model_name_or_path", base, "--output_dir", str(tmp_path / "run")]
    argv += ["--dataset_mixture", pairs, "--eval_datasets", pairs, "--use_cpu", "true", "--max_steps", "1"]
    argv += ["--bf16", "false", "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true"]
    assert main([*argv, "--gradient_accumulation_steps", "2"]) == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["load_in_4bit"], written["use_bnb_nested_quant"], written["dtype"]) == (True, True, "bfloat16")
    assert computed_in(rounded_run(tmp_path / "run")) == {torch.bfloat16}
