"""Pairs that are read, converted, tokenised and cut as training needs them, with the same counts as a whole data set.

A `RowStream` gives rows of `convert.ROW_FEATURES`, pass after pass; `TokenisedStream` makes of it what a data loader
takes.
"""

import itertools
import logging
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import torch.utils.data
from datasets import Dataset

from dpop_trainer.data.convert import ROW_FEATURES
from dpop_trainer.data.counts import NO_COUNTS, TokeniseCounts
from dpop_trainer.data.encode import check_tokenizer
from dpop_trainer.data.forms import Form
from dpop_trainer.data.outcomes import count_outcomes, judge_outcomes
from dpop_trainer.data.pair_weights import WEIGHT_COLUMN, PairWeight, check_pair_weight
from dpop_trainer.data.read import item_row, recognise_items, stream_items
from dpop_trainer.data.records import ALL_REF_COLUMNS, TOKEN_COLUMNS, BadRecord, raise_bad_records
from dpop_trainer.data.sample import SAMPLE_SIZE
from dpop_trainer.data.skipped import SkippedRecords
from dpop_trainer.data.tokenise import (
    SKIP_REMEDY,
    OnBadRecord,
    as_table,
    check_on_bad_record,
    tokenise_rows,
    warn_lost,
    warn_skipped,
)
from dpop_trainer.data.truncate import TruncationMode, check_truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

Row = dict[str, Any]

_BATCH = 64  # records that are tokenised at once, and read ahead of training
_ENOUGH = 1000  # records by which a stream is judged


class RowStream:
    """Rows of pairs, good and bad, read as they are needed."""

    def rows(self, epoch: int) -> Iterator[Row]:
        """One pass; the same `epoch` gives the same rows in the same order."""
        raise NotImplementedError


@dataclass
class SourceStream(RowStream):
    """The rows of one source, in its own order.

    Raises:
        FileNotFoundError: when read: there is no such file, folder or hub data set.
        ValueError: when read: the source cannot be read, or its columns are those of no form.
    """

    source: Any
    """What `read_pairs` takes, or a datasets.IterableDataset."""
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    limit: int | None = None
    """Records of a pass at most."""
    completions: bool = False
    _form: Form | None = field(default=None, init=False, repr=False)

    def rows(self, epoch: int) -> Iterator[Row]:
        items = stream_items(self.source, self.split, name=self.name, revision=self.revision, epoch=epoch)
        if self._form is None:
            origin = "" if isinstance(self.source, datasets.IterableDataset | Dataset) else str(self.source)
            first = list(itertools.islice(items, SAMPLE_SIZE))
            self._form = recognise_items(first, origin, completions=self.completions)
            items = itertools.chain(first, items)
        for item in itertools.islice(items, self.limit):
            yield item_row(item, self._form)


class Part(NamedTuple):
    """One of several streams that are mixed."""

    stream: RowStream
    weight: float
    """How often a row is drawn from it, relative to the others."""


@dataclass
class MixedStream(RowStream):
    """Rows drawn at random from several streams by weight, without end: a stream that has ended begins anew."""

    parts: list[Part]
    seed: int

    def rows(self, epoch: int) -> Iterator[Row]:
        generator = random.Random(f"{self.seed} {epoch}")
        passes = [epoch] * len(self.parts)
        iterators = [part.stream.rows(epoch) for part in self.parts]
        weights = [part.weight for part in self.parts]
        while True:
            (drawn,) = generator.choices(range(len(self.parts)), weights)
            row = next(iterators[drawn], None)
            if row is None:
                passes[drawn] += 1
                iterators[drawn] = self.parts[drawn].stream.rows(passes[drawn])
                row = next(iterators[drawn], None)
                if row is None:
                    raise ValueError(
                        f"dataset_mixture: expected data set {drawn} (from 0) to begin anew when it ends, got no "
                        f"record in pass {passes[drawn]}. Give a source that can be read more than once."
                    )
            yield row


@dataclass
class ShuffledStream(RowStream):
    """Rows in an order of their own in each pass: each is drawn at random from the next `buffer_size`."""

    stream: RowStream
    buffer_size: int
    seed: int

    def rows(self, epoch: int) -> Iterator[Row]:
        generator = random.Random(f"{self.seed} {epoch}")
        buffer: list[Row] = []
        for row in self.stream.rows(epoch):
            if len(buffer) < self.buffer_size:
                buffer.append(row)
                continue
            drawn = generator.randrange(self.buffer_size)
            yield buffer[drawn]
            buffer[drawn] = row
        generator.shuffle(buffer)
        yield from buffer


class TokenisedStream(torch.utils.data.IterableDataset):
    """Tokenised pairs of a stream, as `tokenise_pairs` gives those of a whole data set.

    Every record that is read is counted, whatever becomes of it: `counts` says at any time what happened to those read
    since iteration began (a few more than were trained on: records are tokenised in batches, ahead).

    Args:
        stream: rows, see `SourceStream`.
        tokenizer: the model's.
        name: of the data set, in messages and counts.
        max_length, truncation_mode, keep_identical, vocab_size, max_positions, stop_ids: as in `tokenise_pairs`.
        on_bad_record: "error" stops at the first batch with a record that cannot be used and names it; "skip" leaves
            such records out and counts them.
        pair_weight: which weights pairs have in a loss; a record of another weight than 1 has the column.
        skipped: writes down what "skip" leaves out.
        repeat: begin anew when the stream ends, for training: without end, so that a resumed run goes on where it
            was. A pass that gives no pair stops it.

    Raises:
        ValueError: when read: what `tokenise_pairs` refuses.
    """

    def __init__(
        self,
        stream: RowStream,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        name: str,
        max_length: int | None = None,
        truncation_mode: TruncationMode = "keep_start",
        keep_identical: bool = False,
        vocab_size: int | None = None,
        max_positions: int | None = None,
        stop_ids: Collection[int] = (),
        on_bad_record: OnBadRecord = "error",
        pair_weight: PairWeight = "none",
        skipped: SkippedRecords | None = None,
        repeat: bool = False,
    ) -> None:
        check_truncation(max_length, truncation_mode)
        check_on_bad_record(on_bad_record)
        check_pair_weight(pair_weight)
        self._pair_weight: PairWeight = pair_weight
        self._stream, self._tokenizer, self._name = stream, tokenizer, name
        self._max_length = max_length
        self._truncation_mode: TruncationMode = truncation_mode
        self._keep_identical = keep_identical
        self._vocab_size, self._max_positions, self._stop_ids = vocab_size, max_positions, stop_ids
        self._on_bad_record, self._skipped, self._repeat = on_bad_record, skipped or SkippedRecords(None), repeat
        self.counts: TokeniseCounts = NO_COUNTS
        self._lengths: list[int] | None = None  # in tokens, until they are enough to judge by
        self._refs = self._find_refs()

    @property
    def column_names(self) -> list[str]:
        """Of the records."""
        return [*TOKEN_COLUMNS, "pair_id", *self._refs]

    def first_records(self, num_records: int) -> list[dict[str, Any]]:
        """The first pairs of the stream, which are neither consumed nor counted."""
        pairs = (pair for batch in self._batches(0, is_counted=False) for pair in batch)
        return list(itertools.islice(pairs, num_records))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Records with prompt_ids, chosen_ids, rejected_ids, pair_id (the record's number in its pass) and, if the
        data has them, the reference log-probs."""
        self.counts, self._lengths = NO_COUNTS, []
        for epoch in itertools.count():
            num_pairs = self.counts.num_pairs
            for pairs in self._batches(epoch, is_counted=True):
                yield from pairs
            self._judge_lost()
            if self.counts.num_pairs == num_pairs:
                raise ValueError(
                    f"{self._name}_dataset: expected at least one pair in a pass over the stream, got none. "
                    f"{self.counts.summary()} Look at max_length and at the records that were left out."
                )
            if not self._repeat:
                return
            if epoch == 0:
                _logger.warning("%s data, end of the first pass: %s", self._name, self.counts.summary())

    def _batches(self, epoch: int, *, is_counted: bool) -> Iterator[list[dict[str, Any]]]:
        rows = self._stream.rows(epoch)
        num_read = 0
        while batch := list(itertools.islice(rows, _BATCH)):
            yield self._tokenise(batch, num_read, is_counted=is_counted)
            num_read += len(batch)

    def _tokenise(self, batch: list[Row], first_id: int, *, is_counted: bool) -> list[dict[str, Any]]:
        check_tokenizer(self._tokenizer, {row["kind"] for row in batch if row["kind"] is not None})
        read = [column for column in ROW_FEATURES if column not in ALL_REF_COLUMNS or column in self._refs]
        tokenised = tokenise_rows(
            {column: [row[column] for row in batch] for column in read},
            list(range(first_id, first_id + len(batch))),
            tokenizer=self._tokenizer,
            max_length=self._max_length,
            truncation_mode=self._truncation_mode,
            pair_weight=self._pair_weight,
        )
        table = as_table(tokenised, self._refs)
        outcomes = judge_outcomes(
            table,
            vocab_size=self._vocab_size,
            max_positions=self._max_positions,
            stop_ids=self._stop_ids,
            refs=bool(self._refs),
            keep_identical=self._keep_identical,
        )
        if is_counted:
            self._report_bad([BadRecord(batch[row]["place"], text) for row, text in outcomes.problems.items()], batch)
            self.counts += count_outcomes(table, outcomes)
            if self._lengths is not None:
                self._lengths += table["whole_length"].to_pylist()
                if len(self._lengths) >= _ENOUGH:
                    self._judge_lost()
        has_weights = any(weight != 1 for weight in tokenised[WEIGHT_COLUMN])
        columns = [*self.column_names, *([WEIGHT_COLUMN] if has_weights else [])]
        return table.filter(outcomes.kept).select(columns).to_pylist()

    def _report_bad(self, bad: list[BadRecord], batch: list[Row]) -> None:
        if self._on_bad_record == "error":
            raise_bad_records(f"{self._name}_dataset", len(batch), bad, SKIP_REMEDY)
        new = self._skipped.add(self._name, bad)
        if new:
            warn_skipped(len(batch), new)

    def _judge_lost(self) -> None:
        """Once in an iteration: what `max_length` takes away."""
        if self._lengths is not None:
            warn_lost(self.counts, self._lengths, self._max_length)
        self._lengths = None

    def _find_refs(self) -> list[str]:
        rows = list(itertools.islice(self._stream.rows(0), _BATCH))
        return [column for column in ALL_REF_COLUMNS if any(row[column] is not None for row in rows)]


def is_stream(dataset: Any) -> bool:
    """Whether a data set is read as it is needed."""
    return isinstance(dataset, RowStream | datasets.IterableDataset)


def as_stream(dataset: Any, *, completions: bool = False) -> RowStream:
    """The stream of what `is_stream` says is one."""
    return dataset if isinstance(dataset, RowStream) else SourceStream(dataset, completions=completions)


def first_records(dataset: Any, num_records: int) -> list[dict[str, Any]]:
    """The first records of a tokenised data set or stream."""
    if isinstance(dataset, TokenisedStream):
        return dataset.first_records(num_records)
    return list(itertools.islice(dataset, num_records))
