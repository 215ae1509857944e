"""Pictures of a record: the time of each case, shares of what the machine can do, speed and memory against size."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import CEILINGS, milliseconds, origin_of
from fastlm.charts import log_axis

COLOURS = {"ours": "#1b7837", "peer": "#7f8fa6", "floor": "#d0d4da"}
LINES = ("#1b7837", "#d95f02", "#7570b3", "#1f78b4", "#e7298a", "#a6761d", "#66a61e", "#666666")
SMALLEST_MB = 1.0  # resident memory moves by as much for reasons of its own


class Chart(NamedTuple):
    """Values against the size of a case, a line for each provider; both axes are logarithmic."""

    title: str
    unit: str  # of the values
    across: str  # what the sizes count
    lines: dict[str, list[tuple[float, float]]]


class Shares(NamedTuple):
    """How much of the machine's rate a case gets: (name, role, share) of each provider."""

    case: str
    ceiling: str
    providers: list[tuple[str, str, float]]


def against_size(results: Sequence[Mapping]) -> Iterator[Chart]:
    """Speed and memory of every series of cases that was timed at several sizes."""
    series: dict[tuple[str, str], list[Mapping]] = {}
    for result in results:
        if size := result.get("size"):
            series.setdefault((result["benchmark"], size["series"]), []).append(result)
    for (_, name), members in series.items():
        reference, across = members[0]["reference"], members[0]["size"]["unit"]
        speed = _lines(members, lambda provider: provider["speedup"])
        memory = _lines(members, lambda provider: _megabytes(provider["peak_bytes"]))
        for chart in (
            Chart(f"{name}: speed", f"times that of {reference}", across, speed),
            Chart(f"{name}: peak memory", f"MB, {SMALLEST_MB:g} where it is less", across, memory),
        ):
            if any(len(points) > 1 for points in chart.lines.values()):
                yield chart


def _lines(members: Sequence[Mapping], value: Callable[[Mapping], float | None]) -> dict[str, list]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in sorted(members, key=lambda result: result["size"]["amount"]):
        for provider in result["providers"]:
            if provider["role"] != "floor" and (found := value(provider)) is not None:
                lines.setdefault(provider["name"], []).append((result["size"]["amount"], found))
    return lines


def _megabytes(count: int | None) -> float | None:
    return None if count is None else max(count / 1e6, SMALLEST_MB)


def roofline(record: Mapping) -> Iterator[Shares]:
    """Every case beside the rate that bounds it: that of a copy for bytes, of a matrix product for FLOPs."""
    for result in record["results"]:
        for unit, ceiling in CEILINGS.items():
            found = [
                (provider["name"], provider["role"], provider["shares"][unit])
                for provider in result["providers"]
                if unit in provider["shares"] and provider["role"] != "floor"  # which does part of the work
            ]
            if found:
                yield Shares(f"{result['benchmark']}: {result['case']}", ceiling, found)


def draw(record: Mapping, stem: Path) -> list[Path]:
    """PNGs: stem-<benchmark>.png, stem-<benchmark>-sizes.png and stem-roofline.png; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    origin, written = origin_of(record), []

    def save(figure, name: str, title: str) -> None:
        figure.suptitle(f"{title}\n{origin}", fontsize=10)
        written.append(stem.parent / f"{stem.name}-{name}.png")
        figure.savefig(written[-1], dpi=110, metadata={"Description": origin})

    for benchmark in dict.fromkeys(result["benchmark"] for result in record["results"] if result["providers"]):
        results = [result for result in record["results"] if result["benchmark"] == benchmark and result["providers"]]
        name = benchmark.replace("_", "-")
        save(_bars(results), name, f"{benchmark}: median time, bars of the quartiles (shorter is better)")
        if charts := list(against_size(results)):
            save(_charts(charts), f"{name}-sizes", f"{benchmark}: speed and memory against size")
    if shares := list(roofline(record)):
        save(_dots(shares), "roofline", "Share of what this machine can do")
    return written


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bars(results: Sequence[Mapping]):
    heights = [len(result["providers"]) + 1.5 for result in results]
    figure = _figure(9, 0.38 * sum(heights))
    panels = figure.subplots(len(results), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, result in zip(panels, results, strict=True):
        _draw_case(panel, result)
    return figure


def _draw_case(panel, result: Mapping) -> None:
    providers = result["providers"]
    medians = [provider["median_ms"] for provider in providers]
    low, high = zip(*(provider["quartiles_ms"] for provider in providers), strict=True)
    errors = [
        [max(median - edge, 0) for median, edge in zip(medians, low, strict=True)],
        [max(edge - median, 0) for median, edge in zip(medians, high, strict=True)],
    ]
    colours = [COLOURS[provider["role"]] for provider in providers]
    bars = panel.barh([provider["name"] for provider in providers], medians, xerr=errors, color=colours)
    panel.bar_label(bars, labels=[_label(provider) for provider in providers], padding=4, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, max(medians) * 1.3)
    panel.set_xlabel("ms", fontsize=8)
    _plain(panel, result["case"])


def _label(provider: Mapping) -> str:
    speedup = "" if provider["speedup"] is None or provider["role"] == "floor" else f"   {provider['speedup']:.2f}x"
    return milliseconds(provider["median_ms"]) + speedup


def _plain(panel, title: str) -> None:
    panel.set_title(title, fontsize=9, loc="left")
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _charts(charts: Sequence[Chart]):
    rows = -(-len(charts) // 2)
    figure = _figure(11, 2.7 * rows)
    panels = figure.subplots(rows, 2, squeeze=False).flat
    for panel, chart in zip(panels, charts, strict=False):
        for colour, (name, points) in zip(LINES * len(chart.lines), chart.lines.items(), strict=False):
            look = {"color": colour, "marker": "o", "markersize": 3.5, "linewidth": 1.5, "clip_on": False}
            panel.plot(*zip(*points, strict=True), label=name, **look)
        places = zip(*(point for points in chart.lines.values() for point in points), strict=True)
        x, y = (log_axis(min(values), max(values)) for values in places)
        panel.set(xscale="log", yscale="log", xlim=(x.low, x.high), ylim=(y.low, y.high))
        panel.minorticks_off()
        panel.set_xticks(x.ticks, x.labels())
        panel.set_yticks(y.ticks, y.labels())
        panel.grid(alpha=0.3)
        panel.set_xlabel(chart.across, fontsize=8)
        panel.set_ylabel(chart.unit, fontsize=8)
        panel.legend(fontsize=7, frameon=False)
        _plain(panel, chart.title)
    for panel in panels:
        panel.set_visible(False)
    return figure


def _dots(shares: Sequence[Shares]):
    by_ceiling = {
        ceiling: [case for case in shares if case.ceiling == ceiling]
        for ceiling in dict.fromkeys(case.ceiling for case in shares)
    }
    heights = [len(cases) + 2.5 for cases in by_ceiling.values()]
    figure = _figure(11, 0.24 * sum(heights))
    panels = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, (ceiling, cases) in zip(panels, by_ceiling.items(), strict=True):
        for role in ("peer", "ours"):  # ours on top
            found = [
                (100 * share, row) for row, case in enumerate(cases) for _, its, share in case.providers if its == role
            ]
            if found:
                panel.scatter(*zip(*found, strict=True), s=26, color=COLOURS[role], label=role, zorder=2)
        panel.axvline(100, color="black", linewidth=1, zorder=1)
        panel.set_yticks(range(len(cases)), [case.case for case in cases])
        panel.grid(axis="y", alpha=0.3)
        panel.set(xlim=(0, None), ylim=(len(cases) - 0.5, -0.5))
        panel.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
        _plain(panel, f"% {ceiling}, in the same rounds")
    return figure
