"""What hashing adds to saving a checkpoint: of `write_record`, against the same without hashes.

    python -m benchmarks.hash_cost                1 GiB in 4 files, five rounds
    python -m benchmarks.hash_cost --gib 0.1 --rounds 3 --folder /mnt/disk

One round writes the files as safetensors does, from memory in one go, and has the system take them to the disk, once
with `write_record` and once with hashing left out of it; in turns, so that both see the same disk. Hashing runs beside
the disk, so that its cost is what is left over, which may be nothing or less.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from dpop_trainer.run_folder import checkpoints

NUM_FILES = 4


def seconds(folder: Path, content: bytes, *, hashed: bool) -> float:
    """Of one save."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        started = time.perf_counter()
        for number in range(NUM_FILES):
            (Path(temporary) / f"model-{number}.safetensors").write_bytes(content)
        if hashed:
            checkpoints.write_record(Path(temporary), {})
        else:
            with patch.object(checkpoints, "digests_of", lambda *_: {}):
                checkpoints.write_record(Path(temporary), {})
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    content = os.urandom(int(options.gib * 2**30) // NUM_FILES)
    seconds(options.folder, content, hashed=True)
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(options.rounds):
        for hashed in (True, False) if number % 2 else (False, True):
            times[hashed].append(seconds(options.folder, content, hashed=hashed))
    plain, hashed_too = (statistics.median(times[hashed]) for hashed in (False, True))
    spread = (max(times[False]) - min(times[False])) / plain
    print(
        f"{options.gib:g} GiB: {plain:.3f} s without hashes, {hashed_too:.3f} s with them: "
        f"{hashed_too / plain - 1:+.1%} (median of {options.rounds}; without hashes they spread over {spread:.1%})"
    )


if __name__ == "__main__":
    main()
