"""What a file holds, by its size and a hash: so that what is used is what was written, or it is said.

The hash (XXH3, 128 bits) finds what disks, networks and killed processes do. It is no signature: who can write the file
can write its digest too.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

_BLOCK = 1 << 20
THREADS = 4  # xxhash lets go of the interpreter

Digest = dict[str, Any]
"""{"bytes": size, "xxh3_128": hex}; of what an older version wrote, the size alone."""


def digest_of(path: Path) -> Digest:
    """Reads the whole file, at the speed of the disk or the memory it lies in."""
    hashed, size = xxhash.xxh3_128(), 0
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(block):
            hashed.update(block[:read])
            size += read
    return {"bytes": size, "xxh3_128": hashed.hexdigest()}


def digests_of(folder: Path, paths: list[Path]) -> dict[str, Digest]:
    """By their names in the folder."""
    with ThreadPoolExecutor(THREADS) as pool:
        return {
            path.relative_to(folder).as_posix(): found
            for path, found in zip(paths, pool.map(digest_of, paths), strict=True)
        }


def problem_with(folder: Path, listed: dict[str, Any]) -> str | None:
    """What is wrong with files that were listed once, as the object of "expected what was written"; None if nothing.

    Args:
        folder: where they are.
        listed: from `digests_of`, or sizes alone.
    """
    sizes = {name: entry["bytes"] if isinstance(entry, dict) else entry for name, entry in listed.items()}
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"found no {name} in it"
        if path.stat().st_size != size:
            return f"got {path.stat().st_size} of the {size} bytes of {name}"
    hashed = {name: entry for name, entry in listed.items() if isinstance(entry, dict)}
    found = digests_of(folder, [folder / name for name in hashed])
    changed = next((name for name in hashed if found[name] != hashed[name]), None)
    return None if changed is None else f"got other bytes in {changed} than were written (its hash differs)"
