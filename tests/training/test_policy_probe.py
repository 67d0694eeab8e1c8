"""What a policy gave when it was saved is written beside it, and an export that gives something else is refused."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from dpop_trainer import DPOPTrainer
from dpop_trainer.cli import main
from dpop_trainer.measure.policy_probe import PROBE_FILE, read_probe
from dpop_trainer.models import adapters
from dpop_trainer.settings.config import SFTConfig
from dpop_trainer.training.sft import SFTTrainer
from peft import LoraConfig, PeftModel
from tiny import tiny_llama, token_pairs, word_tokenizer
from trainers import config
from transformers import AutoModelForCausalLM

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def train(base, out, layout="rows", **options):
    args = config(out, layout=layout, max_steps=3, learning_rate=0.05, save_strategy="steps", save_steps=2)
    dataset = Dataset.from_list(token_pairs())
    trainer = DPOPTrainer(str(base), args=args, train_dataset=dataset, processing_class=word_tokenizer(), **options)
    trainer.train()
    trainer.save_model()
    return out / "run"


def by_hand(model, input_ids):
    """Log-probs of all tokens but the first, one row through the model, in fp64 from its logits on."""
    ids = torch.tensor([input_ids])
    with torch.no_grad():
        log_probs = model.eval()(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return log_probs[torch.arange(len(input_ids) - 1), ids[0, 1:]].tolist()


@pytest.mark.parametrize("layout", ["rows", "tree", "packed", "flat"])
def test_the_probe_is_what_the_saved_policy_gives(tmp_path, base, layout):
    if layout == "flat":
        pytest.importorskip("torch.nn.attention.flex_attention")
    run = train(base, tmp_path, layout, peft_config=LoraConfig(**LORA))
    for folder in (run, run / "checkpoint-2"):
        probe = read_probe(folder)
        saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        assert len(probe.input_ids) == 32
        assert not probe.is_rounded
        assert probe.logps == pytest.approx(by_hand(saved, probe.input_ids), abs=1e-4)
    assert read_probe(run).logps != pytest.approx(read_probe(run / "checkpoint-2").logps, abs=1e-2)
    listed = json.loads((run / "checkpoint-2" / "checkpoint.json").read_text())["files"]
    assert PROBE_FILE in listed


def test_the_probe_of_supervised_training(tmp_path, base):
    args = SFTConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, gradient_checkpointing=False)
    dataset = Dataset.from_list(token_pairs())
    trainer = SFTTrainer(str(base), args, train_dataset=dataset, processing_class=word_tokenizer())
    trainer.train()
    trainer.save_model()
    probe = read_probe(tmp_path)
    assert probe.logps == pytest.approx(
        by_hand(AutoModelForCausalLM.from_pretrained(tmp_path), probe.input_ids), abs=1e-4
    )


def test_an_export_is_held_against_what_was_trained(tmp_path, base, capsys):
    run = train(base, tmp_path, peft_config=LoraConfig(**LORA))
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "and the log-probs that the policy had when it was saved to" in capsys.readouterr().out
    probe = json.loads((run / PROBE_FILE).read_text())
    probe["logps"][5] += 0.01  # ten times what fp32's sums may differ by
    (run / PROBE_FILE).write_text(json.dumps(probe))
    assert main(["export", str(run), "--out", str(tmp_path / "other")]) == 1
    assert "what was saved is not what was trained" in capsys.readouterr().err
    assert not (tmp_path / "other" / "README.md").exists()
    Path(run / PROBE_FILE).unlink()
    assert main(["export", str(run), "--out", str(tmp_path / "unknown")]) == 0
    assert "of the policy as it trained, on these weights, nothing is recorded" in capsys.readouterr().out


def test_an_init_that_is_drawn_again_is_not_certified(tmp_path, base, monkeypatch, capsys):
    monkeypatch.setattr(adapters, "_UNREPEATED_INITS", {})  # as an adapter from elsewhere might come
    run = train(base, tmp_path, peft_config=LoraConfig(**LORA, init_lora_weights="pissa_niter_1"))
    torch.manual_seed(1234)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 1
    assert "what was saved is not what was trained" in capsys.readouterr().err
