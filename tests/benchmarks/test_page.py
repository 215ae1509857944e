"""The page of a record, read by a parser, and by a real Chromium where one is installed."""

import copy
import html.parser
import json
from pathlib import Path

import pytest

from benchmarks import page, report
from tests.support import chromium

RECORD = json.loads((Path(__file__).parents[2] / "benchmarks/results/cpu-amd-epyc-losses.json").read_text())
HOSTILE = '"><script>alert(1)</script><img src=http://example.com/x>&lt;'


class Read(html.parser.HTMLParser):
    """The tags of a document, the text of its cells, and the widths of its bars."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags, self.cells, self.widths = [], [], []
        self.feed(document)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if (style := dict(attributes).get("style", "")).startswith("width:"):
            self.widths.append(float(style[len("width:") : -1]))

    def handle_data(self, data):
        self.cells.append(data)


def test_page_shows_every_figure_of_the_text_with_a_bar_for_each_median():
    read = Read(page.page(RECORD))
    for result in RECORD["results"]:
        assert result["case"] in read.cells
        for row in report.rows(result)[1:]:
            assert {cell for cell in row if cell} <= set(read.cells)
    timed = [p["median_ms"] for result in RECORD["results"] for p in result["providers"]]
    assert len(read.widths) == len(timed)
    first = [p["median_ms"] for p in RECORD["results"][0]["providers"]]
    expected = [100 * median / max(first) for median in first]
    assert read.widths[: len(first)] == pytest.approx(expected, abs=0.06)


def test_page_begins_with_ours_beside_the_fastest_peer():
    result = RECORD["results"][0]
    ours, peers = (min(p["median_ms"] for p in result["providers"] if p["role"] == role) for role in ("ours", "peer"))
    cells = Read(page.page(RECORD)).cells
    row = cells[cells.index(f"{result['benchmark']}: {result['case']}") :]
    assert row[1] == f"{peers / ours:.2f}x"


def test_page_escapes_what_a_record_holds_and_asks_for_nothing():
    record = copy.deepcopy(RECORD)
    record["machine"]["device"] = record["run"]["command"] = HOSTILE
    for result in record["results"]:
        result["case"] = result["benchmark"] = HOSTILE
        result["rejected"] = {HOSTILE: HOSTILE}
        for provider in result["providers"]:
            provider["name"] = HOSTILE
    read = Read(page.page(record))
    assert not {"script", "img", "link"} & set(read.tags)
    assert HOSTILE in read.cells


def test_every_form_of_a_record_is_written(tmp_path):
    written = page.write(RECORD, tmp_path / "here.json")
    assert {path.suffix for path in written} >= {".json", ".txt", ".html"}
    assert json.loads(written[0].read_text()) == RECORD
    assert written[1].read_text() == report.text(RECORD) + "\n"


@pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed")
def test_page_in_a_real_browser_asks_for_nothing_and_fits_its_window(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page.page(RECORD))
    with chromium.open_page() as browser:
        browser.open(path.as_uri())
        assert browser.requests == [path.as_uri()]
        assert browser.complaints == []
        bars = browser.evaluate("[...document.querySelectorAll('.bar')].map(bar => bar.getBoundingClientRect().width)")
        assert len(bars) == sum(len(result["providers"]) for result in RECORD["results"])
        assert max(bars) > 100
        assert min(bars) > 0
        assert browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
