"""A base model in one GGUF file: the folder made of it has the file's weights, and stops where its template says."""

import json
import logging

import pytest
import torch
from dpop_trainer.cli import main
from dpop_trainer.models.gguf import folder_of_gguf
from dpop_trainer.models.loading import load_model
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

START, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUM_HEADS, NUM_KEY_HEADS = 4, 2


def _llama(vocab_size):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_KEY_HEADS,
            max_position_embeddings=128,
            initializer_range=0.2,
        )
    ).eval()


def _interleaved(weight, num_heads):
    """Rows of queries and keys as the format has them: the two halves that a rotation pairs stand side by side."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_gguf(path, eos):
    """A Llama with random weights and byte-level tokens, as llama.cpp's converter writes one -> the model."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "hi", START, END, TEXT_END]
    model = _llama(len(tokens))
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // NUM_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 3) + [3] * 3)
    writer.add_token_merges(["h i"])
    writer.add_bos_token_id(tokens.index(START))
    writer.add_eos_token_id(tokens.index(eos))
    writer.add_pad_token_id(tokens.index(TEXT_END))
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _interleaved(weight, NUM_HEADS if "q_proj" in name else NUM_KEY_HEADS)
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """The file, whose end of sequence is wrong as SmolLM2's is, and the model that is in it."""
    path = tmp_path_factory.mktemp("gguf") / "chat-f32.gguf"
    return path, _write_gguf(path, eos=START)


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
    _write_gguf(path, eos=START)
    with caplog.at_level(logging.WARNING, "dpop_trainer"):
        folder = folder_of_gguf(str(path))
    assert f"names {START!r} as its end of sequence" in caplog.text
    assert repr(END) in caplog.text
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == END
    assert (
        json.loads((tmp_path / "wrong-model/generation_config.json").read_text())["eos_token_id"]
        == tokenizer.eos_token_id
    )


def test_right_end_of_sequence_stays_without_a_word(tmp_path, caplog):
    path = tmp_path / "right.gguf"
    _write_gguf(path, eos=END)
    with caplog.at_level(logging.WARNING, "dpop_trainer"):
        folder = folder_of_gguf(str(path))
    assert not caplog.text
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
