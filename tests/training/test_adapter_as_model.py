"""An adapter named as the model is the model: trained on, held against its start, measured; never thrown away."""

import json

import pytest
import torch
import yaml
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.cli import main
from dpop_trainer.models.loading import load_model
from dpop_trainer.training.sft import SFTTrainer
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import text_pairs, tiny_llama, token_pairs, word_tokenizer
from trainers import answer_logp, config, logged
from transformers import AutoModelForCausalLM

TRAIN = {
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, an adapter on it that moves its log-probs by nats, and pairs."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny_llama().save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    torch.manual_seed(5)
    lora = LoraConfig(
        r=4, lora_alpha=32, init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    return folder


def by_hand(folders, records):
    """Mean log-prob of the chosen answers under the base, and under the adapter on it: loaded by peft alone."""
    base = AutoModelForCausalLM.from_pretrained(folders / "base").eval().requires_grad_(False)
    of_base = [answer_logp(base, r["prompt_ids"], r["chosen_ids"]).item() for r in records]
    adapted = PeftModel.from_pretrained(base, folders / "adapter").eval()
    of_adapter = [answer_logp(adapted, r["prompt_ids"], r["chosen_ids"]).item() for r in records]
    means = sum(of_base) / len(records), sum(of_adapter) / len(records)
    assert abs(means[0] - means[1]) > 1  # nat: the one cannot be taken for the other
    return means


def text_records(tokenizer):
    """The pairs of the file as ids, word by word; this tokenizer has no BOS of its own, and answers end with EOS."""
    ids = tokenizer.get_vocab()
    return [
        {
            "prompt_ids": [ids[word] for word in pair["prompt"].split()],
            "chosen_ids": [*(ids[word] for word in pair["chosen"].split()), ids["<eos>"]],
        }
        for pair in text_pairs()
    ]


def run(folders, command, out, **values):
    path = folders / f"{out.name}.yaml"
    named = {"dataset_name": str(folders / "pairs.jsonl"), "output_dir": str(out)}
    path.write_text(yaml.safe_dump({**TRAIN, **named, **values}))
    return main([command, "--config", str(path)])


def test_dpop_trains_an_adapter_on(tmp_path, folders, tokenizer):
    records = token_pairs()
    expected = by_hand(folders, records)[1]
    trainer = DPOPTrainer(
        str(folders / "adapter"),
        args=config(tmp_path, max_steps=2),
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    trainer.train()
    assert logged(trainer, "logps/chosen")[0] == pytest.approx(expected, rel=1e-5)
    # the reference is the adapter as it was: at step 0 policy and reference are one
    assert logged(trainer, "dpop/step_0_max_logratio") == [0.0]
    assert trainer.reference._source.kind == "the adapter as it was at the start"
    trainer.save_model()
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders / "base"), tmp_path / "run")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(reloaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_command_line_trains_an_adapter_on(tmp_path, folders, tokenizer, relative, monkeypatch):
    monkeypatch.chdir(folders)
    expected = by_hand(folders, text_records(tokenizer))[1]
    name = "adapter" if relative else str(folders / "adapter")
    assert run(folders, "train", tmp_path / "run", model_name_or_path=name, layout="rows") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (first,) = [line for line in lines if "logps/chosen" in line]
    assert first["logps/chosen"] == pytest.approx(expected, rel=1e-5)
    assert first["dpop/step_0_max_logratio"] == 0.0


def test_sft_trains_an_adapter_on(tmp_path, folders, tokenizer):
    records = text_records(tokenizer)
    num_tokens = sum(len(record["chosen_ids"]) for record in records)
    expected = -by_hand(folders, records)[1] * len(records) / num_tokens  # nats per scored token
    assert run(folders, "sft", tmp_path / "run", model_name_or_path=str(folders / "adapter")) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert next(line["loss"] for line in lines if "loss" in line) == pytest.approx(expected, rel=1e-4)
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folders / "base"
    )


def test_an_adapter_is_a_reference_too(tmp_path, folders, tokenizer):
    records = token_pairs()
    of_base, of_adapter = by_hand(folders, records)
    trainer = DPOPTrainer(
        str(folders / "base"),
        ref_model=str(folders / "adapter"),
        args=config(tmp_path, max_steps=1, loss_type="dpo", beta=0.5),
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )
    trainer.train()
    # rewards are β (log π - log π_ref), means over the pairs
    assert logged(trainer, "rewards/chosen")[0] == pytest.approx(0.5 * (of_base - of_adapter), rel=1e-4)


@pytest.mark.parametrize("command", ["train", "sft", "compare"])
def test_a_new_adapter_on_an_adapter_is_refused_by_the_commands(tmp_path, folders, capsys, command):
    more = {"eval_dataset_name": str(folders / "pairs.jsonl")} if command == "compare" else {}
    named = {"model_name_or_path": str(folders / "adapter"), "use_peft": True, **more}
    assert run(folders, command, tmp_path / "run", **named) == 1
    message = capsys.readouterr().err
    assert "peft_config: expected None (use_peft: false)" in message
    assert "which is an adapter itself" in message
    assert not (tmp_path / "run" / "adapter_config.json").exists()


@pytest.mark.parametrize("kind", ["dpop", "sft"])
def test_a_new_adapter_on_an_adapter_is_refused_in_python(tmp_path, folders, tokenizer, kind):
    from dpop_trainer.settings.config import SFTConfig

    trainer, arguments = (DPOPTrainer, DPOPConfig) if kind == "dpop" else (SFTTrainer, SFTConfig)
    args = arguments(str(tmp_path / "run"), report_to="none", use_cpu=True)
    options = {"train_dataset": Dataset.from_list(token_pairs()), "processing_class": tokenizer}
    with pytest.raises(ValueError, match=r"peft_config: expected None .*which is an adapter itself.*dpop export"):
        trainer(str(folders / "adapter"), args=args, peft_config=LoraConfig(), **options)
    # transformers' own way of loading one leaves a model that is no peft model, with an adapter's layers in it
    for inside in (
        AutoModelForCausalLM.from_pretrained(folders / "adapter"),
        get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).get_base_model(),
    ):
        with pytest.raises(ValueError, match=r"model: expected a whole model or a peft model, got a LlamaForCausalLM"):
            trainer(inside, args=args, **options)


def test_an_adapter_on_an_adapter_is_refused(tmp_path, folders):
    settings = json.loads((folders / "adapter" / "adapter_config.json").read_text())
    for path in (folders / "adapter").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": str(folders / "adapter")})
    )
    with pytest.raises(ValueError, match=r"expected an adapter on a whole model.*is an adapter itself"):
        load_model(str(tmp_path))


def test_a_name_loads_the_adapter(folders):
    loaded = load_model(str(folders / "adapter")).eval()
    expected = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders / "base"), folders / "adapter"
    ).eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_eval_and_inspect_measure_the_adapter_and_its_start(tmp_path, folders, tokenizer):
    records = text_records(tokenizer)
    of_base, of_adapter = by_hand(folders, records)
    assert run(folders, "train", tmp_path / "run", model_name_or_path=str(folders / "adapter")) == 0
    argv = ["--models", str(folders / "base"), str(folders / "adapter"), "--pairs", str(folders / "pairs.jsonl")]
    assert main(["eval", *argv, "--out", str(tmp_path / "eval"), "--device", "cpu"]) == 0
    rows = json.loads((tmp_path / "eval" / "results.json").read_text())["rows"]
    (shift,) = [row for row in rows if row["metric"] == "chosen Δ"]
    assert shift["figures"]["adapter"]["value"] == pytest.approx(of_adapter - of_base, abs=1e-4)
    assert main(["inspect", str(tmp_path / "run"), "--pairs", str(folders / "pairs.jsonl")]) == 0
    inspected = json.loads((tmp_path / "run" / "inspect.json").read_text())
    trained = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders / "base"), tmp_path / "run"
    ).requires_grad_(False)
    after = sum(answer_logp(trained, r["prompt_ids"], r["chosen_ids"]).item() for r in records) / len(records)
    assert inspected["chosen_logratio"] == pytest.approx(after - of_adapter, abs=1e-4)


def test_plan_knows_an_adapter(folders, capsys):
    argv = ["plan", "--device", "h100-80gb", "--prompt_tokens", "8", "--answer_tokens", "8", "--json", "true"]
    argv += ["--search", "false"]
    argv += ["--gradient_checkpointing", "false", "--memory", "8"]
    figures = []
    for more in (["--model", str(folders / "adapter")], ["--model", str(folders / "base"), "--use_peft", "true"]):
        lora = ["--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"] if "--use_peft" in more else []
        assert main([*argv, *more, *lora]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    for part in ("model", "asked"):
        assert figures[0][part] == figures[1][part]  # the same adapter, named and new
    assert main([*argv, "--model", str(folders / "adapter"), "--use_peft", "true"]) == 1
    assert "which is an adapter itself" in capsys.readouterr().err
