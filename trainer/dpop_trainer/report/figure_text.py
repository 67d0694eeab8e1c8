"""Names that the user chose, as figures can draw them: in a font that has their characters, and never as a formula."""

from collections.abc import Iterable
from functools import cache

from matplotlib import font_manager, rcParams

_MISSING = "?"


def families_for(names: Iterable[str]) -> list[str]:
    """Font families that together have the characters of some names, as far as there is one installed that does.

    The first is matplotlib's own; others are looked for only where it lacks a character.
    """
    families = [str(family) for family in rcParams["font.family"]]
    missing = {character for name in names for character in name if not _has(_own_font(), character)}
    entries = sorted(font_manager.fontManager.ttflist, key=lambda entry: entry.name) if missing else []
    for entry in entries:
        # "Last Resort" has a box for every character
        if entry.name in families or "Last Resort" in entry.name:
            continue
        if found := {character for character in missing if _has(entry.fname, character)}:
            families.append(entry.name)
            missing -= found
        if not missing:
            break
    return families


def drawable(name: str, families: list[str]) -> str:
    """The name for a legend: "?" for what no font of the families has, and no character with a meaning of its own."""
    fonts = [_own_font(), *(_font_of(family) for family in families[1:])]
    text = "".join(character if any(_has(font, character) for font in fonts) else _MISSING for character in name)
    # matplotlib leaves names that begin with an underscore out of legends, and reads "$" as the beginning of a formula
    return ("\u2009" + text if text.startswith("_") else text).replace("$", r"\$")


def _own_font() -> str:
    return font_manager.findfont(font_manager.FontProperties())


def _font_of(family: str) -> str:
    return font_manager.findfont(font_manager.FontProperties(family=family))


@cache
def _has(font: str, character: str) -> bool:
    return bool(font_manager.get_font(font).get_char_index(ord(character)))
