"""What to set for a run on these pairs, each with the numbers that say so."""

from typing import NamedTuple

import numpy as np

from dpop_trainer.data.truncate import fitting_length
from dpop_trainer.settings.wording import counted
from dpop_trainer.tools.doctor.findings import DROPPED_BY_TRAIN, LOW_EDIT, percent
from dpop_trainer.tools.doctor.measure import Measures

_LOW_EDIT_SHARE = 0.25


class Recommendation(NamedTuple):
    """A setting of `dpop train`, or what to do with the file."""

    setting: str
    value: str
    why: str


def recommend(measures: Measures, drop: dict[int, str], max_length: int | None) -> list[Recommendation]:
    """Loss, length, layout (the last two where there is a tokenizer), and which pairs to drop.

    Args:
        measures: of all pairs.
        drop: the rows that should not be trained on, each with why.
        max_length: what was asked for.
    """
    found = [_loss(measures)]
    if (measures.length > 0).any():
        found += [_max_length(measures, max_length), _layout(measures)]
    if drop:
        reasons = list(drop.values())
        parts = ", ".join(f"{reasons.count(name):,} {name.replace('_', ' ')}" for name in dict.fromkeys(reasons))
        how = "--write_clean OUT.jsonl writes the rest."
        if set(reasons) <= set(DROPPED_BY_TRAIN):
            how = "`dpop train` leaves them out by itself."
        found.append(
            Recommendation("pairs to drop", f"{len(drop):,} of {len(measures.identical):,}", f"{parts}. {how}")
        )
    return found


def told_length(measures: Measures) -> int | None:
    """The max_length to train with; None without a tokenizer."""
    lengths = measures.length[measures.length > 0]
    return fitting_length(map(int, lengths)) if len(lengths) else None


def _loss(measures: Measures) -> Recommendation:
    distance = measures.distance[~measures.identical & np.isfinite(measures.distance)]
    if not len(distance):
        return Recommendation("loss_type", "none", "No pair has two different answers.")
    low = float((distance <= LOW_EDIT).mean())
    median = (
        f"The median normalised edit distance is {np.median(distance):.2g}, {percent(low)} of the pairs are low-edit"
    )
    if low >= _LOW_EDIT_SHARE:
        return Recommendation(
            "loss_type",
            "dpop with dpop_lambda 50",
            f"{median}: the kind on which plain DPO lowers the chosen answer. 50 is the paper's λ (its range: 5 to "
            "500). If dpop/chosen_deficit grows in training, raise λ.",
        )
    return Recommendation(
        "loss_type",
        "dpop with dpop_lambda 5 to 50",
        f"{median}: the penalty will be needed less. It costs nothing while the chosen answers do not fall, so that "
        "the paper's 50 is safe; edit distance alone does not rule displacement out (see CHES).",
    )


def _max_length(measures: Measures, max_length: int | None) -> Recommendation:
    lengths = measures.length[measures.length > 0]
    most = told_length(measures)
    assert most is not None
    longest, median = f"{lengths.max():,} tokens", f"{np.median(lengths):,.0f}"
    now = "" if max_length is None else f" At {max_length}, as asked for, {int((lengths > max_length).sum()):,} do not."
    num_cut = int((lengths > most).sum())
    if not num_cut:
        return Recommendation(
            "max_length", str(most), f"All pairs fit: the longest has {longest}, the median {median}.{now}"
        )
    is_cut, them = ("is", "it") if num_cut == 1 else ("are", "them")
    why = (
        f"99% fit, {counted(num_cut, 'longer pair')} {is_cut} cut; to keep {them} whole takes "
        f"{fitting_length([lengths.max()])} (the longest has {longest}, the median {median}).{now}"
    )
    return Recommendation("max_length", str(most), why)


def _layout(measures: Measures) -> Recommendation:
    known = measures.chosen_tokens >= 0
    prompt, chosen, rejected, prefix = (
        column[known].astype(np.int64).sum()
        for column in (measures.prompt_tokens, measures.chosen_tokens, measures.rejected_tokens, measures.prefix)
    )
    rows, tree = 2 * prompt + chosen + rejected, prompt + chosen + rejected - prefix
    saved = 1 - tree / rows
    why = (
        f"One tree per pair holds {tree:,} tokens, two rows {rows:,}: {saved:.0%} less, as prompts are "
        f"{2 * prompt / rows:.0%} of the rows and the answers' common beginnings {2 * prefix / rows:.0%}."
    )
    return Recommendation("layout", "auto", f"{why} auto takes trees where the model can run them.")
