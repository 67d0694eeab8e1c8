"""What a run says and leaves while it goes on: bad numbers, falling answers, metrics; and that it waits for nothing."""

import errno
import logging
import math
import os
import traceback

import pytest
import torch
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.training.non_finite import NonFiniteError, load_non_finite
from dpop_trainer.training.speed import TrainingClock
from dpop_trainer.training.watch import ChosenWatch
from peft import LoraConfig
from tiny import UNUSED_ID, tiny_llama, token_pairs, word_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback, TrainerState


def make_trainer(folder, model=None, *, records=None, eval_dataset=None, callbacks=None, peft_config=None, **overrides):
    settings = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **overrides,
    }
    return DPOPTrainer(
        model or tiny_llama(),
        args=DPOPConfig(**settings),
        train_dataset=Dataset.from_list(records or token_pairs(8)),
        eval_dataset=eval_dataset,
        processing_class=word_tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def with_a_bad_pair():
    """A model that gives NaN for one token, and eight pairs of which pair 3 has it."""
    model, records = tiny_llama(), token_pairs(8)
    model.model.embed_tokens.weight.data[UNUSED_ID] = float("nan")
    records[3]["prompt_ids"][0] = UNUSED_ID
    return model, records


def test_batch_with_a_nan_is_saved(tmp_path):
    model, records = with_a_bad_pair()
    run = make_trainer(tmp_path, model, records=records)
    with pytest.raises(NonFiniteError, match=r"in a log-prob or loss, pair ids \[3\].*nonfinite_step_") as raised:
        run.train()
    (folder,) = (tmp_path / "run").glob("nonfinite_step_*")
    assert str(folder) in str(raised.value)
    batches, report = load_non_finite(folder)
    assert report["step"] == int(folder.name.removeprefix("nonfinite_step_")) == run.state.global_step + 1
    (batch,) = batches  # of the step's two micro-batches, the one with the pair
    assert 3 in batch["pair_ids"].tolist()
    assert len(report["pairs"]) == 2
    (bad,) = [pair for pair in report["pairs"] if pair["is_bad"]]
    assert bad["pair_id"] == 3
    assert bad["chosen"] == word_tokenizer().decode(records[3]["chosen_ids"])
    assert (bad["chosen_logps"], bad["ref_chosen_logps"]) == ("nan", "nan")
    (good,) = [pair for pair in report["pairs"] if not pair["is_bad"]]
    assert math.isfinite(float(good["loss"]))
    # the saved batch shows the fault again
    scored = run.head.token_logps(
        model,
        batch["score_positions"],
        batch["target_ids"],
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
    )
    assert scored.isnan().any()


def test_gradient_overflow_saves_all_of_the_step(tmp_path):
    model = tiny_llama()
    model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    run = make_trainer(tmp_path, model)
    with pytest.raises(NonFiniteError, match="in the gradient norm, pair ids"):
        run.train()
    batches, report = load_non_finite(tmp_path / "run" / "nonfinite_step_1")
    assert len(batches) == 2
    assert len(report["pairs"]) == 4
    assert report["not_finite"] == "the gradient norm"


def test_weights_that_the_last_update_broke_are_not_saved(tmp_path):
    """1e39 is a finite setting, and an infinite step in fp32; the loss of no batch is computed after it."""
    run = make_trainer(tmp_path, learning_rate=1e39, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(NonFiniteError, match=r"step 1: expected finite weights to save, got .* in model\.embed_tok"):
        run.train()
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    with pytest.raises(NonFiniteError, match="Nothing was saved"):
        run.save_model()
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_full_disk_does_not_hide_a_nan(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dpop_trainer.training.non_finite.save_file", full)
    model, records = with_a_bad_pair()
    with pytest.raises(NonFiniteError, match=r"pair ids \[3\]"):
        make_trainer(tmp_path, model, records=records).train()
    assert "the batch could not be saved there ([Errno 28] No space left on device)" in caplog.text


def warnings_of(falls, caplog, **options):
    watch, state = ChosenWatch(10.0, **{"loss_types": ["dpo"], "dpop_lambda": 0.0, **options}), TrainerState()
    args = DPOPConfig(use_cpu=True)
    steps = []
    for step, fall in enumerate(falls):
        state.global_step, before = step, len(caplog.records)
        watch.on_log(args, state, None, logs={"dpop/chosen_logratio": -fall})
        steps += [step] * (len(caplog.records) - before)
    return steps


def test_warns_at_the_threshold_and_when_it_doubles(caplog):
    # 10 is the threshold; then only from 2 * 12 on, then from 2 * 30 on
    assert warnings_of([0, 9.9, 12, 15, 23.9, 30, 50, 59.9, 60.1, -5, math.nan], caplog) == [2, 5, 8]
    assert "your chosen answers are losing probability: −12 nats per answer" in caplog.text
    assert "Use loss_type dpop" in caplog.text
    caplog.clear()
    assert warnings_of([20], caplog, loss_types=["dpop"], dpop_lambda=50.0) == [0]
    assert "Raise dpop_lambda (now 50) or lower learning_rate (now 1e-06)" in caplog.text


def learned(records, num_steps=60):
    """A model that knows the chosen answers, as one does that has been fine-tuned on them."""
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    length = max(len(r["prompt_ids"]) + len(r["chosen_ids"]) for r in records)
    rows = [[*r["prompt_ids"], *r["chosen_ids"]] for r in records]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss.backward()
        optimizer.step()
    return model


def test_dpo_on_low_edit_pairs_warns_and_dpop_does_not(tmp_path, caplog):
    """Answers that differ in one token, the chosen one likely already: DPO lowers both, DPOP must not."""
    records = token_pairs(4)

    def warns(loss_type):
        caplog.clear()
        make_trainer(
            tmp_path / loss_type,
            learned(records),
            records=records,
            loss_type=loss_type,
            max_steps=30,
            learning_rate=1e-3,
            gradient_accumulation_steps=1,
            chosen_logratio_warning=0.5,
        ).train()
        return "your chosen answers are losing probability" in caplog.text

    with caplog.at_level(logging.WARNING):
        assert warns("dpo")
        assert not warns("dpop")


@pytest.mark.parametrize("value", [0.0, -3.0, math.nan])
def test_bad_threshold_is_named(tmp_path, value):
    with pytest.raises(ValueError, match="chosen_logratio_warning: expected nats > 0"):
        DPOPConfig(output_dir=str(tmp_path), chosen_logratio_warning=value)


class Seen(TrainerCallback):
    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs))


def test_callbacks_get_every_metric(tmp_path):
    """TensorBoard, W&B and Trackio are callbacks of transformers: what reaches this one reaches them."""
    seen = Seen()
    make_trainer(tmp_path, callbacks=[seen]).train()
    first = seen.lines[0]
    assert first.keys() >= {"dpop/chosen_logratio", "dpop/penalty", "rewards/margins", "tokens/per_second", "loss"}
    assert 0.01 < first["memory/peak_gib"] < 1000
    records = token_pairs(8)
    lengths = sorted(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in records)
    tokens = [line["num_tokens"] for line in seen.lines if "num_tokens" in line]
    assert tokens[-1] == sum(lengths)  # two steps of four pairs: all of them once
    assert all(line["tokens/per_second"] > 0 for line in seen.lines if "loss" in line)


def test_evaluation_is_a_mean_over_pairs(tmp_path):
    records = token_pairs(5, seed=9)
    sets = {"one": Dataset.from_list(records), "two": Dataset.from_list(records[:1])}
    small = make_trainer(tmp_path / "a", eval_dataset=sets, per_device_eval_batch_size=4)  # the last batch has one pair
    large = make_trainer(tmp_path / "b", eval_dataset=sets, per_device_eval_batch_size=5)
    for run in (small, large):
        run.ref_model.load_state_dict(tiny_llama(seed=7).state_dict())
    metrics, expected = small.evaluate(), large.evaluate()
    keys = {"loss", "rewards/margins", "dpop/chosen_logratio", "logps/chosen"}
    assert metrics.keys() >= {f"eval_{name}_{key}" for name in sets for key in keys}
    for key in (f"eval_{name}_{key}" for name in sets for key in keys):
        assert metrics[key] == pytest.approx(expected[key], rel=1e-5)
    assert metrics["eval_one_loss"] != pytest.approx(metrics["eval_two_loss"], rel=1e-2)
    assert metrics["eval_one_loss"] == small.state.log_history[0]["eval_one_loss"]


def test_clock_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = TrainingClock()
    now[0] = 103.0
    with clock.paused():
        now[0] = 110.0
        with clock.paused():
            now[0] = 120.0
    now[0] = 122.0
    assert clock.lap() == 5.0
    now[0] = 123.5
    assert clock.lap() == 1.5


class Waits(TorchDispatchMode):
    """Notes where the trainer would wait for a GPU: reading a number, or a shape that depends on data.

    The kernels check ids on a CPU alone, where reading them costs nothing.
    """

    OPS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in self.OPS:
            frames = [frame for frame in traceback.extract_stack() if "torch/" not in frame.filename]
            place = frames[-2]  # the last is this one
            if "dpop_trainer" in place.filename:
                self.places.append(f"{place.filename}:{place.lineno} {place.line}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_a_micro_batch_waits_for_nothing(tmp_path, layout, lora):
    peft_config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    run = make_trainer(tmp_path, peft_config=peft_config, layout=layout)
    run.create_optimizer()
    batch = next(iter(run.get_train_dataloader()))
    run.training_step(run.model, batch, num_items_in_batch=4)
    with Waits() as waits:
        run.training_step(run.model, batch, num_items_in_batch=4)
        run.training_step(run.model, batch, num_items_in_batch=4)
    assert not waits.places
    with Waits() as waits:
        run.stop_if_not_finite()
    assert len(waits.places) == 1  # once per optimizer step


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_lion_32bit", "ademamix_8bit"])
def test_optimizers_of_bitsandbytes_are_refused_without_it(tmp_path, monkeypatch, optim):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"optim: expected an optimizer that can run here, got '{optim}', which needs"):
        DPOPConfig(output_dir=str(tmp_path), optim=optim)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_what_needs_a_gpu_is_refused_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="whose pages are CUDA's unified memory, and there is no CUDA device"):
        DPOPConfig(output_dir=str(tmp_path), optim="paged_adamw_8bit")
    with pytest.raises(ValueError, match="activation_offloading: expected a GPU to take activations off, found none"):
        DPOPConfig(output_dir=str(tmp_path), activation_offloading=True)


def test_activations_are_offloaded_by_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    config = DPOPConfig(
        output_dir=str(tmp_path),
        activation_offloading=True,
        gradient_checkpointing=False,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert config.gradient_checkpointing
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False, "offload": True}
