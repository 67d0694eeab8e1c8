"""The pairs and texts that every run is measured on, and what the reference makes of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from datasets import Dataset

from dpop_trainer.data import tokenise_pairs
from dpop_trainer.data.load import load_pairs
from dpop_trainer.inputs.data_sets import first_pairs, load_eval_data
from dpop_trainer.measure.neutral_text import TextLogps, TextShift, text_logps, texts_of, token_rows
from dpop_trainer.measure.pairs_under_model import PairEvaluation, PairTokenLogps, evaluate_pairs, pair_token_logps
from dpop_trainer.models.adapters import adapter_base
from dpop_trainer.models.quantised import as_trained
from dpop_trainer.models.trained import TrainedModel, load_trained, load_trained_tokenizer
from dpop_trainer.reference.of_run import reference_name
from dpop_trainer.settings.arguments import arguments_of
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.settings.errors import doing
from dpop_trainer.tools.compare.answers import Answered, Grading, Problem, answer_problems, problems_of


class Measured(NamedTuple):
    """A trained model on the held-out pairs."""

    num_pairs: int
    evaluation: PairEvaluation
    answered: Answered | None
    """What it answers to held-out prompts; None where it was not asked."""
    ref_answered: Answered | None
    neutral_text: TextShift | None
    """What became of texts that training is not about; None where none were named."""


class NeutralTexts(NamedTuple):
    """Texts that no run trains on, nor on anything like them."""

    source: str
    """A file, a folder or a hub id."""
    split: str
    max_texts: int

    def read(self) -> list[str]:
        """
        Raises:
            FileNotFoundError: there is no such file, folder or hub data set.
            ValueError: it holds no texts.
        """
        with doing(f"reading neutral_texts {self.source}"):
            return texts_of(load_pairs(self.source, self.split), self.source, self.max_texts)


class HeldOut:
    """Measures models; the reference is scored once for all runs that have the same one and cut pairs alike.

    Args:
        max_pairs: measure on the first so many.
        grading: how answers are graded; None asks for none.
        neutral: texts that are scored too; None scores none.
    """

    def __init__(self, max_pairs: int, grading: Grading | None, neutral: NeutralTexts | None = None) -> None:
        self._max_pairs, self._grading, self._neutral = max_pairs, grading, neutral
        self._ref_logps: dict[tuple[Any, ...], list[PairTokenLogps]] = {}
        self._ref_answered: dict[str, Answered] = {}
        self._ref_texts: dict[tuple[Any, ...], TextLogps] = {}

    def check(self, values: Mapping[str, Any]) -> None:
        """Whether the held-out answers can be graded and the texts be read, before anything is trained.

        Raises:
            FileNotFoundError: there are no such texts.
            ValueError: an answer or a text cannot be used.
        """
        if self._neutral is None and self._grading is None:
            return
        name = _reference_name(values)
        tokenizer = load_trained_tokenizer(name, adapter_base(name))
        if self._neutral is not None:
            token_rows(tokenizer, self._neutral.read(), _eval_data(values)[0].max_length)
        if self._grading is not None:
            self._problems(values, tokenizer)

    def measure(self, trained: TrainedModel, values: Mapping[str, Any]) -> Measured:
        """
        Args:
            trained: the trained model.
            values: the run's whole configuration.
        """
        config, pairs = _eval_data(values)
        dataset = _tokenised(first_pairs(pairs, self._max_pairs), trained.tokenizer, config.max_length, config)
        score = {"pad_token_id": trained.tokenizer.pad_token_id, "batch_size": config.per_device_eval_batch_size}
        logps = pair_token_logps(trained.model, dataset, desc="Scoring", **score)
        answered = None
        if self._grading is not None:
            problems = self._problems(values, trained.tokenizer)
            answered = answer_problems(trained, problems, self._grading, desc="Answering")
        texts = None if self._neutral is None else self._neutral.read()
        of_text: dict[str, Any] = {"max_length": config.max_length, "batch_size": config.per_device_eval_batch_size}
        text = texts and text_logps(trained.model, trained.tokenizer, texts, desc="Neutral texts", **of_text)
        name = _reference_name(values)
        cut = (name, config.max_length, config.truncation_mode)
        if cut not in self._ref_logps:
            # where it is the model that training started from, that was rounded too
            rounding = None if values["ref_model_name_or_path"] else as_trained(values)
            reference = load_trained(name, quantization_config=rounding)
            self._ref_logps[cut] = pair_token_logps(reference.model, dataset, desc="Scoring the reference", **score)
            if self._grading is not None and name not in self._ref_answered:
                problems = self._problems(values, reference.tokenizer)
                self._ref_answered[name] = answer_problems(
                    reference, problems, self._grading, desc="Answers of the reference"
                )
            if texts is not None:
                desc = "Neutral texts, reference"
                self._ref_texts[cut] = text_logps(reference.model, reference.tokenizer, texts, desc=desc, **of_text)
        evaluation = evaluate_pairs(logps, self._ref_logps[cut], dataset)
        shift = TextShift.of(text, self._ref_texts[cut]) if text else None
        return Measured(len(dataset), evaluation, answered, self._ref_answered.get(name), shift)

    def _problems(self, values: Mapping[str, Any], tokenizer: Any) -> list[Problem]:
        """As many as are to be answered, from as many pairs as that takes: some share a prompt."""
        assert self._grading is not None
        config, pairs = _eval_data(values)
        num_pairs = self._grading.max_answers
        while True:
            dataset = _tokenised(first_pairs(pairs, num_pairs), tokenizer, None, config)
            problems = problems_of(dataset, tokenizer, self._grading)
            if len(problems) == self._grading.max_answers or num_pairs >= len(pairs):
                return problems
            num_pairs *= 4


def _eval_data(values: Mapping[str, Any]) -> tuple[DPOPConfig, Any]:
    _, data_arguments, config = arguments_of(dict(values), DPOPConfig)
    return config, load_eval_data(data_arguments, config)


def _tokenised(pairs: Any, tokenizer: Any, max_length: int | None, config: DPOPConfig) -> Dataset:
    mode: Any = config.truncation_mode
    return tokenise_pairs(pairs, tokenizer, max_length=max_length, truncation_mode=mode)[0]


def _reference_name(values: Mapping[str, Any]) -> str:
    name = reference_name(values)
    assert name is not None  # a run that is planned has a model
    return name
