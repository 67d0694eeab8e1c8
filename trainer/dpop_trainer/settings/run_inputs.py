"""What a run is to read and where it is to write: named before anything is imported that loads it."""

from pathlib import Path
from typing import Any

from dpop_trainer.data.dataset_source import parse_sources
from dpop_trainer.data.source_path import check_source_path, expanded
from dpop_trainer.run_folder.files import check_writable
from dpop_trainer.settings.arguments import DataArguments, ModelArguments
from dpop_trainer.settings.model_folder import check_model_folder, check_reads
from dpop_trainer.settings.model_paths import (
    adapter_on_adapter,
    check_local_path,
    check_model_path,
    is_adapter_folder,
    is_gguf,
)


def check_inputs(model: ModelArguments, data: DataArguments, config: Any, *, completions: bool = False) -> None:
    """Look for what is named. That something is not named at all is told later, after what the configuration refuses.

    Args:
        model: of which model and reference are looked for.
        data: of which the data sets to train and evaluate on are looked for.
        config: where the run writes, and the template it gives the tokenizer. Where that folder is there, only that is
            checked: a run that is finished needs nothing.
        completions: prompt and completion are a form of the data too.

    Raises:
        FileNotFoundError: a file or folder of data is not there.
        ValueError: a name is not that of what is expected there, a local model lacks a part, or the pairs cannot be
            read with its tokenizer.
    """
    if config.output_dir is not None:
        check_writable(config.output_dir)
        if Path(config.output_dir).exists():
            return
    if data.dataset_name or data.dataset_mixture:
        check_data(data)
    check_eval_data(data)
    sources = [*train_paths(data), *eval_paths(data)]
    for source in sources:
        check_source_path(source)
    if model.ref_model_name_or_path:
        check_local_path(model.ref_model_name_or_path, "")
    if not model.model_name_or_path:
        return
    name = model_name(model)
    if expanded(name).is_dir():  # a hub id may be an adapter
        has_adapter = is_adapter_folder(name) or bool(model.use_peft or model.peft_config)
        check_bits(model, has_adapter=has_adapter, has_gpu=True)
    if not config.model_init_kwargs:  # which may name other files
        check_model_folder(name)
    for source in sources:
        check_reads(name, source, completions=completions, has_template=config.chat_template_path is not None)


def check_data(arguments: DataArguments) -> None:
    """
    Raises:
        ValueError: there is nothing to train on, or it is given twice.
    """
    source, mixture = arguments.dataset_name, arguments.dataset_mixture
    if not source and not mixture:
        raise ValueError("dataset_name: expected a hub id or a local file, got none. Set it in the YAML or as a flag.")
    if source and mixture:
        raise ValueError("dataset_mixture: expected none beside dataset_name, got both. Put all into the mixture.")
    limit = arguments.max_train_pairs
    if limit is not None and limit < 1:
        raise ValueError(f"max_train_pairs: expected at least 1, got {limit}. Leave it out to train on all.")


def check_eval_data(arguments: DataArguments) -> None:
    """
    Raises:
        ValueError: what to evaluate on is given twice.
    """
    if arguments.eval_datasets and (arguments.eval_dataset_name or arguments.dataset_test_split):
        raise ValueError(
            "eval_datasets: expected neither eval_dataset_name nor dataset_test_split beside it, got one. "
            "Give that data set in the list too."
        )


def train_paths(arguments: DataArguments) -> list[str]:
    """Where the training data are read from: files, folders and hub ids."""
    if not arguments.dataset_mixture:
        return [arguments.dataset_name] if arguments.dataset_name else []
    return [source.path for source in parse_sources(arguments.dataset_mixture, "dataset_mixture")]


def eval_paths(arguments: DataArguments) -> list[str]:
    """Where evaluation data of their own are read from, other than splits of the training data."""
    if arguments.eval_datasets:
        return [source.path for source in parse_sources(arguments.eval_datasets, "eval_datasets")]
    return [arguments.eval_dataset_name] if arguments.eval_dataset_name else []


def model_name(arguments: ModelArguments) -> str:
    """
    Raises:
        ValueError: there is none, or it is a local folder without a model, or an adapter on which another is asked for.
    """
    if not arguments.model_name_or_path:
        raise ValueError("model_name_or_path: expected a hub id or a local folder, got none. Set it in the YAML file.")
    if is_gguf(arguments.model_name_or_path):
        return arguments.model_name_or_path  # a run begins by making a folder of it
    check_model_path(arguments.model_name_or_path)
    if (arguments.use_peft or arguments.peft_config) and is_adapter_folder(arguments.model_name_or_path):
        raise ValueError(adapter_on_adapter(arguments.model_name_or_path))
    return arguments.model_name_or_path


def check_bits(arguments: ModelArguments, *, has_adapter: bool, has_gpu: bool) -> None:
    """Whether a base in 4 or 8 bits can be trained, be it planned or done.

    Args:
        arguments: what is asked for.
        has_adapter: an adapter is trained on it.
        has_gpu: the run has a CUDA device.

    Raises:
        ValueError: there is no adapter to train on it, or 8 bits are asked for on a CPU.
    """
    if not (arguments.load_in_4bit or arguments.load_in_8bit):
        return
    if not has_adapter:
        name = "load_in_4bit" if arguments.load_in_4bit else "load_in_8bit"
        raise ValueError(
            f"{name}: expected an adapter to train, got none: rounded weights take no gradient. Set use_peft to true."
        )
    if arguments.load_in_8bit and not has_gpu:
        raise ValueError(
            "load_in_8bit: expected a CUDA device, found none. On a CPU bitsandbytes rounds the inputs of 8-bit "
            "layers in evaluation and not in training, so that policy and reference would differ from the start. "
            "Use load_in_4bit."
        )
