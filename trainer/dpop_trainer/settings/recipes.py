"""Run files that come with the package: `--recipe NAME` runs one, `dpop recipes` lists and copies them.

A recipe's name is its path in the folder `recipes`, without `.yaml`. Its first comment says what starts it, and what it
is: `# dpop train: ...`. Nothing here is imported but the standard library.
"""

import difflib
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from dpop_trainer.data.source_path import expanded
from dpop_trainer.settings.errors import UsageError

FOLDER = Path(__file__).parents[1] / "recipes"

# what starts a recipe -> how
STARTED_BY = {
    "dpop train": "dpop train --recipe NAME",
    "dpop sft": "dpop sft --recipe NAME",
    "dpop compare": "dpop compare --recipe NAME",
    "accelerate launch": 'accelerate launch --config_file "$(dpop recipes --path NAME)" -m dpop_trainer train ...',
    "sbatch": 'sbatch "$(dpop recipes --path NAME)" RECIPE ...',
}


class Recipe(NamedTuple):
    """One file: its name, the key of `STARTED_BY`, and what it is, in a line."""

    name: str
    command: str
    title: str


def recipe_files() -> dict[str, Path]:
    """Name -> path of every file that is not code: recipes, and what they mention."""
    paths = (path for path in sorted(FOLDER.rglob("*")) if path.is_file() and path.suffix not in (".py", ".pyc"))
    return {path.relative_to(FOLDER).as_posix().removesuffix(".yaml"): path for path in paths}


def list_recipes() -> list[Recipe]:
    """Every recipe, by the order of `STARTED_BY` and by name."""
    recipes = [_read(name, path) for name, path in recipe_files().items() if path.suffix in (".yaml", ".sbatch")]
    return sorted(recipes, key=lambda recipe: (list(STARTED_BY).index(recipe.command), recipe.name))


def run_recipe(name: str) -> Path:
    """The YAML of a recipe that `dpop` runs, for --recipe.

    Raises:
        UsageError: there is none of that name (the nearest are named), or it is another program's.
    """
    commands = {recipe.name: recipe.command for recipe in list_recipes()}
    ours = [known for known, command in commands.items() if command.startswith("dpop ")]
    if name in ours:
        return recipe_files()[name]
    expected = f"--recipe: expected a recipe's name, got {name!r}"
    if Path(name).is_file():
        raise UsageError(f"{expected}, which is a file. Give it with --config.")
    if name in commands:
        usage = STARTED_BY[commands[name]].replace("NAME", name)
        raise UsageError(f"{expected}, which is another program's: {usage}")
    raise UsageError(f"{expected}. {_nearest(name, ours)}")


def recipe_file(name: str) -> Path:
    """Any file of this folder by name, for --path.

    Raises:
        UsageError: there is none of that name; the nearest are named.
    """
    files = recipe_files()
    if name not in files:
        raise UsageError(f"--path: expected a recipe's name, got {name!r}. {_nearest(name, list(files))}")
    return files[name]


def copy_recipes(folder: str | Path) -> int:
    """Copy all files into a folder, which need not exist -> how many there are.

    Raises:
        UsageError: it is no folder, or holds a file of the same name; nothing is copied then.
    """
    folder = expanded(folder)
    targets = {source: folder / source.relative_to(FOLDER) for source in recipe_files().values()}
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--copy: expected a folder, got {str(folder)!r}, which is a file. Name another.")
    there = [str(target) for target in targets.values() if target.exists()]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UsageError(f"--copy: expected a folder without these files, found {there[0]}{more}. Name another.")
    for source, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return len(targets)


def _read(name: str, path: Path) -> Recipe:
    comments = (line for line in path.read_text(encoding="utf-8").splitlines()[:2] if line.startswith("# "))
    found = re.match(r"# ([a-z ]+): (.+)", next(comments, ""))
    assert found is not None, f"{path}: expected '# COMMAND: what it is' first"
    return Recipe(name, found[1], found[2])


def _nearest(name: str, known: list[str]) -> str:
    name = name.rpartition("recipes/")[2].removesuffix(".yaml").lower()
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [one for one in known if name and name in one]
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}`dpop recipes` lists them."
