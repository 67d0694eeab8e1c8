"""Every relative link of the pages leads somewhere, anchors too; navigation and citation are complete."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

import dpop_kernels

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
NOTEBOOKS = sorted((ROOT / "examples").rglob("*.ipynb"))

LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
HTML_LINK = re.compile(r"(?:href|src)=\"([^\"]+)\"")
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)


def prose(path: Path) -> str:
    """A page's or a notebook's Markdown without its code, fenced or inline."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^ {0,3}(```|~~~).*?^ {0,3}\1[ \t]*$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, punctuation gone, spaces hyphens, repetitions numbered."""
    found: set[str] = set()
    for heading in HEADING.findall(prose(path)):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number, anchor = 0, slug
        while anchor in found:
            number += 1
            anchor = f"{slug}-{number}"
        found.add(anchor)
    return found | set(re.findall(r"(?:id|name)=\"([^\"]+)\"", prose(path)))


def broken(path: Path) -> Iterator[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    for link in [*LINK.findall(text), *HTML_LINK.findall(text)]:
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        place, _, anchor = unquote(link).partition("#")
        target = (path.parent / place).resolve() if place else path
        if not target.exists() or not target.is_relative_to(ROOT):
            yield f"{link}: no such file"
        elif anchor and (target.suffix not in (".md", ".ipynb") or anchor not in anchors(target)):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(path):
    assert list(broken(path)) == []


def test_broken_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# One `two`: three, λ?\n\n## Again\n\n## Again\n\n```sh\n# no heading\n```\n")
    page.write_text(
        "[a](other.md#one-two-three-λ) [b](other.md#again-1) [c](#here) [d](https://x.example/none) `[e](none.md)`\n\n"
        "# Here\n\n```md\n[f](none.md)\n```\n"
        "[g](none.md) [h](other.md#again-2) [i](other.md#no-heading) ![j](none.png) [k](../outside.md)\n"
    )
    assert [line.partition(":")[0] for line in broken(page)] == [
        "none.md",
        "other.md#again-2",
        "other.md#no-heading",
        "none.png",
        "../outside.md",
    ]


def test_the_navigation_holds_every_page():
    text = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r"^\s+- .+: (\S+\.md)$", text, flags=re.MULTILINE)
    assert sorted(named) == sorted(path.relative_to(ROOT).as_posix() for path in PAGES)
    assert "font: false" in text, "fonts from elsewhere would tell their host of every reader"


def test_the_citation_is_of_this_version_and_this_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    # what version 1.2.0 of the format requires
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[key] for key in ("message", "title", "authors"))
    assert (citation["title"], citation["version"]) == ("dpop-kernels", dpop_kernels.__version__)
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Pal", "Karkhanis", "Dooley", "Roberts", "Naidu", "White",
    ]  # fmt: skip
    assert (paper["year"], paper["url"]) == (2024, "https://arxiv.org/abs/2402.13228")
    assert paper["title"] == "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive"


def test_the_changes_name_this_version():
    headings = re.findall(r"^## (\S+) – ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == dpop_kernels.__version__
