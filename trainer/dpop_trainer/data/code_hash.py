"""A hash of what makes something, which its cache key holds: new code never meets what old code cached, nor does code
under other bounds."""

import ast
import functools
import hashlib
from pathlib import Path

from dpop_trainer.data.limits import LIMITS

_PACKAGE = __name__.partition(".")[0]
_FOLDER = Path(__file__).parents[1]


def code_hash(module: str) -> str:
    """Hex digest of the source of a module of this package and of all of the package that it imports, to the end, and
    of the bounds in force.

    `datasets` hashes an importable function by its name alone, so an upgrade would otherwise reuse stale results.

    Args:
        module: its dotted name, as `__name__` gives it.

    Raises:
        ValueError: a bound that the environment sets is no number.
    """
    return _hash(module, tuple(limit() for limit in LIMITS))


@functools.cache
def _hash(module: str, bounds: tuple[float, ...]) -> str:
    digest = hashlib.sha256(repr(bounds).encode())
    for path in sorted(import_closure(module, _FOLDER)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def import_closure(module: str, folder: Path) -> set[Path]:
    """The files of a module and of all that it imports of its package, found in `folder`, directly or not."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        path = _file_of(waiting.pop(), folder)
        if path is None or path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                # `from package.module import name`, where the name may be a module too
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def _file_of(module: str, folder: Path) -> Path | None:
    """None for another package's module, for a name that is none, and for a package: its `__init__` makes nothing."""
    package, *parts = module.split(".")
    path = folder.joinpath(*parts).with_suffix(".py")
    return path if package == _PACKAGE and parts and path.is_file() else None
