"""Where what was read from a file is kept as Arrow, so that it is read once and what is computed from it is cached."""

import hashlib
from pathlib import Path

import datasets.config

from dpop_trainer.data.code_hash import code_hash

_BLOCK = 1 << 20


def cached_arrow(path: Path, *options: object) -> Path:
    """The cache file for a file's contents, read by this version of the code with these options."""
    digest = hashlib.sha256(repr((code_hash("dpop_trainer.data.read"), *options)).encode())
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return Path(datasets.config.HF_DATASETS_CACHE) / "dpop_pairs" / f"{digest.hexdigest()}.arrow"
