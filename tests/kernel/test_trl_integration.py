"""DPOP inside the installed TRL's own trainer: the numbers are DPOP's, and everything else stays TRL's."""

import pytest
import torch
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from peft import LoraConfig
from tiny import text_pairs, tiny_llama, word_tokenizer
from trl import DPOConfig, DPOTrainer

from dpop_kernels import dpop_loss
from dpop_kernels.integrations.trl import TRLDPOPConfig, TRLDPOPTrainer, check_trl_version


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("trl_integration") / "model"
    tiny_llama().save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return str(path)


def trained(trainer_class, config_class, model_path, folder, *, with_lora=False, with_reference=False, **overrides):
    args = config_class(
        output_dir=str(folder),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 3,
            "learning_rate": 5e-3,
            "beta": 0.1,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "eval_strategy": "steps",
            "eval_steps": 3,
            **overrides,
        },
    )
    trainer = trainer_class(
        model_path,
        ref_model=tiny_llama(seed=5) if with_reference else None,
        args=args,
        train_dataset=Dataset.from_list(text_pairs(8)),
        eval_dataset=Dataset.from_list(text_pairs(4)),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if with_lora else None,
    )
    trainer.train()
    return trainer


def logged(trainer, key):
    return [line[key] for line in trainer.state.log_history if key in line]


@pytest.mark.parametrize("kind", ["another_reference", "lora", "precomputed"])
def test_losses_are_those_of_our_own_trainer(kind, model_path, tmp_path):
    # another model as reference, which finds half of the chosen answers likelier: no pair is at the hinge's tie, where
    # rounding would decide the gradient. With the adapter switched off the tie is exact in both trainers.
    more = {"precompute_ref_log_probs": True} if kind == "precomputed" else {}
    more |= {"with_lora": kind == "lora", "with_reference": kind != "lora", "dpop_lambda": 5.0}
    inside = trained(TRLDPOPTrainer, TRLDPOPConfig, model_path, tmp_path / "trl", **more)
    ours = trained(DPOPTrainer, DPOPConfig, model_path, tmp_path / "ours", **more)
    for key in ("loss", "grad_norm", "eval_loss", "dpop/penalty", "dpop/active_fraction", "eval_dpop/penalty"):
        assert logged(inside, key) == pytest.approx(logged(ours, key), rel=1e-4, abs=1e-5), key
    assert max(logged(inside, "dpop/penalty")) > 1e-3  # the penalty took part
    assert len(logged(inside, "eval_loss")) == 2


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_lambda_zero_is_trls_sigmoid_bit_for_bit(with_lora, model_path, tmp_path):
    without = trained(TRLDPOPTrainer, TRLDPOPConfig, model_path, tmp_path / "a", with_lora=with_lora, dpop_lambda=0.0)
    plain = trained(DPOTrainer, DPOConfig, model_path, tmp_path / "b", with_lora=with_lora)
    for key in ("loss", "grad_norm", "eval_loss", "rewards/margins", "logps/chosen", "entropy"):
        assert logged(without, key) == logged(plain, key), key
    for ours, theirs in zip(without.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_mix_dpop_with_trls_losses(model_path, tmp_path):
    mixed = trained(
        TRLDPOPTrainer,
        TRLDPOPConfig,
        model_path,
        tmp_path / "mixed",
        with_reference=True,
        max_steps=1,
        loss_type=["sft", "dpop", "sigmoid"],
        loss_weights=[0.5, 2.0, 3.0],
    )

    def alone(name, **more):
        classes = (TRLDPOPTrainer, TRLDPOPConfig) if name == "dpop" else (DPOTrainer, DPOConfig)
        run = trained(*classes, model_path, tmp_path / name, with_reference=True, max_steps=1, loss_type=[name], **more)
        return logged(run, "loss")[0]

    expected = 0.5 * alone("sft") + 2.0 * alone("dpop") + 3.0 * alone("sigmoid")
    assert logged(mixed, "loss")[0] == pytest.approx(expected, rel=1e-6)


def test_trls_own_losses_pass_through(model_path, tmp_path):
    settings = {"loss_type": ["hinge"], "max_steps": 2}
    inside = trained(TRLDPOPTrainer, TRLDPOPConfig, model_path, tmp_path / "a", **settings)
    plain = trained(DPOTrainer, DPOConfig, model_path, tmp_path / "b", **settings)
    assert logged(inside, "loss") == logged(plain, "loss")
    assert not logged(inside, "dpop/penalty")


def test_a_batch_by_hand(model_path, tmp_path):
    run = trained(TRLDPOPTrainer, TRLDPOPConfig, model_path, tmp_path, with_reference=True, max_steps=1)
    batch = run.data_collator([run.train_dataset[i] for i in range(3)])
    run.model.eval()
    with torch.no_grad():
        loss = run.compute_loss(run.model, batch)

        def sums(model):  # log-probs of the completions, from the model's plain logits
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            log_probs = logits[:, :-1].double().log_softmax(-1)
            picked = log_probs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
            return (picked * batch["completion_mask"][:, 1:]).sum(dim=1).chunk(2)

        expected = dpop_loss(*sums(run.model), *sums(run.ref_model), beta=0.1, dpop_lambda=50.0)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_unknown_versions_are_refused():
    check_trl_version("1.16.3")
    for version in ("1.15.0", "1.17.0", "2.0.0.dev0"):
        with pytest.raises(ImportError, match=rf"trl: expected version 1\.16, got {version}.*DPOPTrainer"):
            check_trl_version(version)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ld_alpha": 0.5}, "ld_alpha: expected None with the loss 'dpop'"),
        ({"use_weighting": True}, "use_weighting: expected False with the loss 'dpop'"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type: expected 'reverse_kl' with the loss 'dpop'"),
        ({"dpop_lambda": -1.0}, "dpop_lambda: expected a finite value >= 0"),
    ],
)
def test_what_dpop_is_not_defined_for_is_refused(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TRLDPOPConfig(str(tmp_path), bf16=False, **overrides)


def test_another_configuration_is_refused(model_path, tmp_path):
    with pytest.raises(ValueError, match="args: expected a TRLDPOPConfig, got DPOConfig"):
        TRLDPOPTrainer(model_path, args=DPOConfig(str(tmp_path), bf16=False))
