"""A run's record as an HTML page that needs neither network nor script nor another file; and all forms of a record.

    python -m benchmarks.page RECORD.json ...

writes text, page and pictures beside each record anew.
"""

import html
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import pictures, report
from fastlm.charts import Series, line_chart, log_axis
from fastlm.report_style import STYLE

OWN_STYLE = """
.bar { display: block; height: 12px; min-width: 2px; border-radius: 2px; background: var(--axis); }
.bar.ours { background: var(--series-0); }
.bar.floor { background: var(--line); }
.timed td { white-space: nowrap; }
.timed.figures :is(th, td):not(:first-child) { padding-left: 12px; }
.timed td:nth-child(2) { width: 26%; min-width: 120px; }
.pairs { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
.shares td:nth-child(2) { width: 45%; min-width: 200px; }
.track { display: block; position: relative; height: 18px; }
.track i { position: absolute; top: 4px; width: 10px; height: 10px; margin-left: -5px; border-radius: 5px;
  background: var(--axis); }
.track i.ours { background: var(--series-0); }
.track b { position: absolute; top: 0; height: 100%; border-left: 1px solid var(--ink); }
.timed tr.ours :is(th, td) { color: var(--ink); font-weight: 600; }
"""


def page(record: Mapping) -> str:
    """The whole document: what matters first, then every case with all that was timed."""
    title = html.escape(f"fastlm on {record['machine']['device']}")
    benchmarks = (benchmark(name, results) for name, results in by_benchmark(record))
    sections = [summary(record), roofline(record), *benchmarks]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}{OWN_STYLE}</style></head>\n<body><main><h1>{title}</h1>"
        f"<p class=about>{html.escape(report.origin_of(record))}</p>"
        f"<p class=about>{html.escape(record['run']['command'])}</p>{''.join(sections)}</main></body></html>\n"
    )


def by_benchmark(record: Mapping) -> Iterator[tuple[str, list[Mapping]]]:
    names = dict.fromkeys(result["benchmark"] for result in record["results"])
    for name in names:
        yield name, [result for result in record["results"] if result["benchmark"] == name]


def summary(record: Mapping) -> str:
    """Of every case the fastest of ours, beside the fastest peer."""
    if not (rows := report.beside_fastest_peer(record)):
        return "<h2>Nothing was timed beside a peer</h2>"
    return f"<h2>Beside the fastest peer</h2><div class='card wide'>{table(rows)}</div>"


def roofline(record: Mapping) -> str:
    """Of every case a dot for each provider, at its share of the rate that bounds it."""
    cases = list(pictures.roofline(record))
    widest = max((share for case in cases for _, _, share in case.providers), default=1.0)
    scale = 100 / max(1.0, widest)
    lines = []
    for case in cases:
        # Ours come last and so lie on top.
        dots = "".join(
            f"<i class={role} style='left:{scale * share:.1f}%' title='{html.escape(name)}: {share:.0%}'></i>"
            for name, role, share in sorted(case.providers, key=lambda provider: provider[1] == "ours")
        )
        ours = max((share for _, role, share in case.providers if role == "ours"), default=None)
        best = "" if ours is None else f"{ours:.0%} {case.ceiling}"
        track = f"<span class=track><b style='left:{scale:.1f}%'></b>{dots}</span>"
        lines.append(f"<tr><th>{html.escape(case.case)}</th><td>{track}</td><td>{best}</td></tr>")
    if not lines:
        return ""
    return (
        "<h2>Share of what this machine can do</h2><div class='card wide'>"
        "<p class=note>Blue is ours, grey each peer; the line is the rate of a copy, or of a square matrix product, "
        f"timed in the same rounds.</p><table class='figures shares'>{''.join(lines)}</table></div>"
    )


def against_size(results: list[Mapping]) -> str:
    drawn = []
    for chart in pictures.against_size(results):
        sizes = [size for points in chart.lines.values() for size, _ in points]
        series = [
            Series(name, points, f"var(--series-{index % 8})", has_markers=True)
            for index, (name, points) in enumerate(chart.lines.items())
        ]
        axis = log_axis(min(sizes), max(sizes))
        drawn.append(line_chart(chart.title, series, axis, unit=chart.unit, across=chart.across, log=True))
    return f"<div class=pairs>{''.join(drawn)}</div>" if drawn else ""


def table(rows: list[list[str]]) -> str:
    lines = [[html.escape(cell) for cell in cells] for cells in rows]
    first, *others = (
        f"<tr><th>{cells[0]}</th>{''.join(f'<td>{cell}</td>' for cell in cells[1:])}</tr>" for cells in lines
    )
    return f"<table><thead>{first}</thead><tbody>{''.join(others)}</tbody></table>"


def benchmark(name: str, results: list[Mapping]) -> str:
    return f"<h2>{html.escape(name)}</h2><div class=stack>{against_size(results)}{''.join(map(case, results))}</div>"


def case(result: Mapping) -> str:
    """The figures of report.table, with a bar for each median."""
    timed = figures(result["providers"], report.rows(result)) if result["providers"] else ""
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in report.notes(result))
    return f"<div class='card wide'><h3>{html.escape(result['case'])}</h3>{timed}{notes}</div>"


def figures(providers: list[Mapping], rows: list[list[str]]) -> str:
    longest = max(provider["median_ms"] for provider in providers)
    head, *cells = rows
    lines = [f"<tr><th></th><td></td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in head[1:])}</tr>"]
    for provider, (first, *others) in zip(providers, cells, strict=True):
        bar = f"<span class='bar {provider['role']}' style='width:{100 * provider['median_ms'] / longest:.1f}%'></span>"
        values = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        lines.append(f"<tr class={provider['role']}><th>{html.escape(first)}</th><td>{bar}</td>{values}</tr>")
    return f"<table class='figures timed'>{''.join(lines)}</table>"


def write(record: Mapping, path: Path) -> list[Path]:
    """Write path (JSON) and its other forms beside it; returns what was written."""
    report.write_json(record, path)
    return [path, *write_forms(record, path)]


def write_forms(record: Mapping, path: Path) -> list[Path]:
    """Write the record at path as text, as a page and as pictures; returns what was written."""
    text, document = path.with_suffix(".txt"), path.with_suffix(".html")
    text.write_text(report.text(record) + "\n")
    document.write_text(page(record))
    return [text, document, *pictures.draw(record, path.with_suffix(""))]


def main(paths: Sequence[Path]) -> int:
    """Write the forms of each record beside it; 2 if there is none."""
    if not paths:
        print(__doc__)
        return 2
    for path in paths:
        try:
            record = report.read(path, page)
        except ValueError as error:
            print(f"python -m benchmarks.page: error: {error}", file=sys.stderr)
            return 2
        print(f"wrote {', '.join(map(str, write_forms(record, path)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main([*map(Path, sys.argv[1:])]))
