"""Data of images, video or sound, which is refused: without them its texts would train as if nothing were missing."""

from collections.abc import Iterable

_COLUMNS = {"image", "images", "video", "videos", "audio", "audios", "pixel_values"}


def refuse_vision(columns: Iterable[str], name: str) -> None:
    """
    Args:
        columns: of a data set.
        name: what the message calls it.

    Raises:
        ValueError: one of them is known to hold what is no text.
    """
    found = sorted(_COLUMNS & set(columns))
    if found:
        raise ValueError(
            f"{name}: expected pairs of text, got the column {found[0]!r}. Vision-language data is not trained on "
            "here; remove the column, or use TRL's trainer with dpop_kernels.integrations.trl."
        )
