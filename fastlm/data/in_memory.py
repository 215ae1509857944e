"""Documents that are token ids already, from any iterable, as one stream in memory."""

import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

LARGEST_ID = (1 << 32) - 1


def read_documents(
    documents: Iterable[Any], end_of_text: int | None
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
    """(stream, lengths): all tokens end to end, and how many each document has in it.

    The documents are read once and the stream takes 2 bytes per token, 4 if an id is above 65,535; while it is read, 4
    to 7. end_of_text, where given, precedes the first document and follows each, and is counted in the length of the
    document that it follows.
    """
    if isinstance(documents, str | bytes | Mapping):
        raise TypeError(f"documents are {type(documents).__name__}, expected an iterable of lists of token ids")
    if end_of_text is not None and not 0 <= end_of_text <= LARGEST_ID:
        raise ValueError(f"end_of_text is {end_of_text}, expected a token id from 0 to {LARGEST_ID:,}")
    end = np.array([], dtype=np.uint32) if end_of_text is None else np.array([end_of_text], dtype=np.uint32)
    stream, lengths = array.array("I", end.tobytes()), array.array("q")
    for number, document in enumerate(documents):
        tokens = _token_ids(document, number, fewest=1 if len(end) else 2)
        for part in (tokens.astype(np.uint32), end):
            stream.frombytes(part.tobytes())
        lengths.append(len(tokens) + len(end))
    if not lengths:
        raise ValueError("there are no documents: the iterable is empty, or was read to its end before")
    values = np.frombuffer(stream, dtype=np.uint32)
    return values.astype(np.uint16) if values.max() < 1 << 16 else values, np.array(lengths, dtype=np.int64)


def _token_ids(document: Any, number: int, fewest: int) -> NDArray[np.integer]:
    """The ids of one document (n,), each checked."""
    if isinstance(document, str | bytes):
        raise TypeError(f"document {number} is text, expected token ids: tokenize it first")
    if isinstance(document, Mapping):  # as Hugging Face's tokenizers and datasets give it
        if "input_ids" not in document:
            raise ValueError(f"document {number} has the entries {', '.join(map(str, document))}, expected input_ids")
        document = document["input_ids"]
    tokens = np.asarray(document.cpu() if isinstance(document, Tensor) else document)
    if tokens.ndim != 1:
        raise ValueError(
            f"document {number} has shape {tokens.shape}, expected (tokens,); a single long stream goes in as [stream]"
        )
    if len(tokens) < fewest:
        holds = f"document {number} holds {len(tokens)} token{'' if len(tokens) == 1 else 's'}"
        raise ValueError(f"{holds}, expected at least {fewest}: there is nothing to predict; leave it out")
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"document {number} holds {tokens.dtype}, expected integers: token ids")
    smallest, largest = int(tokens.min()), int(tokens.max())
    if smallest < 0 or largest > LARGEST_ID:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(f"document {number} holds the token id {wrong}, expected 0 to {LARGEST_ID:,}")
    return tokens
