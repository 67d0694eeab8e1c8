"""A trainer on the tiny model, of a few plain settings, and what it has logged."""

import torch
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, token_pairs


def config(tmp_path, **overrides):
    settings = {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **overrides,
    }
    return DPOPConfig(**settings)


def trainer(
    tmp_path, tokenizer, model=None, *, records=None, eval_dataset=None, peft_config=None, ref_model=None, **overrides
):
    return DPOPTrainer(
        model if model is not None else tiny_llama(),
        ref_model=ref_model,
        args=config(tmp_path, **overrides),
        train_dataset=Dataset.from_list(records if records is not None else token_pairs()),
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def logged(trainer, key):
    return [line[key] for line in trainer.state.log_history if key in line]


def answer_logp(model, prompt_ids, answer_ids):
    """log π(answer | prompt), one unpadded sequence, eager."""
    ids = torch.tensor([[*prompt_ids, *answer_ids]])
    log_probs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    picked = log_probs[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
    return picked[len(prompt_ids) - 1 :].sum()


def adapted(seed=None, model=None, **overrides):
    """A peft model; with a seed, one whose adapter was trained before."""
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **overrides}
    model = get_peft_model(model if model is not None else tiny_llama(), LoraConfig(**settings))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2, generator=generator)
    return model
