"""Files that are taken to the disk and hashed behind a writer who goes on with the next ones.

Hashed is what the system was given. A file is read back as soon as it is closed, out of the memory that the system
still holds it in: a byte that the disk turns later differs from the hash, where a hash of what has come back from the
disk would take it for what was meant. A hash of the tensors would also find what the writer itself spoils; but it is
safetensors and torch that write, and nobody else ever holds the bytes of their forms.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dpop_trainer.data.digests import THREADS, Digest, digest_of
from dpop_trainer.run_folder.files import flush


class _Taken(NamedTuple):
    state: tuple[int, int, int]
    digest: Future[Digest]
    flushed: Future[None]


class Sealing:
    """To be left (`with`) before anything is done with the files."""

    def __init__(self) -> None:
        self._hashing, self._flushing = ThreadPoolExecutor(THREADS), ThreadPoolExecutor(1)
        self._taken: dict[Path, _Taken] = {}

    def __enter__(self) -> "Sealing":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._hashing, self._flushing):
            pool.shutdown(cancel_futures=True)

    def take(self, paths: Iterable[Path]) -> None:
        """Begin with files that are complete; returns at once. One that was taken before is let pass, unless it has
        been written anew."""
        for path in paths:
            found = path.stat()
            state = (found.st_ino, found.st_size, found.st_mtime_ns)
            if path not in self._taken or self._taken[path].state != state:
                hashed, flushed = self._hashing.submit(digest_of, path), self._flushing.submit(flush, path)
                self._taken[path] = _Taken(state, hashed, flushed)

    def digests(self, folder: Path, paths: Iterable[Path]) -> dict[str, Digest]:
        """By their names in the folder, once all are on the disk; what was not taken yet is taken now.

        Raises:
            OSError: one cannot be read, or written to the disk.
        """
        paths = list(paths)
        self.take(paths)
        for path in paths:
            self._taken[path].flushed.result()
        return {path.relative_to(folder).as_posix(): self._taken[path].digest.result() for path in paths}
