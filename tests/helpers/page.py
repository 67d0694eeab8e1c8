"""A report as a browser takes it: everything closed in order, nothing from elsewhere, nothing that runs."""

import re
from html import unescape
from html.parser import HTMLParser

from dpop_trainer.report.graphemes import columns
from dpop_trainer.report.svg import COLUMN


class Page(HTMLParser):
    """Reads a page, or a piece of one, and gathers what it shows.

    Raises:
        AssertionError: a tag is not closed where it must be, something is loaded, or a handler is set.
    """

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.marked: list[tuple[str, str]] = []
        """Side and text of every mark."""
        self.style = ""
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []
        assert "url(" not in self.style
        assert "@import" not in self.style
        assert not self.tags & {"script", "link", "iframe", "img", "object", "embed"}

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def of(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """The attributes of all elements of a kind; `class_` for a class that they have among others."""
        wanted = attributes.pop("class_", None)
        return [
            found
            for name, found in self.elements
            if name == tag
            and (wanted is None or wanted in found.get("class", "").split())
            and attributes.items() <= found.items()
        ]

    def variables(self) -> list[dict[str, str]]:
        """CSS variables of the light and of the dark scheme."""
        light, dark = self.style.split("@media (prefers-color-scheme: dark)", 1)
        return [
            dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part.partition("\n")[0] + part)) for part in (light, dark)
        ]

    def handle_starttag(self, tag, attrs):
        for name, _ in attrs:
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "href", "action", "data", "srcset", "xlink:href"), (tag, name)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "mark":
            self.marked.append((dict(attrs)["class"], ""))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            self.style += data
            return
        self.text += data
        if "mark" in self.open:
            side, text = self.marked.pop()
            self.marked.append((side, text + data))


def text_stays_inside(drawn):
    """No text of a chart is outside of it, by the room that a column takes; headings are larger by a fifth."""
    page = Page(drawn)
    width, height = map(float, page.of("svg")[0]["viewbox"].split()[2:])
    for kind, x, y, told in re.findall(r'<text class="([\w ]+)" x="([-\d.]+)" y="([-\d.]+)">([^<]*)<', drawn):
        taken = columns(unescape(told)) * COLUMN * (1.2 if kind == "heading" else 1.0)
        left = float(x) - taken * (1.0 if "end" in kind else 0.5 if "middle" in kind else 0.0)
        assert -0.5 <= left <= width + 0.5 - taken, told
        assert 0 <= float(y) <= height, told
