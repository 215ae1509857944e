"""The page of a record, read by a parser, and by a real Chromium where one is installed."""

import copy
import html.parser
import json
from pathlib import Path

import pytest

from benchmarks import page, pictures, report
from tests.support import chromium

RECORD = json.loads((Path(__file__).parents[2] / "benchmarks/results/cpu-amd-epyc-losses.json").read_text())
HOSTILE = '"><script>alert(1)</script><img src=http://example.com/x>&lt;'


class Read(html.parser.HTMLParser):
    """The tags of a document, the text of its cells, the widths of its bars and the places of its dots."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags, self.cells, self.widths, self.places = [], [], [], []
        self.feed(document)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if (style := dict(attributes).get("style", "")).startswith("width:"):
            self.widths.append(float(style[len("width:") : -1]))
        if tag == "i":
            self.places.append(float(style[len("left:") : -1]))

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


def test_a_record_from_before_working_memory_was_measured_is_drawn():
    older = copy.deepcopy(RECORD)
    for result in older["results"]:
        for provider in result["providers"]:
            del provider["working_bytes"]
    assert "not measured" in Read(page.page(older)).cells


def test_page_begins_with_ours_beside_the_fastest_peer():
    result = RECORD["results"][0]
    ours, peers = (min(p["median_ms"] for p in result["providers"] if p["role"] == role) for role in ("ours", "peer"))
    cells = Read(page.page(RECORD)).cells
    row = cells[cells.index(f"{result['benchmark']}: {result['case']}") :]
    assert row[1] == f"{peers / ours:.2f}x"


def test_roofline_shows_the_share_of_everyone_but_floors():
    shares = [
        [share for p in result["providers"] if p["role"] != "floor" for share in p["shares"].values()]
        for result in RECORD["results"]
    ]
    assert [[share for *_, share in case.providers] for case in pictures.roofline(RECORD)] == shares
    found = sorted(share for case in shares for share in case)
    places = sorted(Read(page.page(RECORD)).places)
    assert places == pytest.approx([100 * share / max(1.0, found[-1]) for share in found], abs=0.06)


@pytest.fixture
def sized():
    """The record where cross entropy has two sizes of one series, the larger first, and a third of another."""
    record = copy.deepcopy(RECORD)
    for result, series, amount in zip(
        record["results"], ("plain", "smoothed", "plain"), (1e8, 2e7, 2.5e7), strict=False
    ):
        result["size"] = {"series": series, "amount": amount, "unit": "logits"}
    return record


def test_speed_and_memory_stand_against_the_sizes_of_a_series(sized):
    large, _, small, *_ = sized["results"]
    speed, memory = pictures.against_size(sized["results"])
    assert (speed.title, speed.across) == ("plain: speed", "logits")
    assert list(speed.lines) == [p["name"] for p in large["providers"] if p["role"] != "floor"]
    for index, provider in enumerate(p for p in large["providers"] if p["role"] != "floor"):
        smaller = small["providers"][index]
        assert speed.lines[provider["name"]] == [(2.5e7, smaller["speedup"]), (1e8, provider["speedup"])]
        peaks = [max(p["peak_bytes"] / 1e6, pictures.SMALLEST_MB) for p in (smaller, provider)]
        assert memory.lines[provider["name"]] == list(zip((2.5e7, 1e8), peaks, strict=True))
    document = page.page(sized)
    assert document.count("<figure>") == 2
    assert ">logits</text>" in document


def test_pictures_are_drawn_of_every_benchmark_and_of_sizes_where_there_are_several(sized, tmp_path):
    pytest.importorskip("matplotlib")
    written = pictures.draw(sized, tmp_path / "here")
    assert [path.name for path in written] == [
        "here-cross-entropy.png",
        "here-cross-entropy-sizes.png",
        "here-linear-cross-entropy.png",
        "here-roofline.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_page_escapes_what_a_record_holds_and_asks_for_nothing():
    record = copy.deepcopy(RECORD)
    record["machine"]["device"] = record["run"]["command"] = HOSTILE
    for amount, result in enumerate(record["results"], start=1):
        result["size"] = {"series": HOSTILE, "amount": amount, "unit": HOSTILE}
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
def test_page_in_a_real_browser_asks_for_nothing_and_fits_its_window(sized, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page.page(sized))
    with chromium.open_page() as browser:
        browser.open(path.as_uri())
        assert browser.requests == [path.as_uri()]
        assert browser.complaints == []
        bars = browser.evaluate("[...document.querySelectorAll('.bar')].map(bar => bar.getBoundingClientRect().width)")
        assert len(bars) == sum(len(result["providers"]) for result in RECORD["results"])
        assert max(bars) > 100
        assert min(bars) > 0
        assert browser.evaluate("document.querySelectorAll('figure .line').length") == 8
        assert browser.evaluate("Math.min(...[...document.querySelectorAll('.track')].map(t => t.clientWidth))") > 100
        assert browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_what_is_no_record_is_not_drawn(content, tmp_path, capsys):
    path = tmp_path / "odd.json"
    if content is not None:
        path.write_text(content)
    assert page.main([path]) == 2
    assert "odd.json" in capsys.readouterr().err
    assert not path.with_suffix(".txt").exists()
