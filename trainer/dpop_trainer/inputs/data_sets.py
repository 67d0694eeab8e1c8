"""The data sets that a run's arguments name: read as rows of pairs, not tokenised yet."""

from collections.abc import Mapping
from typing import Any

from dpop_trainer.data import SourceStream, read_pairs
from dpop_trainer.data.dataset_source import DatasetSource, parse_sources
from dpop_trainer.data.mixture import mix_pairs, mix_streams
from dpop_trainer.data.source_path import expanded
from dpop_trainer.data.stream import RowStream, ShuffledStream
from dpop_trainer.settings.arguments import DataArguments
from dpop_trainer.settings.config import HeadConfig
from dpop_trainer.settings.run_inputs import check_data, check_eval_data


def load_train_data(arguments: DataArguments, config: HeadConfig, *, completions: bool = False) -> Any:
    """The training data, read but not tokenised: a data set, or a stream where one is asked for.

    Args:
        arguments: what is named.
        config: the seed of a mixture and of shuffling, the processes that read.
        completions: take prompt and completion too, for supervised fine-tuning.

    Raises:
        FileNotFoundError: there is no such file, folder or hub data set.
        ValueError: nothing is named, or it is given twice, or cannot be read.
    """
    check_data(arguments)
    source, mixture, limit = arguments.dataset_name, arguments.dataset_mixture, arguments.max_train_pairs
    options: dict[str, Any] = {"name": arguments.dataset_config, "completions": completions}
    if arguments.streaming:
        return _stream(arguments, config, limit, options)
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
    return train_dataset


def load_eval_data(arguments: DataArguments, config: HeadConfig, *, completions: bool = False) -> Any:
    """The evaluation data (one data set, several by name, or none), read but not tokenised.

    Raises:
        FileNotFoundError: there is no such file, folder or hub data set.
        ValueError: it is given twice, or cannot be told from the training data, or cannot be read.
    """
    options: dict[str, Any] = {
        "name": arguments.dataset_config,
        "completions": completions,
        "num_proc": config.dataset_num_proc,
    }
    check_eval_data(arguments)
    if arguments.eval_datasets:
        sources = parse_sources(arguments.eval_datasets, "eval_datasets")
        names = [source.shown for source in sources]
        if len(set(names)) < len(names):
            raise ValueError(f"eval_datasets: expected names of their own, got {names}. Give each a label.")
        return {source.shown: _read_eval(source, config, completions) for source in sources}
    if arguments.eval_dataset_name:
        return read_pairs(arguments.eval_dataset_name, arguments.dataset_test_split or "train", **options)
    if not arguments.dataset_test_split:
        return None
    if not arguments.dataset_name:
        raise ValueError(
            "dataset_test_split: expected a dataset_name beside it, got a mixture. Use eval_datasets with a split each."
        )
    if expanded(arguments.dataset_name).is_file():
        raise ValueError(
            f"dataset_test_split: expected a data set with several splits, got the file {arguments.dataset_name}, all "
            "of which is trained on. Evaluate on another file with eval_dataset_name."
        )
    return read_pairs(arguments.dataset_name, arguments.dataset_test_split, **options)


def first_pairs(dataset: Any, num_pairs: int) -> Any:
    """The first so many pairs of a data set, or of each of several by name."""
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        return {name: first_pairs(part, num_pairs) for name, part in dataset.items()}
    return dataset.select(range(min(num_pairs, len(dataset))))


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


def _read_eval(source: DatasetSource, config: HeadConfig, completions: bool) -> Any:
    """One evaluation set: a mixture of one, so that num_pairs and fraction mean what they do there."""
    return mix_pairs([source], seed=config.seed, completions=completions, num_proc=config.dataset_num_proc)
