"""rms_norm equals PyTorch's: the kernels against float64, PyTorch's code where none runs."""

import pytest
import torch
import torch.nn.functional as F

from fastlm.ops.norm import rms_norm, rms_norm_reference
from fastlm.ops.norm_triton import MAX_BACKWARD_C, MAX_C
from tests.support.accuracy import assert_accurate

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (67, 65), (5, 768), (2, 1025), (37, 127), (0, 8)]


def output_and_gradients(function, x, weight, dy, eps=None, dtype=None, dims=1):
    """[y, dx, dweight] at a dtype, or as the tensors are."""
    x, weight, dy = (
        None if tensor is None else tensor.detach().to(dtype or tensor.dtype) for tensor in (x, weight, dy)
    )
    leaves = [tensor.requires_grad_() for tensor in (x, weight) if tensor is not None]
    y = function(x, x.shape[-dims:], weight, eps)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def assert_all_accurate(*draws, **options) -> None:
    """The error rule over one or several draws of (x, weight, dy)."""

    def pooled(function, **more):
        several = [output_and_gradients(function, *inputs, **options, **more) for inputs in draws]
        return [torch.stack(tensors) for tensors in zip(*several, strict=True)]

    y = rms_norm(draws[0][0].clone().requires_grad_(), (draws[0][0].shape[-1],))
    assert type(y.grad_fn).__name__ == "NormFunctionBackward", "the kernels do not run"
    truth = pooled(rms_norm_reference, dtype=torch.float64)
    for name, *three in zip(("y", "dx", "dweight"), pooled(rms_norm), pooled(F.rms_norm), truth, strict=False):
        assert_accurate(*three, name)


def draw(shape, dtype, device, weight_dtype=None):
    x, dy = torch.randn(2, *shape).to(device, dtype)
    return x, torch.randn(shape[-1]).to(device, weight_dtype or dtype), dy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_and_gradients_match_float64(shape, dtype, layer_device):
    repeats = 32 if shape[0] * shape[1] < 32 else 1  # of so few elements PyTorch's are often right by luck
    assert_all_accurate(*(draw(shape, dtype, layer_device) for _ in range(repeats)), eps=1e-6)


@pytest.mark.parametrize("C", [MAX_BACKWARD_C + 1, MAX_C + 1])
def test_rms_norm_matches_float64_on_wide_rows(C, layer_device):
    assert_all_accurate(draw((3, C), torch.float32, layer_device), eps=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_matches_float64_far_from_zero(dtype, layer_device):
    x, weight, dy = draw((11, 300), torch.float32, layer_device)
    assert_all_accurate(((1000 + x).to(dtype), weight.to(dtype), dy.to(dtype)), eps=1e-6)


def test_rms_norm_propagates_nan_to_all_of_its_row_and_no_other(layer_device):
    x, weight, _ = draw((6, 70), torch.float32, layer_device)
    x[2, 3] = float("nan")
    y = rms_norm(x, (70,), weight)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4, 5]].isfinite().all()


def test_rms_norm_matches_float64_without_weight(layer_device):
    x, _, dy = draw((9, 100), torch.float32, layer_device)
    assert_all_accurate((x, None, dy), eps=1e-2)


def test_rms_norm_normalises_several_dimensions(layer_device):
    x, dy = torch.randn(2, 2, 3, 4, 5, device=layer_device)
    assert_all_accurate((x, torch.randn(4, 5, device=layer_device), dy), dims=2, eps=1e-6)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_mixed_dtypes_has_torchs_dtype(dtype, weight_dtype, layer_device):
    assert_all_accurate(draw((7, 130), dtype, layer_device, weight_dtype), eps=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_default_eps_is_that_of_torch(dtype, layer_device):
    x = (1e-4 * torch.randn(300, 8)).to(layer_device, dtype)
    truth = rms_norm_reference(x.double(), (8,), None, torch.finfo(torch.float32).eps)
    assert_accurate(rms_norm(x, (8,)), F.rms_norm(x, (8,)), truth)
    assert_accurate(rms_norm_reference(x, (8,)), F.rms_norm(x, (8,)), truth)


def test_rms_norm_reference_is_the_formula():
    x = torch.tensor([[0.0, 2.0]])
    assert torch.equal(rms_norm_reference(x, (2,), None, 2.0), x / 2)  # mean square 2, and as much eps


@pytest.mark.parametrize("road", ["torch", pytest.param("kernels", marks=pytest.mark.interpreted)])
def test_rms_norm_says_what_is_wrong(road):
    with pytest.raises(ValueError, match=r"rms_norm: normalized_shape is \(3,\), expected the last dim"):
        rms_norm(torch.zeros(2, 4), (3,))
    with pytest.raises(TypeError, match="rms_norm: normalized_shape is an int"):
        rms_norm(torch.zeros(2, 4), 4)
