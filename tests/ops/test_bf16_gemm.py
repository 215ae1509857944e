"""Products of bfloat16 matrices in float32, by every instruction set of this CPU."""

import pytest
import torch

from fastlm.ops._library import facts, is_loaded
from tests.support import instruction_sets
from tests.support.accuracy import assert_accurate

instruction_set = instruction_sets.instruction_set
pytestmark = pytest.mark.skipif(not is_loaded("cpu"), reason=facts()["_cpu"])
LAYOUTS = ["rows", "columns"]
# Around the sizes of registers, panels, tiles and blocks: 8 to 14 rows, 8 to 32 columns, 518 rows, 256 columns, 384.
SHAPES = [(1, 1, 1), (2, 3, 1), (7, 33, 2), (14, 32, 16), (15, 31, 17), (13, 64, 385), (29, 5, 770), (519, 257, 33)]


def matrix(rows, columns, layout="rows"):
    x = torch.randn(rows, columns).bfloat16()
    return x if layout == "rows" else x.t().contiguous().t()


def product(a, b, out=None, alpha=1.0, accumulate=False):
    out = torch.full((a.shape[0], b.shape[1]), torch.nan) if out is None else out
    torch.ops.fastlm.bf16_gemm_(out, a, b, alpha, accumulate)
    return out


@pytest.mark.parametrize("layout_of_b", LAYOUTS)
@pytest.mark.parametrize("layout_of_a", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_gemm_is_as_accurate_as_a_float32_product(instruction_set, shape, layout_of_a, layout_of_b):
    M, N, K = shape
    a, b = matrix(M, K, layout_of_a), matrix(K, N, layout_of_b)
    assert_accurate(product(a, b), a.float() @ b.float(), a.double() @ b.double())


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", [(15, 40, 9), (30, 33, 800)], ids=str)
def test_bf16_gemm_scales_and_adds_to_rows_that_lie_apart(instruction_set, shape, accumulate):
    M, N, K = shape
    a, b, before = matrix(M, K), matrix(K, N, "columns"), torch.randn(M, N + 7)
    memory = before.clone()
    ours = product(a, b, memory[:, :N], alpha=-0.375, accumulate=accumulate)
    start = before[:, :N] if accumulate else torch.zeros(M, N)
    assert_accurate(ours, start + -0.375 * (a.float() @ b.float()), start.double() + -0.375 * (a.double() @ b.double()))
    assert torch.equal(memory[:, N:], before[:, N:])


def test_bf16_gemm_of_parts_of_matrices(instruction_set):
    """A panel's loads must not reach beyond its rows, nor its stores beyond out."""
    whole, other = matrix(40, 50), matrix(50, 60)
    whole[:, 37:], whole[30:], other[37:], other[:, 41:] = (torch.nan,) * 4
    for a in (whole[:30, :37], whole[:30, :37].t().contiguous().t()):
        assert_accurate(
            product(a, other[:37, :41]), a.float() @ other[:37, :41].float(), a.double() @ other[:37, :41].double()
        )


@pytest.mark.parametrize(("depth", "alpha", "accumulate"), [(24, 1.0, False), (400, 0.3, True)])
def test_bf16_gemm_of_a_large_result_is_that_of_its_parts(instruction_set, depth, alpha, accumulate):
    """Stores are non-temporal from 4 MB on, and neither they, nor the threads, nor the tiles may be seen."""
    a, b, before = matrix(530, depth), matrix(depth, 2048, "columns"), torch.randn(530, 2048)
    whole = product(a, b, before.clone(), alpha, accumulate)
    for rows, columns in ((slice(0, 1), slice(None)), (slice(100, 160), slice(7, 700)), (slice(500, None), slice(64))):
        part = product(a[rows], b[:, columns], before[rows, columns].contiguous(), alpha, accumulate)
        assert torch.equal(whole[rows, columns], part)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_bf16_gemm_accepts_empty_matrices(instruction_set, shape):
    M, N, K = shape
    assert torch.equal(product(matrix(M, K), matrix(K, N)), torch.zeros(M, N))
    assert torch.equal(product(matrix(M, K), matrix(K, N), torch.ones(M, N), accumulate=True), torch.ones(M, N))


def test_bf16_gemm_keeps_infinity_and_nan_where_they_are(instruction_set):
    a, b = matrix(20, 8), matrix(8, 40)
    a[3, 2], b[5, 11] = torch.inf, torch.nan
    b[2] = b[2].abs() + 1
    ours, theirs = product(a, b), a.float() @ b.float()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(3, 4)}, "a, expected a matrix of bfloat16"),
        ({"b": torch.zeros(4).bfloat16()}, "b, expected a matrix of bfloat16"),
        ({"b": torch.zeros(8, 10).bfloat16()[::2, ::2]}, "b, expected unit stride in a dimension"),
        ({"out": torch.zeros(3, 5).bfloat16()}, "out, expected a matrix of float32"),
        ({"out": torch.zeros(5, 3).t()}, "out, expected a matrix of float32 with unit stride in a row"),
        ({"b": torch.zeros(3, 5).bfloat16()}, "sizes disagree"),
    ],
)
def test_bf16_gemm_refuses_what_it_cannot_multiply(change, message):
    tensors = {"out": torch.zeros(3, 5), "a": torch.zeros(3, 4).bfloat16(), "b": torch.zeros(4, 5).bfloat16()} | change
    with pytest.raises(ValueError, match=message):
        torch.ops.fastlm.bf16_gemm_(*tensors.values(), 1.0, False)
