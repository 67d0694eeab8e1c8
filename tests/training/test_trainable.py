"""What would train nothing, or what no file keeps, is refused before it begins; what is saved is what counts."""

import logging

import pytest
import torch
from datasets import Dataset
from dpop_trainer import DPOPTrainer
from dpop_trainer.models.adapters import check_adapters
from dpop_trainer.training.trainable import check_trainable
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from tiny import tiny_llama, token_pairs, word_tokenizer
from trainers import config

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def adapted(**overrides):
    return get_peft_model(tiny_llama(), LoraConfig(r=2, **{**TARGETS, **overrides}))


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build(tmp_path, model, **options):
    return DPOPTrainer(
        model,
        args=config(tmp_path, max_steps=4, save_strategy="steps", save_steps=2),
        train_dataset=Dataset.from_list(token_pairs()),
        processing_class=word_tokenizer(),
        **options,
    )


def test_an_optimizer_from_before_the_adapter_is_refused(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lora = LoraConfig(r=2, **TARGETS)
    with pytest.raises(
        ValueError, match=r"optimizers: expected an optimizer of the parameters that are trained, got one"
    ):
        build(tmp_path, model, peft_config=lora, optimizers=(optimizer, None))


def test_an_optimizer_of_a_part_is_named(caplog):
    model = adapted()
    part = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    with caplog.at_level(logging.WARNING):
        check_trainable(model, (torch.optim.SGD(part, lr=0.1), None))
    # two layers, two modules each: four B of eight
    assert "holds 4 of the 8 parameters that take a gradient" in caplog.text
    caplog.clear()
    check_trainable(model, (torch.optim.SGD(trained(model), lr=0.1), None))
    assert not caplog.text


def test_a_scheduler_of_another_optimizer_is_refused():
    model = adapted()
    own, other = (torch.optim.SGD(trained(model), lr=0.1) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.ConstantLR(other)
    for optimizer, got in ((own, "another"), (None, "none")):
        with pytest.raises(
            ValueError, match=f"optimizers: expected a scheduler of the optimizer beside it.*and {got} "
        ):
            check_trainable(model, (optimizer, scheduler))
    check_trainable(model, (other, scheduler))


def test_an_adapter_that_is_merged_or_off_is_refused(tmp_path):
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"model: expected an adapter beside its base, got one that is merged"):
        build(tmp_path, model)
    model.unmerge_adapter()
    check_trainable(model)
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"model: expected an adapter that is switched on, got one that is off"):
        build(tmp_path, model)
    model.base_model.enable_adapter_layers()
    check_trainable(model)


def test_a_model_in_which_all_is_frozen_is_refused():
    with pytest.raises(ValueError, match="model: expected parameters to train, got a model in which all are frozen"):
        check_trainable(tiny_llama().requires_grad_(False))
    check_trainable(tiny_llama().requires_grad_(False), trains=False)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.norm"])
def test_trained_weights_that_the_adapter_s_file_leaves_out_are_refused(tmp_path, name):
    model = adapted()
    model.get_base_model().get_submodule(name).weight.requires_grad_(True)
    with pytest.raises(ValueError, match=rf"model: expected all trained .* got 1 others: .*{name}.*modules_to_save"):
        build(tmp_path, model)


@pytest.mark.parametrize(
    "kind",
    [
        lambda: LoraConfig(r=2, bias="all", **TARGETS),
        lambda: LoraConfig(r=2, use_dora=True, modules_to_save=["lm_head"], **TARGETS),
        lambda: LoraConfig(r=2, trainable_token_indices=[3, 4], **TARGETS),
        lambda: IA3Config(feedforward_modules=[], **TARGETS),
        lambda: LoHaConfig(r=2, **TARGETS),
        lambda: LoKrConfig(r=2, **TARGETS),
        lambda: AdaLoraConfig(init_r=2, target_r=1, total_step=4, **TARGETS),
        lambda: VeraConfig(r=2, **{**TARGETS, "target_modules": ["q_proj"]}),
        lambda: PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
    ids=["bias", "dora_head", "tokens", "ia3", "loha", "lokr", "adalora", "vera", "prefix"],
)
def test_what_peft_saves_is_taken(kind):
    check_trainable(get_peft_model(tiny_llama(), kind()))


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_an_init_that_loading_does_not_repeat_is_refused(tmp_path, init):
    lora = LoraConfig(r=2, **TARGETS)
    lora.init_lora_weights = init
    with pytest.raises(ValueError, match=rf"peft_config: expected init_lora_weights that loading .*{init}"):
        build(tmp_path, tiny_llama(), peft_config=lora)
    for repeated in (True, False, "gaussian", "pissa", "olora", "orthogonal", "eva"):
        lora.init_lora_weights = repeated
        check_adapters({"default": lora})


class ScheduleFreeSGD(torch.optim.Optimizer):
    """y = (1 - m) z + m x is trained, z follows its gradient, x is the average of z: the interface of schedulefree."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "m": 0.9, "k": 0, "train_mode": False})

    def _switch(self, weight, train_mode):
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight(group["m"]))
            group["train_mode"] = train_mode

    def train(self):
        self._switch(lambda m: 1 - m, True)

    def eval(self):
        self._switch(lambda m: 1 - 1 / m, False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            weight = 1 / (group["k"] + 1)
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                x = p + (1 - 1 / group["m"]) * (z - p)
                z.sub_(p.grad, alpha=group["lr"])
                x.lerp_(z, weight)
                p.copy_(torch.lerp(x, z, 1 - group["m"]))
                self.state[p]["x"] = x
            group["k"] += 1


def schedule_free(tmp_path):
    torch.manual_seed(0)
    model = adapted()
    optimizer = ScheduleFreeSGD(trained(model), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return build(tmp_path, model, optimizers=(optimizer, scheduler)), optimizer


def averages(trainer, optimizer):
    """x by the name under which peft saves it."""
    named = trainer.model.named_parameters()
    return {
        name.replace(".default.", "."): optimizer.state[parameter]["x"]
        for name, parameter in named
        if parameter.requires_grad
    }


def test_a_schedule_free_optimizer_s_checkpoints_hold_the_average(tmp_path):
    trainer, optimizer = schedule_free(tmp_path)
    trainer.train()
    trainer.save_model()
    for folder in ("checkpoint-4", "."):
        saved = load_file(tmp_path / "run" / folder / "adapter_model.safetensors")
        expected = averages(trainer, optimizer)
        assert saved.keys() == expected.keys()
        for name, value in expected.items():
            # x is stored to fp32's rounding; y, which is trained, is another by a step of the learning rate
            torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-7)
    moved = [torch.dist(optimizer.state[p]["z"], optimizer.state[p]["x"]).item() for p in trained(trainer.model)]
    assert max(moved) > 1e-4  # so that the one cannot be taken for the other


def test_a_schedule_free_run_resumes_to_the_bit(tmp_path):
    whole, _ = schedule_free(tmp_path)
    whole.train()
    resumed, _ = schedule_free(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for ours, theirs in zip(trained(resumed.model), trained(whole.model), strict=True):
        assert torch.equal(ours, theirs)
