"""The nulls that Arrow puts where a record lacks a key that another has: absent again, whatever road it came by."""

from typing import Any


def without_filled_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """The record less the null keys of every object in it, at any depth. Its own fields stay, null or not.

    Arrow keeps one set of keys for a whole column, so a null key says no more than an absent one: it must not reach a
    chat template, which would write it out. Nulls that are items of a list were there from the start, and stay.
    """
    return {field: _cleaned(value) for field, value in record.items()}


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        # Arrow's lists hold one type: where the first is a number or a text, so are the others
        first = next((item for item in value if item is not None), None)
        if isinstance(first, dict | list):
            return [_cleaned(item) for item in value]
    return value
