"""Data of images is refused by name, whichever command reads it and by whatever road; it never trains as text."""

import json

import datasets.config
import pytest
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer, SFTConfig, SFTTrainer
from dpop_trainer.cli import main
from tiny import text_pairs, tiny_llama, word_tokenizer

COLUMN = "expected pairs of text, got the column 'images'. Vision-language data is not trained on here"
PART = "expected a part of type text, got type 'image'. Only text can be trained on"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def model(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def with_column():
    return [{**pair, "images": ["a.png"]} for pair in text_pairs(2)]


def with_parts():
    asked = {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "w1"}]}
    answers = {name: [{"role": "assistant", "content": "w2"}] for name in ("chosen", "rejected")}
    return [{"prompt": [asked], **answers}] * 2


def write(path, records):
    if path.suffix == ".parquet":
        Dataset.from_list(records).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("command", ["train", "sft"])
@pytest.mark.parametrize(("records", "message"), [(with_column, COLUMN), (with_parts, PART)])
def test_commands(tmp_path, capsys, model, command, streaming, suffix, records, message):
    data = write(tmp_path / f"pairs{suffix}", records())
    argv = [command, "--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(tmp_path / "run")]
    argv += ["--max_steps", "1", "--use_cpu", "true", "--report_to", "none", "--streaming", streaming]
    if records is with_parts:
        argv += ["--chat_template_path", "chatml"]
    assert main(argv) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(("records", "message"), [(with_column, COLUMN), (with_parts, PART)])
def test_doctor(tmp_path, capsys, records, message):
    data = write(tmp_path / "pairs.jsonl", records())
    assert main(["pairs", "inspect", data, "--out", str(tmp_path / "report")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("trainer", "config"), [(DPOPTrainer, DPOPConfig), (SFTTrainer, SFTConfig)])
def test_python(tmp_path, trainer, config, streamed):
    dataset = Dataset.from_list(with_column())
    args = config(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    data = dataset.to_iterable_dataset() if streamed else dataset
    with pytest.raises(ValueError, match="expected pairs of text, got the column 'images'"):
        trainer(tiny_llama(), args=args, train_dataset=data, processing_class=word_tokenizer())


@pytest.mark.parametrize("column", ["image", "images", "video", "videos", "audio", "audios", "pixel_values"])
def test_every_column_that_holds_no_text(tmp_path, capsys, column):
    data = write(tmp_path / "pairs.jsonl", [{**pair, column: "x"} for pair in text_pairs(2)])
    assert main(["pairs", "inspect", data, "--out", str(tmp_path / "report")]) == 1
    assert f"{data}: expected pairs of text, got the column '{column}'" in capsys.readouterr().err
