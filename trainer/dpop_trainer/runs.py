"""Whole runs as the command line starts them: load, train, save; or load and inspect."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import PreTrainedModel

from dpop_trainer.arguments import DataArguments, ModelArguments, run_config
from dpop_trainer.base import HeadTrainer
from dpop_trainer.checkpoints import last_checkpoint
from dpop_trainer.config import DPOPConfig, HeadConfig, SFTConfig
from dpop_trainer.data import load_pairs, tokenise_pairs
from dpop_trainer.evaluate import PairEvaluation, evaluate_pairs, pair_token_logps
from dpop_trainer.loading import load_model, load_tokenizer, prepare_tokenizer
from dpop_trainer.run_end import is_finished, mark_finished
from dpop_trainer.run_files import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, PLOT_FILE
from dpop_trainer.sft import SFTTrainer
from dpop_trainer.trainer import DPOPTrainer
from dpop_trainer.versions import versions


def run_train(model_arguments: ModelArguments, data_arguments: DataArguments, config: DPOPConfig) -> DPOPTrainer | None:
    """Preference fine-tuning from arguments to a saved model in config.output_dir; resumes what was interrupted.

    Returns:
        The trainer; None where this very run is finished already, which is said.

    Raises:
        ValueError: an argument or the data cannot be used, or the folder holds another run.
    """
    whole_config = run_config(model_arguments, data_arguments, config)
    if is_finished(config.output_dir, whole_config):
        return None
    train_dataset, eval_dataset = _load_data(data_arguments)
    ref_name = model_arguments.ref_model_name_or_path
    trainer = DPOPTrainer(
        _load_model(model_arguments),
        ref_model=load_model(ref_name, _init_kwargs(model_arguments)) if ref_name else None,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=load_tokenizer(model_arguments.model_name_or_path),
        peft_config=_peft_config(model_arguments),
        run_config=whole_config,
    )
    _train_and_save(trainer, config)
    return trainer


def run_sft(model_arguments: ModelArguments, data_arguments: DataArguments, config: SFTConfig) -> SFTTrainer | None:
    """Supervised fine-tuning on the chosen answers (or completions) from arguments to a saved model.

    Returns:
        The trainer; None where this very run is finished already, which is said.

    Raises:
        ValueError: an argument or the data cannot be used, or the folder holds another run.
    """
    whole_config = run_config(model_arguments, data_arguments, config)
    if is_finished(config.output_dir, whole_config):
        return None
    train_dataset, eval_dataset = _load_data(data_arguments)
    trainer = SFTTrainer(
        _load_model(model_arguments),
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=load_tokenizer(model_arguments.model_name_or_path),
        peft_config=_peft_config(model_arguments),
        run_config=whole_config,
    )
    _train_and_save(trainer, config)
    return trainer


def run_inspect(
    *,
    model: str,
    ref_model: str | None,
    pairs: str,
    out: str | None,
    limit: int,
    batch_size: int,
    max_length: int | None,
) -> PairEvaluation:
    """Token log-probs of pairs under a trained model and its reference: prints a table, writes shift.json and a plot.

    Raises:
        ValueError: a model or the pairs cannot be loaded, or the reference is neither given nor known.
    """
    from dpop_trainer.plots import plot_token_shift

    tokenizer = load_tokenizer(model)
    prepare_tokenizer(tokenizer)
    dataset = load_pairs(pairs)
    dataset = dataset.select(range(min(limit, len(dataset))))
    dataset, counts = tokenise_pairs(dataset, tokenizer, max_length=max_length)
    print(counts.summary())
    is_adapter = (Path(model) / "adapter_config.json").exists()
    policy: Any = AutoPeftModelForCausalLM.from_pretrained(model) if is_adapter else load_model(model)
    score = {"pad_token_id": tokenizer.pad_token_id, "batch_size": batch_size}
    policy_logps = pair_token_logps(policy, dataset, desc="policy", **score)
    if ref_model is not None:
        ref_logps = pair_token_logps(load_model(ref_model), dataset, desc="reference", **score)
    elif isinstance(policy, PeftModel):
        ref_logps = pair_token_logps(policy.unload(), dataset, desc="reference", **score)
    else:
        raise ValueError("ref_model: expected the model that training started from, got None. Pass --ref_model.")
    evaluation = evaluate_pairs(policy_logps, ref_logps, dataset)
    folder = Path(out or model)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"name": Path(model).name, "num_pairs": len(dataset), **evaluation_as_dict(evaluation)}
    (folder / "shift.json").write_text(json.dumps({**record, "versions": versions()}, indent=2))
    plot_token_shift({Path(model).name: evaluation.shift}, folder / "shift.png")
    print(format_evaluation(evaluation))
    print(f"Written: {folder / 'shift.json'}, {folder / 'shift.png'}")
    return evaluation


def evaluation_as_dict(evaluation: PairEvaluation) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "chosen_logratio": evaluation.chosen_logratio,
        "rejected_logratio": evaluation.rejected_logratio,
        "reward_accuracy": evaluation.reward_accuracy,
        **{f"{region}_edit": getattr(evaluation.shift, region)._asdict() for region in ("before", "at", "after")},
    }


def format_evaluation(evaluation: PairEvaluation) -> str:
    """A few lines for the terminal."""
    lines = [
        f"chosen    {evaluation.chosen_logratio:+9.2f} nats per answer against the reference",
        f"rejected  {evaluation.rejected_logratio:+9.2f} nats per answer",
        f"reward accuracy {evaluation.reward_accuracy:.1%}",
    ]
    for region in ("before", "at", "after"):
        part = getattr(evaluation.shift, region)
        lines.append(f"{region:>6} the edit {part.mean_change:+8.3f} nats per token ({part.num_tokens} tokens)")
    return "\n".join(lines)


def _train_and_save(trainer: HeadTrainer, config: HeadConfig) -> None:
    assert config.output_dir is not None
    folder = Path(config.output_dir)
    checkpoint: str | bool | None = config.resume_from_checkpoint
    if checkpoint is None and last_checkpoint(folder) is not None:
        checkpoint = True
    if checkpoint is not None and trainer.is_world_process_zero():
        print(f"Resuming from {last_checkpoint(folder) if checkpoint is True else checkpoint}")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if trainer.is_world_process_zero():
        mark_finished(folder, trainer.run_config, step=trainer.state.global_step)
        print(f"Saved to {folder}: the model, {CONFIG_FILE}, {ENVIRONMENT_FILE}, {METRICS_FILE}, {PLOT_FILE}")


def _load_data(arguments: DataArguments) -> tuple[Dataset, Dataset | None]:
    if not arguments.dataset_name:
        raise ValueError("dataset_name: expected a hub id or a local file, got none. Set it in the YAML or as a flag.")

    def load(source: str, split: str) -> Dataset:
        return load_pairs(source, split=split, name=arguments.dataset_config)

    train_dataset = load(arguments.dataset_name, arguments.dataset_train_split)
    if arguments.max_train_pairs is not None:
        train_dataset = train_dataset.select(range(min(arguments.max_train_pairs, len(train_dataset))))
    eval_dataset = None
    if arguments.eval_dataset_name:
        eval_dataset = load(arguments.eval_dataset_name, arguments.dataset_test_split or "train")
    elif arguments.dataset_test_split:
        eval_dataset = load(arguments.dataset_name, arguments.dataset_test_split)
    return train_dataset, eval_dataset


def _load_model(arguments: ModelArguments) -> PreTrainedModel:
    if not arguments.model_name_or_path:
        raise ValueError("model_name_or_path: expected a hub id or a local folder, got none.")
    quantization_config = None
    if arguments.load_in_4bit:
        import torch
        from transformers import BitsAndBytesConfig

        if not torch.cuda.is_available():
            raise ValueError("load_in_4bit: expected a CUDA device (bitsandbytes needs one), found none.")
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return load_model(arguments.model_name_or_path, _init_kwargs(arguments), quantization_config)


def _init_kwargs(arguments: ModelArguments) -> dict[str, Any]:
    kwargs = {
        "revision": arguments.model_revision,
        "dtype": arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
        "trust_remote_code": arguments.trust_remote_code or None,
    }
    return {key: value for key, value in kwargs.items() if value is not None}


def _peft_config(arguments: ModelArguments) -> LoraConfig | None:
    if not arguments.use_peft:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules or "all-linear",
        modules_to_save=arguments.lora_modules_to_save,
    )
