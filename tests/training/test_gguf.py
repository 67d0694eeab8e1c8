"""A base model in one GGUF file: the folder made of it has the file's weights, and stops where its template says."""

import json
import logging

import pytest
import torch
from dpop_trainer.cli import main
from dpop_trainer.models.gguf import folder_of_gguf
from dpop_trainer.models.loading import load_model
from gguf_file import END, START, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """The file, whose end of sequence is wrong as SmolLM2's is, and the model that is in it."""
    path = tmp_path_factory.mktemp("gguf") / "chat-f32.gguf"
    return path, write_gguf(path, eos=START)


def test_folder_has_the_files_weights(chat_model):
    path, model = chat_model
    folder = folder_of_gguf(str(path))
    assert folder == str(path.with_name("chat-f32-model"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    assert not hasattr(loaded.config, "quantization_config")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=0)


def test_end_of_sequence_is_the_templates(tmp_path, caplog):
    path = tmp_path / "wrong.gguf"
    write_gguf(path, eos=START)
    with caplog.at_level(logging.WARNING, "dpop_trainer"):
        folder = folder_of_gguf(str(path))
    assert f"is read with {START!r} as its end of sequence" in caplog.text
    assert repr(END) in caplog.text
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == END
    assert (
        json.loads((tmp_path / "wrong-model/generation_config.json").read_text())["eos_token_id"]
        == tokenizer.eos_token_id
    )


def test_right_end_of_sequence_stays_without_a_word(tmp_path, caplog):
    """transformers 5.17 reads it as the beginning's: then it is mended as a wrong one is."""
    path = tmp_path / "right.gguf"
    write_gguf(path, eos=END)
    with caplog.at_level(logging.WARNING, "dpop_trainer"):
        folder = folder_of_gguf(str(path))
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name).eos_token
    assert bool(caplog.text) == (read != END)
    assert AutoTokenizer.from_pretrained(folder).eos_token == END


def test_made_once_and_anew_for_another_file(chat_model, capsys):
    path, _ = chat_model
    folder_of_gguf(str(path))
    capsys.readouterr()
    folder_of_gguf(str(path))
    assert not capsys.readouterr().out
    path.touch()
    folder_of_gguf(str(path))
    assert "once" in capsys.readouterr().out


def test_a_run_starts_from_the_file(chat_model, tmp_path):
    path, _ = chat_model
    turn = {"prompt": [{"role": "user", "content": "hi"}]}
    pair = {key: [{"role": "assistant", "content": text}] for key, text in (("chosen", "hi hi"), ("rejected", "hi"))}
    (tmp_path / "pairs.jsonl").write_text((json.dumps({**turn, **pair}) + "\n") * 2)
    out = tmp_path / "run"
    arguments = {
        "model_name_or_path": path,
        "dataset_name": tmp_path / "pairs.jsonl",
        "output_dir": out,
        "max_steps": 1,
        "use_peft": "true",
        "use_cpu": "true",
        "report_to": "none",
    }
    assert main(["train", *(text for key, value in arguments.items() for text in (f"--{key}", str(value)))]) == 0
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(path.with_name("chat-f32-model"))


def test_what_cannot_be_read_is_named(tmp_path, chat_model):
    path, _ = chat_model
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"expected a GGUF file with a model .*broken\.gguf"):
        folder_of_gguf(str(broken))
    assert sorted(file.name for file in tmp_path.iterdir() if "lock" not in file.name) == ["broken.gguf"]
    with pytest.raises(ValueError, match=r"got the file .*chat-f32-model"):
        load_model(str(path))


def test_a_folder_of_ones_own_is_not_replaced(tmp_path, chat_model):
    path = tmp_path / "own.gguf"
    path.write_bytes(chat_model[0].read_bytes())
    (tmp_path / "own-model").mkdir()
    with pytest.raises(ValueError, match=r"expected no folder .*own-model"):
        folder_of_gguf(str(path))
