"""A comparison's results: means over seeds, their intervals, a table, and a verdict in words.

Every sentence follows the numbers, also when they are not the expected ones.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpop_trainer.measure.generation import Writing
from dpop_trainer.measure.neutral_text import TextShift
from dpop_trainer.measure.pairs_under_model import LOST_NATS, PairEvaluation, Ranking
from dpop_trainer.measure.shares import Interval, share_interval, with_interval
from dpop_trainer.measure.token_shift import TokenShift, mean_token_shift, token_shift_as_dict, token_shift_from_dict
from dpop_trainer.report.signed import signed
from dpop_trainer.report.terminal import PLAIN, Terminal
from dpop_trainer.tools.compare.answers import Answers, right_gain

ERRORS = 2
"""Standard errors from zero, or from the next method, beyond which a change is one."""


class RunResult(NamedTuple):
    """One method with one seed, measured on held-out pairs."""

    method: str
    seed: int
    num_pairs: int
    evaluation: PairEvaluation
    history: dict[str, list[float]]
    """Equally long: "step", and the mean log-ratios of "chosen" and "rejected" answers, in nats per answer."""
    seconds: float
    """Of training, evaluations on the way included."""
    gradients: dict[str, list[float]]
    """Equally long: "step", and "grad_norm" before clipping, as they were logged."""
    answers: Answers | None = None
    """Held-out problems that the trained model solves; None where none were graded."""
    ref_answers: Answers | None = None
    writing: Writing | None = None
    """How it writes its answers; None where it wrote none. Older records have none."""
    ref_writing: Writing | None = None
    neutral_text: TextShift | None = None
    """What became of texts that training is not about; None where none were named."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: NaN becomes None."""
        evaluation = _with_none(self.evaluation._asdict())
        for shift in ("shift", "rejected_shift"):
            evaluation[shift] = token_shift_as_dict(evaluation[shift])
        for ranking in ("ranking", "ref_ranking"):
            evaluation[ranking] = evaluation[ranking]._asdict()
        answered = {
            name: found and _with_none(found._asdict())
            for name in (*_GRADED, *_WRITTEN, *_TEXTS)
            if (found := getattr(self, name)) is not None or name in _GRADED
        }
        return {**{name: getattr(self, name) for name in _MEASURED}, "evaluation": evaluation, **answered}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunResult":
        """Undo `as_dict`."""
        evaluation = _with_nan(values["evaluation"])
        for shift in ("shift", "rejected_shift"):
            evaluation[shift] = token_shift_from_dict(evaluation[shift])
        for ranking in ("ranking", "ref_ranking"):
            evaluation[ranking] = Ranking(**evaluation[ranking])
        read: dict[str, Any] = {**values, "evaluation": PairEvaluation(**evaluation)}
        for names, kind in ((_GRADED, Answers), (_WRITTEN, Writing), (_TEXTS, TextShift)):
            read |= {name: kind(**_with_nan(values[name])) if values.get(name) else None for name in names}
        return cls(**read)


_GRADED, _WRITTEN, _TEXTS = ("answers", "ref_answers"), ("writing", "ref_writing"), ("neutral_text",)
_MEASURED = [name for name in RunResult._fields if name not in (*_GRADED, *_WRITTEN, *_TEXTS)]


def _with_none(values: dict[str, Any]) -> dict[str, Any]:
    """NaN, which JSON does not have, as None."""
    return {key: None if value != value else value for key, value in values.items()}


def _with_nan(values: dict[str, Any]) -> dict[str, Any]:
    """Undo `_with_none`."""
    return {key: math.nan if value is None else value for key, value in values.items()}


class Comparison(NamedTuple):
    """All runs of a comparison."""

    methods: list[str]
    results: list[RunResult]
    config: dict[str, Any]
    versions: dict[str, str]

    def of(self, method: str) -> list[RunResult]:
        """A method's runs, one per seed."""
        return [result for result in self.results if result.method == method]


class Column(NamedTuple):
    """A figure of a run."""

    title: str
    unit: str
    value: Callable[[RunResult], float]
    before: Callable[[RunResult], float] | None
    """The same of the model before training, where it is no change."""
    text: Callable[[float], str]
    spread: Callable[[float], str]
    of_one: Callable[[RunResult], Interval] | None = None
    """In which it lies by the spread over pairs of a single run, where that is known."""


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _share_right(answers: Answers | None) -> float:
    return math.nan if answers is None else answers.right_share


_SIGNED = (signed, "{:.2f}".format)
_SIGNED_PER_TOKEN = (lambda value: signed(value, 3), "{:.3f}".format)
_SHARE = (_percent, _percent)


def _around(mean: float, error: float) -> Interval:
    return Interval(mean - ERRORS * error, mean + ERRORS * error)


def _text_change(run: RunResult) -> tuple[float, float]:
    text = run.neutral_text
    return (text.mean_change, text.error) if text else (math.nan, math.nan)


COLUMNS = (
    Column(
        "chosen Δ",
        "nats",
        lambda run: run.evaluation.chosen_logratio,
        None,
        *_SIGNED,
        lambda run: _around(run.evaluation.chosen_logratio, run.evaluation.chosen_logratio_error),
    ),
    Column(
        "rejected Δ",
        "nats",
        lambda run: run.evaluation.rejected_logratio,
        None,
        *_SIGNED,
        lambda run: _around(run.evaluation.rejected_logratio, run.evaluation.rejected_logratio_error),
    ),
    Column("after edit Δ", "nats/token", lambda run: run.evaluation.shift.after.mean_change, None, *_SIGNED_PER_TOKEN),
    Column("tokens that lost", "", lambda run: run.evaluation.lost_share, None, *_SHARE),
    Column(
        "reward accuracy",
        "",
        lambda run: run.evaluation.reward_accuracy,
        None,
        *_SHARE,
        lambda run: share_interval(run.evaluation.reward_accuracy, run.num_pairs),
    ),
    Column(
        "ranking accuracy",
        "",
        lambda run: run.evaluation.ranking.accuracy,
        lambda run: run.evaluation.ref_ranking.accuracy,
        *_SHARE,
        lambda run: share_interval(run.evaluation.ranking.accuracy, run.num_pairs),
    ),
)
RIGHT = Column(
    "answers right",
    "",
    lambda run: _share_right(run.answers),
    lambda run: _share_right(run.ref_answers),
    *_SHARE,
    lambda run: share_interval(_share_right(run.answers), run.answers.num_prompts if run.answers else 1),
)
NEUTRAL = Column(
    "neutral text Δ",
    "nats/token",
    lambda run: _text_change(run)[0],
    None,
    *_SIGNED_PER_TOKEN,
    lambda run: _around(*_text_change(run)),
)
WRITING = tuple(
    Column(
        title,
        unit,
        lambda run, name=name: getattr(run.writing, name, math.nan),
        lambda run, name=name: getattr(run.ref_writing, name, math.nan),
        *texts,
    )
    for name, title, unit, texts in (
        ("num_tokens", "length", "tokens", ("{:.0f}".format, "{:.0f}".format)),
        ("ended_share", "came to an end", "", _SHARE),
        ("repeated_share", "repeated 4-grams", "", _SHARE),
        ("distinct_share", "distinct 2-grams", "", _SHARE),
    )
)
LEGEND = (
    "Δ is the log-prob under the trained model minus the log-prob under the model before, on held-out pairs: a mean "
    "per answer, or per token of the chosen answers after the edit. Tokens that lost: share of the chosen answers' "
    f"tokens whose log-prob fell by more than {LOST_NATS} nats. Reward accuracy: pairs whose chosen answer gained more "
    "than the rejected one. Ranking accuracy: pairs whose chosen answer is the likelier one. Mean ± standard deviation "
    "over seeds."
)
NEUTRAL_LEGEND = " Neutral text: texts that training is not about, all their tokens."
RIGHT_LEGEND = " Answers right: held-out problems that the model itself answers rightly, one greedy answer each."

WRITING_LEGEND = (
    "One greedy answer to each held-out prompt. Repeated: 4-grams of tokens that stood in the same answer before. "
    "Distinct: 2-grams of tokens in all answers together that are not the same. Mean ± standard deviation over seeds."
)


def read_comparison(path: Path) -> Comparison:
    """What `write_comparison` left in compare.json."""
    record = json.loads(path.read_text())
    results = [RunResult.from_dict(values) for values in record["results"]]
    return Comparison(record["methods"], results, record["config"], record["versions"])


def curves(comparison: Comparison) -> dict[str, dict[str, list[float]]]:
    """By method, what `logratio_panels` takes: mean over seeds, and their range."""
    return {method: _band(comparison.of(method)) for method in comparison.methods}


def token_shifts(comparison: Comparison) -> dict[str, TokenShift]:
    """By method, the mean over its seeds."""
    return {
        method: mean_token_shift([result.evaluation.shift for result in comparison.of(method)])
        for method in comparison.methods
    }


def table_titles(comparison: Comparison, columns: Sequence[Column] | None = None) -> list[str]:
    """One title per column of `table_rows`, with its unit."""
    shown = shown_columns(comparison) if columns is None else columns
    return ["", *(f"{column.title}, {column.unit}".removesuffix(", ") for column in shown)]


def table_rows(comparison: Comparison, columns: Sequence[Column] | None = None) -> list[list[str]]:
    """Rows of text: the model before training, then every method: mean ± standard deviation over seeds.

    Args:
        comparison: what was measured.
        columns: which figures; None: `shown_columns`.
    """
    shown = shown_columns(comparison) if columns is None else columns
    start = comparison.results[0]
    before = ["—" if column.before is None else cell(column, [column.before(start)]) for column in shown]
    rows = [["before training", *before]]
    for method in comparison.methods:
        runs = comparison.of(method)
        rows.append([method, *(cell(column, [column.value(run) for run in runs]) for column in shown)])
    return rows


def format_comparison(comparison: Comparison, terminal: Terminal = PLAIN) -> str:
    """For the terminal: the tables, then the verdict."""
    columns = [shown_columns(comparison), *([WRITING] if has_writing(comparison) else [])]
    tables = [terminal.table([table_titles(comparison, shown), *table_rows(comparison, shown)]) for shown in columns]
    return "\n\n".join([*tables, terminal.filled(verdict(comparison))])


def outcomes(comparison: Comparison) -> dict[str, list[str]]:
    """What became of the chosen answers -> the methods of which that is so, none left out."""
    found: dict[str, list[str]] = {FELL: [], HELD: [], ROSE: []}
    for method in comparison.methods:
        mean, error = _mean_and_error(comparison.of(method))
        is_noise = abs(mean) < LOST_NATS or (not math.isnan(error) and abs(mean) <= ERRORS * error)
        found[HELD if is_noise else FELL if mean < 0 else ROSE].append(method)
    return found


def verdict(comparison: Comparison) -> str:
    """What the numbers say of the chosen answers, in a few sentences.

    A change counts where its mean over seeds lies more than two standard errors from zero; with one seed, where it
    does so by the spread over pairs. A lead over the next method is one where it does so, paired by seed; a share of
    pairs is told from chance by its score interval (95 %), over pairs, which all seeds have in common.
    """
    sentences = []
    for verb, methods in outcomes(comparison).items():
        told = [f"{method} ({signed(_mean_and_error(comparison.of(method))[0])} nats)" for method in methods]
        sentences += [f"{listed(told)} {verb}."] if told else []
    if len(comparison.methods) > 1:
        sentences.append(_best(comparison))
    sentences.append(_ranked(comparison))
    if NEUTRAL in shown_columns(comparison):
        sentences.append(_unlearned(comparison))
    runs = comparison.of(comparison.methods[0])
    basis = f"On {held_out(runs[0].num_pairs)}, {seeds(len(runs))}:"
    return " ".join([basis, *sentences])


FELL = "lowered the chosen answers"
HELD = "left the chosen answers where they were"
ROSE = "raised the chosen answers"


class _Lead(NamedTuple):
    """The method with the highest mean, and how far it is above the next one, seed by seed."""

    method: str
    mean: float
    next_method: str
    difference: float
    error: float
    """Standard error of the difference; NaN with one seed."""

    @classmethod
    def of(cls, comparison: Comparison, value: Callable[[RunResult], float]) -> "_Lead":
        by_seed = {method: {run.seed: value(run) for run in comparison.of(method)} for method in comparison.methods}
        means = {method: statistics.fmean(values.values()) for method, values in by_seed.items()}
        first, second = sorted(means, key=lambda method: -means[method])[:2]
        seeds = by_seed[first].keys() & by_seed[second].keys()
        differences = [by_seed[first][seed] - by_seed[second][seed] for seed in seeds]
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        return cls(first, means[first], second, means[first] - means[second], error)

    def above(self, scale: float = 1.0, digits: int = 2, unit: str = "") -> str:
        """What is to be thought of the lead."""
        if math.isnan(self.error):
            return "with one seed"
        lead = f"{scale * self.difference:.{digits}f} ± {scale * self.error:.{digits}f}{unit} above {self.next_method}"
        return lead if self.difference > ERRORS * self.error else f"{lead}, which is no difference"


def _best(comparison: Comparison) -> str:
    kept = _Lead.of(comparison, COLUMNS[0].value)
    parted = _Lead.of(comparison, lambda run: run.evaluation.chosen_logratio - run.evaluation.rejected_logratio)
    if parted.mean > 0:
        both = "also sets" if parted.method == kept.method else f"{parted.method} sets"
        apart = f"and {both} the two answers furthest apart ({parted.mean:.2f} nats, {parted.above()})"
    else:
        apart = "and none sets the chosen answers further above the rejected ones"
    text = f"{kept.method} keeps them highest ({signed(kept.mean)} nats, {kept.above()}) {apart}."
    if RIGHT in shown_columns(comparison):
        solver = _Lead.of(comparison, RIGHT.value)
        before = _share_right(comparison.results[0].ref_answers)
        text += (
            f" {solver.method} answers most held-out problems rightly ({_percent(solver.mean)}, "
            f"{solver.above(100, 1, ' points')}; {_percent(before)} before)."
        )
        text += _gains(comparison)
    return text


def _gains(comparison: Comparison) -> str:
    """What each method did to the problems that were solved before, and the others, where that was recorded."""
    told = []
    before = comparison.results[0].ref_answers
    for method in comparison.methods:
        after = [run.answers for run in comparison.of(method) if run.answers]
        found = right_gain(after, before) if before else None
        if found is None:
            return ""
        known = "" if abs(found.mean) > ERRORS * found.error else " (no difference)"
        told.append(f"{method} {signed(100 * found.mean, 1)} ± {100 * found.error:.1f}{known}")
    return f" Against the model before, problem by problem, in points: {listed(told)}."


def _unlearned(comparison: Comparison) -> str:
    """What became of neutral text: over seeds or, with one, by the spread over texts."""
    told = []
    for method in comparison.methods:
        changes = [_text_change(run) for run in comparison.of(method)]
        means = [mean for mean, _ in changes]
        mean = statistics.fmean(means)
        error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else changes[0][1]
        known = "" if abs(mean) > ERRORS * error else " (no difference)"
        told.append(f"{method} {signed(mean, 3)}" + ("" if math.isnan(error) else f" ± {error:.3f}{known}"))
    return f"Neutral text, in nats per token: {listed(told)}."


def _ranked(comparison: Comparison) -> str:
    """Whether the chosen answers are the likelier ones, which a loss can leave as it was while it moves both."""
    first = comparison.results[0]
    means = {
        method: statistics.fmean(run.evaluation.ranking.accuracy for run in comparison.of(method))
        for method in comparison.methods
    }
    intervals = {method: share_interval(mean, first.num_pairs) for method, mean in means.items()}
    best = max(means, key=means.__getitem__)
    before = first.evaluation.ref_ranking.accuracy
    text = (
        f"At best ({best}) the chosen answer is the likelier one in {with_interval(means[best], first.num_pairs)} of "
        f"the pairs; before, in {_percent(before)}."
    )
    chance = [method for method, interval in intervals.items() if interval.low <= 0.5]
    if len(chance) < len(means):
        return f"{text} No more often than by chance: {'; '.join(chance)}." if chance else text
    learned = any(interval.low > before for interval in intervals.values())
    return f"{text} That is no more than chance{'' if learned else ': no preference was learned'}."


def shown_columns(comparison: Comparison) -> tuple[Column, ...]:
    has_text = all(run.neutral_text is not None for run in comparison.results)
    is_graded = all(run.answers is not None for run in comparison.results)
    return (*COLUMNS, *([NEUTRAL] if has_text else []), *([RIGHT] if is_graded else []))


def has_writing(comparison: Comparison) -> bool:
    """Whether every run was let write."""
    return all(run.writing is not None for run in comparison.results)


def interval(column: Column, runs: Sequence[RunResult]) -> Interval | None:
    """In which a figure lies: two standard errors around the mean over seeds; of one, what its pairs leave open."""
    values = [column.value(run) for run in runs]
    if any(math.isnan(value) for value in values):
        return None
    if len(values) > 1:
        return _around(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))
    found = column.of_one(runs[0]) if column.of_one else None
    return None if found is None or math.isnan(found.low) else found


def _mean_and_error(runs: Sequence[RunResult]) -> tuple[float, float]:
    values = [run.evaluation.chosen_logratio for run in runs]
    if len(values) == 1:
        return values[0], runs[0].evaluation.chosen_logratio_error
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _band(runs: Sequence[RunResult]) -> dict[str, list[float]]:
    """Mean, lowest and highest over seeds at every step that all of them have."""
    steps = sorted(set.intersection(*(set(run.history["step"]) for run in runs)))
    band: dict[str, list[float]] = {"step": steps}
    for answer in ("chosen", "rejected"):
        by_step = [dict(zip(run.history["step"], run.history[answer], strict=True)) for run in runs]
        values = [[run[step] for run in by_step] for step in steps]
        band[answer] = [statistics.fmean(column) for column in values]
        if len(runs) > 1:
            band[f"{answer}_low"], band[f"{answer}_high"] = list(map(min, values)), list(map(max, values))
    return band


def cell(column: Column, values: Sequence[float]) -> str:
    if any(math.isnan(value) for value in values):
        return "—"
    mean = column.text(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {column.spread(statistics.stdev(values))}"


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def held_out(num_pairs: int) -> str:
    return "1 held-out pair" if num_pairs == 1 else f"{num_pairs:,} held-out pairs"


def seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"
