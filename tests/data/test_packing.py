import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm import _packing
from fastlm.data import pack_documents
from fastlm.data.packing import split_documents


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The rows of piece indices that the definition gives, in plain Python."""
    rows: list[list[int]] = []
    space: list[int] = []
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        fitting = [row for row in range(len(rows)) if space[row] >= lengths[piece]]
        if not fitting:
            rows.append([])
            space.append(capacity)
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda row: space[row])
        rows[row].append(piece)
        space[row] -= lengths[piece]
    return rows


def packed(lengths: list[int], capacity: int) -> list[list[int]]:
    pieces, row_starts = _packing.pack(np.array(lengths, dtype=np.int64), capacity)
    return [pieces[a:b].tolist() for a, b in pairwise(row_starts)]


def row_totals(rows: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[piece] for piece in row) for row in rows]


@st.composite
def lengths_and_capacity(draw: st.DrawFn) -> tuple[list[int], int]:
    """Any capacity, not only powers of two, and around the 64 and 4096 where the tree of bitmaps gains a level."""
    capacity = draw(st.one_of(st.integers(1, 200), st.integers(4090, 4100), st.integers(262_140, 262_150)))
    return draw(st.lists(st.integers(1, capacity), max_size=60)), capacity


@given(lengths_and_capacity())
def test_pack_fills_rows_exactly_like_the_reference(case):
    lengths, capacity = case
    ours, reference = packed(lengths, capacity), best_fit_decreasing(lengths, capacity)
    assert sorted(row_totals(ours, lengths)) == sorted(row_totals(reference, lengths))


@given(lengths_and_capacity())
def test_pack_keeps_every_piece_once_and_overflows_no_row(case):
    lengths, capacity = case
    rows = packed(lengths, capacity)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    assert all(rows), "a row is empty"
    assert all(total <= capacity for total in row_totals(rows, lengths))


@given(lengths_and_capacity())
def test_pack_opens_a_row_only_when_no_other_has_room(case):
    lengths, capacity = case
    fill = sorted(row_totals(packed(lengths, capacity), lengths))
    assert len(fill) < 2 or fill[0] + fill[1] > capacity


@given(st.integers(1, 30), st.integers(2, 300), st.integers(0, 2**32))
def test_pack_needs_at_most_11_9_of_the_optimum(num_full_rows, capacity, seed):
    """Johnson 1974: at most 11/9 of the optimum and 4 rows; cutting full rows into pieces makes the optimum known."""
    rng = np.random.default_rng(seed)
    lengths = []
    for _ in range(num_full_rows):
        cuts = np.unique(rng.integers(1, capacity, rng.integers(0, 6)))
        lengths += np.diff([0, *cuts, capacity]).tolist()
    rng.shuffle(lengths)
    assert num_full_rows <= len(packed(lengths, capacity)) <= 11 / 9 * num_full_rows + 4


def test_pack_is_deterministic():
    lengths = np.random.default_rng(0).integers(1, 1000, 10_000)
    first, second = _packing.pack(lengths, 1000), _packing.pack(lengths.copy(), 1000)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_pack_of_nothing_is_no_row():
    pieces, row_starts = _packing.pack(np.zeros(0, dtype=np.int64), 10)
    assert (pieces.tolist(), row_starts.tolist()) == ([], [0])


@pytest.mark.parametrize(("length", "capacity"), [(0, 4), (-1, 4), (5, 4), (1 << 40, 4)])
def test_pack_refuses_a_length_that_fits_no_row(length, capacity):
    with pytest.raises(ValueError, match=rf"lengths\[1\] is {length}, expected 1 to the capacity 4"):
        _packing.pack(np.array([1, length]), capacity)


@pytest.mark.parametrize("capacity", [0, -3, 1 << 31])
def test_pack_refuses_a_capacity_out_of_range(capacity):
    with pytest.raises(ValueError, match=f"capacity is {capacity}, expected 1 to 2147483647"):
        _packing.pack(np.array([1]), capacity)


@pytest.mark.parametrize("lengths", [np.array([1.5]), np.array([1], dtype=np.int32), np.arange(1, 9)[::2], [1, 2]])
def test_pack_refuses_what_is_not_a_plain_int64_array(lengths):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _packing.pack(lengths, 10)
    with pytest.raises(ValueError, match="lengths has 2 dimensions, expected 1"):
        _packing.pack(np.ones((2, 2), dtype=np.int64), 10)


def test_pack_lets_other_threads_run():
    lengths = np.random.default_rng(0).integers(1, 1000, 2_000_000)
    worker = threading.Thread(target=_packing.pack, args=(lengths, 1000))
    worker.start()
    turns = 0
    while worker.is_alive():
        turns += 1
        time.sleep(0)
    assert turns > 100, "the interpreter stood still while packing"


document_lengths = st.lists(st.integers(1, 400), min_size=1, max_size=30)


@given(document_lengths, st.integers(1, 130))
def test_split_documents_covers_every_token_once_in_full_pieces(lengths, row_size):
    starts = 7 + np.concatenate([[0], np.cumsum(lengths)[:-1]])
    piece_starts, piece_lengths = split_documents(starts, np.array(lengths), row_size)
    tokens = [place for a, n in zip(piece_starts, piece_lengths, strict=True) for place in range(a, a + n)]
    assert tokens == list(range(7, 7 + sum(lengths)))
    assert all(1 <= n <= row_size for n in piece_lengths)
    assert sum(n < row_size for n in piece_lengths) <= len(lengths)


@given(document_lengths, st.integers(1, 130), st.sampled_from(["split", "truncate"]))
def test_packing_report_counts_what_happened(lengths, row_size, overlong):
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    packing = pack_documents(starts, np.array(lengths), row_size, overlong=overlong)
    report = packing.report
    long = [n for n in lengths if n > row_size]
    lost = sum(n - row_size for n in long) if overlong == "truncate" else 0
    assert report.num_tokens == packing.lengths.sum() == sum(lengths) - lost
    assert report.num_lost == lost
    assert (report.num_split, report.num_truncated) == ((len(long), 0) if overlong == "split" else (0, len(long)))
    assert report.num_documents == len(lengths)
    assert report.num_rows * row_size == report.num_tokens + report.num_padding
    assert report.utilisation == report.num_tokens / (report.num_rows * row_size)
    assert report.documents_per_row == len(packing.lengths) / report.num_rows


def test_packing_report_is_one_line_that_names_the_waste():
    lengths = np.array([6, 3, 3, 10])
    starts = np.array([0, 6, 9, 12])
    assert str(pack_documents(starts, lengths, 8).report) == (
        "4 documents in 3 rows of 8: 91.67% used, 2 tokens of padding, 1 document split, none truncated, "
        "1.67 documents per row"
    )
    assert "1 document truncated (2 tokens lost)" in str(pack_documents(starts, lengths, 8, overlong="truncate").report)


@pytest.mark.parametrize(
    ("lengths", "row_size", "overlong", "message"),
    [
        ([], 8, "split", "no documents to pack"),
        ([3], 0, "split", "sequence length is 0, expected at least 1"),
        ([3], 8, "drop", "overlong is 'drop', expected 'split' or 'truncate'"),
    ],
)
def test_pack_documents_refuses_wrong_arguments(lengths, row_size, overlong, message):
    lengths = np.array(lengths, dtype=np.int64)
    with pytest.raises(ValueError, match=message):
        pack_documents(lengths, lengths, row_size, overlong=overlong)


def test_a_row_with_room_for_everything_takes_no_memory_for_the_rest():
    packed = pack_documents(np.arange(3), np.array([5, 1, 9]), 1 << 40)  # 16 bytes for each would be 16 TiB
    assert packed.num_rows == 1
    assert packed.lengths.tolist() == [9, 5, 1]
    assert packed.report.num_padding == (1 << 40) - 15
