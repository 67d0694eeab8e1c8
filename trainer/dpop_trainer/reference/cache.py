"""Reference log-probs on disk: a folder per reference, in it part files that are written once and never changed.

    <ref_cache_dir>/<reference key>/reference.json            what the key is made of, for people
                                    part-<sha256>.safetensors keys [n, 16] uint8, segment_logps [n, 3] float64

A part is named by the hash of its bytes, so that a damaged one shows; it gets its name when it is complete, so that
none is ever half-written. Parts say nothing about where or in which order pairs stand: folders can be copied and
merged, any number of runs may write to one at a time, and another selection of the same pairs finds what is known.
"""

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
from safetensors.numpy import load, save

from dpop_trainer.data.partial_files import replacing
from dpop_trainer.data.source_path import expanded
from dpop_trainer.reference.keys import KEY_BYTES, reference_key

logger = logging.getLogger(__name__)


class ReferenceCache:
    """Segment log-prob sums of one reference by pair.

    Args:
        root: the folder of all references' caches.
        description: from `describe_reference`; decides the folder.
        notes: written beside it for people; decides nothing.
    """

    def __init__(self, root: Path, description: dict[str, Any], notes: dict[str, Any] | None = None) -> None:
        self.folder = root / reference_key(description)
        self._about = {**description, "notes": notes or {}}

    def lookup(self, keys: list[bytes]) -> np.ndarray:
        """What is known of these pairs -> [len(keys), 3] float64, in nats, (shared, chosen tail, rejected tail), NaN in
        rows that are not known. A damaged part is named in a warning, removed, and its pairs are not known."""
        found = np.full((len(keys), 3), np.nan)
        rows: dict[bytes, np.ndarray] = {}
        for path in sorted(self.folder.glob("part-*.safetensors")):
            part = self._read(path)
            if part is not None:
                rows.update(zip(map(bytes, part["keys"]), part["segment_logps"], strict=True))
        for i, key in enumerate(keys):
            if key in rows:
                found[i] = rows[key]
        return found

    def add(self, keys: list[bytes], segment_logps: np.ndarray) -> None:
        """Keep log-probs [len(keys), 3]. What is not finite is not kept; a disk that takes none costs a warning, not
        the run."""
        finite = np.isfinite(segment_logps).all(-1)
        if not finite.any():
            return
        part = {
            "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)[finite],
            "segment_logps": np.ascontiguousarray(segment_logps[finite], dtype=np.float64),
        }
        content = save(part)
        try:
            self._write(f"part-{hashlib.sha256(content).hexdigest()}.safetensors", content)
            if not (self.folder / "reference.json").exists():
                self._write("reference.json", json.dumps(self._about, indent=2, sort_keys=True).encode())
        except OSError as error:
            logger.warning(
                "ref_cache_dir: expected a folder to write to, got %s. The run goes on without keeping %d reference "
                "log-probs; free space, or set another ref_cache_dir.",
                error,
                len(keys),
            )

    def notes(self) -> dict[str, Any]:
        """What was noted by the run that made the folder; nothing where there is none to be read."""
        try:
            return dict(json.loads((self.folder / "reference.json").read_text())["notes"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _write(self, name: str, content: bytes) -> None:
        """Give the file its name when it is whole."""
        with replacing(self.folder / name) as partial, partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> dict[str, np.ndarray] | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # another run found it damaged
            return None
        except OSError as error:
            logger.warning("%s: expected a readable file, got %s. Its pairs are computed again.", path, error)
            return None
        if path.stem.removeprefix("part-") == hashlib.sha256(content).hexdigest():
            return load(content)
        logger.warning(
            "%s: expected the bytes that were written, got others. Removed; its pairs are computed again.", path
        )
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None


def cache_root(ref_cache_dir: str | None) -> Path | None:
    """The folder that a configuration names: "auto" is beside the tokenised data sets; None or "none" is no cache."""
    if ref_cache_dir is None or ref_cache_dir.lower() == "none":
        return None
    if ref_cache_dir == "auto":
        return Path(datasets.config.HF_DATASETS_CACHE) / "dpop_reference"
    return expanded(ref_cache_dir)
