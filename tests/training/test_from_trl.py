"""Scripts written for TRL 1.16, run on TRL and on this trainer with nothing but the import changed.

Each script is a function of the two classes that its import gives. With the loss TRL calls "sigmoid" the losses,
gradient norms and every metric must agree over ten steps: same model, data, order and seed.
"""

import copy
import inspect
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.data.forms import whole_text_pair
from dpop_trainer.settings.arguments import DataArguments, ModelArguments
from dpop_trainer.settings.trl_fields import ALTERNATIVES
from experts import experts
from peft import LoraConfig, get_peft_model
from tiny import text_pairs, tiny_llama, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, LogCompletionsCallback, ModelConfig, ScriptArguments, extract_prompt
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

NUM_STEPS = 10
TRL_CLASSES, OUR_CLASSES = (DPOConfig, DPOTrainer), (DPOPConfig, DPOPTrainer)

# how this machine is, not what the run computes; a shared prefix costs fewer FLOPs
MACHINE = ("_runtime", "_per_second", "total_flos")

# logged here beside TRL's
OURS = ("dpop/", "loss/", "wpo/", "tokens/", "memory/", "num_computed_tokens")

# TRL's default -> ours, and why
DELIBERATE_DEFAULTS = {
    "beta": (0.1, 0.3),  # the DPOP paper's
    "loss_type": (["sigmoid"], ["dpop"]),  # what this package is for
    "logging_nan_inf_filter": (True, False),  # hides a NaN in the logs, and costs a device sync per micro-batch
}

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ ' w50 ' if m.role == 'user' else ' w51 ' }}{{ m.content }}{{ ' w52' }}{% endfor %}"
    "{{ ' w51' if add_generation_prompt else '' }}"
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A tiny model with its tokenizer in a folder, as from a hub."""
    path = tmp_path_factory.mktemp("from_trl") / "tiny-llama"
    tiny_llama().save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return str(path)


def settings(output_dir, **more):
    """What every script sets, so that ten steps on a CPU say something."""
    return {
        "output_dir": str(output_dir),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "loss_type": ["sigmoid"],
        "beta": 0.1,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **more,
    }


def messages(num_pairs=8):
    """Conversations whose prompt is the turns that both answers begin with."""
    return [
        {
            answer: [
                {"role": "user", "content": f"w{i} w{i + 1}"},
                {"role": "assistant", "content": f"w{i + 2} {word} w{i + 4}"},
            ]
            for answer, word in (("chosen", "w3"), ("rejected", "w5"))
        }
        for i in range(num_pairs)
    ]


def full_by_name(DPOConfig, DPOTrainer, model_path, output_dir):
    args = DPOConfig(
        **settings(output_dir, eval_strategy="steps", eval_steps=5),
        model_init_kwargs={"attn_implementation": "eager", "dtype": "float32"},
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.1,
    )
    return DPOTrainer(
        model=model_path,
        args=args,
        train_dataset=Dataset.from_list(text_pairs(9)),  # an epoch ends on a batch of one
        eval_dataset={"short": Dataset.from_list(text_pairs(3)), "long": Dataset.from_list(text_pairs(5))},
    )


def lora(DPOConfig, DPOTrainer, model_path, output_dir):
    return DPOTrainer(
        model_path,
        args=DPOConfig(**settings(output_dir, gradient_accumulation_steps=2), seed=7, max_grad_norm=0.5),
        train_dataset=Dataset.from_list(text_pairs(8)),
        eval_dataset=DatasetDict(test=Dataset.from_list(text_pairs(4))),
        peft_config=LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


def adapter_given(DPOConfig, DPOTrainer, model_path, output_dir):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return DPOTrainer(
        model=model,
        args=DPOConfig(**settings(output_dir, gradient_checkpointing=False)),
        train_dataset=Dataset.from_list(text_pairs(8)),
        processing_class=AutoTokenizer.from_pretrained(model_path),
    )


def precomputed(DPOConfig, DPOTrainer, model_path, output_dir):
    args = DPOConfig(**settings(output_dir, loss_type="sigmoid"), precompute_ref_log_probs=True)
    args.precompute_ref_batch_size = 4
    return DPOTrainer(
        model=model_path,
        args=args,
        train_dataset=Dataset.from_list(text_pairs(8)),
        eval_dataset=Dataset.from_list(text_pairs(4)),
    )


def conversational(DPOConfig, DPOTrainer, model_path, output_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = CHAT_TEMPLATE
    return DPOTrainer(
        model=model_path,
        args=DPOConfig(**settings(output_dir, num_train_epochs=3, max_steps=-1), pad_to_multiple_of=8),
        train_dataset=Dataset.from_list(messages(7)),
        processing_class=tokenizer,
    )


def reference_given(DPOConfig, DPOTrainer, model_path, output_dir):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    counter, model = Count(), AutoModelForCausalLM.from_pretrained(model_path)
    trainer = DPOTrainer(
        model,
        tiny_llama(seed=7),
        DPOConfig(**settings(output_dir, loss_type=["hinge"], dataloader_drop_last=True)),
        None,
        Dataset.from_list(text_pairs(9)),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        callbacks=[counter],
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
    )
    trainer.counter = counter
    return trainer


def truncated(DPOConfig, DPOTrainer, model_path, output_dir):
    # prompts of 2 to 6 tokens: the last leaves no room for an answer
    pairs = [{**pair, "prompt": " ".join(["w9"] * (i + 2))} for i, pair in enumerate(text_pairs(5))]
    return DPOTrainer(
        model=model_path,
        args=DPOConfig(**settings(output_dir), max_length=6, disable_dropout=True, dataset_num_proc=None),
        train_dataset=Dataset.from_list([*pairs[:3], pairs[4]]),
    )


def several_losses(DPOConfig, DPOTrainer, model_path, output_dir):
    args = settings(output_dir, loss_type=["sigmoid", "hinge", "apo_zero"])
    return DPOTrainer(
        model=model_path,
        args=DPOConfig(**args, loss_weights=[0.7, 0.2, 0.1]),
        train_dataset=Dataset.from_list(text_pairs(8)),
    )


# a field alone -> the value with which both trainers run the scripts below
WEIGHING = {
    "wpo": {"use_weighting": True},
    "ld": {"ld_alpha": 0.3},
    # TRL's sft is a mean over the micro-batch's tokens, and knows nothing of α
    "ld_and_sft": {
        "ld_alpha": 0.0,
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.5],
        "per_device_train_batch_size": 1,
    },
}


def weighed(field, peft_config, more_of_ours):
    """A script with one of `WEIGHING`: answers of ragged lengths, more words of which one differs."""

    def script(DPOConfig, DPOTrainer, model_path, output_dir):
        pairs = [
            {**pair, "chosen": pair["chosen"] + " w7" * (i % 3), "rejected": pair["rejected"] + " w8" * (-i % 4)}
            for i, pair in enumerate(text_pairs(8))
        ]
        ours = more_of_ours if DPOConfig is DPOPConfig else {}
        args = DPOConfig(**settings(output_dir, learning_rate=1e-3, **WEIGHING[field], **ours))
        return DPOTrainer(model_path, args=args, train_dataset=Dataset.from_list(pairs), peft_config=peft_config)

    return script


def mixture(DPOConfig, DPOTrainer, model_path, output_dir):
    model = experts()
    model.save_pretrained(f"{output_dir}-model")
    AutoTokenizer.from_pretrained(model_path).save_pretrained(f"{output_dir}-model")
    # of the tokens that reach one of these experts the gradients cancel, but for rounding: AdamW's first steps would
    # be as long for that as for any other, and of opposite signs in the two trainers
    optimizer = {"optim": "sgd", "learning_rate": 0.1}
    return DPOTrainer(
        model=f"{output_dir}-model",
        args=DPOConfig(**settings(output_dir, eval_strategy="steps", eval_steps=5, **optimizer)),
        train_dataset=Dataset.from_list(text_pairs(8)),
        eval_dataset=Dataset.from_list(text_pairs(4)),
    )


def collated_by_trl(DPOConfig, DPOTrainer, model_path, output_dir):
    return DPOTrainer(
        model=model_path,
        args=DPOConfig(**settings(output_dir), precompute_ref_log_probs=True),
        data_collator=DataCollatorForPreference(pad_token_id=0, max_length=5, pad_to_multiple_of=4),
        train_dataset=Dataset.from_list(text_pairs(8)),
    )


def synced(DPOConfig, DPOTrainer, model_path, output_dir):
    args = settings(output_dir, sync_ref_model=True, ref_model_mixup_alpha=0.4, ref_model_sync_steps=3)
    return DPOTrainer(model=model_path, args=DPOConfig(**args), train_dataset=Dataset.from_list(text_pairs(8)))


SCRIPTS = [
    several_losses,
    full_by_name,
    lora,
    adapter_given,
    precomputed,
    conversational,
    reference_given,
    truncated,
    synced,
    collated_by_trl,
    mixture,
]


def run(script, classes, model_path, folder):
    trainer = script(*classes, model_path, folder)
    trainer.train()
    return trainer


def without_names(line):
    """Metrics of an evaluation set that has a name, eval_<name>_x, as TRL calls them whatever the set: eval_x."""
    prefix = next((key.removesuffix("loss") for key in line if re.fullmatch("eval_.+_loss", key)), None)
    kept = ("_loss", *MACHINE)
    return {
        "eval_" + key.removeprefix(prefix)
        if prefix and key.startswith(prefix) and not key.endswith(kept)
        else key: value
        for key, value in line.items()
    }


def _is_rounding(key, *lines):
    """Whether the margins are rounding alone, as against a reference that was computed in another batch: then their
    signs are too. Margins that are exactly 0 on both sides have no such excuse. A margin is β = 0.1 times log-probs
    that agree to 1e-4 nats."""
    margins = [abs(line[key.replace("accuracies", "margins")]) for line in lines]
    return 0 < max(margins) < 0.1 * 1e-4


def assert_same_logs(ours, theirs):
    """Every line of TRL's log, key by key and value by value, and nothing beside it but what is ours."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for our_line, their_line in zip(map(without_names, ours), theirs, strict=True):
        assert their_line.keys() <= our_line.keys()
        more = {key.removeprefix("eval_") for key in our_line.keys() - their_line.keys()}
        assert all(key.startswith(OURS) for key in more), more
        for key, value in their_line.items():
            if key.endswith("rewards/accuracies") and _is_rounding(key, our_line, their_line):
                continue
            if not key.endswith(MACHINE):
                # sums of a few fp32 log-probs; the losses' own bound is 1e-4
                assert our_line[key] == pytest.approx(value, rel=1e-4, abs=1e-4), (their_line["step"], key)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_script_gives_the_same_run(script, model_path, tmp_path):
    ours = run(script, OUR_CLASSES, model_path, tmp_path / "ours")
    theirs = run(script, TRL_CLASSES, model_path, tmp_path / "trl")
    losses = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    assert len(losses) >= NUM_STEPS
    assert max(losses) - min(losses) > 1e-3  # it did train
    assert_same_logs(ours.state.log_history, theirs.state.log_history)


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("field", WEIGHING)
def test_what_weighs_weighs_the_same_in_every_layout(field, adapter, model_path, tmp_path):
    """Of each field and model two of the three layouts, in turn: every pair of the three occurs."""
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    theirs = run(weighed(field, peft_config, {}), TRL_CLASSES, model_path, tmp_path / "trl")
    left_out = ("rows", "tree", "packed")[(list(WEIGHING).index(field) + adapter) % 3]
    for layout in sorted({"rows", "tree", "packed"} - {left_out}):
        ours = run(weighed(field, peft_config, {"layout": layout}), OUR_CLASSES, model_path, tmp_path / layout)
        assert_same_logs(ours.state.log_history, theirs.state.log_history)


# TRL's settings, our layout, whether LoRA is trained
LOSSES_OF_TRL = {
    "forward_kl": ({"f_divergence_type": "forward_kl"}, "tree", False),
    "js_divergence": ({"f_divergence_type": "js_divergence", "loss_type": ["hinge"]}, "flat", True),
    "alpha_divergence": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}, "rows", True),
    "alpha_norm": ({"f_divergence_type": "alpha_divergence", "loss_type": ["sigmoid_norm"], "beta": 1}, "flat", False),
    "aot": ({"loss_type": ["aot"], "label_smoothing": 0.1, "per_device_train_batch_size": 4}, "tree", True),
    "aot_unpaired": ({"loss_type": ["aot_unpaired"], "per_device_train_batch_size": 4}, "flat", False),
}


@pytest.mark.parametrize("name", LOSSES_OF_TRL)
def test_loss_gives_the_same_run(name, model_path, tmp_path):
    """On pairs that share a beginning and differ in length."""
    options, layout, with_lora = LOSSES_OF_TRL[name]
    pairs = [{**pair, "chosen": pair["chosen"] + " w7" * (i % 3)} for i, pair in enumerate(text_pairs(8))]

    def script(DPOConfig, DPOTrainer, folder, **more):
        trainer = DPOTrainer(
            model_path,
            args=DPOConfig(**{**settings(folder), **options, **more}),
            train_dataset=Dataset.from_list(pairs),
            peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if with_lora else None,
        )
        trainer.train()
        return trainer.state.log_history

    theirs = script(*TRL_CLASSES, tmp_path / "trl")
    losses = [line["loss"] for line in theirs if "loss" in line]
    assert len(losses) == NUM_STEPS
    assert max(losses) - min(losses) > 1e-3
    assert_same_logs(script(*OUR_CLASSES, tmp_path / "ours", layout=layout), theirs)


def test_scripts_own_parts_are_used(model_path, tmp_path):
    trainer = run(reference_given, OUR_CLASSES, model_path, tmp_path)
    assert trainer.counter.steps == NUM_STEPS
    assert type(trainer.optimizer.optimizer).__name__ == "SGD"


def test_same_run_on_conversations_of_a_file(shared_once, tiny_llama, tmp_path):
    lines = (shared_once / "data" / "prefs" / "tulu_preference_sample.jsonl").read_text().splitlines()
    shortest = sorted(lines, key=len)[:8]
    records = [{key: json.loads(line)[key] for key in ("chosen", "rejected")} for line in shortest]
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    template += "{{ 'assistant: ' if add_generation_prompt else '' }}"

    def script(DPOConfig, DPOTrainer, model_path, output_dir):
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        tokenizer.chat_template = template
        return DPOTrainer(
            model=model_path,
            args=DPOConfig(**settings(output_dir, learning_rate=1e-4), max_length=160),
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer,
        )

    ours = run(script, OUR_CLASSES, str(tiny_llama), tmp_path / "ours")
    theirs = run(script, TRL_CLASSES, str(tiny_llama), tmp_path / "trl")
    assert len(ours.train_dataset) == len(theirs.train_dataset) > 4
    pairs = zip(ours.state.log_history, theirs.state.log_history, strict=True)
    assert max(abs(a["loss"] - b["loss"]) for a, b in pairs if "loss" in b) < 1e-4


WHOLE_TEXTS = [("w1 w2 w3", "w1 w2 w4"), ("w1 w2 w30", "w1 w2 w31"), ("w1 w2", "w1 w2 w3"), ("w1 w2", "w1 w2")]


@pytest.mark.parametrize(("chosen", "rejected"), WHOLE_TEXTS)
def test_a_text_begins_with_the_prompt_that_trl_finds(chosen, rejected):
    record = {"chosen": chosen, "rejected": rejected}
    assert whole_text_pair(record)._asdict() == extract_prompt(record)


TEXT = {"prompt": "w1", "chosen": " w3", "rejected": " w5"}
IDS = {"prompt_ids": [7], "chosen_ids": [8, 2], "rejected_ids": [9, 2]}
# words of `word_tokenizer` begin at 3; CHAT_TEMPLATE's turns are w50 user w52, w51 assistant w52; 2 is EOS
READINGS = {
    "plain": (TEXT, ([4], [6, 2]), ([4], [6, 2])),
    "system": ({**TEXT, "system": "w9"}, ([54, 12, 55, 53, 4, 55, 54], [6, 55]), ([4], [6, 2])),
    "ids": ({**TEXT, **IDS}, ([7], [8, 2]), ([4], [6, 2])),
    "empty": ({**TEXT, "chosen": ""}, "chosen: expected an answer of at least one character", ([4], [2])),
}


@pytest.mark.parametrize("case", READINGS)
def test_what_the_page_says_that_columns_mean(case, model_path, tmp_path):
    record, ours, theirs = READINGS[case]

    def read(DPOConfig, DPOTrainer):
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        tokenizer.chat_template = CHAT_TEMPLATE
        data = Dataset.from_list([record])
        trainer = DPOTrainer(model_path, None, DPOConfig(**settings(tmp_path)), None, data, processing_class=tokenizer)
        return trainer.train_dataset[0]["prompt_ids"], trainer.train_dataset[0]["chosen_ids"]

    assert read(*TRL_CLASSES) == theirs
    if isinstance(ours, str):
        with pytest.raises(ValueError, match=ours):
            read(*OUR_CLASSES)
    else:
        assert read(*OUR_CLASSES) == ours


def test_what_the_page_says_of_references(model_path, tmp_path):
    pissa = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"], task_type="CAUSAL_LM")
    given = [{**pair, "ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0} for pair in text_pairs(2)]

    def first_line(classes, data, **more):
        DPOConfig, DPOTrainer = classes
        args = DPOConfig(**settings(tmp_path, max_steps=1, loss_type=more.pop("loss_type", ["sigmoid"])))
        trainer = DPOTrainer(model_path, args=args, train_dataset=Dataset.from_list(data), **more)
        trainer.train()
        return trainer.state.log_history[0]

    ours, theirs = (first_line(classes, given) for classes in (OUR_CLASSES, TRL_CLASSES))
    assert theirs["rewards/chosen"] == 0.0
    assert ours["rewards/chosen"] == pytest.approx(0.1 * (ours["logps/chosen"] + 1.0), rel=1e-5)  # β = 0.1
    ours, theirs = (first_line(classes, text_pairs(2), peft_config=pissa) for classes in (OUR_CLASSES, TRL_CLASSES))
    assert ours["rewards/chosen"] == 0.0
    assert abs(theirs["rewards/chosen"]) > 1e-3
    ours, theirs = (first_line(classes, text_pairs(2), loss_type=["sft"]) for classes in (OUR_CLASSES, TRL_CLASSES))
    assert "rewards/chosen" not in ours
    assert "rewards/chosen" in theirs


def test_completions_of_the_evaluation_set_can_be_logged(model_path, tmp_path):
    trainer = full_by_name(*OUR_CLASSES, model_path, tmp_path)
    trainer.eval_dataset = trainer.eval_dataset["short"]
    trainer.args.max_steps = 1
    callback = LogCompletionsCallback(trainer, GenerationConfig(max_new_tokens=2), num_prompts=2, freq=1)
    trainer.add_callback(callback)
    trainer.train()
    assert [(step, prompt) for step, prompt, _ in callback.table] == [("1", "w0 w1"), ("1", "w1 w2")]


def other_owner(model_path, patch):
    """A model that TRL's trainer had before: as it is, as its copy, or as the copy that is its reference."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    if patch is None:
        return model, None
    add_fused_lm_head(model)
    return {
        "same": (model, None),
        "copied": (copy.deepcopy(model), None),
        "reference": (model, copy.deepcopy(model)),
    }[patch]


def test_a_model_that_trls_trainer_had_before(model_path, tmp_path):
    logs = []
    for patch in (None, "same", "copied", "reference"):
        model, ref_model = other_owner(model_path, patch)
        args = OUR_CLASSES[0](**settings(tmp_path / str(patch), max_steps=2))
        data = Dataset.from_list(text_pairs(4))
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        trainer = DPOPTrainer(model, ref_model, args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        logs.append([line["rewards/chosen"] for line in trainer.state.log_history if "loss" in line])
    assert logs[0][0] == 0.0
    assert logs[0][1] != 0.0
    assert logs[1:] == [logs[0]] * 3


def test_evaluate_takes_raw_data(model_path, tmp_path):
    results = []
    for classes, folder in ((OUR_CLASSES, "ours"), (TRL_CLASSES, "trl")):
        trainer = run(truncated, classes, model_path, tmp_path / folder)
        results.append(trainer.evaluate({"held_out": Dataset.from_list(text_pairs(5))}))
    ours, theirs = results
    assert ours["eval_held_out_loss"] == pytest.approx(theirs["eval_held_out_loss"], abs=1e-6)
    assert theirs.keys() <= without_names(ours).keys()


def test_constructor_is_trls():
    theirs = list(inspect.signature(DPOTrainer.__init__).parameters.values())
    ours = list(inspect.signature(DPOPTrainer.__init__).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


def defaults(config_class):
    return {
        item.name: item.default if item.default is not MISSING else item.default_factory()
        for item in fields(config_class)
        if item.init
    }


def test_every_field_of_trls_configuration_is_here_with_its_default():
    theirs, ours = defaults(DPOConfig), defaults(DPOPConfig)
    assert theirs.keys() <= ours.keys()
    different = {name: (theirs[name], ours[name]) for name in theirs if ours[name] != theirs[name]}
    assert different == DELIBERATE_DEFAULTS


def test_every_flag_of_trls_script_is_here():
    ours = {item.name for part in (ModelArguments, DataArguments) for item in fields(part)}
    assert {item.name for item in fields(ModelConfig)} <= ours
    # streaming is called `streaming` here; the last is a debugging aid for data-parallel runs
    assert {item.name for item in fields(ScriptArguments)} - ours == {"dataset_streaming", "ignore_bias_buffers"}


def other_than(value):
    """A value of the same kind as a field's default."""
    if isinstance(value, bool):
        return not value
    return [0.5] if value is None else value + 0.25


@pytest.mark.parametrize("name", sorted(ALTERNATIVES))
def test_what_is_not_supported_is_refused_by_name(name, tmp_path):
    default = defaults(DPOPConfig)[name]
    with pytest.raises(ValueError, match=rf"^{name}: expected {default!r}, got .*\. \w+"):
        DPOPConfig(str(tmp_path), **{name: other_than(default)})
    DPOPConfig(str(tmp_path), report_to="none", **{name: default})  # and may be mentioned


def test_all_refusals_come_at_once(tmp_path):
    with pytest.raises(ValueError, match="expected") as raised:
        DPOPConfig(str(tmp_path), **{name: other_than(defaults(DPOPConfig)[name]) for name in ALTERNATIVES})
    assert {line.partition(":")[0] for line in str(raised.value).splitlines()} == ALTERNATIVES.keys()


def test_auto_and_spelt_out_padding(tmp_path):
    given = {"auto": None, "none": None, "64": 64, 8: 8, None: None}
    configs = [DPOPConfig(str(tmp_path), pad_to_multiple_of=value).pad_to_multiple_of for value in given]
    assert configs == list(given.values())
    with pytest.raises(ValueError, match="pad_to_multiple_of: expected a whole number or 'auto', got 'all'"):
        DPOPConfig(str(tmp_path), pad_to_multiple_of="all")


def test_pad_token_is_taken_or_refused(model_path, tmp_path):
    def trainer(pad_token):
        args = DPOPConfig(str(tmp_path), pad_token=pad_token, use_cpu=True, report_to="none", disable_tqdm=True)
        return DPOPTrainer(model_path, args=args, train_dataset=Dataset.from_list(text_pairs(2)))

    assert trainer("<eos>").data_collator.pad_token_id == 2
    with pytest.raises(ValueError, match="pad_token: expected a token of the tokenizer's vocabulary, got '<none>'"):
        trainer("<none>")


def test_best_checkpoint_can_be_chosen_by_a_metric(model_path, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 5, "load_best_model_at_end": True}
    args = DPOPConfig(
        **settings(tmp_path, **more, eval_strategy="steps", eval_steps=5), metric_for_best_model="rewards/margins"
    )
    data = Dataset.from_list(text_pairs(6))
    trainer = DPOPTrainer(model_path, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    margins = [line["eval_rewards/margins"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.state.best_metric == max(margins)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compute_metrics": 3}, "compute_metrics: expected a function or None, got int"),
        ({"peft_config": {"r": 4}}, r"peft_config: expected a peft\.PeftConfig such as LoraConfig, got dict"),
        ({"quantization_config": object()}, "quantization_config: expected None with a model that is loaded already"),
        (
            {"train_dataset": Dataset.from_list([{**pair, "images": []} for pair in text_pairs(2)])},
            "train_dataset: expected pairs of text, got the column 'images'",
        ),
        ({"args": TrainingArguments(report_to="none")}, "args: expected a DPOPConfig, got TrainingArguments"),
        (
            {"args": DPOConfig(report_to="none", use_cpu=True, bf16=False)},
            "got DPOConfig of trl. Its fields have TRL's names: from dpop_trainer import DPOPConfig as DPOConfig",
        ),
    ],
)
def test_unusable_arguments_are_named(arguments, message, tmp_path):
    usual = {
        "model": tiny_llama(),
        "args": DPOPConfig(str(tmp_path), use_cpu=True, report_to="none"),
        "train_dataset": Dataset.from_list(text_pairs(2)),
        "processing_class": word_tokenizer(),
    }
    with pytest.raises(ValueError, match=message):
        DPOPTrainer(**{**usual, **arguments})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPOPConfig("out", max_prompt_length=5), "max_prompt_length: .*It is called max_length, for prompt"),
        (lambda: DPOPConfig("out", rpo_alpha=1.0), r"rpo_alpha: .*It is called loss_type \[dpop, sft\]"),
        (lambda: DPOPConfig("out", dpop_lamda=5), "dpop_lamda: .*of DPOPConfig.*Did you mean 'dpop_lambda'"),
        (lambda: DPOPTrainer(tokenizer=None), "tokenizer: .*of DPOPTrainer.*It is called processing_class now"),
        (lambda: DPOPTrainer(beta=0.1), "beta: .*It is a field of the configuration, args"),
        (lambda: DPOPTrainer(traindataset=1), "Did you mean 'train_dataset'"),
    ],
)
def test_an_unknown_keyword_is_answered_as_a_flag_is(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_processor_is_refused(tmp_path):
    class Processor:
        tokenizer = word_tokenizer()

    with pytest.raises(
        ValueError, match=r"processing_class: expected a tokenizer, got Processor\. Pass its \.tokenizer"
    ):
        DPOPTrainer(
            tiny_llama(),
            args=DPOPConfig(str(tmp_path)),
            train_dataset=Dataset.from_list(text_pairs(2)),
            processing_class=Processor(),
        )


def test_model_by_name_is_loaded_in_float32_unless_told(model_path, tmp_path):
    def dtype(**kwargs):
        args = DPOPConfig(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **kwargs)
        trainer = DPOPTrainer(model_path, args=args, train_dataset=Dataset.from_list(text_pairs(2)))
        return trainer.model.dtype

    AutoModelForCausalLM.from_pretrained(model_path).bfloat16().save_pretrained(tmp_path / "bf16")
    word_tokenizer().save_pretrained(tmp_path / "bf16")
    model_path = str(tmp_path / "bf16")
    assert dtype() is torch.float32
    assert dtype(model_init_kwargs={"dtype": "auto"}) is torch.bfloat16
    with pytest.raises(ValueError, match="dtype: expected 'float32', 'bfloat16', 'float16' or 'auto', got 'half32'"):
        dtype(model_init_kwargs={"dtype": "half32"})


def test_output_dir_without_a_configuration():
    from dpop_trainer.training.trainer import default_output_dir

    assert default_output_dir("Qwen/Qwen2.5-0.5B") == "Qwen2.5-0.5B-DPOP"
    assert default_output_dir(tiny_llama()) == "LlamaForCausalLM-DPOP"


def rows_of_the_page():
    """First cell -> second, of every table row of docs/from-trl.md."""
    page = (Path(__file__).parents[2] / "docs" / "from-trl.md").read_text()
    return dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", page, flags=re.MULTILINE))


def test_the_page_says_what_happens_to_every_field_and_argument():
    rows = rows_of_the_page()
    own = {
        name for cls in DPOConfig.__mro__[: DPOConfig.__mro__.index(TrainingArguments)] for name in cls.__annotations__
    }
    arguments = set(inspect.signature(DPOTrainer.__init__).parameters) - {"self"}
    assert own | arguments <= rows.keys()
    for name in own:
        expected = f"refused. {ALTERNATIVES[name]}" if name in ALTERNATIVES else None
        assert rows[name] == expected if expected else not rows[name].startswith("refused"), (name, expected)


def test_the_page_lists_every_metric(model_path, tmp_path):
    log = run(truncated, TRL_CLASSES, model_path, tmp_path).state.log_history
    keys = {key for line in log if "loss" in line for key in line} - {"step"}
    assert keys <= rows_of_the_page().keys()
