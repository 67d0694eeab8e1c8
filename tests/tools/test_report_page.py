"""The frame of reports and its palette: both schemes whole and readable, nothing from elsewhere, tables that fold."""

import re
from pathlib import Path

import pytest
from dpop_trainer.report import html_page, palette, svg
from dpop_trainer.report.palette import COLOURS, INKS, MARKS, METHODS, PAGES, SERIES, method_styles
from page import Page

ROOT = Path(__file__).parents[2]


def linear(part):
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4


def parts(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def contrast(one, other):
    """WCAG 2.2's contrast ratio of two sRGB colours, given as three parts up to 255."""
    low, high = sorted(
        sum(w * linear(part / 255) for w, part in zip((0.2126, 0.7152, 0.0722), of, strict=True)) for of in (one, other)
    )
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_of_black_on_white_is_21():
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    # grey 119: ((119 / 255 + 0.055) / 1.055) ** 2.4 = 0.1845, so 1.05 / 0.2345
    assert contrast([119] * 3, [255] * 3) == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_that_is_read_stands_out(scheme):
    def of(colour):
        return parts(getattr(colour, scheme))

    for name, ink in INKS.items():
        for ground in PAGES.values():
            assert contrast(of(ink), of(ground)) >= 4.5, name
    text = of(INKS["ink"])
    for mark in MARKS.values():
        assert contrast(text, of(mark)) >= 4.5
    # a token that changed most: half of its colour over the page
    for side in ("chosen", "rejected"):
        mixed = [(a + b) / 2 for a, b in zip(of(INKS[side]), of(PAGES["page"]), strict=True)]
        assert contrast(text, mixed) >= 4.5, side


def test_colours_are_said_once():
    files = [path for package in ("trainer", "benchmarks") for path in (ROOT / package).rglob("*.*")]
    with_colours = {
        path.name
        for path in files
        if path.suffix in (".py", ".css") and re.search(r"#[0-9A-Fa-f]{6}\b|\brgb\(", path.read_text())
    }
    assert with_colours == {"palette.py"}


def test_things_keep_their_colour():
    for names in (["DPO", "DPOP"], ["DPOP", "IPO", "DPO"], ["dpop", "dpo"]):
        styles = dict(zip(map(str.upper, names), method_styles(names), strict=True))
        assert styles["DPO"] == METHODS["DPO"]
        assert styles["DPOP"] == METHODS["DPOP"]
    # what training does to answers is in their colours, and no method's
    assert {METHODS[name].colour for name in METHODS}.isdisjoint({"chosen", "rejected"})


def test_series_read_in_grey():
    names = ["DPO", "DPOP, λ = 5", "DPOP", "DPOP, λ = 500", "slic", "IPO", "SimPO", "ORPO", "CPO", "dpo+sft"]
    for styles in (method_styles(names), SERIES):
        assert len({(style.dash, style.marker) for style in styles if style.colour != "sft"}) >= len(METHODS)
    of_dpop = [style for name, style in zip(names, method_styles(names), strict=True) if name.startswith("DPOP")]
    assert {style.colour for style in of_dpop} == {"dpop"}
    assert len({style.dash for style in of_dpop}) == len({style.marker for style in of_dpop}) == 3


@pytest.fixture
def page(tmp_path):
    sections = [
        html_page.tiles([("<1>", "a & b")]),
        html_page.table([("loss", ""), ("chosen Δ", "nats")], [["DPO", "-1.00\n-2.00 to 0.00"], ["<b>", "—"]]),
        html_page.verdict(["one", "two"], command="dpop train", numbered=True),
        html_page.folded("more", html_page.facts({"<k>": "<v>"})),
        html_page.beside([html_page.answer("before", html_page.visible("<i>x</i>"))]),
    ]
    html_page.write_page("It <fell>", sections, tmp_path / "new" / "page.html", about="a & b", kind="bad")
    return Page((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))


def test_both_schemes_define_every_variable(page):
    light, dark = page.variables()
    assert light.keys() == dark.keys() == COLOURS.keys()
    assert set(re.findall(r"var\(--([\w-]+)\)", page.style)) <= {*COLOURS, "much"}
    assert light["page"] != dark["page"]
    assert page.of("meta", name="viewport") == [{"name": "viewport", "content": "width=device-width, initial-scale=1"}]
    assert "color-scheme: light dark" in page.style


def test_the_judgement_is_the_heading_and_everything_is_escaped(page):
    assert page.tags.isdisjoint({"fell", "k", "v", "i", "1"})
    assert page.open == []
    for shown in ("It <fell>", "<1>", "a & b", "<b>", "<k>", "<v>", "<i>x</i>", "dpop train"):
        assert shown in page.text
    assert page.text.index("a & b") < page.text.index("It <fell>")
    assert page.of("span", class_="bad")


def test_tables_fold_on_a_phone(page):
    """Every cell has its title with it, and the style sheet shows that below 44 rem; what is wider scrolls, visibly."""
    assert [cell["data-title"] for cell in page.of("td")] == ["loss", "chosen Δ, nats"] * 2
    assert "content: attr(data-title)" in page.style
    narrow = page.style.partition("@media (max-width: 44rem)")[2]
    assert "thead { display: none; }" in narrow
    wide = re.search(r"\.wide \{(.*?)\}", page.style, re.DOTALL)
    assert wide
    assert "overflow-x: auto" in wide[1]
    assert "local" in wide[1]  # shadows at the edges that scroll away where there is no more
    # nothing asks for more than a phone has
    widths = [float(size) for size in re.findall(r"(?:min-width|(?<![-\w])width): ([\d.]+)rem", page.style)]
    assert max(widths, default=0) <= 22
    assert all("min(" in found for found in re.findall(r"minmax\(([^)]*\)?)", page.style) if "rem" in found)


def test_a_file_by_itself_has_its_colours_in_it(tmp_path):
    """For readers of SVG that know no variables; on a ground of its own, in both schemes."""
    inside = svg.chart("<told>", 100, 50, [svg.text(0, 10, "<x>", "tick")])
    text = svg.write_svg(svg.Panel("a", inside), tmp_path / "new").read_text()
    assert "var(" not in text
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    for scheme, part in (("light", light), ("dark", dark)):
        assert getattr(COLOURS["page"], scheme) in part
        assert getattr(COLOURS["dpop"], scheme) in part
    assert 'viewBox="-8 -8 116 66"' in text
    page = Page(text)
    assert page.of("rect", class_="ground") == [
        {"class": "ground", "x": "-8", "y": "-8", "width": "116", "height": "66", "rx": "6"}
    ]
    assert "<x>" in page.text
    assert palette.resolved("a var(--ink) b", "dark") == f"a {INKS['ink'].dark} b"
