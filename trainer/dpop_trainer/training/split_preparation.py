"""The splits of a run made ready for training: checked against the configuration, tokenised, counted."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from dpop_trainer.batches import with_lengths
from dpop_trainer.data import SkippedRecords, TokenisedStream, tokenise_pairs
from dpop_trainer.data.records import BadRecord
from dpop_trainer.data.stream import as_stream, is_stream
from dpop_trainer.data.tokenise import NoPairsError
from dpop_trainer.measure.stop_tokens import stop_token_ids
from dpop_trainer.models.loading import Policy
from dpop_trainer.models.positions import usable_positions
from dpop_trainer.settings.config import DPOPConfig, HeadConfig

logger = logging.getLogger(__name__)

_SAMPLED_BY_LENGTH = ("group_by_length", "batch_rebalance")


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


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a run makes pairs ready to train on or to be evaluated on; the same for each of its splits."""

    policy: Policy
    """Whose tokenizer and vocabulary are used."""
    args: HeadConfig
    keep_identical: bool
    """Keep pairs whose two answers have the same tokens."""
    skipped: SkippedRecords
    """Is given the records that are left out."""
    completions: bool = False
    """Take prompt and completion too."""
    counts: dict[str, float] = field(default_factory=dict)
    """What became of the pairs of the splits made ready so far. A stream's are logged as it runs."""

    def split(self, dataset: Any, name: str, *, repeat: bool = False) -> Any:
        """Tokenise a split as the configuration says, and tell what became of its pairs.

        Args:
            dataset: pairs in any form, rows of `read_pairs`, or a stream of either, which is tokenised as it is read;
                several of them by name.
            name: of the split, in messages and counts: "train", "eval". Of several each has its own.
            repeat: a stream begins anew when it ends.

        Returns:
            A tokenised Dataset or `TokenisedStream`, several of them by name, or None for None.

        Raises:
            ValueError: the data cannot be used: what, where, and the remedy.
        """
        if dataset is None:
            return None
        if isinstance(dataset, Mapping):
            return {part_name: self.split(part, part_name) for part_name, part in dataset.items()}
        return self._streamed(dataset, name, repeat) if is_stream(dataset) else self._tokenised(dataset, name)

    def _streamed(self, dataset: Any, name: str, repeat: bool) -> TokenisedStream:
        return TokenisedStream(
            as_stream(dataset, completions=self.completions),
            self.policy.tokenizer,
            name=name,
            skipped=self.skipped,
            repeat=repeat,
            **self._options(),
        )

    def _tokenised(self, dataset: Any, name: str) -> Dataset:
        args = self.args
        shown = {"train": "train_dataset", "eval": "eval_dataset"}.get(name, f"eval_dataset {name!r}")
        if not len(dataset):
            raise ValueError(f"{shown}: expected at least one pair, got an empty data set. Leave it out, or fill it.")

        def on_skipped(bad_records: list[BadRecord]) -> None:
            if args.process_index == 0:
                self.skipped.add(name, bad_records)

        with args.main_process_first(desc="tokenising"):  # the others find its work in the cache
            try:
                tokenised, counts = tokenise_pairs(
                    dataset,
                    self.policy.tokenizer,
                    num_proc=args.dataset_num_proc,
                    on_skipped=on_skipped,
                    completions=self.completions,
                    **self._options(),
                )
            except NoPairsError as error:
                raise ValueError(f"{shown}: {str(error).removeprefix('dataset: ')}") from error
        logger.warning("%s data: %s", name, counts.summary())
        self.counts.update({f"{name}_{key}": value for key, value in counts.as_metrics().items()})
        return self._with_lengths(tokenised) if name == "train" else self._with_prompts(tokenised)

    def _with_prompts(self, dataset: Dataset) -> Dataset:
        """Pairs that are evaluated keep their prompts as text, for callbacks that have them completed (TRL has one)."""
        tokenizer: Any = self.policy.tokenizer

        def text(ids: list[int]) -> str:
            begin = int(ids[:1] == [tokenizer.bos_token_id])  # which the tokenizer will put there again
            return tokenizer.decode(ids[begin:])

        return dataset.add_column("prompt", [text(ids) for ids in dataset["prompt_ids"]])  # type: ignore[call-arg]

    def _with_lengths(self, dataset: Dataset) -> Dataset:
        """Pairs that are batched by length bring it along, in the column that transformers' samplers read."""
        args = self.args
        if not isinstance(args, DPOPConfig) or args.train_sampling_strategy not in _SAMPLED_BY_LENGTH:
            return dataset
        return with_lengths(dataset, args.length_column_name, prefix_sharing=args.prefix_sharing)

    def _options(self) -> dict[str, Any]:
        args = self.args
        return {
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
            "keep_identical": self.keep_identical,
            "vocab_size": self.policy.vocab_size,
            "max_positions": usable_positions(self.policy.model, args.row_multiple),
            "stop_ids": stop_token_ids(self.policy.model, self.policy.tokenizer),
            "on_bad_record": args.on_bad_record,
            "pair_weight": getattr(args, "pair_weight", "none"),
        }
