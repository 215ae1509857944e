"""layer_norm equals PyTorch's: the kernels against float64, the roads around them exactly."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops import _dispatch, norm
from fastlm.ops.norm import layer_norm, layer_norm_reference
from fastlm.ops.norm_triton import MAX_BACKWARD_C, MAX_C
from tests.support.accuracy import assert_accurate

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (N, C): one row, one column, prime, one below and above a block, more rows than all programs take in one turn
SHAPES = [(1, 1), (1, 64), (3, 7), (67, 65), (5, 768), (2, 1025), (37, 127), (200, 16)]


def forward_op(x, shape, weight, bias, eps, dtype):
    """(y, mean, rstd) of the raw op."""
    y, _, mean, rstd = norm.forward_op(x, None, shape, weight, bias, None, 0.0, eps, True, dtype)
    return y, mean, rstd


def backward_op(dy, x, weight, bias, mean, rstd, needs):
    """(dx, dweight, dbias) of the raw op."""
    needs = (needs[0], False, *needs[1:])
    dx, _, *sums = norm.backward_op(dy, None, x, weight, bias, mean, rstd, None, 0.0, x.dtype, needs)
    return dx, *sums


def random_inputs(*shape: int, dtype: torch.dtype, device: torch.device, parameters: torch.dtype | None = None):
    """(x, weight, bias, dy), the parameters 1-dimensional; a seeded draw on the CPU, so the same on every device."""
    x, dy = torch.randn(2, *shape)
    weight, bias = torch.randn(2, shape[-1])
    kinds = (dtype, parameters or dtype, parameters or dtype, dtype)
    return [tensor.to(device, kind) for tensor, kind in zip((x, weight, bias, dy), kinds, strict=True)]


def output_and_gradients(function, x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, **kwargs):
    """[y, dx, dweight, dbias] of fresh leaves; without those whose parameter is None."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    y = function(leaves[0], x.shape[-1:], *leaves[1:], **kwargs)
    return [y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy.to(y.dtype))]


def assert_all_accurate(x, weight, bias, dy, **kwargs) -> None:
    ours = output_and_gradients(layer_norm, x, weight, bias, dy, **kwargs)
    assert type(ours[0].grad_fn).__name__ == "NormFunctionBackward", "the kernels did not run"
    torchs = output_and_gradients(F.layer_norm, x, weight, bias, dy, **kwargs)
    exact = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, dy)]
    truth = output_and_gradients(layer_norm_reference, *exact, **kwargs)
    for name, *three in zip(("y", "dx", "dweight or dbias", "dbias"), ours, torchs, truth, strict=False):
        assert_accurate(*three, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_and_gradients_match_float64(shape, dtype, layer_device):
    assert_all_accurate(*random_inputs(*shape, dtype=dtype, device=layer_device))


@pytest.mark.parametrize("C", [MAX_BACKWARD_C, MAX_C, MAX_C + 1, pytest.param(65536, marks=pytest.mark.soak)])
def test_layer_norm_matches_float64_on_wide_rows(C, layer_device):
    assert_all_accurate(*random_inputs(3, C, dtype=torch.float32, device=layer_device))


@pytest.mark.parametrize(("has_weight", "has_bias"), [(False, False), (True, False), (False, True)])
def test_layer_norm_matches_float64_without_parameters(has_weight, has_bias, layer_device):
    x, weight, bias, dy = random_inputs(9, 100, dtype=torch.float32, device=layer_device)
    assert_all_accurate(x, weight if has_weight else None, bias if has_bias else None, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_matches_float64_far_from_zero(dtype, layer_device):
    x, weight, bias, dy = random_inputs(11, 300, dtype=torch.float32, device=layer_device)
    assert_all_accurate((1000 + x).to(dtype), weight.to(dtype), bias.to(dtype), dy.to(dtype))


def test_layer_norm_matches_float64_on_constant_rows(layer_device):
    x, weight, bias, dy = random_inputs(5, 33, dtype=torch.float32, device=layer_device)
    assert_all_accurate(torch.full_like(x, 3.7), weight, bias, dy, eps=1e-3)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layer_norm_matches_float64_with_float32_parameters(dtype):
    assert_all_accurate(*random_inputs(7, 130, dtype=dtype, device="cpu", parameters=torch.float32))


def test_layer_norm_propagates_nan_and_infinity_of_one_row_only(layer_device):
    x, weight, bias, _ = random_inputs(6, 70, dtype=torch.float32, device=layer_device)
    x[1, 3], x[4, 0] = float("nan"), float("inf")
    y = layer_norm(x, (70,), weight, bias)
    assert y[[1, 4]].isnan().all()
    assert y[[0, 2, 3, 5]].isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter, NumPy says so
@pytest.mark.parametrize("C", [65, 2049, MAX_C + 1])
def test_layer_norm_whose_squares_overflow_is_finite_as_torchs(C, layer_device):
    x, weight, bias, dy = random_inputs(3, C, dtype=torch.float32, device=layer_device)
    for scale in (1e25, 1e30):
        assert_all_accurate(scale * (1 + x), weight, bias, dy)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
def test_layer_norm_takes_mixed_dtypes_whatever_its_size(dtypes, layer_device):
    x, weight, bias, _ = random_inputs(5, 40, dtype=dtypes[0], device=layer_device, parameters=dtypes[1])
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(_dispatch.CPU_MIN_NUMEL, "layer_norm", 1 << 20)
        y = layer_norm(x, (40,), weight, bias)
    assert y.dtype == dtypes[0]
    truth = layer_norm_reference(x.double(), (40,), weight.double(), bias.double())
    assert_accurate(y, layer_norm_reference(x, (40,), weight, bias), truth)


def test_layer_norm_normalises_several_dimensions(layer_device):
    x, dy = torch.randn(2, 3, 4, 5, 6, device=layer_device)
    weight, bias = torch.randn(2, 5, 6, device=layer_device)

    def run(function, *tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        y = function(leaves[0], (5, 6), *leaves[1:])
        return [y, *torch.autograd.grad(y, leaves, tensors[3])]

    truth = run(layer_norm_reference, *(tensor.double() for tensor in (x, weight, bias, dy)))
    for three in zip(run(layer_norm, x, weight, bias, dy), run(F.layer_norm, x, weight, bias, dy), truth, strict=True):
        assert_accurate(*three)


def test_layer_norm_gradients_of_wide_rows_do_not_depend_on_what_else_is_frozen(layer_device):
    C, trained = MAX_BACKWARD_C + 1, (0, 2)
    *tensors, dy = random_inputs(5, C, dtype=torch.float32, device=layer_device)
    full = output_and_gradients(layer_norm, *tensors, dy)[1:]
    leaves = [tensor.clone().requires_grad_(index in trained) for index, tensor in enumerate(tensors)]
    layer_norm(leaves[0], (C,), *leaves[1:]).backward(dy)
    for index, leaf in enumerate(leaves):
        assert leaf.grad is None if index not in trained else torch.equal(leaf.grad, full[index])


@pytest.mark.parametrize("output_dtype", DTYPES, ids=str)
def test_layer_norm_rounds_once_to_the_dtype_autocast_asks_for(output_dtype, layer_device):
    x, weight, bias, _ = random_inputs(4, 64, dtype=torch.bfloat16, device=layer_device)
    y, _, _ = forward_op(x, (64,), weight, bias, 1e-5, output_dtype)
    exact, _, _ = forward_op(x.float(), (64,), weight.float(), bias.float(), 1e-5, torch.float32)
    assert torch.equal(y, exact.to(output_dtype))


@pytest.mark.parametrize("layer_device", ["compiled"], indirect=True)
def test_layer_norm_compiles_by_inductor(layer_device):
    inputs = random_inputs(6, 32, dtype=torch.float32, device=layer_device)
    torch.compiler.reset()
    compiled = torch.compile(layer_norm, fullgraph=True, backend="inductor", dynamic=True)
    for ours, eager in zip(
        output_and_gradients(compiled, *inputs), output_and_gradients(layer_norm, *inputs), strict=True
    ):
        assert torch.equal(ours, eager)


WRONG_ARGUMENTS = {
    "shape": ({"normalized_shape": (7,)}, ValueError, r"normalized_shape is \(7,\), expected the last dim"),
    "empty shape": ({"normalized_shape": ()}, ValueError, r"normalized_shape is \(\), expected the last dim"),
    "long shape": ({"normalized_shape": (2, 4, 8)}, ValueError, r"normalized_shape is \(2, 4, 8\), expected"),
    "int for shape": ({"normalized_shape": 8}, TypeError, r"normalized_shape is an int, expected a sequence: \(8,\)"),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
@pytest.mark.parametrize("road", ["torch", pytest.param("kernels", marks=pytest.mark.interpreted)])
def test_layer_norm_rejects(case, road):
    wrong, error, message = WRONG_ARGUMENTS[case]
    with pytest.raises(error, match=f"layer_norm: {message}"):
        layer_norm(**{"input": torch.ones(4, 8), "normalized_shape": (8,), **wrong})
