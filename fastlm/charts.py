"""Line charts as SVG text: pure functions of their points, coloured by the style sheet of the page that holds them.

A chart reads without script: round ticks, a line per series, and each line's last value beside its end. For a script
that shows values under the pointer, each line also carries its values as text.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 250  # units of the view box, in which a letter is 11 high
LEFT, RIGHT, TOP, BOTTOM = 50, 62, 10, 36  # margins: room for the ticks, the last values, and the name of the x axis
LABEL_GAP = 13  # least distance of two last values, one above the other
MOST_LABELS = 8  # beyond this many lines the last values would be a column of digits
MOST_POINTS = 600  # of a line: more than the pixels it has say nothing
LEAST_RANGE = 1e-290  # of an axis: a fifth of a few denormal numbers is 0, and so would the step between ticks be

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line: points (x, y) in ascending x, all finite, and a CSS colour."""

    label: str
    points: Points
    color: str
    has_markers: bool = False


@dataclass(frozen=True)
class Axis:
    """A range of values, the ticks in it, and whether equal ratios, not differences, are equally far apart."""

    low: float
    high: float
    ticks: list[float]
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 at low, 1 at high."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    x_name: str = "step",
    log: bool = False,
    from_zero: bool = False,
    ramp: bool = False,
) -> str:
    """An HTML figure with the lines of all series that have a point; "" if none has.

    log        a logarithmic y axis, on which only values above 0 have a place
    from_zero  a y axis that begins at 0, for amounts of which half is half as high
    ramp       the colours go gradually from the first line to the last: the legend then names these two alone
    """
    drawn = [_prepared(one, log) for one in series]
    drawn = [one for one in drawn if one.points]
    if not drawn:
        return ""
    x_axis, y_axis = _axes(drawn, log, from_zero)
    last = "; ".join(f"{one.label} {number(one.points[-1][1])}" for one in drawn[:MOST_LABELS])
    parts = [*_grid(x_axis, y_axis, x_name), *(_line(one, x_axis, y_axis) for one in drawn)]
    parts += _last_values(drawn, x_axis, y_axis)
    described = html.escape(f"{title}, at the end: {last}")
    return (
        f"<figure><figcaption>{html.escape(title)}<small>{html.escape(unit)}</small></figcaption>{_legend(drawn, ramp)}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">{"".join(parts)}</svg></figure>'
    )


def number(value: float, digits: int = 4) -> str:
    """At most so many significant digits: 0, 2.431, 0.0125, 3e-5, 12.5k, 1.2M."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    powers = ["", "k", "M", "G", "T", "P"]
    power = 0
    while abs(float(f"{value:.{digits}g}")) >= 1000 and power < len(powers) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.{digits}g}{powers[power]}"


def linear_axis(low: float, high: float, *, outward: bool = True) -> Axis:
    """Ticks at multiples of 1, 2 or 5 times a power of ten; outward widens the range to ticks at both ends."""
    if high - low < LEAST_RANGE:
        margin = max(abs(low), abs(high)) / 10
        margin = 1.0 if margin < LEAST_RANGE else margin
        low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 6)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if outward:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = first * step, last * step
    return Axis(low, high, [float(f"{k * step:.12g}") for k in range(first, last + 1)])


def log_axis(low: float, high: float) -> Axis:
    """Ticks at powers of ten, or at 1, 2 and 5 times these where the range is within two of them; low is above 0."""
    factors = (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [float(f"{factor}e{power}") for power in powers for factor in factors]
    start = max(mark for mark in marks if mark <= low * (1 + 1e-9))
    end = min(mark for mark in marks if mark >= high * (1 - 1e-9) and mark > start)
    ticks = [mark for mark in marks if start <= mark <= end]
    if len(ticks) > 7:
        tens = [float(f"1e{power}") for power in powers]
        ticks = [mark for mark in tens if start <= mark <= end]
        ticks = ticks[:: math.ceil(len(ticks) / 7)]
    return Axis(start, end, ticks, is_log=True)


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points that look the same: of each stretch the lowest and the highest, and the very ends."""
    if len(points) <= most:
        return list(points)
    inner, num_stretches = points[1:-1], most // 2 - 1
    kept = [points[0]]
    for index in range(num_stretches):
        stretch = inner[index * len(inner) // num_stretches : (index + 1) * len(inner) // num_stretches]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return [*kept, points[-1]]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions, in their order, moved apart to at least gap within low and high, or evenly where that is full."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    gap = min(gap, (high - low) / max(1, len(positions) - 1))
    placed, floor = [0.0] * len(positions), low
    for index in order:
        placed[index] = max(positions[index], floor)
        floor = placed[index] + gap
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def _prepared(series: Series, log: bool) -> Series:
    points = [point for point in series.points if point[1] > 0] if log else series.points
    return Series(series.label, thinned(points), series.color, series.has_markers)


def _axes(series: Sequence[Series], log: bool, from_zero: bool) -> tuple[Axis, Axis]:
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points] + [0.0] * from_zero
    start = 0.0 if 0 < min(xs) <= max(xs) / 4 else min(xs)  # the axes of curves that begin at other steps are alike
    return linear_axis(start, max(xs), outward=False), (log_axis if log else linear_axis)(min(ys), max(ys))


def _place(axis: Axis, value: float, is_y: bool) -> float:
    """The coordinate of a value in the view box."""
    share = axis.share(value)
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP) if is_y else LEFT + share * (WIDTH - LEFT - RIGHT)


def _grid(x_axis: Axis, y_axis: Axis, x_name: str) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y_axis.ticks:
        y = _place(y_axis, tick, is_y=True)
        parts.append(f'<path class="grid-line" d="M{LEFT},{y:.1f}H{right}"/>')
        parts.append(f'<text class="y tick" x="{LEFT - 7}" y="{y + 3.5:.1f}">{number(tick)}</text>')
    for tick in x_axis.ticks:
        x = _place(x_axis, tick, is_y=False)
        parts.append(f'<path class="axis" d="M{x:.1f},{bottom}v4"/>')
        parts.append(f'<text class="x tick" x="{x:.1f}" y="{bottom + 16}">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT},{bottom}H{right}"/>')
    parts.append(f'<text class="x name" x="{(LEFT + right) / 2:.1f}" y="{HEIGHT - 4}">{html.escape(x_name)}</text>')
    return parts


def _line(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    places = [(_place(x_axis, x, is_y=False), _place(y_axis, y, is_y=True)) for x, y in series.points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    values = " ".join(f"{x:.12g}:{number(y)}" for x, y in series.points)
    dots = places if series.has_markers and len(places) <= MOST_POINTS // 10 else places if len(places) == 1 else []
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in dots)
    label, color = html.escape(series.label), html.escape(series.color)
    return (
        f'<g class="series" style="--color:{color}" data-label="{label}" data-values="{values}">'
        f'<polyline points="{line}"/>{marks}</g>'
    )


def _last_values(series: Sequence[Series], x_axis: Axis, y_axis: Axis) -> list[str]:
    """The last value of each line, right of where it ends, and a dash of its colour between the two."""
    if len(series) > MOST_LABELS:
        return []
    ends = [one.points[-1] for one in series]
    ys = [_place(y_axis, y, is_y=True) for _, y in ends]
    parts, right = [], WIDTH - RIGHT
    for one, (x, value), y, label_y in zip(series, ends, ys, spread(ys, LABEL_GAP, TOP, HEIGHT - BOTTOM), strict=True):
        end = f"{_place(x_axis, x, is_y=False):.1f},{y:.1f}"
        parts.append(
            f'<g style="--color:{html.escape(one.color)}"><path class="leader" d="M{end}L{right + 8},{label_y:.1f}"/>'
            f'<text class="last" x="{right + 12}" y="{label_y + 3.5:.1f}">{number(value)}</text></g>'
        )
    return parts


def _legend(series: Sequence[Series], ramp: bool) -> str:
    """Which colour is which."""
    if len(series) == 1:
        return ""
    between = ""
    if ramp and len(series) > MOST_LABELS:
        series, between = [series[0], series[-1]], "<li class=between>to</li>"
    keys = [f'<li style="--color:{html.escape(one.color)}">{html.escape(one.label)}</li>' for one in series]
    return f"<ul class=legend>{between.join(keys)}</ul>"
