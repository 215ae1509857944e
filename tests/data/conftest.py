"""A tokenizer trained on made text, and datasets of documents with chosen lengths."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from fastlm.data import TokenDataset, Tokenizer
from tests.support.made_text import documents_of, sentences, write_documents

# Without this a test fails when the machine is busy: an example may then take longer than hypothesis's 200 ms.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(sentences(200), 300)


@pytest.fixture
def dataset_of(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., TokenDataset]:
    """A dataset whose documents have these lengths (end-of-text counted) and tokens that occur nowhere else."""

    def make(lengths: list[int], name: str = "made.tokens") -> TokenDataset:
        write_documents(tmp_path / name, documents_of(lengths, tokenizer), tokenizer)
        return TokenDataset(tmp_path / name)

    return make
