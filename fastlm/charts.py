"""Line charts as HTML and SVG text: pure functions of their points, coloured by the style sheet of their page.

A chart reads without script: round ticks, a line per series, and each line's last value at the right. For a script that
shows values under the pointer, each line also carries its values as text.

A chart is as wide as the page lets it be, and its letters keep their size: places across are percentages, and only the
lines, in an inner svg with a view box of their own, are stretched.
"""

import bisect
import html
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

HEIGHT = 200  # of a plot in pixels
SPAN = 1000  # width of a plot in the units of its lines
LABEL_GAP = 14  # pixels between last values, one above the other, at least
MAX_LABELS = 8  # beyond this many lines the last values would be a column of digits
MAX_POINTS = 600  # of a line: more than the pixels it has say nothing
MAX_LOG_TICKS = 8
MIN_RANGE = 1e-290  # of an axis: a fifth of a few denormal numbers is 0, and so would the step between ticks be
MAX_LEGEND = 24  # letters of a name that a legend holds in one line

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line: points (x, y) in ascending x, a CSS colour, and a class of the style sheet, such as dashed.

    Where y is NaN the line is broken.
    """

    label: str
    points: Points
    color: str
    css_class: str = ""
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

    def labels(self) -> list[str]:
        """The ticks as text, no two alike."""
        digits = 4
        while len(set(texts := in_one_notation(self.ticks, digits))) < len(texts) and digits < 17:
            digits += 1
        return texts if self.is_log else _same_decimals(self.ticks, texts)


def line_chart(
    title: str,
    series: Sequence[Series],
    steps: Axis,
    *,
    unit: str = "",
    across: str = "step",
    log: bool = False,
    from_zero: bool = False,
    whole: bool = False,
    ramp: bool = False,
) -> str:
    """An HTML figure with the lines of all series that have a point; "" if none has.

    steps      the x axis, which all charts of a page share
    across     what the x axis counts
    log        a logarithmic y axis, on which only values above 0 have a place
    from_zero  a y axis that begins at 0, for amounts of which half is half as high
    whole      a y axis with whole numbers at its ticks, for counts
    ramp       the colours go gradually from the first line to the last: the legend then names these two alone
    """
    lines = [_Line(one, stretches) for one in series if (stretches := _stretches(one.points, log))]
    if not lines:
        return ""
    ys = [y for line in lines for _, y in line.points] + [0.0] * from_zero
    values = log_axis(min(ys), max(ys)) if log else linear_axis(min(ys), max(ys), whole=whole)
    parts = [*_grid(steps, values, across), *_curves(lines, steps, values), *_last_values(lines, steps, values)]
    last = "; ".join(f"{line.series.label} {number(line.last)}" for line in lines[:MAX_LABELS])
    described = html.escape(f"{title}, at the end: {last}")
    note = html.escape(", ".join(filter(None, [unit, "log scale" if log else ""])))
    return (
        f"<figure><figcaption>{html.escape(title)}<small>{note}</small></figcaption>"
        f"{_legend([line.series for line in lines], ramp)}"
        f'<svg height="{HEIGHT}" role="img" aria-label="{described}">{"".join(parts)}</svg></figure>'
    )


def number(value: float, digits: int = 4) -> str:
    """At most so many significant digits: 0, 2.431, 0.0125, 3e-5, 12.5k, 1.2M."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) < 1e-3:
        return _scientific(value, digits)
    powers = ["", "k", "M", "G", "T", "P"]
    power = 0
    while abs(float(f"{value:.{digits}g}")) >= 1000 and power < len(powers) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.{digits}g}{powers[power]}"


def in_one_notation(values: Sequence[float], digits: int = 4) -> list[str]:
    """The values as text: all as powers of ten if one is and none reaches 1, so that 0.001 stands as 1e-3 by 5e-4."""
    sizes = [abs(value) for value in values if value]
    if sizes and min(sizes) < 1e-3 and max(sizes) < 1:
        return [_scientific(value, digits) if value else "0" for value in values]
    return [number(value, digits) for value in values]


def quantity(value: float, unit: str, digits: int = 3) -> str:
    """A number with its unit: 61.2 GB, 5 B."""
    text = number(value, digits)
    plain = text.rstrip("kMGTP")
    return f"{plain} {text[len(plain) :]}{unit}"


def step_axis(first: float, last: float) -> Axis:
    """The x axis of a page that shows steps first to last: from 0 if first is near it, with ticks at whole numbers."""
    start = 0.0 if first == last or first <= last / 4 else first  # a step alone stands at the end of its axis
    return linear_axis(start, max(last, start + 1), outward=False, whole=True, max_intervals=5)


def linear_axis(low: float, high: float, *, outward: bool = True, whole: bool = False, max_intervals: int = 6) -> Axis:
    """Ticks at multiples of 1, 2 or 5 times a power of ten; outward widens the range to ticks at both ends."""
    if high - low < MIN_RANGE:
        margin = max(abs(low), abs(high)) / 10
        margin = 1.0 if margin < MIN_RANGE else margin
        low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= max_intervals)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if outward:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = first * step, last * step
    return Axis(low, high, [float(f"{k * step:.12g}") for k in range(first, last + 1)])


def log_axis(low: float, high: float) -> Axis:
    """Ticks at round parts of powers of ten, as fine as there is room for; low is above 0."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in range(1, 10), (1, 2, 5):
        marks = [float(f"{factor}e{power}") for power in powers for factor in factors]
        start = max(mark for mark in marks if mark <= low * (1 + 1e-9))
        end = min(mark for mark in marks if mark >= high * (1 - 1e-9) and mark > start)
        ticks = [mark for mark in marks if start <= mark <= end]
        if len(ticks) <= MAX_LOG_TICKS:
            return Axis(start, end, ticks, is_log=True)
    tens = [mark for mark in ticks if mark in {float(f"1e{power}") for power in powers}]
    return Axis(start, end, tens[:: math.ceil(len(tens) / MAX_LOG_TICKS)], is_log=True)


def thinned(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
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


def told_apart(labels: Sequence[str]) -> list[str]:
    """The labels; where they are long, without the words with which all of them begin."""
    words = [re.split(r"(?<=[-_./ ])", label) for label in labels]
    beginnings = zip(*(found[:-1] for found in words), strict=False)
    num_shared = sum(1 for _ in itertools.takewhile(lambda found: len(set(found)) == 1, beginnings))
    if max(map(len, labels)) <= MAX_LEGEND or num_shared == 0:
        return list(labels)
    return ["\N{HORIZONTAL ELLIPSIS}" + "".join(found[num_shared:]) for found in words]


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _same_decimals(values: Sequence[float], texts: Sequence[str], max_decimals: int = 17) -> list[str]:
    """The texts of the values, with equally many decimals if all are plain decimal numbers."""
    if not all(re.fullmatch(r"-?\d+(\.\d+)?", text) for text in texts):
        return list(texts)
    decimals = min(max_decimals, max(len(text.partition(".")[2]) for text in texts))
    return [f"{value:.{decimals}f}" for value in values]


@dataclass(frozen=True)
class _Line:
    """A series and what of it is drawn: stretches of points without a gap."""

    series: Series
    stretches: list[list[tuple[float, float]]]

    @property
    def points(self) -> list[tuple[float, float]]:
        return [point for stretch in self.stretches for point in stretch]

    @property
    def last(self) -> float:
        return self.stretches[-1][-1][1]


def _stretches(points: Points, log: bool) -> list[list[tuple[float, float]]]:
    def has_place(y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not log)

    gaps = [x for x, y in points if not has_place(y)]
    stretches: list[list[tuple[float, float]]] = []
    gaps_before = -1
    for point in thinned([point for point in points if has_place(point[1])]):
        if (index := bisect.bisect(gaps, point[0])) != gaps_before:
            stretches.append([])
            gaps_before = index
        stretches[-1].append(point)
    return stretches


def _percent(axis: Axis, value: float) -> str:
    """A place across the plot."""
    return f"{100 * axis.share(value):.2f}%"


def _height(axis: Axis, value: float) -> float:
    """A place in the plot, in pixels from its top."""
    return HEIGHT * (1 - axis.share(value))


def _grid(steps: Axis, values: Axis, across: str) -> list[str]:
    parts = []
    for tick, label in zip(values.ticks, values.labels(), strict=True):
        y = _height(values, tick)
        parts.append(f'<line class="grid-line" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y tick" x="-7" y="{y + 4:.1f}">{label}</text>')
    for tick, label in zip(steps.ticks, steps.labels(), strict=True):
        x = _percent(steps, tick)
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{HEIGHT}" y2="{HEIGHT + 4}"/>')
        parts.append(f'<text class="x tick" x="{x}" y="{HEIGHT + 17}">{label}</text>')
    parts.append(f'<line class="axis" x2="100%" y1="{HEIGHT}" y2="{HEIGHT}"/>')
    parts.append(f'<text class="x name" x="50%" y="{HEIGHT + 33}">{html.escape(across)}</text>')
    return parts


def _curves(lines: Sequence[_Line], steps: Axis, values: Axis) -> list[str]:
    """The lines, stretched to the width of the plot, and on top of them the markers, which are not."""
    paths = "".join(_path(line, steps, values) for line in lines)
    parts = [f'<svg class="lines" viewBox="0 0 {SPAN} {HEIGHT}" preserveAspectRatio="none">{paths}</svg>']
    for line in lines:
        if len(line.points) == 1 or (line.series.has_markers and len(line.points) <= MAX_POINTS // 10):
            color = html.escape(line.series.color)
            parts += [
                f'<circle class="marker" style="--color:{color}" r="3" cx="{_percent(steps, x)}"'
                f' cy="{_height(values, y):.1f}"/>'
                for x, y in line.points
            ]
    return parts


def _path(line: _Line, steps: Axis, values: Axis) -> str:
    """A path with the label and the values of its points as data; a point alone is a stretch of no length."""
    drawn = []
    for stretch in line.stretches:
        places = " ".join(f"{SPAN * steps.share(x):.1f},{_height(values, y):.1f}" for x, y in stretch)
        drawn.append(f"M{places}{'h0' * (len(stretch) == 1)}")
    texts = " ".join(f"{x:.12g}:{number(y)}" for x, y in line.points)
    css_class = f"line {line.series.css_class}".strip()
    return (
        f'<path class="{html.escape(css_class)}" style="--color:{html.escape(line.series.color)}"'
        f' data-label="{html.escape(line.series.label)}" data-values="{texts}" d="{"".join(drawn)}"/>'
    )


def _last_values(lines: Sequence[_Line], steps: Axis, values: Axis) -> list[str]:
    """The last value of a line where it ends; of several lines one below another, each with a dot in its colour."""
    if len(lines) > MAX_LABELS:
        return []
    last = [line.last for line in lines]
    texts = in_one_notation(last)
    if not values.is_log:
        most = max(last, key=abs)
        texts = _same_decimals(last, texts, len(f"{most:#.4g}".partition(".")[2]))
    if len(lines) == 1:
        end = _percent(steps, lines[0].points[-1][0])
        return [f'<text class="last" x="{end}" dx="8" y="{_height(values, last[0]) + 4:.1f}">{texts[0]}</text>']
    parts = []
    heights = spread([_height(values, value) for value in last], LABEL_GAP, 0, HEIGHT)
    for line, y, text in zip(lines, heights, texts, strict=True):
        color = html.escape(line.series.color)
        parts.append(
            f'<circle class="key" style="--color:{color}" r="3" cx="100%" cy="{y:.1f}" transform="translate(12)"/>'
        )
        parts.append(f'<text class="last" x="100%" dx="18" y="{y + 4:.1f}">{text}</text>')
    return parts


def _legend(series: Sequence[Series], ramp: bool) -> str:
    """Which colour is which."""
    if len(series) == 1:
        return ""
    between = ""
    if ramp and len(series) > MAX_LABELS:
        series, between = [series[0], series[-1]], "<li class=between>to</li>"
    keys = [
        f'<li class="{html.escape(one.css_class)}" style="--color:{html.escape(one.color)}">{html.escape(label)}</li>'
        for one, label in zip(series, told_apart([one.label for one in series]), strict=True)
    ]
    return f"<ul class=legend>{between.join(keys)}</ul>"
