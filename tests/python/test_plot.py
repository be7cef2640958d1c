"""The SVG writer that bench, training and the learning path share."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from nano_inference.plot import (
    Panel,
    Span,
    cdf,
    log_ticks,
    nice_ticks,
    number,
    render,
    stairs,
    thin,
)

NS = "{http://www.w3.org/2000/svg}"


def drawn(*panels: Panel) -> ET.Element:
    return ET.fromstring(render(panels, "a page"))


def shapes(panel: Panel, tag: str) -> list[dict[str, str]]:
    """Without the page's background and the squares of the legend."""
    found = [dict(e.attrib) for e in drawn(panel).iter(NS + tag)]
    return [s for s in found if s.get("fill") != "white" and s.get("width") != "9.0"]


def texts(panel: Panel) -> list[str]:
    return [str(e.text) for e in drawn(panel).iter(NS + "text")]


def test_cdf_and_stairs() -> None:
    assert cdf([3.0, 1.0, 2.0, 2.0]) == [(1.0, 0.25), (2.0, 0.5), (2.0, 0.75), (3.0, 1.0)]
    many = cdf(list(range(10_000)))
    assert len(many) <= 400 and many[0] == (0.0, 1e-4) and many[-1] == (9999.0, 1.0)
    assert cdf([]) == [] and cdf([5.0]) == [(5.0, 1.0)]
    assert stairs([(1, 2), (3, 5)]) == [(1, 0.0), (1, 2), (3, 2), (3, 5)]
    long = [(float(i), 0.0) for i in range(9999)]
    assert len(thin(long)) < 2000 and thin(long)[-1] == long[-1] and thin([]) == []


def test_ticks() -> None:
    for top in (0.003, 1.0, 7.0, 99.0, 12345.0):
        ticks = nice_ticks(top)
        assert ticks[0] == 0 and ticks[-1] <= top * 1.001 and 3 <= len(ticks) <= 8
    for low, high in ((1.0, 1000.0), (0.04, 7.0), (3e9, 4e11), (5.0, 5.0)):
        ticks = log_ticks(low, high)
        assert ticks[0] <= low * 1.001 and ticks[-1] >= high * 0.999 and 2 <= len(ticks) <= 10
    assert [number(v) for v in (0.5, 1200, 12_000, 3e6, 2.5e9)] == [
        "0.5",
        "1200",
        "12k",
        "3M",
        "2.5G",
    ]


@pytest.mark.parametrize("log", [False, True])
def test_points_lie_where_the_axes_say(log: bool) -> None:
    points = [(1.0, 10.0), (10.0, 100.0), (100.0, 1000.0)]
    panel = Panel("t", "x", "y", dots=[("a", points)], x_log=log, y_log=log)
    xs, ys = ([float(c[k]) for c in shapes(panel, "circle")] for k in ("cx", "cy"))
    # Equal steps on a logarithmic axis, a tenth and ten tenths on a linear one.
    share = 0.5 if log else 0.0909
    assert (xs[1] - xs[0]) / (xs[2] - xs[0]) == pytest.approx(share, abs=2e-3)
    assert (ys[1] - ys[0]) / (ys[2] - ys[0]) == pytest.approx(share, abs=2e-3)
    assert ys[0] > ys[2]  # up is more


def test_a_dot_that_another_covers_is_larger() -> None:
    panel = Panel("t", "x", "y", dots=[("a", [(1, 1), (5, 5)]), ("b", [(1, 1), (9, 9)])])
    assert [c["r"] for c in shapes(panel, "circle")] == ["5", "3", "3", "3"]


def test_a_logarithmic_axis_leaves_out_zeros() -> None:
    panel = Panel("t", "x", "y", [("a", [(0, 0), (1, 1), (2, 10)])], y_log=True)
    (line,) = shapes(panel, "polyline")
    assert len(line["points"].split()) == 2


def test_one_name_one_colour() -> None:
    panel = Panel("t", "x", "y", [("a", [(0, 1), (1, 2)]), ("b", [(0, 2), (1, 1)])])
    panel.dots = [("b", [(0, 2)]), ("a", [(1, 2)])]
    colours = [line["stroke"] for line in shapes(panel, "polyline")]
    assert len(set(colours)) == 2
    assert [c["fill"] for c in shapes(panel, "circle")] == colours[::-1]
    assert texts(panel).count("a") == texts(panel).count("b") == 1
    panel.legend = False
    assert "a" not in texts(panel)


def test_bars_stand_on_the_axis_side_by_side() -> None:
    panel = Panel("t", "x", "y", bars=[("p", [(0, 0.5), (1, 1.0)]), ("q", [(0, 0.25)])])
    panel.x_names = ["one", "two"]
    left, second, right = shapes(panel, "rect")
    values = [{k: float(v) for k, v in s.items() if k != "fill"} for s in (left, second, right)]
    tops = [v["y"] + v["height"] for v in values]
    assert max(tops) - min(tops) < 0.2
    assert values[1]["height"] == pytest.approx(2 * values[0]["height"], abs=0.2)
    assert values[2]["x"] == pytest.approx(values[0]["x"] + values[0]["width"], abs=0.2)
    assert {"one", "two"} <= set(texts(panel))


def test_spans_are_rows_from_the_top() -> None:
    spans = [Span(0, 0, 4, "a", "first"), Span(1, 4, 8, "b"), Span(1, 8, 16, "a")]
    panel = Panel("t", "step", "seat", spans=spans, y_names=["1", "2"], wide=True)
    first, second, third = (
        {k: float(v) for k, v in s.items() if k != "fill"} for s in shapes(panel, "rect")
    )
    assert first["y"] + first["height"] <= second["y"] == third["y"]
    assert second["x"] + second["width"] <= third["x"]
    assert third["width"] == pytest.approx(2 * second["width"], rel=0.05)
    assert "first" in texts(panel)


def test_everything_stays_on_the_page() -> None:
    panels = [
        Panel("small & <odd>", "x", "y", [("", [(0, 0), (3, 7)])]),
        Panel("wide", "x", "y", [("", [(1, 1e-3), (9, 1e3)])], y_log=True, wide=True),
        Panel("empty", "x", "y"),
        Panel("many names", "x", "y", [(f"a rather long name {i}", [(0, i)]) for i in range(6)]),
    ]
    root = drawn(*panels)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    moves = [re.findall(r"[\d.]+", g.attrib["transform"]) for g in root.findall(f"{NS}g")]
    places = [(float(x), float(y)) for x, y in moves]
    # The wide one has a row of its own; the two after it share the next.
    assert len(places) == 4 and places[2][1] == places[3][1] > places[1][1] > places[0][1]
    assert all(0 <= x < width and 0 < y < height for x, y in places)
    assert "small & <odd>" in [t.text for t in root.iter(NS + "text")]
