"""softmax and log_softmax equal PyTorch's: the kernels against float64, the roads around them exactly."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm.ops.softmax  # noqa: F401  (the module, which the function of its name hides from the package)
from fastlm.ops import _library
from fastlm.ops._triton import HAS_TRITON
from fastlm.ops.softmax import (
    MAX_C,
    MAX_PLAIN_C,
    MULTI_BLOCK_TILE,
    Tile,
    backward_tile,
    broadcast_mask,
    forward_tile,
    log_softmax,
    softmax,
    softmax_reference,
)
from tests.support.accuracy import assert_accurate
from tests.support.compilations import compilations
from tests.support.samples import torch_samples

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FUNCTIONS = [softmax, log_softmax]
# (N, C): one row, one column, prime, one below and above a block, several programs
SHAPES = [(1, 1), (1, 64), (3, 7), (67, 65), (5, 768), (2, 1025), (37, 127), (200, 16)]
BOTH = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def is_log(function) -> bool:
    return function.__name__ == "log_softmax"


def reference(function):
    """The float64 truth of a function."""
    return lambda x, dim, **kwargs: softmax_reference(x, dim, log=is_log(function), **kwargs)


def composed(function):
    """What one writes in PyTorch without this op, at the dtype of x; no row that is fully masked goes through it."""

    def run(x: Tensor, dim: int, scale: float = 1.0, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        s, hidden = x * scale, torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        if causal:
            T_q, T_k = x.shape[-2:]
            keys, queries = torch.arange(T_k, device=x.device), torch.arange(T_q, device=x.device)
            hidden = hidden | (keys > queries[:, None] + T_k - T_q)
        is_masked = hidden
        if mask is not None and mask.dtype == torch.bool:
            is_masked = hidden = hidden | ~mask
        elif mask is not None:
            s, is_masked = (s + mask).to(x.dtype), hidden | (mask == -math.inf)
        fully_masked = is_masked.all(dim, keepdim=True)
        y = getattr(F, function.__name__)(s.masked_fill(hidden, -math.inf).masked_fill(fully_masked, 0), dim)
        return y.masked_fill(fully_masked, -math.inf if is_log(function) else 0)

    return run


def output_and_gradients(function, x: Tensor, dy: Tensor, mask: Tensor | None = None, dim: int = -1, **kwargs):
    """[y, dx] of fresh leaves, and dmask of an additive mask."""
    leaves = [x.detach().clone().requires_grad_()]
    if mask is not None and mask.is_floating_point():
        mask = mask.detach().clone().requires_grad_()
        leaves.append(mask)
    y = function(leaves[0], dim, **kwargs, **({} if mask is None else {"mask": mask}))
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def assert_all_accurate(function, *draws: tuple[Tensor, ...], **kwargs) -> None:
    """Hold y, dx and dmask of (x, dy) or (x, dy, mask) against float64; the errors of several draws are pooled."""
    found = [([], [], []) for _ in range(3)]
    for x, dy, *masks in draws:
        ours = output_and_gradients(function, x, dy, *masks, **kwargs)
        assert type(ours[0].grad_fn).__name__ == "SoftmaxFunctionBackward", "the kernels did not run"
        torchs = output_and_gradients(composed(function), x, dy, *masks, **kwargs)
        exact_masks = [mask.double() if mask.is_floating_point() else mask for mask in masks]
        truth = output_and_gradients(reference(function), x.double(), dy.double(), *exact_masks, **kwargs)
        for pooled, three in zip(found, zip(ours, torchs, truth, strict=True), strict=False):
            for several, one in zip(pooled, three, strict=True):
                several.append(one)
    for name, pooled in zip(("y", "dx", "dmask"), found, strict=True):
        if pooled[0]:
            assert_accurate(*map(torch.stack, pooled), name)


def random_pair(*shape: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(x, dy), drawn on the CPU, so the same on every device."""
    x, dy = torch.randn(2, *shape)
    return x.to(device, dtype), dy.to(device, dtype)


def random_mask(kind: str, *shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A boolean mask, or an additive one that takes some elements away."""
    kept = torch.rand(shape) < 0.6
    return (kept if kind == "boolean" else torch.randn(shape).to(dtype).masked_fill(~kept, -math.inf)).to(device)


@pytest.fixture
def without_compiled_code(monkeypatch) -> None:
    monkeypatch.setattr(_library, "LIBRARIES", {})


@pytest.fixture
def short_long_rows(monkeypatch) -> None:
    """Rows of more than 8 elements take the loops of long ones, of which one turn is 32 elements."""
    for name, value in (("MAX_C", 8), ("MAX_PLAIN_C", {2: 8, 4: 8}), ("MULTI_BLOCK_TILE", Tile(1, 32, 1, 2, 0))):
        monkeypatch.setitem(forward_tile.__globals__, name, value)


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_and_gradients_match_float64(function, shape, dtype, layer_device):
    draws = 16 if math.prod(shape) < 100 else 1  # PyTorch may be right to the last bit in a few numbers, by luck
    pairs = (random_pair(*shape, dtype=dtype, device=layer_device) for _ in range(draws))
    assert_all_accurate(function, *pairs)


@BOTH
@pytest.mark.parametrize("C", [MAX_C, MAX_C + 1, MAX_PLAIN_C[4], MAX_PLAIN_C[4] + 16])
def test_softmax_matches_float64_on_long_rows(function, C, layer_device):
    assert_all_accurate(function, random_pair(3, C, dtype=torch.float32, device=layer_device))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, "boolean", "additive"])
def test_causal_softmax_matches_float64_on_rows_longer_than_a_block_of_sums(function, dtype, kind, layer_device):
    x, dy = random_pair(5, 2077, dtype=dtype, device=layer_device)
    masks = () if kind is None else (random_mask(kind, 1, 2077, device=layer_device),)
    assert_all_accurate(function, (x, dy, *masks), causal=True, scale=3.0)


@BOTH
@pytest.mark.parametrize("kind", [None, "boolean", "additive"])
def test_softmax_of_a_row_does_not_depend_on_its_batch(function, kind, layer_device):
    x, dy = random_pair(40, 77, dtype=torch.float32, device=layer_device)
    masks = () if kind is None else (random_mask(kind, 40, 77, device=layer_device),)
    together = output_and_gradients(function, x, dy, *masks, scale=0.3)
    for row in (0, 13, 39):
        alone = output_and_gradients(function, *(tensor[row : row + 1] for tensor in (x, dy, *masks)), scale=0.3)
        assert all(torch.equal(ours[row : row + 1], own) for ours, own in zip(together, alone, strict=True))


MASK_SHAPES = [(2, 2, 3, 33), (2, 1, 33), (2, 1, 1, 33), (2, 1, 3, 33), (3, 1), (33,), (1,)]


def random_draws(num_draws: int, shape: tuple[int, ...], kind: str | None, mask_shape: tuple[int, ...], device):
    """(x, dy, mask) several times, or (x, dy) if there is no kind of mask."""
    for _ in range(num_draws):
        pair = random_pair(*shape, dtype=torch.float32, device=device)
        yield (*pair, random_mask(kind, *mask_shape, device=device)) if kind else pair


@BOTH
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_softmax_with_a_broadcast_mask_matches_float64(function, shape, kind, layer_device):
    draws = random_draws(4 if math.prod(shape) > 3 else 12, (2, 2, 3, 33), kind, shape, layer_device)
    assert_all_accurate(function, *draws, scale=0.3)


@BOTH
@pytest.mark.parametrize("shape", [(2, 2, 70), (2, 1, 70), (70,)], ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.usefixtures("short_long_rows")
def test_softmax_with_a_broadcast_mask_matches_float64_on_long_rows(function, shape, kind, layer_device):
    assert_all_accurate(function, *random_draws(6, (2, 2, 70), kind, shape, layer_device), scale=0.3)


@BOTH
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 5), (3, 70), (23, 11), (2, 4, 33), (2, 7, 1)], ids=str)
@pytest.mark.parametrize("kind", [None, "boolean", "additive"])
def test_causal_softmax_matches_float64(function, shape, kind, layer_device):
    assert_all_accurate(function, *random_draws(8, shape, kind, shape[-2:], layer_device), causal=True)


@BOTH
@pytest.mark.parametrize("shape", [(3, 40), (12, 9), (2, 66)], ids=str)
@pytest.mark.parametrize("kind", [None, "boolean", "additive"])
@pytest.mark.usefixtures("short_long_rows")
def test_causal_softmax_matches_float64_on_long_rows(function, shape, kind, layer_device):
    assert_all_accurate(function, *random_draws(4, shape, kind, shape, layer_device), causal=True)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, *DTYPES], ids=str)
def test_softmax_masks_short_types_of_any_kind(function, dtype, mask_dtype, layer_device):
    kind = "boolean" if mask_dtype == torch.bool else "additive"
    mask = random_mask(kind, 1, 6, 70, device=layer_device, dtype=mask_dtype)
    draw = (*random_pair(4, 6, 70, dtype=dtype, device=layer_device), mask)
    assert_all_accurate(function, draw, scale=1.7)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("long", [False, True], ids=["whole", "looped"])
def test_softmax_matches_float64_far_from_zero(function, dtype, long, layer_device, request):
    if long:
        request.getfixturevalue("short_long_rows")
    x, dy = random_pair(4, 100, dtype=torch.float32, device=layer_device)
    assert_all_accurate(function, *(((far + x).to(dtype), dy.to(dtype)) for far in (1000, -1000)))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("long", [False, True], ids=["whole", "looped"])
def test_softmax_matches_float64_where_scaled_exponents_would_overflow(function, long, dtype, layer_device, request):
    if long:
        request.getfixturevalue("short_long_rows")
    x, dy = random_pair(5, 70, dtype=dtype, device=layer_device)
    lowest = torch.finfo(dtype).min
    x[0], x[1], x[1, 7], x[1, 60] = lowest, -3e38, -2e38, 3e38
    x[2], x[3, 2:50], x[4, 69] = 3.3e38, lowest, 1.1e38
    assert_all_accurate(function, (x, dy))
    for huge in (1e7, 3e8, 2.0**30, 5e9, 1e12, 1e30):  # from some 1e9 on the product's rounding alone has exponents
        rows = x.new_tensor([[huge, 0.0, huge], [-huge, -2 * huge, -huge], [huge, huge * 0.99, -huge]])
        assert_all_accurate(function, (rows, dy[:3, :3]), (rows * 1.0078125, dy[:3, :3]))
    mask = torch.zeros(5, 70, dtype=dtype, device=layer_device)
    mask[0], mask[1, :50] = lowest, lowest
    assert_all_accurate(function, (torch.zeros_like(x), dy, mask))


@BOTH
@pytest.mark.parametrize("long", [False, True], ids=["whole", "looped"])
def test_softmax_of_what_is_kept_is_that_of_a_shorter_row(function, long, layer_device, request):
    if long:
        request.getfixturevalue("short_long_rows")
    x, _ = random_pair(4, 70, dtype=torch.float32, device=layer_device)
    mask = random_mask("boolean", 4, 70, device=layer_device)
    x[~mask] = torch.tensor([math.nan, math.inf, -math.inf], device=layer_device).repeat(500)[: int((~mask).sum())]
    y = function(x, -1, mask=mask)
    assert (y[~mask] == (-math.inf if is_log(function) else 0)).all()
    rows = [row[kept] for row, kept in zip(x, mask, strict=True)]
    torchs = torch.cat([getattr(F, function.__name__)(row, -1) for row in rows])
    assert_accurate(y[mask], torchs, torch.cat([reference(function)(row.double(), -1) for row in rows]))


def assert_fully_masked_rows_get_nothing(function, kind: str, device: torch.device) -> None:
    x, dy = random_pair(22, 20, dtype=torch.float32, device=device)
    x[0, :4], dy[1, 3] = torch.tensor([math.nan, math.inf, -math.inf, 3e38], device=device), math.inf
    mask = None if kind == "causal" else random_mask(kind, 22, 20, device=device)
    if mask is not None:
        mask[:2] = -math.inf if kind == "additive" else False
    y, *gradients = output_and_gradients(function, x, dy, mask, causal=kind == "causal")
    assert (y[:2] == (-math.inf if is_log(function) else 0)).all()
    for gradient in gradients:
        assert not gradient[:2].any()
        assert gradient[2:].isfinite().all()


@BOTH
@pytest.mark.parametrize("kind", ["boolean", "additive", "causal"])
@pytest.mark.parametrize("long", [False, True], ids=["whole", "looped"])
def test_softmax_gives_nothing_to_fully_masked_rows_whatever_they_hold(function, kind, long, layer_device, request):
    if long:
        request.getfixturevalue("short_long_rows")
    assert_fully_masked_rows_get_nothing(function, kind, layer_device)


@BOTH
@pytest.mark.parametrize("kind", ["boolean", "additive", "causal"])
@pytest.mark.usefixtures("without_compiled_code")
def test_softmax_by_torch_gives_nothing_to_fully_masked_rows_whatever_they_hold(function, kind):
    assert_fully_masked_rows_get_nothing(function, kind, torch.device("cpu"))


@BOTH
@pytest.mark.parametrize("mask", [None, "boolean", "additive", "causal"])
@pytest.mark.parametrize("long", [False, True], ids=["whole", "looped"])
def test_softmax_of_a_row_of_nan_or_infinity_is_nan_as_in_torch(function, mask, long, layer_device, request):
    if long:
        request.getfixturevalue("short_long_rows")
    x, dy = random_pair(7, 70, dtype=torch.float32, device=layer_device)
    x[1], x[2, 5], x[3, 0], x[4, 1], x[5] = -math.inf, math.inf, math.nan, -math.inf, math.nan
    extras = {"causal": True} if mask == "causal" else {}
    if mask in ("boolean", "additive"):
        extras["mask"] = torch.ones(7, 70, dtype=torch.bool, device=layer_device)
        extras["mask"] = extras["mask"] if mask == "boolean" else torch.zeros(70, device=layer_device)
    y, dx, *_ = output_and_gradients(function, x, dy, **extras)
    assert y[[1, 2, 3, 5]].isnan().all()
    assert dx[[1, 2, 3, 5], :60].isnan().all()
    assert not y[[0, 4, 6]].isnan().any()
    assert y[4, 1] == (-math.inf if is_log(function) else 0)
    assert dx[[0, 6]].isfinite().all()


def test_softmax_walks_through_a_mask_where_it_lies():
    shape = (2, 2, 3, 33)
    for mask in (torch.zeros(mask_shape, dtype=dtype) for mask_shape in MASK_SHAPES for dtype in (torch.bool, *DTYPES)):
        assert broadcast_mask(mask, shape).ptr.data_ptr() == mask.data_ptr()
    assert broadcast_mask(torch.zeros(shape), shape)[1:] == ((0, 0, 0, 33, 1), None, None, None)
    assert broadcast_mask(torch.zeros(3, 33), shape)[1:] == ((33, 0, 0, 0, 1), 3, None, None)
    assert broadcast_mask(torch.zeros(2, 1, 1, 33), shape)[1:] == ((0, 0, 0, 33, 1), 6, None, None)
    assert broadcast_mask(torch.zeros(3, 1), shape)[1:] == ((1, 0, 0, 0, 0), 3, None, None)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_softmax_takes_a_mask_that_changes_its_broadcast_at_every_dimension(kind, layer_device):
    x, dy = random_pair(2, 3, 2, 3, 2, 3, 5, dtype=torch.float32, device=layer_device)
    mask = random_mask(kind, 2, 1, 2, 1, 2, 1, 5, device=layer_device)
    assert broadcast_mask(mask, x.shape).ptr.shape == x.shape
    assert_all_accurate(softmax, (x, dy, mask))


@BOTH
@pytest.mark.skipif(not _library.is_loaded("cpu"), reason="the compiled CPU code is not built")
@pytest.mark.parametrize("C", [1024, 1021], ids=["aligned", "unaligned"])
def test_softmax_on_a_cpu_stores_large_results_past_the_caches(function, C):
    """Those of more than 4 MiB, too many for the interpreter."""
    x, dy = random_pair(1100, C, dtype=torch.float32, device=torch.device("cpu"))
    assert_all_accurate(function, (x, dy), causal=True)


@BOTH
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("asked", DTYPES, ids=str)
def test_softmax_casts_its_input_to_the_dtype_asked_for(function, given, asked, layer_device):
    x, dy = random_pair(5, 70, dtype=given, device=layer_device)
    ours, torchs, cast = (
        output_and_gradients(f, tensor, dy, dtype=asked)
        for f, tensor in ((function, x), (getattr(F, function.__name__), x), (function, x.to(asked)))
    )
    assert type(ours[0].grad_fn).__name__ == "SoftmaxFunctionBackward"
    assert torch.equal(ours[0], cast[0])
    truth = output_and_gradients(reference(function), x.to(asked).double(), dy.to(asked).double())
    for three in zip(ours, torchs, truth, strict=True):
        assert_accurate(*three)


@BOTH
def test_softmax_matches_float64_on_the_samples_of_torch(function, layer_device):
    for sample in torch_samples(function.__name__):
        x = sample.input.to(layer_device)
        dy = torch.randn(x.shape).to(layer_device)
        ours, torchs = (
            output_and_gradients(f, x, dy, None, *sample.args, **sample.kwargs)
            for f in (function, getattr(F, function.__name__))
        )
        truth = output_and_gradients(reference(function), x.double(), dy.double(), None, *sample.args)
        for three in zip(ours, torchs, truth, strict=True):
            assert_accurate(*three)


@BOTH
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [None, "boolean", "additive"])
@pytest.mark.usefixtures("without_compiled_code")
def test_masked_softmax_without_the_compiled_code_is_the_reference(function, dtype, kind):
    x, dy = random_pair(3, 5, 9, dtype=dtype, device="cpu")
    mask = random_mask(kind, 5, 9, device="cpu") if kind else None
    for dim in (1, -1):
        ours = output_and_gradients(function, x, dy, mask, dim=dim, scale=0.5, causal=True)
        for mine, plain in zip(
            ours, output_and_gradients(reference(function), x, dy, mask, dim=dim, scale=0.5, causal=True), strict=True
        ):
            assert torch.equal(mine, plain)


@BOTH
@pytest.mark.parametrize(
    ("dim", "dtype", "extras"),
    [(0, torch.float32, {}), (1, torch.float32, {"scale": 0.5, "causal": True}), (-1, torch.float64, {})],
    ids=str,
)
def test_softmax_leaves_other_dimensions_and_dtypes_to_torch(function, dim, dtype, extras, layer_device):
    x, dy = random_pair(2, 5, 4, dtype=dtype, device=layer_device)
    ours = output_and_gradients(function, x, dy, dim=dim, **extras)
    torchs = output_and_gradients(
        composed(function) if extras else getattr(F, function.__name__), x, dy, None, dim, **extras
    )
    assert all(torch.equal(*pair) for pair in zip(ours, torchs, strict=True))


@BOTH
@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
@pytest.mark.parametrize("extras", [{}, {"scale": 0.5}], ids=str)
@pytest.mark.parametrize("road", ["torch", pytest.param("kernels", marks=pytest.mark.interpreted)])
def test_softmax_without_a_dim_warns_and_chooses_as_torch_does(function, ndim, extras, road):
    x = torch.randn(*(2, 3, 4, 5)[:ndim])
    torchs = getattr(F, function.__name__)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y, _ = function(x, **extras), torchs(x)
    ours, theirs = (warning for warning in caught if issubclass(warning.category, UserWarning))
    assert str(ours.message) == str(theirs.message)
    assert ours.filename == __file__
    assert (ours.filename, ours.lineno) == (theirs.filename, theirs.lineno)
    assert torch.equal(y, function(x, 0 if ndim in (1, 3) else 1, **extras))


@BOTH
def test_softmax_errors_without_extras_are_torchs_own(function, layer_device):
    torchs = getattr(F, function.__name__)
    x = torch.ones(3, 4, device=layer_device)
    for arguments in ((x, 2), (x, -3), (x.long(), 1), (x, "0")):
        errors = []
        for called in (torchs, function):
            with pytest.raises((IndexError, RuntimeError, TypeError), match=r".") as error:
                called(*arguments)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]


@BOTH
def test_softmax_of_integers_cast_by_dtype_is_torchs(function, layer_device):
    x = torch.arange(12, device=layer_device).view(3, 4)
    expected = getattr(F, function.__name__)(x, -1, dtype=torch.float32)
    assert torch.equal(function(x, -1, dtype=torch.float32), expected)
    assert torch.equal(function(x, -1, dtype=torch.float32, mask=torch.ones_like(x).bool()), expected)


@BOTH
def test_softmax_of_a_number_is_torchs(function, layer_device):
    x = torch.tensor(3.0, device=layer_device)
    assert torch.equal(function(x, 0), getattr(F, function.__name__)(x, 0))
    assert torch.equal(function(x, -1, scale=2.0), getattr(F, function.__name__)(x, -1))


WRONG_ARGUMENTS = {
    "mask rank": ({"mask": torch.ones(1, 4, 8)}, ValueError, r"mask has shape \(1, 4, 8\), expected one that broad"),
    "causal": (
        {"input": torch.ones(8), "causal": True},
        ValueError,
        r"causal with input of shape \(8,\), expected two",
    ),
}


@BOTH
@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
@pytest.mark.parametrize("road", ["torch", pytest.param("kernels", marks=pytest.mark.interpreted)])
def test_softmax_rejects(function, case, road):
    wrong, error, message = WRONG_ARGUMENTS[case]
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        function(**{"input": torch.ones(4, 8), "dim": -1, **wrong})


@pytest.mark.gpu
def test_softmax_reaches_beyond_int32_offsets():
    x = torch.zeros(65537, 32768, dtype=torch.float16, device="cuda")
    x[-1, -1] = 5
    y = softmax(x, -1)
    assert torch.equal(y[-1], F.softmax(x[-1], -1))


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_softmax_tiles_cover_a_row_or_loop_over_it():
    for C in [*range(1, 300), 768, 1024, 1600, 4096, 8192, MAX_C, MAX_C + 1, 50304, 128256]:
        tile = backward_tile(C)
        assert tile == MULTI_BLOCK_TILE if C > MAX_C else tile.block_c >= C
        assert tile.block_n * tile.block_c // (32 * tile.num_warps) in (8, 16, 32)
        for itemsize, masked in ((2, False), (2, True), (4, False), (4, True)):
            tile = forward_tile(C, itemsize, itemsize, masked)
            if tile == MULTI_BLOCK_TILE:
                assert (MAX_C if masked or C % 16 else MAX_PLAIN_C[itemsize]) < C
            else:
                assert (tile.num_blocks - 1) * tile.block_c < C <= tile.num_blocks * tile.block_c
                assert tile.block_n * tile.num_blocks * tile.block_c <= 104 * 32 * tile.num_warps
    assert MULTI_BLOCK_TILE.block_n == 1  # the loop ends where causality ends the one row
    assert MULTI_BLOCK_TILE.num_blocks == 0  # which tells the kernel to loop


@pytest.mark.parametrize("mask", [torch.zeros(64), torch.zeros(3, 1, 64)], ids=["(C,)", "(B, 1, C)"])
def test_softmax_compiles_a_mask_that_comes_after_a_size_became_dynamic(mask):
    calls = [(torch.randn(3, 5, C), own) for C, own in ((64, None), (96, None), (64, mask))]
    assert compilations(lambda x, mask: softmax(x, -1, mask=mask, scale=0.5), calls, dynamic=None) <= 3
