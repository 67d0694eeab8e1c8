"""Cut a tokenised pair to a length, the same way for both of its answers."""

import math
from collections.abc import Iterable
from typing import Literal, get_args

from dpop_trainer.data.pair_tree import PairIds

TruncationMode = Literal["keep_start", "keep_end"]

_STEP = 64


def truncate_pair(pair: PairIds, max_length: int, truncation_mode: TruncationMode) -> PairIds | None:
    """Cut a pair so that prompt + answer is at most `max_length` tokens for either answer.

    Both answers keep the same prompt, so what they share stays shared. "keep_start" cuts the end of each answer.
    "keep_end" cuts the start of the prompt by what the longer answer needs, down to the prompt's last token (the
    first answer token must be predicted from something), and then the start of an answer that is still too long.

    Returns:
        The pair, or None where "keep_start" leaves no room for an answer: the prompt alone fills `max_length`.
    """
    if truncation_mode == "keep_start":
        room = max_length - len(pair.prompt_ids)
        return PairIds(pair.prompt_ids, pair.chosen_ids[:room], pair.rejected_ids[:room]) if room > 0 else None
    longer_answer = max(len(pair.chosen_ids), len(pair.rejected_ids))
    prompt_ids = pair.prompt_ids[-max(1, max_length - longer_answer) :]
    room = max_length - len(prompt_ids)
    return PairIds(prompt_ids, pair.chosen_ids[-room:], pair.rejected_ids[-room:])


def check_truncation(max_length: int | None, truncation_mode: str) -> None:
    """
    Raises:
        ValueError: `max_length` has no room for one prompt and one answer token, or the mode is unknown.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(
            f"max_length: expected at least 2 (one prompt and one answer token), got {max_length}. "
            "Use None to keep pairs whole."
        )
    if truncation_mode not in get_args(TruncationMode):
        raise ValueError(f"truncation_mode: expected one of {get_args(TruncationMode)}, got {truncation_mode!r}.")


def fitting_length(lengths: Iterable[int]) -> int:
    """The `max_length` for pairs of these lengths: a multiple of 64 that all fit, or 99% where a few are far longer."""
    ordered = sorted(lengths)
    of_99_percent = ordered[math.ceil(0.99 * len(ordered)) - 1]
    longest, most = (-(-int(length) // _STEP) * _STEP for length in (ordered[-1], of_99_percent))
    return longest if longest <= 1.5 * most else most
