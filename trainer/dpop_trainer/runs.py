"""Whole runs as the command line starts them: load, train, save."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from dpop_trainer.arguments import DataArguments, ModelArguments, run_config
from dpop_trainer.base import HeadTrainer
from dpop_trainer.config import DPOPConfig, HeadConfig, SFTConfig
from dpop_trainer.data import load_pairs
from dpop_trainer.loading import load_model, load_tokenizer
from dpop_trainer.sft import SFTTrainer
from dpop_trainer.trainer import DPOPTrainer


def run_train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    config: DPOPConfig,
    *,
    max_eval_pairs: int | None = None,
) -> DPOPTrainer:
    """Preference fine-tuning from arguments to a saved model in config.output_dir; resumes what was interrupted.

    Args:
        model_arguments: the model and its adapter.
        data_arguments: the pairs.
        config: everything else.
        max_eval_pairs: evaluate on the first so many held-out pairs.

    Raises:
        ValueError: an argument or the data cannot be used.
    """
    settings = run_config(model_arguments, data_arguments, config)
    train_dataset, eval_dataset = _load_data(data_arguments)
    if eval_dataset is not None and max_eval_pairs is not None:
        eval_dataset = eval_dataset.select(range(min(max_eval_pairs, len(eval_dataset))))
    if model_arguments.ref_model_name_or_path and model_arguments.trust_remote_code:
        own: Any = config.ref_model_init_kwargs
        config.ref_model_init_kwargs = {"trust_remote_code": True, **(own or {})}
    trainer = DPOPTrainer(
        _load_model(model_arguments),
        ref_model=model_arguments.ref_model_name_or_path,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=load_tokenizer(model_arguments.model_name_or_path),
        peft_config=_peft_config(model_arguments),
        run_config=settings,
    )
    _train_and_save(trainer, config)
    return trainer


def run_sft(model_arguments: ModelArguments, data_arguments: DataArguments, config: SFTConfig) -> SFTTrainer:
    """Supervised fine-tuning on the chosen answers (or completions) from arguments to a saved model.

    Raises:
        ValueError: an argument or the data cannot be used.
    """
    train_dataset, eval_dataset = _load_data(data_arguments)
    trainer = SFTTrainer(
        _load_model(model_arguments),
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=load_tokenizer(model_arguments.model_name_or_path),
        peft_config=_peft_config(model_arguments),
        run_config=run_config(model_arguments, data_arguments, config),
    )
    _train_and_save(trainer, config)
    return trainer


def _train_and_save(trainer: HeadTrainer, config: HeadConfig) -> None:
    checkpoint: Any = config.resume_from_checkpoint
    assert config.output_dir is not None
    if checkpoint is None and Path(config.output_dir).is_dir():
        checkpoint = get_last_checkpoint(config.output_dir)
    if checkpoint is not None:
        print(f"Resuming from {checkpoint}")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if trainer.is_world_process_zero():
        print(f"Saved to {config.output_dir}: the model, config.yaml, metrics.jsonl, metrics.png")


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
