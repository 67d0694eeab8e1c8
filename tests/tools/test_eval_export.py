"""`dpop export`: the merged model is the run, from every kind of base; the card says what the records say."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from dpop_trainer.cli import main
from dpop_trainer.models.trained import load_trained
from dpop_trainer.run_folder import files as files_module
from dpop_trainer.tools.delivery import export as export_module
from dpop_trainer.tools.delivery.card import base_license, model_card
from peft import LoraConfig, get_peft_model
from rounding import TWO_ROADS_NATS, stored
from safetensors.torch import load_file
from tiny import text_pairs, tiny_llama, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

IDS = torch.tensor([[1, 5, 6, 7, 40, 3, 9]])
TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }}{% endfor %}"


def save_base(folder, *, tied=False, dtype=torch.float32):
    model = tiny_llama()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.to(dtype).save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base, folder, **config):
    torch.manual_seed(3)
    model = load_trained(str(base), device="cpu").model
    config = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 32, **config}
    get_peft_model(model, LoraConfig(init_lora_weights=False, **config)).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A real LoRA run of three steps, with its records, beside its base and its pairs."""
    folder = tmp_path_factory.mktemp("trained")
    base = save_base(folder / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    argv = ["train", "--model_name_or_path", str(base), "--dataset_name", str(folder / "pairs.jsonl")]
    argv += ["--output_dir", str(folder / "run"), "--max_steps", "3", "--learning_rate", "0.05", "--use_peft", "true"]
    argv += ["--gradient_checkpointing", "false", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "true"]
    assert main([*argv, "--save_strategy", "steps", "--save_steps", "2"]) == 0
    return folder / "run"


def test_merged_model_is_the_run(trained_run, tmp_path, capsys):
    base = trained_run.parent / "base"
    assert main(["export", str(trained_run), "--out", str(tmp_path / "out")]) == 0
    expected = logits(load_trained(str(trained_run), device="cpu").model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=TWO_ROADS_NATS)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2  # the run learned
    assert not list((tmp_path / "out").glob("adapter*"))
    # exactly W + (alpha / r) B A, in fp64
    adapter = load_file(trained_run / "adapter_model.safetensors")
    weights, start = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    scale = 32 / 16
    torch.testing.assert_close(
        weights[f"{name}.weight"].double(), start[f"{name}.weight"].double() + scale * b @ a, rtol=0, atol=1e-6
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    run_what_the_card_shows(tmp_path / "out", max_new_tokens=3)
    assert "The adapter is merged into `base`, in float32. Reloaded, it gives" in capsys.readouterr().out


def run_what_the_card_shows(folder, max_new_tokens):
    shown = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert '"role": "user"' in shown
    shown = shown.replace(json.dumps(folder.name), json.dumps(str(folder)))
    exec(shown.replace("max_new_tokens=256", f"max_new_tokens={max_new_tokens}"), {})


def test_card_of_a_run_that_was_evaluated_tells_that_and_no_single_batch(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"loss_type": "dpop", "beta": 0.1}))
    lines = [
        {"step": 0, "train_data/num_pairs": 9, "train_data/skipped_bad": 0, "train_data/truncated_chosen": 2},
        {"step": 1, "loss": 0.7},
        {"step": 2, "loss": 21.7},
        {"step": 2, "eval_loss": 0.5, "eval_dpop/rejected_logratio": -1.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = model_card(tmp_path, name="x", base=None, license_id=None, merge_note="")
    assert "| loss | 0.5 |\n| rejected Δ, nats per answer | −1.25 |" in card
    assert "21.7" not in card
    assert "| train: num pairs | 9 |\n| train: truncated chosen | 2 |\n\n" in card
    assert 'pipeline("text-generation", model="x")\nprint(write("How many?", max_new_tokens=256)' in card


def test_card_is_the_runs_records(trained_run, tmp_path):
    base, pairs = trained_run.parent / "base", trained_run.parent / "pairs.jsonl"
    assert main(["inspect", str(trained_run), "--pairs", str(pairs)]) == 0
    argv = ["eval", "--models", str(base), str(trained_run), "--pairs", str(pairs)]
    assert main([*argv, "--out", str(tmp_path / "eval")]) == 0
    argv = ["export", str(trained_run), "--out", str(tmp_path / "out"), "--name", "Tiny-DPOP"]
    assert main([*argv, "--evaluation", str(tmp_path / "eval")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit"  # the base's
    assert "base_model" not in front  # which is no hub id
    assert "# Tiny-DPOP" in text
    for line in ("| dpop_lambda | 50.0 |", "| beta | 0.3 |", "| learning_rate | 0.05 |", "| train: num pairs | 6 |"):
        assert line in text
    shift = json.loads((trained_run / "inspect.json").read_text())
    assert f"chosen answers {shift['chosen_logratio']:+.2f} nats" in text
    assert "| pairs | chosen_likelier |" in text
    logged = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert f"| loss | {losses[0]:.4g} | {losses[-1]:.4g} |" in text
    config = yaml.safe_load((tmp_path / "out" / "training_config.yaml").read_text())
    assert config["dpop_lambda"] == 50.0
    # nothing of this machine is handed on
    assert not any(
        str(tmp_path) in (tmp_path / "out" / name).read_text() for name in ("README.md", "training_config.yaml")
    )


def test_card_of_a_mixture_names_every_source(tmp_path):
    config = {
        "dataset_mixture": [
            {"path": "org/pairs", "weight": 2, "revision": "v1"},
            json.dumps({"path": "/home/someone/own.jsonl", "num_pairs": 40}),
            "org/more",
        ],
        "eval_datasets": [{"path": "org/pairs", "split": "test", "label": "held out"}, "../b/other.parquet"],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    card = model_card(tmp_path, name="x", base=None, license_id=None, merge_note="")
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["org/pairs", "org/more"]
    section = card.partition("## Data\n\n")[2].partition("\n\n## Training")[0]
    page = "https://huggingface.co/datasets/org"
    assert section == (
        "Trained on 3 data sets:\n\n"
        f"- [org/pairs]({page}/pairs), revision v1, weight 2\n"
        "- `own.jsonl` (a local file), records 40\n"
        f"- [org/more]({page}/more)\n\n"
        "Evaluated in training on 2 data sets:\n\n"
        f"- [org/pairs]({page}/pairs), split test\n"
        "- `other.parquet` (a local file)"
    )


def test_checkpoint_of_a_run_finds_its_records(trained_run, tmp_path):
    assert main(["export", str(trained_run / "checkpoint-2"), "--out", str(tmp_path / "out")]) == 0
    assert "| dpop_lambda | 50.0 |" in (tmp_path / "out" / "README.md").read_text()


# peft warns that such merges go wrong; that ours do not is what is tested
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_adapter_on_a_tied_head_is_not_lost(tmp_path):
    base = save_base(tmp_path / "base", tied=True)
    run = save_adapter(base, tmp_path / "run", target_modules=["q_proj", "lm_head"])
    expected = logits(load_trained(str(run), device="cpu").model)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=TWO_ROADS_NATS)
    start = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(merged.get_input_embeddings().weight, start.get_input_embeddings().weight)


# peft warns that such merges go wrong; that ours do not is what is tested
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_head_trained_in_full_is_not_lost(tmp_path):
    base = save_base(tmp_path / "base", tied=True)
    model = get_peft_model(
        load_trained(str(base), device="cpu").model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(torch.randn(61, 32) * 0.1)
    model.save_pretrained(tmp_path / "run")
    expected = logits(load_trained(str(tmp_path / "run"), device="cpu").model)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=TWO_ROADS_NATS)


def test_sixteen_bit_base_keeps_its_dtype(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    run = save_adapter(base, tmp_path / "run", lora_alpha=4)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert main(["export", str(run), "--out", str(tmp_path / "fp32"), "--dtype", "float32"]) == 0
    exact = load_file(tmp_path / "fp32" / "model.safetensors")
    for name, weight in weights.items():
        # one rounding of the sum to 8 bits of mantissa, or one of the update before it
        assert (weight.double() - exact[name].double()).abs().max() <= stored(torch.bfloat16) * exact[name].abs().max()


def test_run_on_a_4_bit_base_is_merged_into_full_precision(base, tmp_path):
    run = save_adapter(base, tmp_path / "run")
    (run / "config.yaml").write_text("load_in_4bit: true\nloss_type: [dpop]\n")
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--merge_into", "full"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(
        logits(merged), logits(load_trained(str(run), device="cpu").model), rtol=0, atol=TWO_ROADS_NATS
    )
    assert "Training saw this base rounded to 4 bits" in (tmp_path / "out" / "README.md").read_text()


def test_base_stored_quantised_is_refused_and_another_taken(base, tmp_path, capsys):
    quantised = save_base(tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    run = save_adapter(quantised, tmp_path / "run")
    (quantised / "config.json").write_text(json.dumps(config))
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 1
    assert "stored quantised (bitsandbytes). Name the model that it was made from: --base" in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--base", str(base)]) == 0


def test_whole_model_is_handed_on_as_it_is(base, tmp_path):
    assert main(["export", str(base), "--out", str(tmp_path / "out"), "--license", "apache-2.0"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(merged), logits(AutoModelForCausalLM.from_pretrained(base)))
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    assert "No config.yaml was found with the run." in text
    assert "No evaluation is among the run's records." in text


def test_a_saved_model_that_answers_otherwise_is_not_accepted(base, tmp_path, monkeypatch, capsys):
    run = save_adapter(base, tmp_path / "run")
    other = tiny_llama(seed=1)
    monkeypatch.setattr(export_module, "load_model", lambda *args: other)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 1
    assert "expected the saved model to give the run's probabilities" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_that_was_killed_is_made_anew(base, tmp_path, monkeypatch):
    """While it saves, and in the middle of putting its files into their places."""
    out = tmp_path / "out"
    (out / ".incomplete").mkdir(parents=True)
    (out / ".incomplete" / "config.json").write_text("{")
    (out / "model.safetensors").write_bytes(b"moved already")
    (out / "own.txt").write_text("kept")
    assert main(["export", str(base), "--out", str(out)]) == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(tiny_llama()))
    assert not (out / ".incomplete").exists()
    assert (out / "own.txt").read_text() == "kept"
    moved, replace = [], files_module.os.replace
    monkeypatch.setattr(files_module.os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    assert main(["export", str(base), "--out", str(tmp_path / "other")]) == 0
    assert moved[-1] == "config.json"  # which says that the folder is taken


def test_records_that_rotted_are_told_before_a_weight_is_loaded(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_module, "merge_run", None)
    for name, content in (
        ("inspect.json", "{"),
        ("inspect.json", '{"num_pairs": "many"}'),
        ("inspect.json", "[]"),
        ("config.yaml", "a: ["),
        ("config.yaml", "[1]"),
    ):
        (base / name).write_text(content)
        assert main(["export", str(base), "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert f"{base}" in error
        assert "expected" in error
        assert "fault" not in error
        (base / name).unlink()
    (tmp_path / "results.json").write_text('{"models": 3}')
    evaluation = ["--evaluation", str(tmp_path / "results.json")]
    assert main(["export", str(base), "--out", str(tmp_path / "out"), *evaluation]) == 1
    assert f"in {base} and {tmp_path / 'results.json'}, got some that cannot be read (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_pushed_unless_asked(base, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            calls.append(("create_repo", repo_id, kwargs))
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            calls.append(("upload_folder", repo_id, sorted(file.name for file in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert main(["export", str(base), "--out", str(tmp_path / "a")]) == 0
    assert calls == []
    assert main(["export", str(base), "--out", str(tmp_path / "b"), "--push_to_hub", "me/mine", "--private"]) == 0
    assert calls[0] == ("create_repo", "me/mine", {"private": True, "exist_ok": True})
    assert calls[1][:2] == ("upload_folder", "me/mine")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(
        calls[1][2]
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere/at/all", "--out", "{out}"], "expected an existing folder or a hub id, found nothing"),
        (["{base}", "--out", "{base}"], "out: expected a folder without a model, found one"),
        (["{base}", "--out", "{out}", "--base", "x"], "base: expected none for"),
        (["{base}", "--out", "{out}", "--evaluation", "none.json"], "evaluation: expected results.json"),
    ],
)
def test_bad_usage_is_named(argv, message, base, tmp_path, capsys):
    argv = [part.format(base=base, out=tmp_path / "out") for part in argv]
    assert main(["export", *argv]) == 1
    assert message in capsys.readouterr().err


def test_licence_of_a_base(tmp_path):
    assert base_license(None) is None
    assert base_license(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("no front matter")
    assert base_license(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: llama2\ntags: [a]\n---\ntext")
    assert base_license(str(tmp_path)) == "llama2"
