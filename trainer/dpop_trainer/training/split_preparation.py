"""A split of pairs made ready for training: checked against the configuration, tokenised, counted."""

import logging
from typing import Any

from dpop_trainer.data import SkippedRecords, TokenisedStream, tokenise_pairs
from dpop_trainer.data.records import BadRecord
from dpop_trainer.data.stream import as_stream, is_stream
from dpop_trainer.models.loading import Policy
from dpop_trainer.models.positions import usable_positions
from dpop_trainer.settings.config import HeadConfig

logger = logging.getLogger(__name__)


def check_streams(args: HeadConfig, train_dataset: Any, *eval_datasets: Any) -> None:
    """
    Raises:
        ValueError: data sets are streamed, and the configuration asks for what only whole ones allow.
    """
    if is_stream(train_dataset) and getattr(args, "max_tokens_per_batch", None) is not None:
        raise ValueError(
            "max_tokens_per_batch: expected None with a streamed train_dataset, whose lengths are not known, got "
            f"{args.max_tokens_per_batch}. Set per_device_train_batch_size, or load it whole."  # type: ignore[attr-defined]
        )
    if is_stream(train_dataset) and args.max_steps <= 0:
        raise ValueError(
            f"max_steps: expected the number of optimizer steps, since train_dataset is streamed and has no length, "
            f"got {args.max_steps}. Set max_steps, or load the data set whole."
        )
    if not any(map(is_stream, (train_dataset, *eval_datasets))):
        return
    if args.accelerator_config.dispatch_batches:  # type: ignore[union-attr]
        raise ValueError(
            "accelerator_config.dispatch_batches: expected None or False, got True. Batches are packed and cannot be "
            "split by rows; every process reads the stream and takes its share."
        )
    if args.dataloader_num_workers:
        raise ValueError(
            f"dataloader_num_workers: expected 0 with a streamed data set, whose records are tokenised and counted by "
            f"the training process, got {args.dataloader_num_workers}."
        )


def tokenise_for_training(
    dataset: Any,
    name: str,
    policy: Policy,
    args: HeadConfig,
    data_metrics: dict[str, float],
    *,
    keep_identical: bool,
    skipped: SkippedRecords | None = None,
    completions: bool = False,
    repeat: bool = False,
) -> Any:
    """Tokenise a split as the configuration says, tell what became of its pairs, and add the counts to data_metrics.

    Args:
        dataset: pairs in any form, rows of `read_pairs`, or a stream of either, which is tokenised as it is read.
        name: of the split, in messages and counts: "train", "eval", or an evaluation set's name.
        policy: whose tokenizer and vocabulary are used.
        args: the configuration.
        data_metrics: is given the counts; those of a stream are logged as it runs.
        keep_identical: keep pairs whose two answers have the same tokens.
        skipped: is given the records that are left out.
        completions: take prompt and completion too.
        repeat: a stream begins anew when it ends.

    Returns:
        A tokenised Dataset or `TokenisedStream`; None for None.

    Raises:
        ValueError: the data cannot be used: what, where, and the remedy.
    """
    if dataset is None:
        return None
    max_positions = usable_positions(policy.model, args.pad_to_multiple_of)  # type: ignore[arg-type]
    if is_stream(dataset):
        return TokenisedStream(
            as_stream(dataset, completions=completions),
            policy.tokenizer,
            name=name,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,  # type: ignore[arg-type]
            keep_identical=keep_identical,
            vocab_size=policy.vocab_size,
            max_positions=max_positions,
            on_bad_record=args.on_bad_record,  # type: ignore[arg-type]
            skipped=skipped,
            repeat=repeat,
        )

    def on_skipped(bad_records: list[BadRecord]) -> None:
        if skipped is not None and args.process_index == 0:
            skipped.add(name, bad_records)

    with args.main_process_first(desc="tokenising"):  # the others find its work in the cache
        dataset, counts = tokenise_pairs(
            dataset,
            policy.tokenizer,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,  # type: ignore[arg-type]
            num_proc=args.dataset_num_proc,
            keep_identical=keep_identical,
            vocab_size=policy.vocab_size,
            max_positions=max_positions,
            on_bad_record=args.on_bad_record,  # type: ignore[arg-type]
            on_skipped=on_skipped,
            completions=completions,
        )
    logger.warning("%s data: %s", name, counts.summary())
    data_metrics.update({f"{name}_{key}": value for key, value in counts.as_metrics().items()})
    return dataset
