"""The last lines of a script: the model's card by TRL's arguments, and the push to the hub, whose API is a stand-in."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.trainer
from datasets import Dataset
from dpop_trainer import SFTConfig, SFTTrainer
from dpop_trainer.training.run_card import write_run_card
from huggingface_hub import ModelCard
from peft import LoraConfig
from tiny import text_pairs, tiny_llama, word_tokenizer
from trainers import trainer as new_trainer


@pytest.fixture
def pushed(monkeypatch):
    """Files of each upload, by repository."""
    uploads = []

    class Api:
        def create_repo(self, name, **kwargs):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            uploads.append((repo_id, ModelCard.load(f"{folder_path}/README.md")))

    monkeypatch.setattr(transformers.trainer, "hf_api", Api)
    return uploads


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")])
def test_the_last_line_of_trls_script(tmp_path, pushed, peft_config):
    trainer = new_trainer(
        tmp_path, word_tokenizer(), peft_config=peft_config, max_steps=1, loss_type=["dpop", "sft"], loss_weights=[1, 1]
    )
    trainer.train()
    trainer.push_to_hub(dataset_name="me/pairs")
    ((repository, card),) = pushed
    assert repository == "me/run"
    assert card.data.datasets == ["me/pairs"]
    assert "the me/pairs dataset" in card.text
    assert {"dpop-kernels", "dpop", "sft"} <= set(card.data.tags)
    assert trainer.model.model_tags == ["dpop-kernels", "dpop", "sft"]


def test_a_card_by_hand(tmp_path):
    trainer = new_trainer(tmp_path, word_tokenizer())
    trainer.create_model_card("mine", ["me/a", "me/b"], "tiny", license="mit")  # TRL's order, transformers' names
    card = ModelCard.load(trainer.args.output_dir + "/README.md")
    assert "# mine" in card.text
    assert (card.data.datasets, card.data.license) == (["me/a", "me/b"], "mit")
    assert {"tiny", "dpop-kernels", "dpop"} <= set(card.data.tags)


def test_a_card_of_data_without_a_name_names_none(tmp_path):
    trainer = SFTTrainer(
        tiny_llama(),
        SFTConfig(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True),
        Dataset.from_list(text_pairs(2)),
        processing_class=word_tokenizer(),
    )
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets is None
    assert {"dpop-kernels", "sft"} <= set(card.data.tags)


def test_a_readme_by_hand_is_kept(tmp_path):
    trainer = new_trainer(tmp_path, word_tokenizer())
    readme = Path(trainer.args.output_dir) / "README.md"
    trainer.save_model()
    assert "All weights after 0 steps, trained with dpop-kernels." in readme.read_text()
    assert "| dpop_lambda | 50.0 |" in readme.read_text()
    readme.write_text("mine")
    trainer.save_model()
    assert readme.read_text() == "mine"


def test_names_in_a_run_s_readme_are_shown_as_they_are(tmp_path):
    folder = tmp_path / "a`<b>"
    folder.mkdir()
    settings = {"dataset_name": "p`<i>.jsonl", "loss_type": ["dpo", "sft|<u>"]}
    write_run_card(folder, base="x`y", tags=[], run_config=settings, step=3)
    text = (folder / "README.md").read_text()
    assert "\n# a\\`&lt;b&gt;\n" in text
    assert "All weights of ``x`y`` after 3 steps on ``p`<i>.jsonl``, trained" in text
    assert "| loss_type | dpo, sft\\|&lt;u&gt; |" in text
