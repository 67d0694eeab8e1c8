"""KTO on single answers: TRL's script with the import changed gives TRL's log; batches by hand; bad input named."""

import pytest
import torch
from datasets import Dataset
from dpop_trainer import KTOConfig, KTOTrainer
from dpop_trainer.training.kto import UnpairedCollator
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, word_tokenizer
from transformers import AutoModelForCausalLM
from trl import KTOConfig as TRLKTOConfig
from trl import KTOTrainer as TRLKTOTrainer

NUM_STEPS = 10
MACHINE = ("_runtime", "_per_second", "total_flos")  # how this machine is, not what a run computes
# a mean over the micro-batches' means there, over answers or tokens here: the same where there is one
OF_ONE_BATCH = ("rewards/", "logps/", "logits/", "entropy")
OURS = ("tokens/", "memory/", "train_data/", "eval_data/")  # logged here beside TRL's


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("kto") / "tiny-llama"
    tiny_llama().save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return str(path)


def answers(num_records=12):
    """Single answers of one to four words; two of three are liked."""
    return Dataset.from_list(
        [
            {
                "prompt": f"w{i} w{i + 1}",
                "completion": " " + " ".join(f"w{i + j}" for j in range(2, 3 + i % 4)),
                "label": i % 3 != 0,
            }
            for i in range(num_records)
        ]
    )


def trained(classes, model, folder, *, ref_model=None, peft_config=None, **more):
    config, trainer_class = classes
    args = config(
        output_dir=str(folder),
        **{
            "max_steps": NUM_STEPS,
            "per_device_train_batch_size": 3,
            "per_device_eval_batch_size": 3,  # TRL's KL term of an evaluation goes by the size of training's batches
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **more,
        },
    )
    trainer = trainer_class(
        model,
        ref_model=ref_model,
        args=args,
        train_dataset=answers(),
        eval_dataset=answers(3),
        peft_config=peft_config,
    )
    trainer.train()
    return [
        {key: value for key, value in line.items() if not key.endswith(MACHINE) and not key.startswith(OURS)}
        for line in trainer.state.log_history
    ]


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
RUNS = {
    "all weights": {},
    "LoRA, accumulation": {"peft_config": LORA, "gradient_accumulation_steps": 2},
    "weights": {"desirable_weight": 0.6, "undesirable_weight": 1.2, "beta": 0.3},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    "truncation": {"max_length": 4},
    "an adapter that was trained before": {"learning_rate": 0.05, "optim": "sgd"},
}


def trained_adapter(model_path):
    """On a base in memory, with an effect from the start."""
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", RUNS)
def test_the_log_is_trls(name, model_path, tmp_path):
    """Against the base under an adapter, an adapter as it was, a copy, or a model that is another from the start."""
    has_own_reference = name in ("weights", "truncation")
    more = RUNS[name] | ({"ref_model": tiny_llama(seed=5)} if has_own_reference else {})

    def model():
        return trained_adapter(model_path) if "adapter" in name else model_path

    theirs = trained((TRLKTOConfig, TRLKTOTrainer), model(), tmp_path / "theirs", **more)
    ours = trained((KTOConfig, KTOTrainer), model(), tmp_path / "ours", **more)
    assert len(ours) == len(theirs)
    for our_line, their_line in zip(ours, theirs, strict=True):
        assert set(their_line) <= set(our_line)
        for key, value in their_line.items():
            if "accumulation" in name and key.startswith(OF_ONE_BATCH):
                continue
            assert our_line[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key
    assert max(line.get("kl", 0.0) for line in theirs) > 0 or name == "apo_zero_unpaired"


def test_answers_change_places_within_the_batch():
    """Prompt i with the answer before it, the first with the last one's, cut to the room that is left."""
    records = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6], "label": True, "pair_id": 0},
        {"prompt_ids": [7, 8], "chosen_ids": [9], "label": False, "pair_id": 1},
        {"prompt_ids": [10], "chosen_ids": [11, 12, 13, 14], "label": False, "pair_id": 2},
    ]
    batch = UnpairedCollator(0, with_mismatched=True, max_length=5)(records)
    assert batch.labels.tolist() == [True, False, False]
    assert batch.mismatched.input_ids.tolist() == [[1, 2, 3, 11, 12], [7, 8, 4, 5, 6], [10, 9, 0, 0, 0]]
    assert batch.mismatched.target_ids.tolist() == [11, 12, 4, 5, 6, 9]
    assert batch.mismatched.cu_seqlens.tolist() == [0, 2, 5, 6]
    assert batch.to("meta").mismatched.input_ids.device == torch.device("meta")
    assert "mismatched" not in UnpairedCollator(0, with_mismatched=False)(records)


def test_labels_stay_with_their_records_where_some_are_left_out(model_path, tmp_path):
    records = answers(6).to_list()
    records[1]["prompt"] = None
    args = KTOConfig(str(tmp_path), use_cpu=True, bf16=False, on_bad_record="skip", max_length=6, report_to="none")
    trainer = KTOTrainer(model_path, None, args, train_dataset=Dataset.from_list(records))
    assert trainer.train_dataset["pair_id"] == [0, 2, 3, 4, 5]
    assert trainer.train_dataset["label"] == [records[i]["label"] for i in (0, 2, 3, 4, 5)]


def test_the_kl_term_is_of_all_processes(model_path, tmp_path, monkeypatch):
    """Another process brings two differences, 300 nats in all; a batch that is there to keep step brings nothing."""
    args = KTOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = KTOTrainer(model_path, tiny_llama(seed=5), args, train_dataset=answers(4))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])

    def sums(model):
        rows = batch.mismatched
        with torch.no_grad():
            log_probs = model(rows.input_ids, attention_mask=rows.attention_mask).logits.flatten(0, 1).log_softmax(-1)
        return log_probs[rows.score_positions, rows.target_ids].sum()

    own = float(sums(trainer.model) - sums(trainer.ref_model))
    assert float(trainer._kl(trainer.model, batch)) == pytest.approx(max(own / 3, 0.0), abs=1e-4)
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda sums, reduction: sums + torch.tensor([300.0, 2.0]))
    assert float(trainer._kl(trainer.model, batch)) == pytest.approx((own + 300) / 5, abs=1e-4)
    batch["is_filler"] = True
    assert float(trainer._kl(trainer.model, batch)) == pytest.approx(150, rel=1e-6)


def test_a_run_that_stops_and_resumes_is_the_whole_one(model_path, tmp_path):
    classes, more = (KTOConfig, KTOTrainer), {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
    whole = trained(classes, model_path, tmp_path, max_steps=4, **more)
    args = KTOConfig(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=5e-3,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    again = KTOTrainer(model_path, None, args, train_dataset=answers())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = [line for line in again.state.log_history if "loss" in line]
    for line, expected in zip(resumed, (line for line in whole if "loss" in line), strict=True):
        assert (line["loss"], line["grad_norm"], line["kl"]) == (
            expected["loss"],
            expected["grad_norm"],
            expected["kl"],
        )


def test_another_set_is_evaluated(model_path, tmp_path):
    args = KTOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    trainer = KTOTrainer(model_path, None, args, train_dataset=answers(4))
    metrics = trainer.evaluate({"first": answers(4), "second": answers(5)})
    # the policy is its own reference: Δ = 0 = z0, and σ(0) is a half
    assert metrics["eval_first_loss"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["eval_second_rewards/chosen"] == pytest.approx(0.0, abs=1e-5)


def test_both_sides_are_to_weigh_the_same(model_path, tmp_path, caplog):
    args = KTOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    KTOTrainer(model_path, None, args, train_dataset=answers(12))
    # 8 liked, 4 not: 4 / 8 balances them
    assert "8 desirable and 4 undesirable answers weigh as 8 to 4" in caplog.text
    assert "0.5 balances them" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.rename_column("completion", "answer"), "train_dataset: expected the columns prompt, comple"),
        (lambda data: data.add_column("rejected", [" w1"] * 4), "Pairs of chosen and rejected answers are DPOPTrainer"),
        (lambda data: data.remove_columns("label").add_column("label", [1, 0, 2, 1]), "got 2 in record 2"),
        (lambda data: data.to_iterable_dataset(), "train_dataset: expected a Dataset, got IterableDataset"),
    ],
)
def test_other_data_are_named(change, message, tmp_path):
    args = KTOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match=message):
        KTOTrainer("nowhere", None, args, train_dataset=change(answers(4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type: expected one of kto, apo_zero_unpaired, got 'dpo'"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: expected 'sequential' or 'random'"),
        ({"beta": -1.0}, "beta: expected a finite value > 0, got -1.0"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size: expected at least 2 with the loss 'kto'"),
    ],
)
def test_other_options_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        KTOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("name", ["data_collator", "compute_metrics"])
def test_what_cannot_be_given_is_named(name, tmp_path):
    args = KTOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=f"{name}: expected None, got list"):
        KTOTrainer("nowhere", None, args, **{name: []})
    with pytest.raises(ValueError, match="ref_model: expected a model that is loaded, or None, got 'nowhere'"):
        KTOTrainer("nowhere", "nowhere", args)
