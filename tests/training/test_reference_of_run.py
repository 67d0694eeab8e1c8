"""What a run is held against afterwards is what it was held against, for every kind of adapter: by two models loaded
by hand."""

import json

import pytest
import torch
from datasets import Dataset
from dpop_trainer import DPOPTrainer
from dpop_trainer.cli import main
from dpop_trainer.reference.of_run import reference_of_run
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import text_pairs, tiny_llama, word_tokenizer
from trainers import answer_logp, config
from transformers import AutoModelForCausalLM

TARGETS = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "lora": {},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "head": {"modules_to_save": ["lm_head"]},
    "head_and_embedding": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("of_run")
    tiny_llama().save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    return folder


def records():
    ids = word_tokenizer().get_vocab()
    return [
        ([ids[w] for w in pair["prompt"].split()], [*(ids[w] for w in pair["chosen"].split()), ids["<eos>"]])
        for pair in text_pairs()
    ]


def mean_chosen(model):
    model = model.eval().requires_grad_(False)
    logps = [answer_logp(model, prompt, chosen).item() for prompt, chosen in records()]
    return sum(logps) / len(logps)


def base_by_hand(folders):
    return AutoModelForCausalLM.from_pretrained(folders / "base")


def train(folders, out, model, **options):
    """A run from Python: its config.yaml names no model."""
    settings = {"max_steps": 4, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 2, "max_length": 9}
    trainer = DPOPTrainer(
        model,
        args=config(out, layout="rows", **settings),
        train_dataset=Dataset.from_list(text_pairs()),
        processing_class=word_tokenizer(),
        **options,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def inspect(folders, folder, *more):
    assert main(["inspect", str(folder), "--pairs", str(folders / "pairs.jsonl"), "--no_checkpoints", *more]) == 0
    return json.loads((folder / "inspect.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
# peft says that the embedding is among what it saves
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_inspect_s_reference_is_the_run_s(tmp_path, folders, kind):
    model = str(folders / "base")
    trainer = train(folders, tmp_path, model, peft_config=LoraConfig(**TARGETS, **KINDS[kind]))
    before = mean_chosen(base_by_hand(folders))  # what every one of these adapters begins at
    after = mean_chosen(PeftModel.from_pretrained(base_by_hand(folders), tmp_path / "run"))
    assert abs(after - before) > 0.5
    assert mean_chosen(trainer.model) == pytest.approx(after, abs=1e-4)  # what was trained is what was saved
    inspected = inspect(folders, tmp_path / "run")
    assert inspected["chosen_logratio"] == pytest.approx(after - before, abs=1e-4)
    middle = mean_chosen(PeftModel.from_pretrained(base_by_hand(folders), tmp_path / "run" / "checkpoint-2"))
    of_checkpoint = inspect(folders, tmp_path / "run" / "checkpoint-2")
    assert of_checkpoint["chosen_logratio"] == pytest.approx(middle - before, abs=1e-4)
    assert of_checkpoint["reference"] == inspected["reference"]


def test_an_adapter_trained_on_is_held_against_its_start(tmp_path, folders):
    torch.manual_seed(5)
    start = get_peft_model(base_by_hand(folders), LoraConfig(**TARGETS, lora_alpha=32, init_lora_weights=False))
    start.save_pretrained(tmp_path / "start")
    before = mean_chosen(PeftModel.from_pretrained(base_by_hand(folders), tmp_path / "start"))
    policy = PeftModel.from_pretrained(base_by_hand(folders), tmp_path / "start", is_trainable=True)
    train(folders, tmp_path, policy)
    after = mean_chosen(PeftModel.from_pretrained(base_by_hand(folders), tmp_path / "run"))
    assert abs(mean_chosen(base_by_hand(folders)) - before) > 0.5
    for folder, expected in (
        (tmp_path / "run", after - before),
        (
            tmp_path / "run" / "checkpoint-2",
            mean_chosen(PeftModel.from_pretrained(base_by_hand(folders), tmp_path / "run" / "checkpoint-2")) - before,
        ),
    ):
        inspected = inspect(folders, folder)
        assert inspected["reference"] == "the adapter as it was at the start"
        assert inspected["chosen_logratio"] == pytest.approx(expected, abs=1e-4)


def test_a_second_model_that_no_file_names_is_asked_for(tmp_path, folders, capsys):
    train(folders, tmp_path, str(folders / "base"), peft_config=LoraConfig(**TARGETS), ref_model=tiny_llama(seed=3))
    with pytest.raises(ValueError, match=r"it was a second model, which no file names. Pass --ref_model"):
        reference_of_run(str(tmp_path / "run"))
    assert inspect(folders, tmp_path / "run", "--ref_model", str(folders / "base"))["reference"] == str(
        folders / "base"
    )
