"""Whole runs as the command line starts them: load, train, save."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dpop_trainer.data import SourceStream, read_pairs
from dpop_trainer.data.encode import check_tokenizer
from dpop_trainer.data.mixture import DatasetSource, mix_pairs, mix_streams, parse_sources
from dpop_trainer.data.stream import RowStream, ShuffledStream
from dpop_trainer.models.model_setup import init_kwargs, lora_config, quantization_config, tokenizer_of
from dpop_trainer.run_folder.checkpoints import last_checkpoint
from dpop_trainer.run_folder.files import check_writable
from dpop_trainer.run_folder.finished import is_finished, mark_finished
from dpop_trainer.run_folder.run_files import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, PLOT_FILE
from dpop_trainer.settings.arguments import DataArguments, ModelArguments, run_config
from dpop_trainer.settings.config import DPOPConfig, HeadConfig, SFTConfig
from dpop_trainer.settings.run_inputs import check_data, model_name
from dpop_trainer.training.base import HeadTrainer
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
    whole_config = run_config(model_arguments, data_arguments, config)
    check_writable(str(config.output_dir))
    if is_finished(config.output_dir, whole_config):
        return None
    train_dataset, eval_dataset = _load_data(data_arguments, config)
    if max_eval_pairs is not None:
        eval_dataset = first_pairs(eval_dataset, max_eval_pairs)
    tokenizer = _tokenizer_for(model_arguments, config, train_dataset, eval_dataset)
    config.model_init_kwargs = init_kwargs(model_arguments, config)
    trainer = DPOPTrainer(
        model_name(model_arguments),
        ref_model=model_arguments.ref_model_name_or_path,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=quantization_config(model_arguments, config),
        peft_config=lora_config(model_arguments),
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
    check_writable(str(config.output_dir))
    if is_finished(config.output_dir, whole_config):
        return None
    train_dataset, eval_dataset = _load_data(data_arguments, config, completions=True)
    tokenizer = _tokenizer_for(model_arguments, config, train_dataset, eval_dataset)
    config.model_init_kwargs = init_kwargs(model_arguments, config)
    trainer = SFTTrainer(
        model_name(model_arguments),
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=quantization_config(model_arguments, config),
        peft_config=lora_config(model_arguments),
        run_config=whole_config,
    )
    _train_and_save(trainer, config)
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


def _load_data(arguments: DataArguments, config: HeadConfig, *, completions: bool = False) -> tuple[Any, Any]:
    """The training data and the evaluation data (one data set, several by name, or none), read but not tokenised."""
    check_data(arguments)
    source, mixture, limit = arguments.dataset_name, arguments.dataset_mixture, arguments.max_train_pairs
    options: dict[str, Any] = {"name": arguments.dataset_config, "completions": completions}
    if arguments.streaming:
        return _stream(arguments, config, limit, options), _load_eval(arguments, config, options)
    if mixture:
        train_dataset = mix_pairs(
            parse_sources(mixture, "dataset_mixture"),
            seed=config.seed,
            completions=completions,
            num_proc=config.dataset_num_proc,
        )
    else:
        assert source is not None
        train_dataset = read_pairs(source, arguments.dataset_train_split, num_proc=config.dataset_num_proc, **options)
    if limit is not None:
        train_dataset = train_dataset.select(range(min(limit, len(train_dataset))))
    return train_dataset, _load_eval(arguments, config, options)


def _stream(arguments: DataArguments, config: HeadConfig, limit: int | None, options: dict[str, Any]) -> RowStream:
    if arguments.dataset_mixture:
        if limit is not None:
            raise ValueError(
                f"max_train_pairs: expected None with a streamed mixture, which has no end, got {limit}. "
                "Set max_steps, or num_pairs for each data set."
            )
        sources = parse_sources(arguments.dataset_mixture, "dataset_mixture")
        stream = mix_streams(sources, seed=config.seed, completions=options["completions"])
    else:
        stream = SourceStream(arguments.dataset_name, arguments.dataset_train_split, limit=limit, **options)
    if arguments.shuffle_buffer_size < 2:
        return stream
    return ShuffledStream(stream, arguments.shuffle_buffer_size, config.seed)


def _load_eval(arguments: DataArguments, config: HeadConfig, options: dict[str, Any]) -> Any:
    options = {**options, "num_proc": config.dataset_num_proc}
    if arguments.eval_datasets:
        if arguments.eval_dataset_name or arguments.dataset_test_split:
            raise ValueError(
                "eval_datasets: expected neither eval_dataset_name nor dataset_test_split beside it, got one. "
                "Give that data set in the list too."
            )
        sources = parse_sources(arguments.eval_datasets, "eval_datasets")
        names = [source.shown for source in sources]
        if len(set(names)) < len(names):
            raise ValueError(f"eval_datasets: expected names of their own, got {names}. Give each a label.")
        return {source.shown: _read_eval(source, config, options["completions"]) for source in sources}
    if arguments.eval_dataset_name:
        return read_pairs(arguments.eval_dataset_name, arguments.dataset_test_split or "train", **options)
    if not arguments.dataset_test_split:
        return None
    if not arguments.dataset_name:
        raise ValueError(
            "dataset_test_split: expected a dataset_name beside it, got a mixture. Use eval_datasets with a split each."
        )
    if Path(arguments.dataset_name).expanduser().is_file():
        raise ValueError(
            f"dataset_test_split: expected a data set with several splits, got the file {arguments.dataset_name}, all "
            "of which is trained on. Evaluate on another file with eval_dataset_name."
        )
    return read_pairs(arguments.dataset_name, arguments.dataset_test_split, **options)


def load_eval_data(arguments: DataArguments, config: HeadConfig, *, completions: bool = False) -> Any:
    """The evaluation data (one data set, several by name, or none), read but not tokenised."""
    return _load_eval(arguments, config, {"name": arguments.dataset_config, "completions": completions})


def first_pairs(dataset: Any, num_pairs: int) -> Any:
    """The first so many pairs of a data set, or of each of several by name."""
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        return {name: first_pairs(part, num_pairs) for name, part in dataset.items()}
    return dataset.select(range(min(num_pairs, len(dataset))))


def _read_eval(source: DatasetSource, config: HeadConfig, completions: bool) -> Any:
    """One evaluation set: a mixture of one, so that num_pairs and fraction mean what they do there."""
    return mix_pairs([source], seed=config.seed, completions=completions, num_proc=config.dataset_num_proc)
