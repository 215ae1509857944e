"""Made text, and made documents of chosen lengths."""

from pathlib import Path

import numpy as np

from fastlm.data import Tokenizer, write_shard

WORDS = ["the", "quick", "brown", "fox", "jumps over", "Zoë", "12345", "snowflakes ❄", "and", "returns", "None"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Distinct texts of 1 to 60 words."""
    rng = np.random.default_rng(seed)
    return [f"{n}: " + " ".join(rng.choice(WORDS, rng.integers(1, 60))) + "\n" for n in range(count)]


def documents_of(lengths: list[int], tokenizer: Tokenizer) -> list[list[int]]:
    """Documents of length - 1 tokens, any but end-of-text."""
    rng = np.random.default_rng(len(lengths))
    others = [token for token in range(tokenizer.vocab_size) if token != tokenizer.end_of_text]
    return [rng.choice(others, length - 1).tolist() for length in lengths]


def write_documents(path: Path, documents: list[list[int]], tokenizer: Tokenizer) -> None:
    with write_shard(path, tokenizer) as writer:
        for tokens in documents:
            writer.append(tokens, num_bytes=3 * len(tokens) + 1)
