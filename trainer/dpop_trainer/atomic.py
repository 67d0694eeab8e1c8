"""Files that are there whole or not at all: an interrupted run leaves no half of one."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Put a complete file in place of what was there; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
