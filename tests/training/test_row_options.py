"""Options that go by a row of the batch: right in every layout, or refused where a row is no sequence."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from dpop_trainer import DPOPConfig
from dpop_trainer.batches.choose_layout import flat_obstacle
from dpop_trainer.settings.config import SFTConfig
from dpop_trainer.training.sft import SFTTrainer
from tiny import tiny_llama, token_pairs, word_tokenizer
from trainers import config, logged, trainer

LAYOUTS = ("rows", "tree", "packed", "flat")
ALPHA = 5.0


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def noise_of(run):
    """What is added to the embeddings of the first training batch -> noise [R, T, H]."""
    found = []

    def note(module, args, output):
        if module.training:
            found.append((output - module.weight[args[0]]).detach())

    embeddings = run.model.get_input_embeddings()
    begin = run.begin_training

    def begin_training():  # the hook follows NEFTune's own
        embeddings.register_forward_hook(note)
        begin()

    run.begin_training = begin_training
    run.train()
    return found[0]


def test_neftune_s_noise_is_that_of_a_row(tmp_path, tokenizer, caplog):
    """Uniform within alpha / sqrt(T H), so that its variance is a third of that squared."""
    run = trainer(tmp_path, tokenizer, max_steps=1, neftune_noise_alpha=ALPHA, per_device_train_batch_size=5)
    assert run.data_collator.layout == "rows"
    assert "two rows per pair, not a tree: neftune_noise_alpha=5.0, and NEFTune's noise is divided" in caplog.text
    noise = noise_of(run)
    records = token_pairs()
    length = max(len(pair["prompt_ids"]) + len(pair["chosen_ids"]) for pair in records)
    assert noise.shape == (2 * len(records), length, 32)
    bound = ALPHA / math.sqrt(length * 32)
    assert noise.abs().max() <= bound * (1 + 1e-5)
    # of n squares of such numbers the mean has the standard error bound² · sqrt(4 / 45 / n): five of them
    error = 5 * bound**2 * math.sqrt(4 / 45 / noise.numel())
    assert noise.square().mean().item() == pytest.approx(bound**2 / 3, abs=error)
    assert "NEFTune's noise is on the policy's embeddings (neftune_noise_alpha=5)" in caplog.text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neftune_is_refused_where_a_row_is_no_sequence(tmp_path, layout):
    if layout == "rows":
        assert config(tmp_path, layout=layout, neftune_noise_alpha=ALPHA).layout == "rows"
        return
    with pytest.raises(ValueError, match=f"layout: expected 'rows' or 'auto' with neftune_noise_alpha=5.0.*{layout}"):
        config(tmp_path, layout=layout, neftune_noise_alpha=ALPHA)
    assert config(tmp_path, layout=layout, neftune_noise_alpha=0.0).layout == layout  # no noise


def test_neftune_and_grouping_by_prompt_contradict_each_other(tmp_path):
    with pytest.raises(ValueError, match="group_by_prompt: expected False with neftune_noise_alpha"):
        config(tmp_path, max_tokens_per_batch=64, group_by_prompt=True, neftune_noise_alpha=ALPHA)


@pytest.mark.parametrize("counted", ["all", "non_padding"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_seen_are_those_of_whole_sequences(tmp_path, tokenizer, layout, counted):
    run = trainer(tmp_path, tokenizer, max_steps=1, layout=layout, include_num_input_tokens_seen=counted)
    run.train()
    lengths = [
        2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in token_pairs()
    ]
    assert run.state.num_input_tokens_seen == sum(lengths)
    assert logged(run, "num_tokens")[-1] == sum(lengths)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_attention_that_drops_is_not_run_flat_where_it_could_not(monkeypatch, device):
    model = tiny_llama()
    monkeypatch.setattr("dpop_trainer.batches.choose_layout._device", lambda model: torch.device(device))
    assert flat_obstacle(model) is None
    model.model.layers[1].self_attn.attention_dropout = 0.25
    expected = "flat rows' attention drops nothing, and model.layers.1.self_attn.attention_dropout is 0.25"
    obstacle = flat_obstacle(model)
    assert (obstacle or "").startswith(expected) == (device == "cuda")


def test_smoothing_of_tokens_is_refused_with_our_name():
    for config_class in (DPOPConfig, SFTConfig):
        with pytest.raises(ValueError, match=r"label_smoothing_factor: expected 0.0, got 0.1. .* label_smoothing, of"):
            config_class("out", label_smoothing_factor=0.1, use_cpu=True)
    assert DPOPConfig("out", label_smoothing=0.1, loss_type="dpo", use_cpu=True).label_smoothing == 0.1


@pytest.mark.parametrize(
    "option",
    [
        {"include_for_metrics": ["inputs"]},
        {"prediction_loss_only": True},
        {"eval_accumulation_steps": 4},
        {"eval_do_concat_batches": False},
        {"eval_use_gather_object": True},
        {"label_names": ["labels"]},
        {"average_tokens_across_devices": False},
        {"do_predict": True},
        {"dataloader_drop_last": True, "max_tokens_per_batch": 64},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_changes_nothing_is_told(tmp_path, option, caplog):
    with caplog.at_level(logging.WARNING):
        config(tmp_path)
        assert "has no effect" not in caplog.text
        config(tmp_path, **option)
    name, value = next(iter(option.items()))
    assert f"{name}={value!r} has no effect: " in caplog.text


def test_supervised_rows_take_neftune(tmp_path, tokenizer):
    """Its rows are sequences, whatever else."""
    settings = SFTConfig(str(tmp_path), max_steps=1, neftune_noise_alpha=ALPHA, use_cpu=True, report_to="none")
    data = Dataset.from_list([{"prompt": "w1 w2", "completion": " w3 w4"}] * 2)
    noise = noise_of(SFTTrainer(tiny_llama(), settings, data, processing_class=tokenizer))
    assert 0 < noise.abs().max() <= ALPHA / math.sqrt(noise.shape[1] * 32) * (1 + 1e-5)
