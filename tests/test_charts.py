"""Charts are judged as what they are, geometry: where ticks, lines and labels lie."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from fastlm.charts import HEIGHT, LABEL_GAP, Series, line_chart, linear_axis, log_axis, number, spread, thinned


def svg(text):
    """The picture of a figure as a tree: what is no XML fails here."""
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", text)[0])


def texts(picture, kind):
    return [one.text for one in picture.iter("text") if kind in one.get("class").split()]


def line_of(picture, index=0):
    points = list(picture.iter("polyline"))[index].get("points").split()
    return [tuple(map(float, point.split(","))) for point in points]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2.43149, "2.431"),
        (0.0125, "0.0125"),
        (3e-5, "3e-5"),
        (-1.25e-7, "-1.25e-7"),
        (999.96, "1k"),
        (12500, "12.5k"),
        (1.2e6, "1.2M"),
        (float("inf"), "inf"),
    ],
)
def test_number_keeps_four_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 1),
        (2.31, 7.6),
        (1, 700),
        (1e-5, 4e-3),
        (-3, 11),
        (0, 1e12),
        (5, 5),
        (0, 0),
        (1, 1 + 1e-9),
        (0, 5e-324),
        (1e-323, 2e-323),
    ],
)
def test_linear_ticks_are_round_evenly_spaced_and_cover_the_range(low, high):
    axis = linear_axis(low, high)
    assert axis.low <= low <= high <= axis.high
    assert 3 <= len(axis.ticks) <= 8
    steps = {float(f"{b - a:.6g}") for a, b in pairwise(axis.ticks)}
    assert len(steps) == 1
    assert f"{steps.pop():.9e}"[:3] in ("1.0", "2.0", "5.0")


def test_linear_axis_of_steps_keeps_its_range_and_has_ticks_within():
    axis = linear_axis(1, 700, outward=False)
    assert (axis.low, axis.high, axis.ticks) == (1, 700, [200, 400, 600])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.9, 90, [0.5, 1, 2, 5, 10, 20, 50, 100]), (1e-6, 0.4, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]), (3, 3, [2, 5])],
)
def test_log_ticks_are_powers_of_ten_or_round_parts_of_them(low, high, ticks):
    axis = log_axis(low, high)
    assert axis.low <= low <= high <= axis.high
    assert axis.ticks == ticks or len(axis.ticks) <= 7
    assert set(axis.ticks) <= set(ticks)
    assert axis.share(math.sqrt(axis.low * axis.high)) == pytest.approx(0.5)


def test_line_goes_through_its_points_and_its_last_value_stands_at_its_end():
    picture = svg(line_chart("Loss", [Series("a", [(0, 4.0), (50, 1.0), (100, 2.0)], "red")]))
    line = line_of(picture)
    assert [x for x, _ in line] == [50, 274, 498]
    ticks = {one.text: float(one.get("y")) - 3.5 for one in picture.iter("text") if one.get("class") == "y tick"}
    assert [y for _, y in line] == [ticks["4"], ticks["1"], ticks["2"]]
    assert ticks["4"] < ticks["2"] < ticks["1"]
    assert texts(picture, "last") == ["2"]
    assert texts(picture, "name") == ["step"]


def test_axis_of_steps_begins_at_zero_where_the_first_is_near_it():
    for first, start in ((10, "0"), (60, "60")):
        picture = svg(line_chart("Loss", [Series("a", [(first, 2.0), (100, 1.0)], "red")]))
        assert texts(picture, "x")[0] == start


def test_amounts_are_drawn_from_zero():
    picture = svg(line_chart("Memory", [Series("a", [(0, 10.0), (1, 11.0)], "red")], from_zero=True))
    assert texts(picture, "y")[0] == "0"


def test_log_chart_leaves_out_what_has_no_logarithm():
    picture = svg(line_chart("Norm", [Series("a", [(0, 0.0), (1, 1e-3), (2, 1.0), (3, -1.0)], "red")], log=True))
    assert len(line_of(picture)) == 2


def test_chart_of_nothing_is_nothing():
    assert line_chart("Loss", [Series("a", [], "red")]) == line_chart("Loss", []) == ""


def test_single_point_is_a_dot():
    picture = svg(line_chart("Loss", [Series("a", [(1, 2.0)], "red")]))
    assert len(list(picture.iter("circle"))) == 1


def test_legend_names_every_line_once_there_are_two():
    lines = [Series(name, [(0, 1.0)], "red") for name in "abc"]
    assert "legend" not in line_chart("Loss", lines[:1])
    assert re.findall(r"<li[^>]*>(\w)</li>", line_chart("Loss", lines)) == ["a", "b", "c"]


def test_legend_of_a_ramp_names_the_first_and_the_last_line():
    lines = [Series(f"block {i}", [(0, 1.0)], "red") for i in range(20)]
    assert re.findall(r"<li[^>]*>([^<]*)</li>", line_chart("Norms", lines, ramp=True)) == ["block 0", "to", "block 19"]


def test_last_values_of_near_lines_do_not_overlap_and_keep_their_order():
    lines = [Series(str(i), [(0, 1.0), (1, 5 + i / 1000)], "red") for i in range(8)]
    picture = svg(line_chart("Loss", lines))
    ys = [float(one.get("y")) for one in picture.iter("text") if one.get("class") == "last"]
    assert ys == sorted(ys, reverse=True)
    assert min(a - b for a, b in pairwise(ys)) >= LABEL_GAP - 0.2
    assert all(0 < y < HEIGHT for y in ys)


@pytest.mark.parametrize("positions", [[5, 5, 5], [0, 100, 99], [-9, 300], [], [50] * 40])
def test_spread_stays_within_its_bounds(positions):
    placed = spread(positions, 10, 0, 100)
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in placed)
    gap = min(10, 100 / max(1, len(positions) - 1))
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(sorted(placed)))


def test_thinned_keeps_the_ends_and_every_spike():
    points = [(float(i), 1.0) for i in range(100_000)]
    points[41_234] = (41_234.0, 9.0)
    points[41_235] = (41_235.0, -9.0)
    few = thinned(points)
    assert len(few) <= 600
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert {(41_234.0, 9.0), (41_235.0, -9.0)} <= set(few)
    assert few == sorted(few)


def test_labels_are_escaped():
    chart = line_chart("<b>&", [Series('"><script>x</script>', [(0, 1.0)], "red")], unit="<i>", x_name="<u>")
    assert "<script" not in chart
    assert "<b>" not in chart
    assert "<i>" not in chart
    assert "<u>" not in chart
    assert next(svg(chart).iter("g")).get("data-label") == '"><script>x</script>'
