"""transformers' options that go by a row of the batch: right in the layout "rows" alone, where a row is a sequence.

In the other layouts a row is a pair, several pairs or a whole batch, with what they share computed once.
"""

from typing import Any

# field -> what of it goes by rows
_BY_ROWS = {
    "neftune_noise_alpha": "NEFTune's noise is divided by the root of a row's length",
}


def rows_needed(args: Any) -> str | None:
    """Why a run needs the layout "rows", as far as its options tell; None where nothing speaks for it."""
    for name, why in _BY_ROWS.items():
        if getattr(args, name, None):
            return f"{name}={getattr(args, name)}, and {why}"
    return None


def check_row_options(args: Any) -> None:
    """
    Raises:
        ValueError: an option goes by rows, and a layout is asked for in which they are not sequences.
    """
    reason = rows_needed(args)
    if reason is None:
        return
    if args.layout not in ("auto", "rows"):
        raise ValueError(
            f"layout: expected 'rows' or 'auto' with {reason}, got {args.layout!r}, whose rows are no single "
            "sequences. Leave one of the two out."
        )
    if args.group_by_prompt:
        raise ValueError(
            f"group_by_prompt: expected False with {reason}, got True: the layout is then 'rows', which computes the "
            "prompt for each pair anew. Leave one of the two out."
        )
