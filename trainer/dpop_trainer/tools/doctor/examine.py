"""The whole examination: load, tokenise, measure, hold against the evaluation set, ask a model, find, recommend."""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from dpop_trainer.data import tokenise_pairs
from dpop_trainer.data.outcomes import NOTE_COLUMNS
from dpop_trainer.data.pair_tree import PairIds
from dpop_trainer.data.records import TOKEN_COLUMNS, BadRecord, raise_bad_records
from dpop_trainer.data.tokenise import NoPairsError, OnBadRecord
from dpop_trainer.data.truncate import TruncationMode, truncate_pair
from dpop_trainer.measure.surface import Surface, SurfaceSample
from dpop_trainer.settings.errors import doing
from dpop_trainer.tools.doctor.findings import Evidence, Finding, find_all, rows_to_drop
from dpop_trainer.tools.doctor.measure import (
    CUT,
    EMPTY,
    FITS,
    Measures,
    fingerprints_of,
    measure_pairs,
    outcome_under,
)
from dpop_trainer.tools.doctor.pair_file import PairFile
from dpop_trainer.tools.doctor.recommend import Recommendation, recommend, told_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpop_trainer.tools.doctor.ches import ModelScores

_QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95}


@dataclass(frozen=True)
class Examination:
    """What was seen of a data set of pairs."""

    pair_file: PairFile
    tokenised: Dataset | None
    """Not truncated, with `pair_id` for the row; None without a tokenizer."""
    settings: dict[str, Any]
    measures: Measures
    findings: list[Finding]
    recommendations: list[Recommendation]
    drop: dict[int, str]
    """Rows that should not be trained on, with the length that is told -> the finding that says so."""
    model_scores: "ModelScores | None"
    surface: Surface
    """What tells the two sides apart without reading them."""
    run_flags: dict[str, str]
    """Of `dpop train`, for what was examined."""
    clean_file: Path | None
    """Where the pairs that need not be dropped are written, if they are."""

    @property
    def num_pairs(self) -> int:
        return self.pair_file.num_pairs

    @property
    def is_serious(self) -> bool:
        return any(finding.level == "serious" for finding in self.findings)

    def token_ids(self, row: int) -> PairIds:
        """The pair's tokens, not truncated.

        Raises:
            ValueError: there is no tokenizer, or the pair has an answer without tokens.
        """
        if self.tokenised is None or self.measures.outcome[row] == EMPTY:
            raise ValueError(f"row: expected a pair with tokens, got {row}, which has none.")
        return _token_ids(self.tokenised, self.measures, row)

    def statistics(self) -> dict[str, dict[str, float]]:
        """Mean, quantiles and extremes of each measure over the pairs that have it."""
        return self._statistics

    @functools.cached_property
    def _statistics(self) -> dict[str, dict[str, float]]:
        measures = self.measures
        length = np.where(measures.chosen_length > 0, measures.chosen_length, 1)
        columns: dict[str, NDArray[Any]] = {
            "token_distance": measures.token_distance,
            "char_distance": measures.char_distance,
            "first_difference": _at_least_0(measures.prefix),
            "common_prefix_share": np.where(measures.prefix >= 0, measures.prefix / length, np.nan),
            "common_suffix_share": np.where(measures.suffix >= 0, measures.suffix / length, np.nan),
            "length_ratio": measures.ratio,
            "prompt_tokens": _at_least_0(measures.prompt_tokens),
            "chosen_tokens": _at_least_0(measures.chosen_tokens),
            "rejected_tokens": _at_least_0(measures.rejected_tokens),
            "chosen_chars": measures.chosen_chars,
            "rejected_chars": measures.rejected_chars,
        }
        if (self.pair_file.weights() != 1).any():
            columns["weight"] = self.pair_file.weights()
        if self.model_scores is not None:
            scores = self.model_scores
            columns |= {
                "ref_margin": scores.margins,
                "ref_margin_per_token": scores.normalised_margins,
                "ches": scores.ches,
                "ches_normalised": scores.ches_normalised,
            }
        return {name: summary for name, column in columns.items() if (summary := _summary(column))}


def examine_pairs(
    source: str | PairFile,
    *,
    split: str = "train",
    config: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    model: Any = None,
    stop_ids: Collection[int] = (),
    taken_end: str | None = None,
    run_flags: Mapping[str, str] | None = None,
    clean_file: Path | None = None,
    eval_source: str | None = None,
    eval_split: str = "train",
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    max_scored: int = 512,
    batch_size: int = 8,
    num_proc: int | None = None,
    on_bad_record: OnBadRecord = "skip",
    show_progress: bool = True,
) -> Examination:
    """Examine pairs.

    Args:
        source: whatever `load_pairs` takes, or the pairs, opened.
        split: of a hub data set or folder.
        config: of a hub data set that has several.
        tokenizer: of the model that is to be trained. None: everything is measured in characters, and nothing is
            said of `max_length` and layout.
        model: the causal LM itself (needs the tokenizer), for reference margins and CHES.
        stop_ids: the tokens at which the model stops when it generates. Without, nothing is
            said of endless answers.
        taken_end: the end of sequence that the tokenizer was given, where it names none.
        run_flags: the flags of `dpop train` for the model and the data as they are examined here, for the command that
            is told.
        clean_file: where `write_clean` is to write, for that command where the file itself is not to be trained on.
        eval_source: the pairs that the run is evaluated on, of the same `config`.
        eval_split: theirs.
        max_length: what the training run will use. None: nothing is said of what it would cut.
        truncation_mode: likewise.
        max_scored: pairs that the model looks at, spread evenly over the data set.
        batch_size: pairs per forward of the model.
        num_proc: processes that tokenise.
        on_bad_record: "skip" counts and leaves out what cannot be used; "error" names it and stops.
        show_progress: progress bars on stderr.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no record can be used, or with "error" one cannot (they are named), or the tokenizer does not suit
            them.
    """
    for name, value in (("max_scored", max_scored), ("batch_size", batch_size), ("num_proc", num_proc)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}.")
    if model is not None and tokenizer is None:
        raise ValueError("tokenizer: expected the model's tokenizer, got None.")
    pair_file = source
    if isinstance(pair_file, str):
        pair_file = PairFile.open(pair_file, split, config, on_bad_record=on_bad_record)
    tokenised, notes = None, {}
    if tokenizer is not None:
        vocab_size = None if model is None else model.get_input_embeddings().weight.shape[0]
        tokenise = functools.partial(
            tokenise_pairs,
            processing_class=tokenizer,
            num_proc=num_proc,
            keep_identical=True,
            vocab_size=vocab_size,
            stop_ids=stop_ids,
            on_bad_record=on_bad_record,
            notes=True,
        )
        refused: list[BadRecord] = []
        try:
            tokenised, _ = tokenise(pair_file.dataset, on_skipped=refused.extend)
        except NoPairsError:
            raise_bad_records("pairs", pair_file.num_pairs, refused)
            raise
        if refused:
            pair_file = pair_file.without(refused)
            tokenised, _ = tokenise(pair_file.dataset)
        notes = _notes_of(tokenised, pair_file.num_pairs)
    sample = SurfaceSample()
    measures, fingerprints = measure_pairs(
        pair_file,
        tokenised,
        eos_token_id=None if tokenizer is None else tokenizer.eos_token_id,  # type: ignore[arg-type]
        max_length=max_length,
        truncation_mode=truncation_mode,
        sample=sample,
        desc="Measuring pairs" if show_progress else None,
    )
    held_out = None
    if eval_source is not None:
        desc = "Reading evaluation pairs" if show_progress else None
        with doing(f"reading the evaluation pairs {eval_source}"):
            held_out = fingerprints_of(PairFile.open(eval_source, eval_split, config), desc=desc)
    surface = sample.surface()
    findings = find_all(Evidence(measures, fingerprints, held_out, max_length, notes, surface, taken_end))
    scores = None
    if model is not None:
        assert tokenizer is not None
        assert tokenised is not None
        scores = _score(model, tokenizer, tokenised, measures, max_length, truncation_mode, max_scored, batch_size)
    drop = rows_to_drop(findings, _outcome_as_told(measures, tokenised, truncation_mode), pair_file.weights())
    return Examination(
        pair_file=pair_file,
        tokenised=tokenised,
        settings={
            "tokenizer": None if tokenizer is None else _name(tokenizer.name_or_path),
            "model": None if model is None else _name(model.config._name_or_path),
            "max_length": None if tokenizer is None else max_length,
            "truncation_mode": truncation_mode,
            "eval": eval_source,
            "pairs scored by the model": 0 if scores is None else len(scores.rows),
        },
        measures=measures,
        findings=findings,
        recommendations=recommend(measures, drop, None if tokenizer is None else max_length),
        drop=drop,
        model_scores=scores,
        surface=surface,
        run_flags={**(run_flags or {})},
        clean_file=clean_file,
    )


def _notes_of(tokenised: Dataset, num_pairs: int) -> dict[str, NDArray[np.bool_]]:
    """What tokenising says of each pair of the file; of one without tokens, nothing."""
    rows = np.asarray(tokenised["pair_id"][:])
    notes = {}
    for name in (*NOTE_COLUMNS, "endless"):
        notes[name] = np.zeros(num_pairs, np.bool_)
        notes[name][rows] = tokenised[name][:]
    return notes


def _token_ids(tokenised: Dataset, measures: Measures, row: int) -> PairIds:
    # those without tokens are left out of `tokenised`, the others keep their order
    record: dict[str, Any] = tokenised[row - int((measures.outcome[:row] == EMPTY).sum())]
    assert record["pair_id"] == row
    return PairIds(*(record[column] for column in TOKEN_COLUMNS))


def _outcome_as_told(
    measures: Measures, tokenised: Dataset | None, truncation_mode: TruncationMode
) -> NDArray[np.int8]:
    """What becomes of each pair under the length that is told; the few that it does not fit are cut once more."""
    length = told_length(measures)
    outcome = np.where(measures.outcome == EMPTY, EMPTY, FITS).astype(np.int8)
    if tokenised is not None and length is not None:
        for row in np.flatnonzero(measures.length > length):
            outcome[row] = outcome_under(_token_ids(tokenised, measures, int(row)), length, truncation_mode)
    return outcome


def _score(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    tokenised: Dataset,
    measures: Measures,
    max_length: int | None,
    truncation_mode: TruncationMode,
    max_scored: int,
    batch_size: int,
) -> "ModelScores | None":
    """A model's view of pairs spread evenly over those that it would be trained on, cut as they would be."""
    from dpop_trainer.tools.doctor.ches import score_pairs

    rows = np.flatnonzero(measures.outcome != EMPTY)  # of the pairs in `tokenised`
    usable = np.flatnonzero(np.isin(measures.outcome[rows], [FITS, CUT]) & ~measures.identical[rows])
    if not len(usable):
        return None
    picked = usable[np.unique(np.linspace(0, len(usable) - 1, min(max_scored, len(usable))).round().astype(int))]

    def cut(record: dict[str, Any]) -> dict[str, Any]:
        ids = PairIds(*(record[column] for column in TOKEN_COLUMNS))
        kept = ids if max_length is None else truncate_pair(ids, max_length, truncation_mode)
        assert kept is not None
        return {**record, **kept._asdict()}

    sample = Dataset.from_list([cut(record) for record in tokenised.select(picked)])  # type: ignore[arg-type]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return score_pairs(model, sample, pad_token_id=pad or 0, batch_size=batch_size)  # type: ignore[operator]


def _summary(column: NDArray[Any]) -> dict[str, float] | None:
    values = column[np.isfinite(column)].astype(np.float64)
    if not len(values):
        return None
    quantiles = map(float, np.quantile(values, list(_QUANTILES.values())))
    return {
        "mean": float(values.mean()),
        **dict(zip(_QUANTILES, quantiles, strict=True)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def _at_least_0(column: NDArray[Any]) -> NDArray[np.float64]:
    return np.where(column >= 0, column, np.nan)


def _name(name_or_path: str) -> str:
    return Path(name_or_path).name or name_or_path
