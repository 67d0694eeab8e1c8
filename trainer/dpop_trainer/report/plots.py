"""What training did, drawn: log-ratios over its steps, and the change per token around the edit."""

from collections.abc import Mapping, Sequence

from dpop_trainer.measure.pairs_under_model import PairEvaluation
from dpop_trainer.measure.token_shift import TokenShift
from dpop_trainer.report import palette
from dpop_trainer.report.charts import LARGE, Line, Size, lines, stems
from dpop_trainer.report.palette import Style, method_styles
from dpop_trainer.report.scale import Axis
from dpop_trainer.report.svg import Panel

_FEW_TOKENS = 0.1
_STEPS = Axis("optimizer step", whole=True)
_PER_ANSWER = Axis("log π − log π_ref, nats per answer")
_PER_TOKEN = Axis("log π − log π_ref, nats per token")


def logratio_panels(histories: Mapping[str, Mapping[str, Sequence[float]]], *, size: Size = LARGE) -> list[Panel]:
    """The answers' log-ratios over training: a panel of the chosen and one of the rejected, a line per method.

    Args:
        histories: by method, equally long lists "step" (optimizer steps), "chosen" and "rejected": mean over pairs of
            log π - log π_ref of the whole answer, in nats. With "chosen_low", "chosen_high" and the same of "rejected"
            a band is drawn around the line.
        size: of a panel.

    Raises:
        ValueError: there is no method, or a method's lists are missing or differ in length.
    """
    styles = _styles("histories", histories)
    for name, history in histories.items():
        lengths = {key: len(history[key]) if key in history else None for key in ("step", "chosen", "rejected")}
        if None in lengths.values() or len(set(lengths.values())) > 1:
            raise ValueError(f"histories[{name!r}]: expected three lists of one length, got lengths {lengths}.")
    panels = []
    for answer in ("chosen", "rejected"):
        series = []
        for name, history in histories.items():
            has_band = f"{answer}_low" in history
            band = (history[f"{answer}_low"], history[f"{answer}_high"]) if has_band else None
            series.append(Line(name, history["step"], history[answer], styles[name], band))
        title = f"{answer.capitalize()} answers"
        panels.append(Panel(f"{answer}_answers", lines(title, series, _STEPS, _PER_ANSWER, size=size, zero=True)))
    return panels


def token_shift_panels(shifts: Mapping[str, TokenShift], *, size: Size = LARGE) -> list[Panel]:
    """The chosen answers' change per token: before, at and after the edit, and by distance from it.

    Offsets with fewer than a tenth of the tokens that the best-filled offset beside the edit has are left out: means
    over a handful of long answers are noise.

    Args:
        shifts: by method, from `token_shift.token_shift`.
        size: of the panel by distance.

    Raises:
        ValueError: there is no method.
    """
    styles = _styles("shifts", shifts)
    regions = {
        name: (styles[name], [shift.before.mean_change, shift.at.mean_change, shift.after.mean_change])
        for name, shift in shifts.items()
    }
    profiles = []
    for name, shift in shifts.items():
        offsets, changes, counts = shift.profile
        enough = counts >= max(1, _FEW_TOKENS * counts[offsets != 0].max(initial=0))
        x, y = (list(map(float, values[enough])) for values in (offsets, changes))
        profiles.append(Line(name, x, y, styles[name]))
    by_region = stems("Around the edit", ("before", "at the edit", "after"), regions, _PER_TOKEN, size=size)
    distance = Axis("tokens from the edit (0: the edit itself)", whole=True)
    by_distance = lines("By distance from the edit", profiles, distance, _PER_TOKEN, size=size, zero=True, origin=True)
    return [Panel("around_the_edit", by_region), Panel("by_distance", by_distance)]


def checkpoint_panels(history: Mapping[int, PairEvaluation], *, size: Size = LARGE) -> list[Panel]:
    """A run's checkpoints: whole answers, and the chosen answers' tokens around the edit.

    Args:
        history: by optimizer step, each against the same reference; step 0, where nothing has changed, is added.
        size: of a panel.

    Raises:
        ValueError: there is no checkpoint.
    """
    if not history:
        raise ValueError("history: expected at least one checkpoint, got none.")
    steps = [0, *history]

    def series(name: str, style: Style, values: Sequence[float]) -> Line:
        return Line(name, steps, [0.0, *values], style)

    answers = [
        series(f"{side} answers", style, [getattr(value, f"{side}_logratio") for value in history.values()])
        for side, style in (("rejected", palette.REJECTED), ("chosen", palette.CHOSEN))
    ]
    regions = (("before", palette.BEFORE), ("at", palette.AT), ("after", palette.AFTER))
    tokens = [
        series(f"{region} the edit", style, [getattr(value.shift, region).mean_change for value in history.values()])
        for region, style in regions
    ]
    return [
        Panel("checkpoints_answers", lines("Whole answers", answers, _STEPS, _PER_ANSWER, size=size, zero=True)),
        Panel(
            "checkpoints_tokens",
            lines("The chosen answers' tokens", tokens, _STEPS, _PER_TOKEN, size=size, zero=True),
        ),
    ]


def _styles(name: str, methods: Mapping[str, object]) -> dict[str, Style]:
    if not methods:
        raise ValueError(f"{name}: expected at least one method, got none.")
    return dict(zip(methods, method_styles(methods), strict=True))
