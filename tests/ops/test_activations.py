"""Activations equal PyTorch's: the kernels against float64, the roads around them exactly."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._triton import HAS_TRITON, MAX_BLOCKS_PER_PROGRAM
from fastlm.ops.activations import (
    ELEMENTS,
    NUM_WARPS,
    as_matrices,
    bias_gelu,
    choose_tile,
    geglu,
    gelu,
    gelu_reference,
    glu_reference,
    grid_of,
    persistent_grid,
    swiglu,
)
from tests.support.accuracy import assert_accurate
from tests.support.samples import torch_samples

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One element, prime, one below and above a tile, more rows than all programs take in one turn, one dimension, four
SHAPES = [(1, 1), (3, 7), (67, 65), (5, 768), (2, 513), (3, 1, 5, 127), (300, 16), (ELEMENTS + 1,)]


class Case(NamedTuple):
    """One function, PyTorch's own, and the formula whose float64 result is the truth."""

    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    node: str
    inputs: Callable[[tuple[int, ...]], list[tuple[int, ...]]]  # their shapes, given that of the output


def gelu_case(approximate: str) -> Case:
    return Case(
        lambda x: gelu(x, approximate),
        lambda x: F.gelu(x, approximate=approximate),
        lambda x: gelu_reference(x, approximate=approximate),
        "GeluFunctionBackward",
        lambda shape: [shape],
    )


def bias_gelu_case(approximate: str) -> Case:
    return Case(
        lambda x, bias: bias_gelu(x, bias, approximate),
        lambda x, bias: F.gelu(x + bias, approximate=approximate),
        lambda x, bias: gelu_reference(x, bias, approximate),
        "GeluFunctionBackward",
        lambda shape: [shape, shape[-1:]],
    )


def geglu_case(approximate: str) -> Case:
    return Case(
        lambda gate, up: geglu(gate, up, approximate),
        lambda gate, up: F.gelu(gate, approximate=approximate) * up,
        lambda gate, up: glu_reference(gate, up, "gelu" if approximate == "none" else "gelu_tanh"),
        "GluFunctionBackward",
        lambda shape: [shape, shape],
    )


CASES = {
    "gelu": gelu_case("none"),
    "gelu tanh": gelu_case("tanh"),
    "bias_gelu": bias_gelu_case("none"),
    "bias_gelu tanh": bias_gelu_case("tanh"),
    "swiglu": Case(
        swiglu,
        lambda gate, up: F.silu(gate) * up,
        lambda gate, up: glu_reference(gate, up, "silu"),
        "GluFunctionBackward",
        lambda shape: [shape, shape],
    ),
    "geglu": geglu_case("none"),
    "geglu tanh": geglu_case("tanh"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def random_inputs(case: Case, *shape: int, dtype: torch.dtype, device: torch.device, scale: float = 3.0):
    """[*inputs, dy]; a seeded draw on the CPU, so the same on every device."""
    return [(scale * torch.randn(size)).to(device, dtype) for size in case.inputs(shape)] + [
        torch.randn(shape).to(device, dtype)
    ]


def output_and_gradients(function: Callable[..., Tensor], *inputs_and_dy: Tensor) -> list[Tensor]:
    """[y, *gradients] of fresh leaves, which keep the strides of the inputs."""
    *inputs, dy = inputs_and_dy
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def assert_all_accurate(case: Case, *draws: list[Tensor]) -> None:
    """Of several draws at once: among few elements, PyTorch's largest error may be zero by luck."""

    def pooled(function: Callable[..., Tensor], draws: list[list[Tensor]]) -> list[Tensor]:
        results = [output_and_gradients(function, *draw) for draw in draws]
        return [torch.stack(kind) for kind in zip(*results, strict=True)]

    assert type(output_and_gradients(case.ours, *draws[0])[0].grad_fn).__name__ == case.node, "the kernels did not run"
    truth = pooled(case.formula, [[tensor.double() for tensor in draw] for draw in draws])
    for three in zip(pooled(case.ours, draws), pooled(case.torchs, draws), truth, strict=True):
        assert_accurate(*three)


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_references_are_the_formulas():
    x, up = torch.randn(2, 100, dtype=torch.float64)
    assert torch.allclose(gelu_reference(x), x * torch.special.ndtr(x), rtol=1e-14)
    assert torch.allclose(gelu_reference(x, up, "tanh"), F.gelu(x + up, approximate="tanh"), rtol=1e-14)
    assert torch.allclose(glu_reference(x, up, "silu"), F.silu(x) * up, rtol=1e-14)
    assert torch.allclose(glu_reference(x, up, "gelu"), F.gelu(x) * up, rtol=1e-14)
    assert torch.allclose(glu_reference(x, up, "gelu_tanh"), F.gelu(x, approximate="tanh") * up, rtol=1e-14)


@every_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_gradients_match_float64(case, shape, dtype, layer_device):
    draws = 1 if math.prod(shape) >= 500 else 20
    assert_all_accurate(case, *(random_inputs(case, *shape, dtype=dtype, device=layer_device) for _ in range(draws)))


@every_case
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 30.0], ids=str)
def test_activations_match_float64_near_and_far_from_zero(case, scale, layer_device):
    assert_all_accurate(case, random_inputs(case, 9, 100, dtype=torch.float32, device=layer_device, scale=scale))


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_match_float64_where_the_gate_closes(case, dtype, layer_device):
    """From -3 down only the tail is left: what is computed as 1 - 1 there would be all error."""
    first, *others, dy = random_inputs(case, 9, 100, dtype=torch.float32, device=layer_device)
    first = -3 - 2 * first.abs()
    others = [0.1 * other for other in others]
    assert_all_accurate(case, [tensor.to(dtype) for tensor in (first, *others, dy)])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_tiny_numbers_is_half_of_them(approximate, layer_device):
    x = (torch.randn(1000) * 1e-30).to(layer_device).requires_grad_()
    y = gelu(x, approximate)
    assert torch.equal(y, x / 2)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 0.5))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # of the interpreter, NumPy says so
@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_of_huge_numbers_are_the_limits(case, dtype, layer_device):
    """Squares and cubes overflow there, and infinity times the vanished slope would be NaN."""
    x = torch.tensor([[1e4, -1e4, 1e6, -1e6, 1e15, -1e15, 1e30, -1e30]], device=layer_device).to(dtype)
    others = [torch.full(size, float(case.node == "GluFunctionBackward"), device=layer_device, dtype=dtype)
              for size in case.inputs((1, 8))[1:]]  # fmt: skip
    y, dx, *_ = output_and_gradients(case.ours, x, *others, torch.ones_like(x))
    assert torch.equal(y, x.clamp(min=0))
    assert torch.equal(dx, (x > 0).to(dtype))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # of the interpreter, NumPy says so
@every_case
def test_activations_treat_infinity_and_nan_as_torch_does(case, layer_device):
    *inputs, dy = random_inputs(case, 3, 10, dtype=torch.float32, device=layer_device, scale=1.0)
    inputs[0][:, 2:5] = torch.tensor([float("inf"), float("-inf"), float("nan")], device=layer_device)
    # In float64: of float32, oneDNN's exact GELU of infinity is NaN on a CPU with AVX-512 and infinity on others.
    theirs = output_and_gradients(case.torchs, *(tensor.double() for tensor in (*inputs, dy)))
    for mine, torchs in zip(output_and_gradients(case.ours, *inputs, dy), theirs, strict=True):
        assert torch.equal(mine.isfinite(), torchs.isfinite())
        assert torch.equal(mine.isnan(), torchs.isnan())


def test_gelu_and_gated_units_accept_a_single_number(layer_device):
    for case in (CASES["gelu"], CASES["swiglu"], CASES["geglu"]):
        assert_all_accurate(case, *(random_inputs(case, dtype=torch.float32, device=layer_device) for _ in range(20)))


def test_swiglu_reads_the_halves_of_one_tensor_where_they_lie():
    both = torch.randn(2, 3, 8)
    gate, up = both.chunk(2, dim=-1)
    N, C, rows, strides = as_matrices([gate, up], flatten=True)
    assert (N, C, strides) == (6, 4, [8, 8])
    assert [x.data_ptr() for x in rows] == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_of_the_halves_of_one_tensor_matches_float64(dtype, layer_device):
    def of_halves(function):
        return CASES["swiglu"]._replace(
            ours=lambda both: function(both, swiglu),
            torchs=lambda both: function(both, CASES["swiglu"].torchs),
            formula=lambda both: function(both, CASES["swiglu"].formula),
        )

    case = of_halves(lambda both, swiglu: swiglu(*both.chunk(2, dim=-1)))
    both, dy = torch.randn(2, 5, 72, device=layer_device, dtype=dtype), torch.randn(2, 5, 36, device=layer_device)
    assert_all_accurate(case, [both, dy.to(dtype)])


@pytest.mark.gpu
def test_gelu_reaches_rows_beyond_int32_offsets():
    x = torch.empty_strided((2, 8), (2**31 + 8, 1), dtype=torch.float16, device="cuda").normal_()
    assert torch.equal(gelu(x), gelu(x.contiguous()))


@every_case
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_activations_promote_dtypes_as_torch_does(case, dtypes, layer_device):
    *inputs, dy = random_inputs(case, 3, 10, dtype=torch.float32, device=layer_device)
    inputs = [tensor.to(dtype) for tensor, dtype in zip(inputs, dtypes[: len(inputs)], strict=True)]
    assert_all_accurate(case, [*inputs, dy])


def test_activations_save_nothing_but_their_inputs(layer_device):
    for case in CASES.values():
        *inputs, _ = random_inputs(case, 3, 10, dtype=torch.float32, device=layer_device)
        out = case.ours(*(tensor.requires_grad_() for tensor in inputs))  # a graph whose result is gone is freed
        saved = [tensor.data_ptr() for tensor in out.grad_fn.saved_tensors if tensor is not None]
        assert saved == [tensor.data_ptr() for tensor in inputs]


@pytest.mark.parametrize("layer_device", ["compiled", "portable"], indirect=True)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("N", [(1 << 18) + 3, 70_001])
def test_bias_gradient_of_bias_gelu_over_very_many_rows_matches_float64(N, approximate, layer_device):
    case = bias_gelu_case(approximate)
    x, bias, dy = random_inputs(case, N, 8, dtype=torch.float32, device=layer_device)
    gradients = [
        output_and_gradients(function, *(tensor.to(dtype) for tensor in (x, bias, dy)))[-1]
        for function, dtype in ((case.ours, torch.float32), (case.torchs, torch.float32), (case.formula, torch.float64))
    ]
    assert_accurate(*gradients, "dbias")


def test_bias_gelu_gradients_are_the_same_on_any_number_of_threads():
    inputs = random_inputs(CASES["bias_gelu"], 5001, 65, dtype=torch.float32, device=torch.device("cpu"))
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(output_and_gradients(bias_gelu, *inputs))
    torch.set_num_threads(threads)
    assert_equal(*results)


def test_gelu_matches_float64_on_the_samples_of_torch(layer_device):
    for sample in torch_samples("nn.functional.gelu"):
        case = gelu_case(*sample.args, **{"approximate": "none", **sample.kwargs})
        x = sample.input.to(layer_device)
        assert_all_accurate(case, [x, torch.randn(x.shape).to(layer_device)])


@pytest.mark.parametrize("name", ["gelu", "swiglu", "geglu tanh"])
def test_compiled_function_transforms_of_activations_equal_eager_ones(name, layer_device):
    """Traced into the raw op, which has no derivative, they would silently miss a part."""
    case = CASES[name]
    *inputs, _ = random_inputs(case, 4, 10, dtype=torch.float32, device=layer_device)
    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1]):
        eager = transform(lambda x: case.torchs(x, *inputs[1:]).square().sum())
        compiled = torch.compile(
            transform(lambda x: case.ours(x, *inputs[1:]).square().sum()), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(inputs[0]), eager(inputs[0]))


def test_gelu_leaves_nested_tensors_to_torch(layer_device):
    rows = [torch.randn(size, 8, device=layer_device) for size in (3, 2)]
    y = gelu(torch.nested.nested_tensor(rows))
    assert_equal(list(y.unbind()), [F.gelu(row) for row in rows])


def wrong_calls(device: torch.device | str) -> dict[str, tuple[Callable[[], Tensor], str]]:
    x = torch.zeros(4, 2, device=device)
    return {
        "formula": (lambda: gelu(x, "fast"), "gelu: approximate is 'fast', expected 'none' or 'tanh'"),
        "gated formula": (lambda: geglu(x, x, "fast"), "geglu: approximate is 'fast', expected 'none' or 'tanh'"),
        "gate and up": (lambda: geglu(x, x[:2]), r"geglu: gate has shape \(4, 2\) and up \(2, 2\), expected one shape"),
        "bias formula": (lambda: bias_gelu(x, x[0], "fast"), "bias_gelu: approximate is 'fast'"),
        "a number": (lambda: bias_gelu(x[0, 0], x[0, 0]), r"bias_gelu: x has shape \(\), expected \(\.\.\., C\)"),
    }


@pytest.mark.parametrize("wrong", wrong_calls("cpu"))
@pytest.mark.parametrize("road", ["torch", pytest.param("kernels", marks=pytest.mark.interpreted)])
def test_activations_say_what_is_wrong(wrong, road):
    call, message = wrong_calls("cpu")[wrong]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: geglu(1.0, x), "geglu: gate is a float, expected a tensor"),
        (lambda x: swiglu(x, None), "swiglu: up is a NoneType, expected a tensor"),
        (lambda x: bias_gelu(x, 2), "bias_gelu: bias is a int, expected a tensor"),
        (lambda x: gelu([1.0]), "gelu: its input is a list, expected a tensor"),
    ],
)
def test_activations_say_which_argument_is_no_tensor(call, message):
    with pytest.raises(TypeError, match=message):
        call(torch.ones(3))


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("num_sms", [1, 108, 132])
def test_launches_of_activations_cover_every_row_and_column(num_sms):
    for C in (*range(1, 300), 768, 1024, 1600, 4096, 8192, 50257, 2**33):
        for N in (1, 2, 31, 10**6):
            tile = choose_tile(N, C)
            across, down = -(-C // tile.block_c), -(-N // tile.block_n)
            assert tile.block_n * tile.block_c == ELEMENTS
            assert grid_of(N, C, tile) == (across * down,)
            (programs,) = persistent_grid(N, C, tile, num_sms)
            assert programs % across == 0
            turns = -(-down * across // programs)
            assert programs >= across
            assert turns <= MAX_BLOCKS_PER_PROGRAM
            assert programs <= num_sms * 16 // NUM_WARPS + across or turns > MAX_BLOCKS_PER_PROGRAM // 2


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_takes_the_keywords_of_torchs(approximate):
    x = torch.randn(7)
    assert torch.equal(gelu(input=x, approximate=approximate), F.gelu(input=x, approximate=approximate))
