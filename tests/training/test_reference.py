"""Which model is the reference, that it stays what it was, and that its log-probs are the same however they are had."""

import json
import logging

import pytest
import torch
import yaml
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.reference import choose
from dpop_trainer.reference.adapters import adapter_changes_nothing
from dpop_trainer.reference.second_model import check_init_kwargs
from dpop_trainer.reference.source import eval_mode
from dpop_trainer.reference.start_weights import RECORD_FILE, WEIGHTS_FILE, StartWeights
from dpop_trainer.settings.arguments import parse_arguments
from dpop_trainer.training.runs import run_train
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import text_pairs, tiny_llama, token_pairs, word_tokenizer
from trainers import adapted, answer_logp, config, logged, trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def merged(seed):
    """The same model as `adapted(seed)`, without an adapter."""
    return adapted(seed).merge_and_unload()


def precomputed(tmp_path, tokenizer, **options):
    """A trainer with a cache of its own, and how many pairs it found there."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("dpop_trainer.reference.precompute")
    logger.addHandler(handler)
    try:
        run = trainer(
            tmp_path, tokenizer, precompute_ref_log_probs=True, ref_cache_dir=str(tmp_path / "cache"), **options
        )
    finally:
        logger.removeHandler(handler)
    (line,) = [line for line in records if "from the cache" in line]
    return run, int(line.split(": ")[1].split(" of ")[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_precomputed_columns_are_an_eager_models(tmp_path, tokenizer, layout, dtype):
    run, _ = precomputed(tmp_path, tokenizer, model=tiny_llama().to(dtype), layout=layout)
    exact = tiny_llama().double().requires_grad_(False)
    for record in run.train_dataset:
        prompt, chosen, rejected = (record[f"{name}_ids"] for name in ("prompt", "chosen", "rejected"))
        num_shared = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b)
        expected = [
            answer_logp(exact, prompt, chosen[:num_shared]).item() if num_shared else 0.0,
            answer_logp(exact, prompt, chosen).item(),
            answer_logp(exact, prompt, rejected).item(),
        ]
        ours = [record[f"ref_{name}_logps"] for name in ("shared", "chosen", "rejected")]
        assert ours == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 2e-6, abs=1e-12)


def test_what_hits_the_cache_and_what_misses_it(tmp_path, tokenizer):
    records = token_pairs()
    options = {"records": records, "max_length": 64}
    _, hits = precomputed(tmp_path, tokenizer, **options)
    assert hits == 0
    for change in [
        {},
        {"learning_rate": 1e-5, "beta": 0.1, "dpop_lambda": 5.0, "seed": 7},
        {"loss_type": "dpo"},
        {"per_device_train_batch_size": 1, "precompute_ref_batch_size": 4},
        {"layout": "rows"},
        {"layout": "tree", "prefix_sharing": False},
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")},  # the base is the same
        {"model": tiny_llama(seed=3), "ref_model": tiny_llama()},  # ... and so is this reference
        {"records": records[::-1]},
    ]:
        assert precomputed(tmp_path, tokenizer, **{**options, **change})[1] == len(records), change
    more = [*records, *token_pairs(2, seed=8)]
    assert precomputed(tmp_path, tokenizer, **{**options, "records": more})[1] == len(records)
    # three tokens of prompt in pair 0, then 4 in the answer; the others are longer, and are cut
    is_whole = [len(r["prompt_ids"]) + len(r["chosen_ids"]) <= 10 for r in records]
    assert 0 < sum(is_whole) < len(records)
    for change, expected in [
        ({"max_length": 10}, sum(is_whole)),
        ({"model": tiny_llama(seed=3)}, 0),
        ({"model": tiny_llama().to(torch.bfloat16)}, 0),
        ({"model": adapted(seed=5)}, 0),
        ({"bf16": True}, 0),
    ]:
        assert precomputed(tmp_path, tokenizer, **{**options, **change})[1] == expected, change


def test_another_tokenizer_misses_the_cache(tmp_path, tokenizer):
    options = {"records": text_pairs()}
    assert precomputed(tmp_path, tokenizer, **options)[1] == 0
    assert precomputed(tmp_path, tokenizer, **options)[1] == len(text_pairs())
    other = word_tokenizer()
    other.eos_token = "<pad>"
    assert precomputed(tmp_path, other, **options)[1] == 0


@pytest.mark.parametrize(
    ("cached", "trained"),
    [
        ({"layout": "tree"}, {"layout": "rows"}),
        ({"layout": "rows", "prefix_sharing": False}, {"layout": "tree"}),
        ({"layout": "tree"}, {"layout": "rows", "prefix_sharing": False}),
    ],
    ids=["tree_then_rows", "whole_then_tree", "tree_then_whole"],
)
def test_layouts_may_differ_between_caching_and_training(tmp_path, tokenizer, cached, trained):
    # another model as the reference: no pair at the tie, where rounding decides about the penalty
    options = {"max_steps": 3}
    precomputed(tmp_path, tokenizer, ref_model=tiny_llama(seed=7), **options, **cached)
    run, hits = precomputed(tmp_path, tokenizer, ref_model=tiny_llama(seed=7), **options, **trained)
    assert hits == 5
    run.train()
    online = trainer(tmp_path / "online", tokenizer, ref_model=tiny_llama(seed=7), **options, **trained)
    online.train()
    assert logged(run, "loss") == pytest.approx(logged(online, "loss"), rel=2e-5)


def test_full_fine_tuning_that_precomputes_holds_one_model(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(choose, "frozen_copy", lambda model: pytest.fail("copied"))
    run, _ = precomputed(tmp_path, tokenizer)
    assert run.ref_model is None
    assert run.model.training
    run.train()
    batch = run.data_collator([{**record, "pair_id": 0} for record in token_pairs(2)])
    with pytest.raises(ValueError, match="expected pairs with reference log-probs, got pairs without"):
        run._reference_logps(batch, {})


def test_a_second_model_is_given_back_after_the_pass(tmp_path, tokenizer):
    reference = tiny_llama(seed=7)
    run, _ = precomputed(tmp_path, tokenizer, ref_model=reference, ref_model_offload=True)
    assert run.ref_model is None
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(reference(input_ids=ids).logits, tiny_llama(seed=7)(input_ids=ids).logits)  # no head, no hooks
    assert reference.lm_head.forward.__func__ is torch.nn.Linear.forward


def test_a_streamed_data_set_is_not_precomputed(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="precompute_ref_log_probs: expected a data set with a length"):
        run.reference.precompute(run.train_dataset.to_iterable_dataset(), "train", 2)


@pytest.mark.parametrize("columns_in", ["train", "eval"])
def test_columns_are_used_where_they_are_and_computed_elsewhere(tmp_path, tokenizer, columns_in):
    given = [{**record, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for record in token_pairs()]
    parts = {"train": token_pairs(), "eval": token_pairs(), columns_in: given}
    run, _ = precomputed(tmp_path, tokenizer, records=parts["train"], eval_dataset=Dataset.from_list(parts["eval"]))
    own, computed = run.train_dataset, run.eval_dataset
    if columns_in == "eval":
        own, computed = computed, own
    assert own["ref_chosen_logps"][:] == [-1.0] * 5
    assert computed["ref_chosen_logps"][0] == pytest.approx(
        answer_logp(tiny_llama(), *(token_pairs()[0][key] for key in ("prompt_ids", "chosen_ids"))).item(), rel=1e-5
    )


KINDS = {
    "trained lora": lambda: adapted(seed=5),
    "dora": lambda: adapted(use_dora=True),
    "pissa": lambda: adapted(init_lora_weights="pissa"),
    "bias": lambda: adapted(model=_llama_with_biases(), bias="all"),
    "ia3": lambda: get_peft_model(
        tiny_llama(),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    ),
}


def _llama_with_biases():
    config = tiny_llama().config
    config.attention_bias = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def _with_trainable_norm(model):
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_held_against_its_own_start(tmp_path, tokenizer, kind):
    policy = KINDS[kind]()
    assert not adapter_changes_nothing(policy)
    start = KINDS[kind]().eval()
    run = trainer(tmp_path, tokenizer, policy, learning_rate=1e-2, max_steps=3)
    assert run.ref_model is None
    run.train()
    assert logged(run, "dpop/step_0_max_logratio") == [0.0]
    batch = run.data_collator([run.train_dataset[i] for i in range(5)])
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    sums = run._reference_logps(batch, {key: batch[key] for key in ("input_ids", "attention_mask")} | _tree(run, batch))
    for record, (shared, chosen, rejected) in zip(run.train_dataset, sums.tolist(), strict=True):
        with torch.no_grad():
            expected = [answer_logp(start, record["prompt_ids"], record[key]) for key in ("chosen_ids", "rejected_ids")]
        assert [shared + chosen, shared + rejected] == pytest.approx([value.item() for value in expected], rel=1e-5)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name
    moved = max((value - start.state_dict()[name]).abs().max() for name, value in policy.state_dict().items())
    assert moved > 1e-3  # it was the start, and not the policy, that gave these numbers


def _tree(run, batch):
    from dpop_trainer.batches.scoring import forward_inputs

    return forward_inputs(batch, run.model)


def test_a_new_adapter_needs_no_copy(tmp_path, tokenizer):
    for model in (adapted(), adapted(use_rslora=True), adapted(modules_to_save=["lm_head"])):
        assert adapter_changes_nothing(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight[0, 0] += 1
    assert not adapter_changes_nothing(model)
    assert not adapter_changes_nothing(_with_trainable_norm(adapted()))  # which a trainer refuses: no file keeps it
    run = trainer(tmp_path, tokenizer, adapted(), max_steps=1)
    run.train()
    assert not (tmp_path / "run" / WEIGHTS_FILE).exists()
    assert json.loads((tmp_path / "run" / RECORD_FILE).read_text())["reference"] == "the base under the adapter"


def test_continued_adapter_trains_as_with_a_second_model(tmp_path, tokenizer):
    by_start = trainer(tmp_path / "a", tokenizer, adapted(seed=5), learning_rate=1e-2)
    by_start.train()
    by_model = trainer(tmp_path / "b", tokenizer, adapted(seed=5), ref_model=adapted(seed=5), learning_rate=1e-2)
    by_model.train()
    assert logged(by_start, "loss") == pytest.approx(logged(by_model, "loss"), rel=1e-6)
    cached, _ = precomputed(tmp_path / "c", tokenizer, model=adapted(seed=5), learning_rate=1e-2, loss_type="dpo")
    cached.train()
    online = trainer(tmp_path / "d", tokenizer, adapted(seed=5), learning_rate=1e-2, loss_type="dpo")
    online.train()
    assert logged(cached, "loss") == pytest.approx(logged(online, "loss"), rel=1e-4)


def test_start_weights_are_put_back_when_the_forward_fails(tmp_path, tokenizer):
    policy = adapted(seed=5)
    start = StartWeights(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    pointers = {name: parameter.data_ptr() for name, parameter in policy.named_parameters()}
    values = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    policy.train()
    with pytest.raises(ZeroDivisionError):
        _fail_at_the_start(start, policy)
    assert policy.training
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, values[name]), name
        assert parameter.data_ptr() == pointers[name]
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trainable


def _fail_at_the_start(start, policy):
    with start.switched_in(policy):
        assert not policy.training
        assert torch.equal(policy.state_dict()[_LORA_B], adapted(seed=5).state_dict()[_LORA_B])
        raise ZeroDivisionError


def test_each_module_gets_its_own_mode_back():
    model = tiny_llama().train()
    model.model.layers[0].eval()  # a part that somebody keeps out of training mode
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert not any(module.training for module in model.model.layers[0].modules())
    assert model.training
    assert model.model.layers[1].training


_LORA_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"


def test_gradients_are_the_policys_after_its_start_was_switched_in(tmp_path):
    # the reference's forward comes between the policy's forward and its backward, which reads the weights again
    policy = adapted(seed=5)
    ids = torch.tensor([[4, 5, 6, 7]])
    policy(input_ids=ids).logits.sum().backward()
    expected = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    start = StartWeights(adapted(seed=6))
    loss = policy(input_ids=ids).logits.sum()
    with start.switched_in(policy), torch.no_grad():
        policy(input_ids=ids)
    loss.backward()
    for name, parameter in policy.named_parameters():
        if name in expected:
            assert torch.equal(parameter.grad, expected[name]), name


def test_a_checkpoint_holds_the_policys_adapter_alone(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, adapted(seed=5), learning_rate=1e-2, save_strategy="steps", save_steps=3)
    run.train()
    for folder in (tmp_path / "run" / "checkpoint-3", tmp_path / "run" / "checkpoint-6"):
        assert not [path for path in folder.iterdir() if path.is_dir()]
        assert all(
            ".default" not in name and "ref" not in name for name in load_file(folder / "adapter_model.safetensors")
        )
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "run" / "checkpoint-6")
    ids = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, run.model(input_ids=ids).logits)


def test_a_resumed_adapter_is_held_against_the_start_of_the_run(tmp_path, tokenizer, caplog):
    settings = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path, tokenizer, adapted(seed=5), **settings)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    # built from the checkpoint, as one might: its adapter is not the one that the run began with
    policy = PeftModel.from_pretrained(tiny_llama(), checkpoint, is_trainable=True)
    resumed = trainer(tmp_path, tokenizer, policy, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert "the reference is the one it began with" in caplog.text
    (tmp_path / "run" / WEIGHTS_FILE).write_bytes(b"cut")
    again = trainer(tmp_path, tokenizer, adapted(seed=5), **settings)
    with pytest.raises(ValueError, match=r"start weights as the run wrote them, got 3 of the \d+ bytes"):
        again.train(resume_from_checkpoint=str(checkpoint))


def test_a_run_is_not_resumed_with_another_reference(tmp_path, tokenizer, caplog):
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path, tokenizer, **settings)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    for options in ({}, {"precompute_ref_log_probs": True}):
        trained = AutoModelForCausalLM.from_pretrained(checkpoint)
        with pytest.raises(ValueError, match="reference: expected the weights that this run began with"):
            _resumed(tmp_path, tokenizer, trained, checkpoint, **settings, **options)
    (tmp_path / "run" / RECORD_FILE).unlink()
    trainer(tmp_path, tokenizer, **settings).train(resume_from_checkpoint=str(checkpoint))
    assert "taken on trust" in caplog.text


def _resumed(tmp_path, tokenizer, model, checkpoint, **options):
    trainer(tmp_path, tokenizer, model, **options).train(resume_from_checkpoint=str(checkpoint))


def test_an_adapter_that_cannot_be_trained_is_refused(tmp_path, tokenizer):
    adapted(seed=5).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"model: expected parameters to train.*is_trainable=True"):
        trainer(tmp_path, tokenizer, PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter"))


def test_a_second_model_by_name(tmp_path, tokenizer):
    tiny_llama(seed=7).save_pretrained(tmp_path / "reference")
    name = str(tmp_path / "reference")
    by_name = trainer(tmp_path / "a", tokenizer, ref_model=name)
    assert by_name.ref_model.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in by_name.ref_model.parameters())
    by_name.train()
    by_model = trainer(tmp_path / "b", tokenizer, ref_model=tiny_llama(seed=7), ref_model_offload=True)
    assert all(parameter.is_meta for parameter in by_model.ref_model.parameters())  # each layer's come when it runs
    by_model.train()
    assert logged(by_name, "loss") == logged(by_model, "loss")
    half = trainer(
        tmp_path / "c", tokenizer, tiny_llama(), ref_model=name, ref_model_init_kwargs='{"dtype": "bfloat16"}'
    )
    assert half.ref_model.dtype == torch.bfloat16
    eager = tiny_llama()
    eager.set_attn_implementation("eager")
    assert trainer(tmp_path / "d", tokenizer, eager, ref_model=name).ref_model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("init_kwargs", "message"),
    [
        (
            {"quantization_config": {"load_in_4bit": True}},
            "expected bitsandbytes, which quantises, to be installed",
        ),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "expected bitsandbytes, which quantises"),
        ("bfloat16", "expected a mapping of from_pretrained's arguments, or its JSON, got 'bfloat16'"),
    ],
)
def test_arguments_of_a_second_model_that_cannot_be_used(init_kwargs, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"ref_model_init_kwargs: {message}"):
        check_init_kwargs(init_kwargs)


def test_no_reference_where_no_loss_has_one(tmp_path, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(choose, "frozen_copy", lambda model: pytest.fail("copied"))
    run = trainer(tmp_path, tokenizer, loss_type="sft", max_steps=1, precompute_ref_log_probs=True)
    assert "ref_chosen_logps" not in run.train_dataset.column_names
    run.train()
    line = next(line for line in run.state.log_history if "loss" in line)
    assert "logps/chosen" in line
    assert not [key for key in line if key.startswith(("rewards/", "dpop/"))]
    assert isinstance(trainer(tmp_path, tokenizer, loss_type="sft", ref_model="nowhere"), DPOPTrainer)
    assert "ref_model is not used" in caplog.text


def test_fields_of_the_reference_come_from_the_command_line(tmp_path, tokenizer):
    tiny_llama(seed=7).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    flags = {
        "model_name_or_path": tmp_path / "model",
        "ref_model_name_or_path": tmp_path / "model",
        "ref_model_init_kwargs": '{"dtype": "float16"}',
        "ref_cache_dir": tmp_path / "cache",
        "precompute_ref_log_probs": "true",
        "dataset_name": tmp_path / "pairs.jsonl",
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "gradient_checkpointing": "false",
        "report_to": "none",
        "use_cpu": "true",
        "layout": "rows",
    }
    run_train(
        *parse_arguments(DPOPConfig, [word for k, v in flags.items() for word in (f"--{k}", str(v))], "dpop train")
    )
    (about,) = (tmp_path / "cache").glob("*/reference.json")
    assert json.loads(about.read_text())["notes"]["attn_implementation"] == "sdpa"
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["ref_model_init_kwargs"] == {"dtype": "float16"}


def test_configuration_is_checked(tmp_path):
    with pytest.raises(ValueError, match="precompute_ref_batch_size: expected None or at least 1 pair, got 0"):
        config(tmp_path, precompute_ref_batch_size=0)
