"""README.md and docs/architecture.md say of the code what the code is."""

import pytest

from tests.support.generated_pages import PARTS, ROOT, updated


@pytest.mark.parametrize("name", PARTS)
def test_page_says_what_the_code_is(name):
    part, text = PARTS[name]
    page = (ROOT / name).read_text()
    assert page == updated(page, part, text()), "write it again: python -m tests.support.generated_pages"
