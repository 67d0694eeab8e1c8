"""The pairs that every run is measured on, and what the reference makes of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from datasets import Dataset

from dpop_trainer.data import tokenise_pairs
from dpop_trainer.inputs.data_sets import first_pairs, load_eval_data
from dpop_trainer.measure.pairs_under_model import PairEvaluation, PairTokenLogps, evaluate_pairs, pair_token_logps
from dpop_trainer.models.adapters import adapter_base
from dpop_trainer.models.quantised import as_trained
from dpop_trainer.models.trained import TrainedModel, load_trained, load_trained_tokenizer
from dpop_trainer.reference.of_run import reference_name
from dpop_trainer.settings.arguments import arguments_of
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.tools.compare.answers import Answered, Grading, Problem, answer_problems, problems_of


class Measured(NamedTuple):
    """A trained model on the held-out pairs."""

    num_pairs: int
    evaluation: PairEvaluation
    answered: Answered | None
    """What it answers to held-out prompts; None where it was not asked."""
    ref_answered: Answered | None


class HeldOut:
    """Measures models; the reference is scored once for all runs that have the same one and cut pairs alike.

    Args:
        max_pairs: measure on the first so many.
        grading: how answers are graded; None asks for none.
    """

    def __init__(self, max_pairs: int, grading: Grading | None) -> None:
        self._max_pairs, self._grading = max_pairs, grading
        self._ref_logps: dict[tuple[Any, ...], list[PairTokenLogps]] = {}
        self._ref_answered: dict[str, Answered] = {}

    def check(self, values: Mapping[str, Any]) -> None:
        """Whether the held-out answers can be graded, before anything is trained.

        Raises:
            ValueError: one cannot.
        """
        if self._grading is not None:
            name = _reference_name(values)
            self._problems(values, load_trained_tokenizer(name, adapter_base(name)))

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
        evaluation = evaluate_pairs(logps, self._ref_logps[cut], dataset)
        return Measured(len(dataset), evaluation, answered, self._ref_answered.get(name))

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
