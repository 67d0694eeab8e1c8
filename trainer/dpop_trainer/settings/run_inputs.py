"""What a run is to read and where it is to write: named before anything is imported that loads it."""

from pathlib import Path

from dpop_trainer.data.source_path import check_source_path
from dpop_trainer.run_folder.files import check_writable
from dpop_trainer.settings.arguments import DataArguments, ModelArguments
from dpop_trainer.settings.model_paths import (
    adapter_on_adapter,
    check_local_path,
    check_model_path,
    is_adapter_folder,
    is_gguf,
)


def check_inputs(model: ModelArguments, data: DataArguments, output_dir: str | None) -> None:
    """Look for what is named. That something is not named at all is told later, after what the configuration refuses.

    Args:
        model: of which model and reference are looked for.
        data: of which the data sets to train and evaluate on are looked for; of a mixture, when it is read.
        output_dir: where the run writes. Where it is there, only that is checked: a run that is finished needs nothing.

    Raises:
        FileNotFoundError: a file or folder of data is not there.
        ValueError: a name is not that of what is expected there.
    """
    if output_dir is not None:
        check_writable(output_dir)
        if Path(output_dir).exists():
            return
    if data.dataset_name or data.dataset_mixture:
        check_data(data)
    for source in (data.dataset_name, None if data.eval_datasets else data.eval_dataset_name):
        if source:
            check_source_path(source)
    if model.model_name_or_path:
        model_name(model)
    if model.ref_model_name_or_path:
        check_local_path(model.ref_model_name_or_path, "")


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
