"""What the norms share: adding to the residual stream with dropout, raw ops, launches, what runs without them."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastlm.ops import norm_triton
from fastlm.ops._dispatch import use_triton
from fastlm.ops._triton import HAS_TRITON, MAX_BLOCKS_PER_PROGRAM
from fastlm.ops.norm import (
    add_layer_norm,
    add_layer_norm_reference,
    add_rms_norm,
    add_rms_norm_reference,
    backward_op,
    dropout_factors,
    dropout_noise_op,
    forward_op,
    layer_norm,
    rms_norm,
)
from fastlm.ops.norm_triton import (
    DWEIGHT_TILE,
    MAX_BACKWARD_C,
    MAX_C,
    MAX_DROPOUT_C,
    MULTI_BLOCK_BACKWARD_TILE,
    MULTI_BLOCK_TILE,
    backward_grid,
    backward_passes,
    forward_tile,
)
from tests.support.accuracy import assert_accurate
from tests.support.samples import torch_samples

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (67, 65), (5, 768), (2, 1025), (0, 8)]
NAMES = ("normalised", "new_residual", "dx", "dresidual", "dweight", "dbias")
SEED = 0x123456789ABCDEF
FORMS = {
    "add_layer_norm": (add_layer_norm, add_layer_norm_reference),
    "add_rms_norm": (add_rms_norm, add_rms_norm_reference),
}


def in_torch(form, x, residual, shape, *parameters, eps, factors):
    """The composition of PyTorch's own functions at the dtypes of the tensors; factors stand for dropout."""
    h = (residual + x * factors.to(x.dtype)).to(residual.dtype)
    parameters = [tensor.to(h.dtype) for tensor in parameters]
    return (F.rms_norm if form == "add_rms_norm" else F.layer_norm)(h, shape, *parameters, eps=eps).to(x.dtype), h


def draw(form, shape, dtype, device, residual_dtype=None):
    """(x, residual, weight and bias as the form has them), (the upstream gradients of both results)."""
    x, residual, dy, dsum = torch.randn(4, *shape)
    parameters = torch.randn(1 if form == "add_rms_norm" else 2, shape[-1])
    kinds = (dtype, residual_dtype or dtype)
    tensors = [x.to(device, kinds[0]), residual.to(device, kinds[1]), *parameters.to(device, dtype)]
    return tensors, [dy.to(device, kinds[0]), dsum.to(device, kinds[1])]


def results_and_gradients(function, tensors, upstream, dtype=None, **options):
    leaves = [tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]
    results = function(*leaves[:2], leaves[0].shape[-1:], *leaves[2:], eps=1e-5, **options)
    upstream = [tensor.to(result.dtype) for tensor, result in zip(upstream, results, strict=True)]
    return [*results, *torch.autograd.grad(results, leaves, upstream)]


def factors_of(x, dropout_p, seed):
    """What an op that takes x multiplies it by: Philox's in the kernels, those of PyTorch's generator elsewhere."""
    if use_triton(x):
        return dropout_factors(x, x.shape[-1], dropout_p, seed)
    return dropout_noise_op(x, dropout_p, seed)


def given(factors, function):
    """A function of x and more as one of the x that dropout leaves."""
    return lambda x, *others, **options: function(x * factors.to(x.dtype), *others, **options)


def assert_all_accurate(form, *draws, dropout_p=0.0) -> None:
    """The error rule over one or several draws."""
    ours, reference = FORMS[form]
    x = draws[0][0][0]
    seed = torch.tensor(SEED, device=x.device)
    factors = factors_of(x, dropout_p, seed)
    dropout = {"dropout_p": dropout_p, "seed": seed if dropout_p else None}

    def pooled(function, dtype=None, **options):
        several = [results_and_gradients(function, *inputs, dtype, **options) for inputs in draws]
        assert function is not ours or type(several[0][0].grad_fn).__name__ == "NormFunctionBackward"
        return [torch.stack(tensors) for tensors in zip(*several, strict=True)]

    torchs = pooled(functools.partial(in_torch, form), factors=factors)
    truth = pooled(given(factors, reference), torch.float64)
    for name, *three in zip(NAMES, pooled(ours, **dropout), torchs, truth, strict=False):
        assert_accurate(*three, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_added_norm_and_gradients_match_float64(form, shape, dtype, dropout_p, layer_device):
    repeats = 12 if shape[0] * shape[1] < 32 else 1  # of so few elements PyTorch's are often right by luck
    draws = (draw(form, shape, dtype, layer_device) for _ in range(repeats))
    assert_all_accurate(form, *draws, dropout_p=dropout_p)


@pytest.mark.parametrize("C", [MAX_DROPOUT_C + 1, MAX_BACKWARD_C + 1, MAX_C + 1])
@pytest.mark.parametrize("form", FORMS)
def test_added_norm_and_gradients_match_float64_on_wide_rows(form, C, layer_device):
    assert_all_accurate(form, draw(form, (2, C), torch.float32, layer_device), dropout_p=0.3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "residual_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_residual_stream_keeps_its_own_dtype(form, dtype, residual_dtype, dropout_p, layer_device):
    assert_all_accurate(form, draw(form, (9, 130), dtype, layer_device, residual_dtype), dropout_p=dropout_p)


@pytest.mark.parametrize("form", FORMS)
def test_added_norm_matches_float64_far_from_zero(form, layer_device):
    (x, residual, *parameters), upstream = draw(form, (11, 300), torch.float32, layer_device)
    assert_all_accurate(form, ([x, 1000 + residual, *parameters], upstream))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
def test_dropout_of_the_kernels_is_philox_of_seed_row_and_column(dropout_p, kernel_device):
    x, seed = torch.ones(37, 130, device=kernel_device), torch.tensor(SEED, device=kernel_device)
    _, kept = add_layer_norm(x, torch.zeros_like(x), (130,), dropout_p=dropout_p, seed=seed)
    assert torch.equal(kept, dropout_factors(x, 130, dropout_p, seed))


def test_dropout_factors_are_the_published_philox():
    """Random123's known answers for philox4x32 with 7 rounds: counters and key 0."""
    known = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    x, seed = torch.empty(1, 4), torch.tensor(0)
    for column, number in enumerate(known):
        below, above = ((number >> 8) * 2.0**-24 + step for step in (-(2.0**-25), 2.0**-25))
        assert dropout_factors(x, 4, below, seed)[0, column] > 0
        assert dropout_factors(x, 4, above, seed)[0, column] == 0


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_keeps_the_right_share_and_the_mean(dropout_p):
    factors = dropout_factors(torch.empty(4000, 50), 50, dropout_p, torch.tensor(SEED))
    deviation = (dropout_p * (1 - dropout_p) / factors.numel()) ** 0.5
    assert abs((factors > 0).double().mean().item() - (1 - dropout_p)) < 5 * deviation
    other = dropout_factors(torch.empty(4000, 50), 50, dropout_p, torch.tensor(SEED + 1))
    agreement = ((factors > 0) == (other > 0)).double().mean().item()
    assert abs(agreement - (dropout_p**2 + (1 - dropout_p) ** 2)) < 5 * 0.5 / factors.numel() ** 0.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("road", ["torch", pytest.param("kernels", marks=pytest.mark.interpreted)])
def test_seed_decides_what_is_dropped(form, road):
    tensors, upstream = draw(form, (20, 40), torch.float32, "cpu")
    run = functools.partial(results_and_gradients, FORMS[form][0], tensors, upstream, dropout_p=0.5)

    def same(first, second):
        return all(torch.equal(*pair) for pair in zip(first, second, strict=True))

    assert same(run(seed=7), run(seed=torch.tensor(7)))
    assert not same(run(seed=7), run(seed=8))
    assert not same(run(seed=None), run(seed=None))
    torch.manual_seed(3)
    first = run(seed=None)
    torch.manual_seed(3)
    assert same(first, run(seed=None))


@pytest.mark.parametrize("road", ["torch", pytest.param("kernels", marks=pytest.mark.interpreted)])
def test_checkpointing_draws_the_same_dropout_again(road):
    tensors, upstream = draw("add_layer_norm", (20, 40), torch.float32, "cpu")

    def gradients(wrap):
        torch.manual_seed(5)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        results = wrap(lambda *leaves: add_layer_norm(*leaves[:2], (40,), *leaves[2:], dropout_p=0.5), *leaves)
        return torch.autograd.grad(results, leaves, upstream)

    plain = gradients(lambda function, *leaves: function(*leaves))
    again = gradients(functools.partial(checkpoint, use_reentrant=False))
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))


def test_added_norm_compiles_on_a_cpu_with_a_seed():
    tensors, upstream = draw("add_layer_norm", (6, 32), torch.float32, "cpu")
    torch.compiler.reset()
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    run = functools.partial(results_and_gradients, dropout_p=0.4, seed=torch.tensor(SEED))
    pairs = zip(run(compiled, tensors, upstream), run(add_layer_norm, tensors, upstream), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_layer_norm_leaves_nested_tensors_to_torch(layer_device):
    rows, weight = [torch.randn(size, 8, device=layer_device) for size in (3, 2)], torch.randn(8, device=layer_device)
    y = layer_norm(torch.nested.nested_tensor(rows), (8,), weight, weight)
    for ours, row in zip(y.unbind(), rows, strict=True):
        torchs, truth = (F.layer_norm(x, (8,), w, w) for x, w in ((row, weight), (row.double(), weight.double())))
        assert_accurate(ours, torchs, truth)


def test_dropout_noise_runs_on_any_device():
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("fastlm::dropout_noise", "MPS")


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_norms_match_float64_on_the_samples_of_torch(norm, layer_device):
    theirs = {layer_norm: F.layer_norm, rms_norm: F.rms_norm}[norm]
    for sample in torch_samples(f"nn.functional.{norm.__name__}"):
        draws = [sample]
        if sample.input.numel() < 32:  # of so few elements PyTorch's are often right by luck
            draws += [redrawn(sample) for _ in range(15)]
        runs = ((norm, torch.float32), (theirs, torch.float32), (theirs, torch.float64))
        several = ([of_sample(*run, draw, layer_device) for draw in draws] for run in runs)
        pooled = ([torch.stack(tensors) for tensors in zip(*results, strict=True)] for results in several)
        for three in zip(*pooled, strict=True):
            assert_accurate(*three, str(sample))


def redrawn(sample):
    """The sample with other numbers, of the range from which PyTorch draws."""

    def other(value):
        return torch.empty_like(value).uniform_(-9, 9) if torch.is_tensor(value) else value

    kwargs = {key: other(value) for key, value in sample.kwargs.items()}
    return sample._replace(input=other(sample.input), args=tuple(map(other, sample.args)), kwargs=kwargs)


def of_sample(function, dtype, sample, device):
    """The result of a function for one of PyTorch's samples, and the gradients of its tensors."""

    def convert(value):
        return value.detach().to(device, dtype, copy=True).requires_grad_() if torch.is_tensor(value) else value

    args = [convert(value) for value in (sample.input, *sample.args)]
    kwargs = {key: convert(value) for key, value in sample.kwargs.items()}
    y = function(*args, **kwargs)
    leaves = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
    upstream = torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape).to(dtype)
    return [y, *torch.autograd.grad(y, leaves, upstream)]


MANY_ROWS = {  # in numbers that are no multiple of a block
    "layer_norm": ((1 << 18) + 3, 8, torch.bfloat16),
    "add_layer_norm": (40_001, 65, torch.float32),
    "rms_norm": ((1 << 18) + 3, 7, torch.float32),
    "add_rms_norm": ((1 << 17) + 1, 16, torch.bfloat16),
}


TORCHS = {layer_norm: F.layer_norm, rms_norm: F.rms_norm}
WIDE = torch.float32, torch.float64


def sums_over_rows(form, x, dy, dtype):
    """dweight, and dbias where there is one, of rows that the norm leaves as they are, from their own statistics."""
    has_mean = "layer_norm" in form
    weight, bias = torch.ones(2, x.shape[1], device=x.device)
    _, h, mean, rstd = forward_op(
        x, x if "add" in form else None, weight.shape, None, None, None, 0.0, 1e-5, has_mean, x.dtype
    )
    h, mean = h if "add" in form else x, mean if has_mean else None
    if dtype is None:
        needs = False, False, True, has_mean
        sums = backward_op(dy, None, h, weight, bias, mean, rstd, None, 0.0, x.dtype, needs)[2:]
    else:
        centered = h.to(dtype) if mean is None else h.to(dtype) - mean.to(dtype)[:, None]
        sums = (dy * (centered * rstd.to(dtype)[:, None])).sum(0), dy.to(dtype).sum(0)
    return sums[: 1 + has_mean]


@pytest.mark.parametrize("layer_device", ["compiled", "portable"], indirect=True)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("form", MANY_ROWS)
def test_gradients_of_norms_summed_over_very_many_rows_match_float64(form, offset, layer_device):
    N, C, dtype = MANY_ROWS[form]
    x, dy = torch.randn(N, C).to(dtype), (torch.randn(N, C) + offset).to(dtype)
    results = [sums_over_rows(form, x, dy, dtype) for dtype in (None, *WIDE)]
    for name, *three in zip(NAMES[4:], *results, strict=False):
        assert_accurate(*three, name)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_norms_match_float64_on_very_long_rows(norm):
    C = (1 << 21) + 5
    x, dy, weight = torch.randn(2, C) + 3, torch.randn(2, C), torch.randn(C)

    def evaluated(function, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        y = function(leaves[0], (C,), leaves[1])
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    results = [evaluated(*how) for how in ((norm, torch.float32), *((TORCHS[norm], wide) for wide in WIDE))]
    for three in zip(*results, strict=True):
        assert_accurate(*three)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_norms_match_float64_on_rows_of_very_many_blocks(norm, kernel_device, monkeypatch):
    monkeypatch.setattr(norm_triton, "forward_tile", lambda *_: MULTI_BLOCK_TILE._replace(block_n=16, block_c=8))
    C = (1 << 12) + 5
    x, weight = torch.randn(16, C, device=kernel_device), torch.randn(C, device=kernel_device)
    torchs = [TORCHS[norm](x.to(dtype), (C,), weight.to(dtype)) for dtype in WIDE]
    assert_accurate(norm(x, (C,), weight), *torchs)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_norms_are_the_same_on_any_number_of_threads(form):
    tensors, upstream = draw(form, (5001, 65), torch.float32, "cpu")
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(results_and_gradients(FORMS[form][0], tensors, upstream))
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_added_norm_on_a_cpu_takes_mixed_dtypes(form, dtype, residual_dtype):
    tensors, upstream = draw(form, (9, 33), dtype, "cpu", residual_dtype)
    y, h, *_ = results_and_gradients(FORMS[form][0], tensors, upstream)
    assert (y.dtype, h.dtype) == (dtype, residual_dtype)


WRONG = {
    "probability": ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5, expected a probability"),
    "seed type": ({"seed": 1.5}, TypeError, "seed is a float, expected an int"),
    "seed dtype": ({"seed": torch.ones(())}, TypeError, "seed is a tensor of torch.float32, expected torch.int64"),
    "seed shape": ({"seed": torch.arange(2)}, ValueError, r"seed has shape \(2,\), expected one element"),
    "seed range": ({"seed": 2**63}, ValueError, "seed is 9223372036854775808, expected"),
    "shape": ({"normalized_shape": (7,)}, ValueError, r"normalized_shape is \(7,\), expected the last dim"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("form", FORMS)
def test_added_norm_rejects(form, case):
    wrong, error, message = WRONG[case]
    with pytest.raises(error, match=f"{form}: {message}"):
        FORMS[form][0](**{"x": torch.ones(4, 8), "residual": torch.ones(4, 8), "normalized_shape": (8,), **wrong})


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("num_sms", [1, 108, 132])
@pytest.mark.parametrize("drops", [False, True])
def test_norm_launches_cover_every_row_and_column(num_sms, drops):
    widths = (768, 1024, 1600, 4096, MAX_BACKWARD_C, MAX_BACKWARD_C + 1, 12288, MAX_C, MAX_C + 1, 65536, 10**6, 2**30)
    for C in (*range(1, 300), *widths):
        for itemsize, is_added in itertools.product((2, 4), (False, True)):
            tile = forward_tile(C, itemsize, is_added)
            assert 0 <= tile.num_blocks * tile.block_c - C < tile.block_c or C < 64 or tile == MULTI_BLOCK_TILE
        for asked in ((True, True), (True, False), (False, True)):
            passes = backward_passes(C, 2, *asked, drops)
            assert [sum(kind) for kind in zip(*(given[1:] for given in passes), strict=True)] == [*asked]
            for given in passes:
                tile, computes_dx, computes_dweight = given
                assert tile.block_c >= C or computes_dweight == (tile == DWEIGHT_TILE)
                assert tile.block_c >= C or computes_dx == (tile == MULTI_BLOCK_BACKWARD_TILE)
                if tile not in (DWEIGHT_TILE, MULTI_BLOCK_BACKWARD_TILE):
                    ahead = (tile.num_stages - 1) * tile.block_n * 2 * 2 * C  # bytes of h and dy that a program awaits
                    assert drops or C < 768 or ahead * 16 // tile.num_warps > 32 * 1024  # of a multiprocessor
                across, down = backward_grid(10**6, C, given, num_sms)
                turns = -(-(10**6) // (down * tile.block_n))
                assert turns <= MAX_BLOCKS_PER_PROGRAM
                assert down <= 16 * num_sms or turns > MAX_BLOCKS_PER_PROGRAM // 2
                assert across * tile.block_c >= C or tile == MULTI_BLOCK_BACKWARD_TILE


@pytest.mark.parametrize("norm", [layer_norm, rms_norm, add_layer_norm, add_rms_norm], ids=lambda norm: norm.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_result_of_another_dtype_is_the_rounded_result_and_so_are_its_gradients(layer_device, norm, dtype):
    names = ("x", "residual") if "add" in norm.__name__ else ("input",)
    leaves = [torch.randn(6, 24, device=layer_device).requires_grad_() for _ in names]
    weight = torch.randn(24, device=layer_device).requires_grad_()

    def results(cast: bool) -> list[torch.Tensor]:
        given = dict(zip(names, leaves, strict=True)) | {"normalized_shape": (24,), "weight": weight}
        y = norm(**given) if cast else norm(**given, dtype=dtype)
        y = y[0] if isinstance(y, tuple) else y
        y = y.to(dtype) if cast else y
        return [y, *torch.autograd.grad(y, [*leaves, weight], torch.ones_like(y) / 3)]

    for ours, expected in zip(results(cast=False), results(cast=True), strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)
