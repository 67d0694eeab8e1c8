"""Whole runs as the command line starts them: load, train, save."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dpop_trainer.data.encode import check_tokenizer
from dpop_trainer.inputs.data_sets import first_pairs, load_eval_data, load_train_data
from dpop_trainer.inputs.model_setup import (
    init_kwargs,
    lora_config,
    quantization_config,
    tokenizer_of,
    with_model_folder,
)
from dpop_trainer.report.run_page import PAGE_FILE
from dpop_trainer.run_folder.checkpoints import last_checkpoint
from dpop_trainer.run_folder.files import check_writable
from dpop_trainer.run_folder.finished import finished_already, mark_finished
from dpop_trainer.run_folder.lock import check_not_running
from dpop_trainer.run_folder.run_files import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE
from dpop_trainer.settings.arguments import DataArguments, ModelArguments, run_config
from dpop_trainer.settings.config import DPOPConfig, HeadConfig, SFTConfig
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.run_inputs import model_name, train_paths
from dpop_trainer.settings.terminal import say
from dpop_trainer.settings.under_way import under_way
from dpop_trainer.training.base import HeadTrainer
from dpop_trainer.training.last_words import last_words
from dpop_trainer.training.sft import SFTTrainer
from dpop_trainer.training.trainer import DPOPTrainer


def run_train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    config: DPOPConfig,
    *,
    max_eval_pairs: int | None = None,
) -> DPOPTrainer | None:
    """Preference fine-tuning from arguments to a saved model in config.output_dir; resumes what was interrupted.

    Args:
        model_arguments: the model and its adapter.
        data_arguments: the pairs.
        config: everything else.
        max_eval_pairs: evaluate on the first so many held-out pairs.

    Returns:
        The trainer; None where this very run is finished already, which is said.

    Raises:
        ValueError: an argument or the data cannot be used, or the folder holds another run.
    """
    return _run(DPOPTrainer, model_arguments, data_arguments, config, max_eval_pairs=max_eval_pairs)


def run_sft(model_arguments: ModelArguments, data_arguments: DataArguments, config: SFTConfig) -> SFTTrainer | None:
    """Supervised fine-tuning on the chosen answers (or completions) from arguments to a saved model.

    Returns:
        The trainer; None where this very run is finished already, which is said.

    Raises:
        ValueError: an argument or the data cannot be used, or the folder holds another run.
    """
    return _run(SFTTrainer, model_arguments, data_arguments, config, completions=True)


def _run(
    trainer_class: type[Any],
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    config: Any,
    *,
    completions: bool = False,
    max_eval_pairs: int | None = None,
) -> Any:
    """What both runs are; a preference run alone has a reference."""
    check_writable(str(config.output_dir))
    check_not_running(str(config.output_dir))
    model_arguments = with_model_folder(model_arguments)
    whole_config = run_config(model_arguments, data_arguments, config)
    with under_way(f"Looking at {config.output_dir}"):
        finished = finished_already(config.output_dir, whole_config)
    if finished is not None:
        if os.environ.get("RANK", "0") == "0":
            say(finished)
        return None
    with doing(_reading(data_arguments)):
        train_dataset = load_train_data(data_arguments, config, completions=completions)
    with doing(_reading_held_out(data_arguments)):
        eval_dataset = load_eval_data(data_arguments, config, completions=completions)
    if max_eval_pairs is not None:
        eval_dataset = first_pairs(eval_dataset, max_eval_pairs)
    with doing(f"loading the tokenizer of {model_arguments.model_name_or_path!r}"):
        tokenizer = _tokenizer_for(model_arguments, config, train_dataset, eval_dataset)
    config.model_init_kwargs = init_kwargs(model_arguments, config)
    reference = {} if completions else {"ref_model": model_arguments.ref_model_name_or_path}
    with doing(_preparing(model_arguments, data_arguments), str(config.output_dir)):
        trainer = trainer_class(
            model_name(model_arguments),
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            quantization_config=quantization_config(model_arguments, config),
            peft_config=lora_config(model_arguments),
            run_config=whole_config,
            **reference,
        )
    _train_and_save(trainer, config, data_arguments)
    return trainer


def _tokenizer_for(
    arguments: ModelArguments, config: HeadConfig, train_dataset: Any, eval_dataset: Any
) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ValueError: it cannot read the pairs, having no chat template for messages: told before the weights are loaded.
    """
    tokenizer = tokenizer_of(arguments, config)
    if config.chat_template_path is None:
        evaluated = eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]
        for dataset in (train_dataset, *evaluated):
            if isinstance(dataset, Dataset):  # rows of `read_pairs`; of a stream nothing is known before it is read
                check_tokenizer(tokenizer, dataset.unique("kind"))
    return tokenizer


def _reading(arguments: DataArguments) -> str:
    return f"reading the data {', '.join(train_paths(arguments)) or '(none named)'}"


def _reading_held_out(arguments: DataArguments) -> str:
    sources = arguments.eval_datasets or [arguments.eval_dataset_name or arguments.dataset_test_split]
    return f"reading the held-out data {', '.join(map(str, sources))}"


def _preparing(model: ModelArguments, data: DataArguments) -> str:
    return f"loading the model {model.model_name_or_path!r} and preparing {', '.join(train_paths(data))}"


def _train_and_save(trainer: HeadTrainer, config: HeadConfig, data_arguments: DataArguments) -> None:
    assert config.output_dir is not None
    folder = Path(config.output_dir)
    with trainer.folder_held():
        checkpoint: str | bool | None = config.resume_from_checkpoint
        if checkpoint is None and last_checkpoint(folder) is not None:
            checkpoint = True
        if checkpoint is not None and trainer.is_world_process_zero():
            say(f"Resuming from {last_checkpoint(folder) if checkpoint is True else checkpoint}")
        begun = "" if checkpoint is None else f", from {last_checkpoint(folder) if checkpoint is True else checkpoint}"
        with doing(f"training in {folder}{begun}", folder):
            result = trainer.train(resume_from_checkpoint=checkpoint)
        with doing(f"saving the model to {folder}", folder):
            trainer.save_model()
            trainer.save_state()
            trainer.log_metrics("train", result.metrics)
            trainer.save_metrics("train", result.metrics)
        if trainer.is_world_process_zero():
            with under_way(f"Hashing what is in {folder}"):
                mark_finished(
                    folder, trainer.run_config, step=trainer.state.global_step, sources=train_paths(data_arguments)
                )
            say(f"Saved to {folder}: the model, {CONFIG_FILE}, {ENVIRONMENT_FILE}, {METRICS_FILE}, {PAGE_FILE}")
            held_out = data_arguments.eval_dataset_name
            for line in last_words(folder, trainer.state.log_history, trainer.preparation.counts, held_out):
                say(line)
