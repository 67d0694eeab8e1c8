"""What an export reads and where it writes, looked for before torch is imported."""

import re
from pathlib import Path


def check_out(out: str) -> None:
    """
    Raises:
        ValueError: a file is in the way, or a model.
    """
    if Path(out).is_file():
        raise ValueError(f"out: expected a folder, got the file {out!r}. Choose another.")
    if (Path(out) / "config.json").exists():
        raise ValueError(f"out: expected a folder without a model, found one in {out!r}. Give another, or remove it.")


def check_shard_size(size: str) -> None:
    """
    Raises:
        ValueError: it is no size as huggingface_hub reads it.
    """
    if not re.fullmatch(r"(?i)[0-9]{1,9}(\.[0-9]{1,9})?[KMGT]B", size.strip()):
        raise ValueError(f"max_shard_size: expected a number with KB, MB, GB or TB, as in 5GB, got {size!r}.")


def evaluation_file(evaluation: str | None) -> Path | None:
    """results.json of `dpop eval`, given as such or by its folder.

    Raises:
        ValueError: there is none.
    """
    if evaluation is None:
        return None
    path = Path(evaluation)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"evaluation: expected results.json of `dpop eval` or its folder, found none at {evaluation!r}."
        )
    return path
