"""The tables that pages hold of the code are what the code is, and their figures those of the records."""

import json

import pytest

from benchmarks.report import origin_of
from tests.support.figures import FIGURES, RESULTS, Picture
from tests.support.generated_pages import PAGES, ROOT, updated


@pytest.mark.parametrize("name", PAGES)
def test_page_says_what_the_code_is(name):
    assert (ROOT / name).read_text() == updated(name), "write it again: python -m tests.support.generated_pages"


@pytest.mark.parametrize("name", FIGURES)
def test_picture_on_a_page_is_drawn_of_its_record(name):
    for picture in (figure for figure in FIGURES[name].values() if isinstance(figure, Picture)):
        record = ROOT / RESULTS / f"{picture.record}.json"
        drawn = record.with_name(f"{picture.record}-{picture.name}.png").read_bytes()
        described = origin_of(json.loads(record.read_text())).encode()
        assert described in drawn, f"draw it again: python -m benchmarks.page {record.relative_to(ROOT)}"
