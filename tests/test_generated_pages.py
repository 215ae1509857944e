"""The tables that pages hold of the code are what the code is."""

import pytest

from tests.support.generated_pages import PAGES, ROOT, updated


@pytest.mark.parametrize("name", PAGES)
def test_page_says_what_the_code_is(name):
    assert (ROOT / name).read_text() == updated(name), "write it again: python -m tests.support.generated_pages"
