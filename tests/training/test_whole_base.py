"""A base is loaded whole or not at all: transformers draws at random what its files lack."""

import json

import pytest
from dpop_trainer.cli import main
from dpop_trainer.models.loading import load_model
from safetensors.torch import load_file, save_file
from tiny import text_pairs, tiny_llama, word_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def base(original, tmp_path):
    """A base in shards, and a function that changes one tensor's shard and the index alike."""
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    return tmp_path


def change(base, name, becomes):
    """`becomes` gets the tensor, and gives another or None for none."""
    index_path = base / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = base / index["weight_map"][name]
    tensors = load_file(shard)
    value = becomes(tensors.pop(name))
    if value is None:
        del index["weight_map"][name]
    else:
        tensors[name] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    index_path.write_text(json.dumps(index))


def test_a_base_that_lacks_a_tensor_is_not_trained_on(base, capsys):
    load_model(str(base))
    change(base, "model.layers.1.mlp.up_proj.weight", lambda tensor: None)
    with pytest.raises(ValueError, match=r"none that fits for model\.layers\.1\.mlp\.up_proj\.weight, which would"):
        load_model(str(base))
    (base / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs(4)))
    flags = ["--dataset_name", str(base / "pairs.jsonl"), "--output_dir", str(base / "run"), "--use_cpu", "true"]
    assert main(["train", "--model_name_or_path", str(base), *flags]) == 1
    assert "model: expected all weights of" in capsys.readouterr().err


def test_a_base_with_a_tensor_of_another_shape_is_refused(base):
    change(base, "lm_head.weight", lambda tensor: tensor[:-1].contiguous())
    with pytest.raises((ValueError, RuntimeError), match=r"lm_head\.weight|size mismatch|mismatched"):
        load_model(str(base))


def test_a_base_of_which_a_shard_is_gone_is_refused(base):
    next(base.glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"model: expected a hub id or a folder with a model"):
        load_model(str(base))
