"""Models with a table of positions: how many they have is known, and longer pairs are named before anything is run."""

import json

import datasets.config
import pytest
import torch
import transformers
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer, SFTConfig, SFTTrainer
from dpop_trainer.measure.pairs_under_model import pair_token_logps
from dpop_trainer.models.positions import learned_positions, usable_positions
from dpop_trainer.tools.doctor.examine import examine_pairs
from tiny import VOCAB_SIZE, word_tokenizer
from transformers import AutoModelForCausalLM

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": VOCAB_SIZE}
FAMILIES = {
    "GPT2Config": {"n_positions": 16},
    "OPTConfig": {"max_position_embeddings": 16, "ffn_dim": 32, "word_embed_proj_dim": 32},  # begins two rows down
    "BioGptConfig": {"max_position_embeddings": 16},  # likewise
    "GPTNeoConfig": {
        "max_position_embeddings": 16,
        "num_layers": 1,
        "num_heads": 4,
        "attention_types": [[["global"], 1]],
    },
    "GPTBigCodeConfig": {"n_positions": 16},
    "LlamaConfig": {"max_position_embeddings": 16, "num_key_value_heads": 2},
    "BloomConfig": {},
}
NO_TABLE = ("LlamaConfig", "BloomConfig")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def build(name, **more):
    torch.manual_seed(0)
    sizes = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **SIZES, **FAMILIES[name], **more}
    if name == "GPTNeoConfig":
        del sizes["num_hidden_layers"], sizes["num_attention_heads"]
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes)).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_known_positions_are_those_that_run(name):
    model = build(name)
    limit = learned_positions(model)
    assert limit == (None if name in NO_TABLE else 16)
    ids = torch.ones(1, 17, dtype=torch.int64)
    with torch.no_grad():
        model(ids[:, :16])
        if limit is None:
            model(ids)
        else:
            with pytest.raises(IndexError):
                model(ids)


def test_padding_takes_positions_too():
    assert usable_positions(build("GPT2Config"), 5) == 15
    assert usable_positions(build("GPT2Config"), None) == 16


def pairs(length=17):
    """Three pairs; prompt and longer answer of the second have so many tokens, with its EOS."""
    words = " w5" * (length - 5)
    return [
        {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"},
        {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": f"{words} w6 w7"},
        {"prompt": "w1 w2", "chosen": " w4", "rejected": " w3"},
    ]


def options(tmp_path, **more):
    return {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 1,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "per_device_train_batch_size": 1,
        **more,
    }


TOO_LONG = (
    "record 1: prompt_ids: expected at most 16 tokens with the longer answer, for as many positions has the model "
    "learned, got 17. Set max_length to 16 or less."
)


@pytest.mark.parametrize("layout", ["rows", "tree", "packed", "auto"])
def test_longer_pair_is_named_when_the_trainer_is_built(tmp_path, layout):
    args = DPOPConfig(**options(tmp_path, layout=layout))
    model, dataset = build("GPT2Config"), Dataset.from_list(pairs())
    with pytest.raises(ValueError, match="expected 3 usable records, got 1") as raised:
        DPOPTrainer(model, args=args, train_dataset=dataset, processing_class=word_tokenizer())
    assert TOO_LONG in str(raised.value)


def test_remedies_train(tmp_path):
    """What max_length cuts and what is left out; what fits to the last position is trained on."""
    for more, records in (({"max_length": 16}, pairs()), ({"on_bad_record": "skip"}, pairs()), ({}, pairs(16))):
        args = DPOPConfig(**options(tmp_path, per_device_train_batch_size=3, layout="rows", **more))
        dataset = Dataset.from_list(records)
        trainer = DPOPTrainer(build("GPT2Config"), args=args, train_dataset=dataset, processing_class=word_tokenizer())
        assert len(trainer.train_dataset) == (2 if "on_bad_record" in more else 3)
    trainer.train()


def test_supervised_and_streamed(tmp_path):
    dataset = Dataset.from_list(pairs())
    for data in (dataset, dataset.to_iterable_dataset()):
        args = SFTConfig(**options(tmp_path))
        chosen_too_long = data.map(lambda record: {"chosen": record["rejected"]})
        with pytest.raises(ValueError, match=r"record 1: prompt_ids: expected at most 16 tokens"):
            SFTTrainer(
                build("GPT2Config"), args=args, train_dataset=chosen_too_long, processing_class=word_tokenizer()
            ).train()


def test_reference_with_fewer_positions_is_named(tmp_path):
    args = DPOPConfig(**options(tmp_path))
    with pytest.raises(ValueError, match=r"ref_model: expected pairs of at most 16 tokens, .* got pair 1 with 17 \(1 "):
        DPOPTrainer(
            build("GPT2Config", n_positions=32),
            ref_model=build("GPT2Config"),
            args=args,
            train_dataset=Dataset.from_list(pairs()),
            processing_class=word_tokenizer(),
        )


def test_measuring_names_the_pair(tmp_path):
    tokenised = Dataset.from_list(
        [
            {"prompt_ids": [3], "chosen_ids": [4] * 15, "rejected_ids": [5] * length, "pair_id": length}
            for length in (9, 16)
        ]
    )
    with pytest.raises(ValueError, match=r"expected pairs of at most 16 tokens, .* got pair 16 with 17"):
        pair_token_logps(build("GPT2Config"), tokenised, pad_token_id=0)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in pairs()))
    with pytest.raises(ValueError, match="got pair 1 with 17"):
        examine_pairs(str(path), tokenizer=word_tokenizer(), model=build("GPT2Config"), show_progress=False)
