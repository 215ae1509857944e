"""A run's record as an HTML page that needs neither network nor script nor another file; and all forms of a record."""

import html
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks import report
from fastlm.report_style import STYLE

OWN_STYLE = """
.bar { display: block; height: 12px; min-width: 2px; border-radius: 2px; background: var(--axis); }
.bar.ours { background: var(--series-0); }
.bar.floor { background: var(--line); }
.timed td:nth-child(2) { width: 34%; min-width: 144px; padding-right: 0; }
.timed tr.ours :is(th, td) { color: var(--ink); font-weight: 600; }
"""


def page(record: Mapping) -> str:
    """The whole document: what matters first, then every case with all that was timed."""
    title = html.escape(f"fastlm on {record['machine']['device']}")
    sections = [summary(record), *(benchmark(name, results) for name, results in by_benchmark(record))]
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


def table(rows: list[list[str]]) -> str:
    lines = [[html.escape(cell) for cell in cells] for cells in rows]
    first, *others = (
        f"<tr><th>{cells[0]}</th>{''.join(f'<td>{cell}</td>' for cell in cells[1:])}</tr>" for cells in lines
    )
    return f"<table><thead>{first}</thead><tbody>{''.join(others)}</tbody></table>"


def benchmark(name: str, results: list[Mapping]) -> str:
    return f"<h2>{html.escape(name)}</h2><div class=stack>{''.join(map(case, results))}</div>"


def case(result: Mapping) -> str:
    """A bar for each median, and the figures of report.table."""
    longest = max((provider["median_ms"] for provider in result["providers"]), default=1.0)
    head, *cells = report.rows(result)
    lines = [f"<tr><th></th><td></td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in head[1:])}</tr>"]
    for provider, (first, *others) in zip(result["providers"], cells, strict=True):
        bar = f"<span class='bar {provider['role']}' style='width:{100 * provider['median_ms'] / longest:.1f}%'></span>"
        figures = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        lines.append(f"<tr class={provider['role']}><th>{html.escape(first)}</th><td>{bar}</td>{figures}</tr>")
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in report.notes(result))
    return (
        f"<div class='card wide'><h3>{html.escape(result['case'])}</h3>"
        f"<table class='figures timed'>{''.join(lines)}</table>{notes}</div>"
    )


def write(record: Mapping, path: Path) -> list[Path]:
    """Write path (JSON), the same as text, as a page, and the plots beside it; returns what was written."""
    report.write_json(record, path)
    text, document = path.with_suffix(".txt"), path.with_suffix(".html")
    text.write_text(report.text(record) + "\n")
    document.write_text(page(record))
    return [path, text, document, *report.plot(record, path.with_suffix(""))]
