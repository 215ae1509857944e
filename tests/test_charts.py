"""Charts are judged as what they are, geometry: where ticks, lines and labels lie."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from fastlm.charts import (
    HEIGHT,
    LABEL_GAP,
    SPAN,
    Series,
    in_one_notation,
    line_chart,
    linear_axis,
    log_axis,
    number,
    quantity,
    spread,
    step_axis,
    thinned,
    told_apart,
)

STEPS = step_axis(0, 100)


def chart(*series, title="Loss", steps=STEPS, **options):
    return line_chart(title, series, steps, **options)


def svg(text):
    """The picture of a figure as a tree: what is no XML fails here."""
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", text)[0])


def texts(picture, kind):
    return [one.text for one in picture.iter("text") if kind in one.get("class").split()]


def line_of(picture, index=0):
    """The stretches of a line: for each its points, x in units of the line's view box."""
    stretches = list(picture.iter("path"))[index].get("d").replace("h0", "").split("M")[1:]
    return [[tuple(map(float, point.split(","))) for point in stretch.split()] for stretch in stretches]


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
    ("value", "text"), [(61.2e9, "61.2 GB"), (5, "5 B"), (0, "0 B"), (3e-5, "3e-5 B"), (999.9e3, "1 MB")]
)
def test_quantity_keeps_the_unit_with_its_prefix(value, text):
    assert quantity(value, "B") == text


@pytest.mark.parametrize(
    ("values", "texts"),
    [([0, 5e-4, 1e-3], ["0", "5e-4", "1e-3"]), ([1e-4, 0.1], ["1e-4", "1e-1"]), ([1e-4, 10], ["1e-4", "10"])],
)
def test_small_numbers_side_by_side_are_written_alike(values, texts):
    assert in_one_notation(values) == texts


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        (linear_axis(0.6, 1.2), ["0.6", "0.7", "0.8", "0.9", "1.0", "1.1", "1.2"]),
        (linear_axis(0, 2000), ["0", "500", "1k", "1.5k", "2k"]),
        (linear_axis(1_000_000, 1_000_004), ["1M", "1.000001M", "1.000002M", "1.000003M", "1.000004M"]),
        (log_axis(0.5, 20), ["0.5", "1", "2", "5", "10", "20"]),
    ],
)
def test_labels_of_an_axis_differ_and_have_equally_many_decimals(axis, labels):
    assert axis.labels() == labels


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


@pytest.mark.parametrize(
    ("first", "last", "low", "high", "ticks"),
    [
        (10, 700, 0, 700, [0, 200, 400, 600]),
        (400, 700, 400, 700, [400, 500, 600, 700]),
        (1, 1, 0, 1, [0, 1]),
        (0, 0, 0, 1, [0, 1]),
        (777, 777, 0, 777, [0, 200, 400, 600]),
        (1, 3, 1, 3, [1, 2, 3]),
    ],
)
def test_step_axis_keeps_its_range_and_has_whole_ticks_within(first, last, low, high, ticks):
    axis = step_axis(first, last)
    assert (axis.low, axis.high, axis.ticks) == (low, high, ticks)


def test_counts_have_whole_ticks():
    assert linear_axis(0, 2, whole=True).ticks == [0, 1, 2]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.9, 90, [0.5, 1, 2, 5, 10, 20, 50, 100]),
        (0.9, 200, [1, 10, 100]),
        (1e-6, 0.4, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]),
        (1e-30, 1, [1e-30, 1e-26, 1e-22, 1e-18, 1e-14, 1e-10, 1e-6, 1e-2]),
        (3, 3, [3, 4]),
        (2.3, 9, [2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_log_ticks_are_powers_of_ten_or_round_parts_of_them(low, high, ticks):
    axis = log_axis(low, high)
    assert axis.low <= low <= high <= axis.high
    assert axis.ticks == ticks
    assert axis.share(math.sqrt(axis.low * axis.high)) == pytest.approx(0.5)


def test_line_goes_through_its_points_and_its_last_value_stands_at_its_end():
    picture = svg(chart(Series("a", [(0, 4.0), (50, 1.0), (80, 2.0)], "red")))
    (line,) = line_of(picture)
    assert [x for x, _ in line] == [0, SPAN / 2, SPAN * 0.8]
    ticks = {one.text: float(one.get("y")) - 4 for one in picture.iter("text") if one.get("class") == "y tick"}
    assert [y for _, y in line] == [ticks["4.0"], ticks["1.0"], ticks["2.0"]]
    assert ticks["4.0"] < ticks["2.0"] < ticks["1.0"]
    (last,) = (one for one in picture.iter("text") if one.get("class") == "last")
    assert (last.text, last.get("x"), float(last.get("y"))) == ("2", "80.00%", ticks["2.0"] + 4)
    assert texts(picture, "name") == ["step"]


def test_nothing_but_lines_is_drawn_in_colour_so_that_nothing_else_looks_like_one():
    runs = [Series("a", [(0, 4.0), (100, 1.0)], "red"), Series("b", [(0, 4.0), (10, 1.0)], "blue")]
    picture = svg(chart(*runs))
    assert len(list(picture.iter("path"))) == 2
    assert {one.get("class") for one in picture.iter("line")} == {"grid-line", "axis"}


def test_charts_on_the_same_steps_have_the_same_ticks_wherever_their_points_are():
    few, many = Series("few", [(40, 2.0)], "red"), Series("many", [(0, 2.0), (100, 1.0)], "red")
    assert texts(svg(chart(few)), "x") == texts(svg(chart(many)), "x") == ["0", "20", "40", "60", "80", "100", "step"]
    assert line_of(svg(chart(few)))[0][0][0] == 0.4 * SPAN


def test_a_line_is_broken_where_it_has_no_value():
    nan = math.nan
    points = [(0, nan), (10, 1.0), (20, 2.0), (30, nan), (40, nan), (50, 3.0), (60, math.inf), (70, 1.0), (80, 2.0)]
    text = chart(Series("a", points, "red"))
    stretches = [[x * 100 / SPAN for x, _ in stretch] for stretch in line_of(svg(text))]
    assert stretches == [[10, 20], [50], [70, 80]]
    assert text.count("h0") == 1, "a point alone needs a stretch of its own to be seen"


def test_a_gap_is_kept_in_a_line_that_is_thinned():
    points = [(float(step), math.nan if step == 5000 else 1.0 + step % 2) for step in range(10_000)]
    stretches = line_of(svg(chart(Series("a", points, "red"), steps=step_axis(0, 9_999))))
    assert len(stretches) == 2
    assert stretches[0][-1][0] <= SPAN / 2 <= stretches[1][0][0]


def test_amounts_are_drawn_from_zero():
    picture = svg(chart(Series("a", [(0, 10.0), (1, 11.0)], "red"), from_zero=True))
    assert texts(picture, "y")[0] == "0"


def test_log_chart_says_so_and_leaves_out_what_has_no_logarithm():
    text = chart(Series("a", [(0, 0.0), (1, 1e-3), (2, 1.0), (3, -1.0)], "red"), log=True, unit="nats")
    assert "<small>nats, log scale</small>" in text
    assert [len(stretch) for stretch in line_of(svg(text))] == [2]


def test_chart_of_nothing_is_nothing():
    assert chart(Series("a", [], "red")) == chart() == chart(Series("a", [(0, math.nan)], "red")) == ""


def test_single_point_is_a_dot():
    assert len(list(svg(chart(Series("a", [(1, 2.0)], "red"))).iter("circle"))) == 1


def test_legend_names_every_line_once_there_are_two():
    lines = [Series(name, [(0, 1.0)], "red") for name in "abc"]
    assert "legend" not in chart(*lines[:1])
    assert re.findall(r"<li[^>]*>(\w)</li>", chart(*lines)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (["runs/a", "runs/b"], ["runs/a", "runs/b"]),
        (["gpt2-124m-learning-rate-1e-4", "gpt2-124m-learning-rate-2e-4"], ["\u20261e-4", "\u20262e-4"]),
        (["gpt2-124m-learning-rate", "gpt2-124m-learning-rate-2e-4"], ["\u2026rate", "\u2026rate-2e-4"]),
        (["a" * 60, "b" * 60], ["a" * 60, "b" * 60]),
        (["runs/the-same-name-as-the-other"] * 2, ["\u2026other"] * 2),
    ],
)
def test_long_labels_are_shortened_to_what_tells_them_apart(labels, shown):
    assert told_apart(labels) == shown


def test_legend_of_a_ramp_names_the_first_and_the_last_line():
    lines = [Series(f"block {i}", [(0, 1.0)], "red") for i in range(20)]
    assert re.findall(r"<li[^>]*>([^<]*)</li>", chart(*lines, ramp=True)) == ["block 0", "to", "block 19"]


def test_last_values_of_near_lines_do_not_overlap_and_keep_their_order():
    lines = [Series(str(i), [(0, 1.0), (1, 5 + i / 1000)], "red") for i in range(8)]
    picture = svg(chart(*lines))
    assert texts(picture, "last")[0] == "5.000"
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
    hostile = '"><script>x</script>'
    text = chart(*(Series(f"{hostile}{i}", [(0, 1.0)], hostile, hostile) for i in range(2)), title="<b>&", unit="<i>")
    assert "<script" not in text
    assert "<b>" not in text
    assert "<i>" not in text
    assert next(svg(text).iter("path")).get("data-label") == f"{hostile}0"
