"""A hash of this folder's source, which every cache key holds: new code never meets tokens that old code cached."""

import functools
import hashlib
from pathlib import Path


@functools.cache
def code_hash() -> str:
    """Hex digest of the source of all modules beside this one.

    `datasets` hashes an importable function by its name alone, so an upgrade would otherwise reuse stale results.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
