"""Documents packed into rows of T tokens: best-fit decreasing, nothing lost unless asked, and a report of the waste.

Documents longer than a row are split into row-sized pieces and a rest (pretraining) or truncated (fine-tuning, where
half an answer is worse than none of its tail). All pieces are then placed longest first, each into the fullest row with
room for it, by csrc/packing.cpp. Ding et al. 2024, arXiv 2404.10830.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from fastlm.wording import quantity

OVERLONG = ("split", "truncate")


@dataclasses.dataclass(frozen=True)
class PackingReport:
    """What a packing made of the documents; str() is one line."""

    num_documents: int
    num_pieces: int  # documents, or parts of one
    num_rows: int
    row_size: int
    num_tokens: int  # in the rows
    num_split: int  # documents in more than one piece
    num_truncated: int  # documents that lost their end
    num_lost: int  # tokens lost with it

    @property
    def utilisation(self) -> float:
        """Share of the rows that holds tokens."""
        return self.num_tokens / (self.num_rows * self.row_size)

    @property
    def num_padding(self) -> int:
        return self.num_rows * self.row_size - self.num_tokens

    @property
    def documents_per_row(self) -> float:
        """Pieces per row: a part of a document counts like a document."""
        return self.num_pieces / self.num_rows

    def __str__(self) -> str:
        overlong = f"{quantity(self.num_split, 'document')} split, none truncated"
        if self.num_truncated:
            overlong = f"{quantity(self.num_truncated, 'document')} truncated ({quantity(self.num_lost, 'token')} lost)"
        return (
            f"{quantity(self.num_documents, 'document')} in {quantity(self.num_rows, 'row')} of {self.row_size:,}: "
            f"{self.utilisation:.2%} used, {quantity(self.num_padding, 'token')} of padding, {overlong}, "
            f"{self.documents_per_row:.2f} documents per row"
        )


@dataclasses.dataclass(frozen=True)
class Packing:
    """Pieces in the order of their rows: row r holds the pieces row_starts[r] to row_starts[r + 1]."""

    starts: NDArray[np.int64]  # (pieces,) position of each piece's first token in the dataset
    lengths: NDArray[np.int64]  # (pieces,)
    row_starts: NDArray[np.int64]  # (rows + 1,)
    report: PackingReport

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1


def pack_documents(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], row_size: int, *, overlong: str = "split"
) -> Packing:
    """Pack documents, given by position and length, into rows of row_size tokens.

    starts, lengths    (documents,) int64
    overlong           "split" or "truncate" documents longer than a row

    Deterministic. Raises ValueError if there are no documents or an argument is out of range.
    """
    if overlong not in OVERLONG:
        raise ValueError(f"overlong is {overlong!r}, expected {' or '.join(map(repr, OVERLONG))}")
    if row_size < 1:
        raise ValueError(f"the sequence length is {row_size}, expected at least 1")
    if len(lengths) == 0:
        raise ValueError("there are no documents to pack")
    too_long = lengths > row_size
    num_split = num_truncated = 0
    if overlong == "split":
        piece_starts, piece_lengths = split_documents(starts, lengths, row_size)
        num_split = int(too_long.sum())
    else:
        piece_starts, piece_lengths = starts, np.minimum(lengths, row_size)
        num_truncated = int(too_long.sum())
    num_tokens = int(piece_lengths.sum())
    # Packing takes memory in step with the row; one that has room for everything may as well be shorter.
    pieces, row_starts = _pack(piece_lengths, min(row_size, num_tokens))
    report = PackingReport(
        num_documents=len(lengths),
        num_pieces=len(pieces),
        num_rows=len(row_starts) - 1,
        row_size=row_size,
        num_tokens=num_tokens,
        num_split=num_split,
        num_truncated=num_truncated,
        num_lost=int(lengths.sum()) - num_tokens,
    )
    return Packing(piece_starts[pieces], piece_lengths[pieces], row_starts, report)


def split_documents(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], row_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(starts, lengths) of consecutive pieces of at most row_size tokens; only the last of a document is shorter."""
    counts = -(-lengths // row_size)
    document = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    offset = nth * row_size
    return starts[document] + offset, np.minimum(lengths[document] - offset, row_size)


def _pack(lengths: NDArray[np.int64], row_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    try:
        from fastlm._packing import pack
    except ImportError as error:
        raise ImportError(
            f"fastlm._packing is not built ({error}); reinstall fastlm where a C++ compiler is found, "
            "or in a checkout run: pip install -e ."
        ) from None
    return pack(np.ascontiguousarray(lengths, dtype=np.int64), row_size)
