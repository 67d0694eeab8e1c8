"""Charts: where values stand, by hand; what is not finite is left out; text stays within its panel."""

import re

import numpy as np
import pytest
from dpop_trainer.data.edits import EditRegions
from dpop_trainer.measure.token_shift import token_shift
from dpop_trainer.report.charts import LARGE, SMALL, Estimate, Line, histogram, intervals, lines, scatter, stems
from dpop_trainer.report.palette import PLAIN, SERIES
from dpop_trainer.report.plots import logratio_panels, token_shift_panels
from dpop_trainer.report.scale import Axis, Scale, number, round_numbers
from page import Page, text_stays_inside

AT = Axis("step", low=0.0, high=10.0)


def paths(drawn, kind):
    return re.findall(rf'<path class="{kind}"[^>]* d="([^"]+)"', drawn)


def test_a_line_by_hand():
    drawn = lines("Loss", [Line("a", [0, 5, 10], [0.0, 1.0, 2.0])], AT, Axis("", low=0.0, high=2.0))
    # ticks 0 to 2 by halves: three digits of 7.3 and 8 more are under 30, the least; 360 - 16 at the right;
    # 48 above, 220 - 36 below
    assert paths(drawn, "run") == ["M30.0 184.0L187.0 116.0L344.0 48.0"]
    assert "<title>a, step 5: 1</title>" in drawn
    assert "legend" not in drawn
    text_stays_inside(drawn)


def test_a_band_and_a_legend():
    low, high = [0.0, 0.5], [1.0, 2.0]
    series = [Line("a", [0, 10], [0.5, 1.0], SERIES[0], (low, high)), Line("b", [0, 10], [0.1, 0.2], SERIES[1])]
    drawn = lines("Loss", series, AT, Axis("", low=0.0, high=2.0), zero=True)
    # there along the lower side, back along the upper one
    assert paths(drawn, "band") == ["M30.0 184.0L344.0 150.0L344.0 48.0L30.0 116.0Z"]
    page = Page(drawn)
    assert page.text.count("a") >= 2
    assert page.of("g", class_=f"of-{SERIES[1].colour}")
    assert drawn.count('stroke-dasharray="7 3"') == 2  # the line, and its sample
    assert 'class="zero" x1="30.0" y1="184.0"' in drawn


def test_what_is_not_finite_is_left_out():
    drawn = lines("x", [Line("a", [0, 5, 10], [0.0, float("nan"), 2.0])], AT, Axis("", low=0.0, high=2.0))
    assert paths(drawn, "run") == ["M30.0 184.0L344.0 48.0"]
    for values in ([], [float("nan")], [float("inf")], [3.0], [0.0, 0.0], [-1e-30, 1e30], [1e300, -1e300]):
        for axis in (Axis(), Axis(low=0.0), Axis(log=True), Axis(whole=True)):
            drawn = lines("x", [Line("a", range(len(values)), values)], Axis(), axis, zero=True)
            Page(drawn)
            assert "nan" not in drawn
            assert "inf" not in drawn


def test_a_logarithmic_axis_goes_from_power_to_power():
    scale = Scale.over([2.0, 300.0], Axis(log=True), 0.0, 30.0)
    assert (scale.low, scale.high) == (1.0, 1000.0)
    assert scale(10.0) == pytest.approx(10.0)
    assert scale(0.0) == 0.0  # has no place: at the beginning
    assert [text for _, text in scale.ticks(Axis(log=True), 4)] == ["1", "10", "100", "1,000"]


def test_numbers_along_an_axis():
    told = ["0", "−1.5", "0.001", "1,234", "12.3k", "4.5M", "10⁻⁷", "−10⁻⁷", "2.5·10⁻⁵", "10¹²"]
    values = (-0.0, -1.5, 1e-3, 1234, 12300, 4.5e6, 1e-7, -1e-7, 2.5e-5, 1e12)
    assert [number(value) for value in values] == told
    assert round_numbers(-0.3, 1.1, 5) == [0.0, 0.5, 1.0]  # fifths of 1.4 are 0.28: the next round step is a half
    assert round_numbers(0.0, 7.0, 4) == [0.0, 2.0, 4.0, 6.0]


def test_markers_are_few_and_end_with_the_last_point():
    drawn = lines("x", [Line("a", range(100), [float(i) for i in range(100)])], Axis("step"), Axis())
    marks = paths(drawn, "full")
    assert 10 <= len(marks) <= 12
    assert "a, step 99: 99" in drawn
    assert drawn.count('class="hit"') <= 60 + len(marks)
    hollow = lines("x", [Line("a", [0, 1], [0.0, 1.0], kind="points")], Axis(), Axis())
    assert len(paths(hollow, "hollow")) == 2
    assert not paths(hollow, "run")


def test_stems_by_hand():
    series = {"DPO": (SERIES[1], [-1.0, float("nan"), 2.0]), "DPOP": (SERIES[0], [0.0, 0.0, 0.0])}
    drawn = stems("Around the edit", ("before", "at", "after"), series, Axis("nats", low=-1.0, high=2.0))
    stem = re.findall(r'class="stem" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"', drawn)
    assert len(stem) == 5  # one value is missing
    # groups at 0, 1, 2 of -0.5 to 2.5, two series 0.37 apart: the first at -0.185; zero a third up from 184 to 48
    at = 30 + (0.5 - 0.185) / 3 * 314
    np.testing.assert_allclose([float(v) for v in stem[0]], [at, 184 - 136 / 3, at, 184.0], atol=0.051)
    assert "<title>DPO, after: 2</title>" in drawn
    text_stays_inside(drawn)


def test_intervals_by_hand():
    rows = [Estimate("DPO", -2.0, -4.0, 0.0, SERIES[1], "-2.00"), Estimate("one", 4.0, np.nan, np.nan, PLAIN, "+4.00")]
    drawn = intervals("Chosen", rows, "nats")
    # -4 to 4 over 30 to 344: 39.25 a nat; rows of 34 from 32 on, their dots 24 below
    assert re.findall(r'class="whisker" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)"', drawn)[0] == (
        "30.0",
        "56.0",
        "187.0",
    )
    assert drawn.count("whisker") == 3  # none where no range is known
    assert "<title>one: +4.00</title>" in drawn
    text_stays_inside(drawn)


def bars(drawn):
    return [(float(x), float(h)) for x, h in re.findall(r'class="bar" x="([\d.]+)".*?height="([\d.]+)"', drawn)]


def test_histogram_by_hand():
    drawn = histogram("share <b>", np.array([0.0, 0.0, 0.5, 1.0, np.nan]), Axis(low=0, high=1))
    # 40 steps of 314 / 40 from 30: value 0 in the first, 0.5 in the 21st, 1 in the last; the drawing is 136 high
    expected = [(30.5, 136.0), (30.5 + 20 * 7.85, 68.0), (30.5 + 39 * 7.85, 68.0)]
    np.testing.assert_allclose(bars(drawn), expected, atol=0.051)
    assert "share &lt;b&gt;: 4 pairs, median 0.25" in drawn
    assert 'class="median" x1="108.5"' in drawn  # 30 + 0.25 * 314
    assert "<title>0.5 to 0.525: 1</title>" in drawn
    text_stays_inside(drawn)


def test_charts_of_little():
    assert histogram("x", np.array([np.nan]), Axis()) == ""
    assert scatter("x", np.array([np.nan]), np.array([1.0]), Axis(), Axis()) == ""
    for values in ([3.0], [0.0, 0.0], [-1e-30, 1e30], [1.0, 2.0]):
        for axis in (Axis(), Axis(low=0), Axis(low=0, high=1)):
            drawn = histogram("x", np.array(values), axis) + scatter(
                "x", np.array(values), np.array(values), axis, Axis()
            )
            Page(drawn)
            assert "nan" not in drawn
            assert "inf" not in drawn
    assert scatter("x", np.arange(3), np.arange(3), Axis(), Axis()).count("<circle") == 3


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 12345.0, 1e8])
def test_text_stays_within_its_panel(size, scale):
    names = ["DPO", "DPOP, λ = 5, learning_rate = 1e-05, max_length = 1024, a name that no row has room for", "运行１"]
    y = [scale * value for value in (-1.0, 0.3, 1.0)]
    series = [Line(name, [0, 500_000, 1_000_000], y, style) for name, style in zip(names, SERIES, strict=False)]
    drawn = lines("Change of the answers", series, Axis("step"), Axis("nats per answer"), size=size, zero=True)
    text_stays_inside(drawn)
    assert "…" in drawn
    assert names[1] in drawn  # in full on hover


def test_token_shift_with_regions_that_are_empty():
    policy, ref = [[-1.0, -2.0, -4.0]], [[-1.0, -2.5, -2.0]]
    shifts = {
        "DPO": token_shift(policy, ref, [EditRegions(1, 2)]),
        "at the very beginning": token_shift(policy, ref, [EditRegions(0, 0)]),  # nothing before, nothing at
        "the whole answer": token_shift(policy, ref, [EditRegions(0, 3)]),  # nothing beside it
    }
    around, by_distance = token_shift_panels(shifts)
    assert "<title>DPO, after: −2</title>" in around.svg
    assert "<title>DPO, at the edit: 0.5</title>" in around.svg
    assert around.svg.count('class="stem"') == 3 + 1 + 1
    for panel in (around, by_distance):
        Page(panel.svg)
    assert [panel.svg for panel in token_shift_panels(shifts)] == [around.svg, by_distance.svg]


def test_figures_refuse_what_they_cannot_draw():
    with pytest.raises(ValueError, match="histories: expected at least one method"):
        logratio_panels({})
    with pytest.raises(ValueError, match="shifts: expected at least one method"):
        token_shift_panels({})
    with pytest.raises(
        ValueError, match=r"histories\['DPO'\]: expected three lists of one length, got .*'rejected': None"
    ):
        logratio_panels({"DPO": {"step": [0], "chosen": [0.0]}})
    with pytest.raises(ValueError, match=r"'step': 2, 'chosen': 1"):
        logratio_panels({"DPO": {"step": [0, 1], "chosen": [0.0], "rejected": [0.0]}})


def test_names_of_any_script_are_drawn():
    history = {"step": [0.0, 1.0], "chosen": [0.0, 1.0], "rejected": [0.0, -1.0]}
    names = ["运行１", "_hidden", "a$b$c_{", "ริ", "тест", "خط", "😀", "<b>"]
    for panel in logratio_panels(dict.fromkeys(names, history)):
        page = Page(panel.svg)
        assert all(name in page.text for name in names)
        text_stays_inside(panel.svg)
