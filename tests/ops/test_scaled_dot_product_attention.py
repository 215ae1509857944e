"""scaled_dot_product_attention in every form that torch.nn.functional's takes, on a plain CPU and where kernels run."""

import importlib
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left
from torch.utils._pytree import tree_map_only

from fastlm.nn import MultiheadAttention
from fastlm.ops import _dispatch, scaled_dot_product_attention
from tests.support.accuracy import assert_accurate
from tests.support.samples import torch_samples

module = importlib.import_module("fastlm.ops.scaled_dot_product_attention")  # the name in fastlm.ops is the function


class Form:
    """One call: shapes of query, key and value, and the options."""

    def __init__(self, query, key=None, value=None, **options):
        self.shapes = query, key or query, value or key or query
        self.options = options

    def tensors(self, device="cpu", dtype=torch.float32, seed=0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).to(device, dtype) for shape in self.shapes]


BOOLEAN = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
ADDED = torch.tensor([[0.5, -torch.inf, 1.0], [-1.0, 2.0, 0.0], [0.0, 0.0, -torch.inf]])
# Not 8 features: a row that sees one key has score gradients of 0, and PyTorch's CPU code, which adds eight products at
# a time, would find just that, where sums in another order leave a rounding.
SERVED = {
    "plain": Form((2, 3, 5, 24)),
    "causal": Form((2, 3, 5, 24), is_causal=True),
    "one token": Form((1, 1, 1, 24), is_causal=True),
    "scale": Form((2, 3, 5, 24), scale=0.3, is_causal=True),
    "fewer queries": Form((2, 3, 2, 24), (2, 3, 7, 24)),
    "more queries": Form((2, 3, 7, 24), (2, 3, 2, 24)),
    "shared key heads": Form((2, 4, 5, 24), (2, 2, 5, 24), enable_gqa=True, is_causal=True),
    "odd sizes": Form((1, 3, 17, 5), is_causal=True),
}
PYTORCHS = {
    "causal, fewer queries": Form((2, 3, 2, 8), (2, 3, 7, 8), is_causal=True),
    "causal, more queries": Form((2, 3, 7, 8), (2, 3, 2, 8), is_causal=True),
    "two dimensions": Form((3, 8)),
    "three dimensions": Form((2, 3, 8), (2, 5, 8)),
    "five dimensions": Form((2, 2, 3, 5, 8), is_causal=True),
    "broadcast batch": Form((3, 8), (2, 4, 5, 8)),
    "broadcast heads": Form((2, 3, 5, 8), (1, 1, 5, 8)),
    "other features of value": Form((2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 4)),
    "boolean mask that empties a row": Form((2, 3, 3, 8), attn_mask=BOOLEAN),
    "added mask": Form((2, 3, 3, 8), attn_mask=ADDED),
    "no queries": Form((2, 3, 0, 8), (2, 3, 4, 8)),
    "no keys": Form((2, 3, 4, 8), (2, 3, 0, 8)),
    "no batch": Form((0, 3, 4, 8)),
    "everything dropped": Form((2, 3, 4, 8), dropout_p=1.0),
}
FORMS = SERVED | PYTORCHS


def of_device(options, device, dtype=None):
    """The options with their tensors there."""
    convert = {True: lambda x: x.to(device, dtype if x.is_floating_point() else None), False: lambda x: x}
    return {name: convert[isinstance(value, Tensor)](value) for name, value in options.items()}


def evaluated(function, tensors, dtype, options):
    """The result and the gradients of every floating tensor among the arguments."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors]
    options = of_device(options, inputs[0].device, dtype)
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options["attn_mask"] = mask.detach().clone().requires_grad_()
        inputs.append(options["attn_mask"])
    out = function(*inputs[:3], **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return {"out": out.detach()} | dict(zip("qkvm", torch.autograd.grad(out, inputs, dout), strict=False))


def several(function, form, device, dtype, count=8):
    """The same, over draws: of a few numbers PyTorch's largest error may be small by luck."""
    draws = [evaluated(function, form.tensors(device, seed=seed), dtype, form.options) for seed in range(count)]
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


@pytest.mark.parametrize("name", FORMS)
def test_sdpa_and_gradients_match_float64(name, kernel_device):
    form = FORMS[name]
    ours = several(scaled_dot_product_attention, form, kernel_device, torch.float32)
    theirs = several(F.scaled_dot_product_attention, form, kernel_device, torch.float32)
    truth = several(F.scaled_dot_product_attention, form, kernel_device, torch.float64)
    for key in truth:
        assert_accurate(ours[key], theirs[key], truth[key], key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_sdpa_on_a_plain_cpu_is_pytorchs_bit_for_bit(name, dtype):
    form = FORMS[name]
    ours, theirs = (
        evaluated(function, form.tensors(), dtype, form.options)
        for function in (scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", FORMS)
def test_sdpa_asks_the_kernels_for_what_they_serve(name, kernel_device, monkeypatch):
    calls = []

    def recorded(*tensors, **options):
        calls.append(options)
        return tensors[0]

    monkeypatch.setattr(module, "attention", recorded)
    form = FORMS[name]
    scaled_dot_product_attention(*form.tensors(kernel_device), **of_device(form.options, kernel_device))
    assert len(calls) == (name in SERVED)


LARGE = {
    "causal": (Form((2, 2, 512, 8), is_causal=True), True),
    "causal, shared key heads": (Form((2, 4, 300, 8), (2, 2, 300, 8), enable_gqa=True, is_causal=True), True),
    "causal, over 512 tokens": (Form((1, 2, 513, 8), is_causal=True), False),
    "causal, more keys": (Form((2, 4, 300, 8), (2, 4, 301, 8), is_causal=True), False),
    "full": (Form((2, 2, 512, 8)), False),
    "causal, one key head": (Form((1, 4, 512, 8), (1, 1, 512, 8), enable_gqa=True, is_causal=True), False),
    "small": (Form((2, 2, 128, 8), is_causal=True), False),
    "causal, many rows of 64 tokens": (Form((64, 8, 64, 8), is_causal=True), True),
    "causal, many rows of 63 tokens": (Form((64, 8, 63, 8), is_causal=True), False),
    "three dimensions": (Form((4, 512, 8), is_causal=True), False),
    "a mask": (Form((8, 32, 3, 512), attn_mask=BOOLEAN), False),
}


@pytest.mark.parametrize("name", LARGE)
def test_sdpa_on_a_cpu_runs_compiled_code_where_that_is_faster(name, monkeypatch):
    form, compiled = LARGE[name]
    monkeypatch.setattr(_dispatch, "num_threads", lambda: 2)
    monkeypatch.setattr(_dispatch, "has_avx512", lambda: False)
    original = module.attention
    calls = []
    monkeypatch.setattr(module, "attention", lambda *x, **options: calls.append(x) or original(*x, **options))
    torch.manual_seed(0)
    ours = evaluated(scaled_dot_product_attention, form.tensors(), torch.float32, form.options)
    assert len(calls) == compiled
    theirs = evaluated(F.scaled_dot_product_attention, form.tensors(), torch.float32, form.options)
    truth = evaluated(F.scaled_dot_product_attention, form.tensors(), torch.float64, form.options)
    for key in truth:
        assert_accurate(ours[key], theirs[key], truth[key], key)


@pytest.mark.parametrize(
    ("has_avx512", "tokens", "dtype", "gradients", "compiled"),
    [
        (True, 4096, torch.float32, True, True),
        (True, 4097, torch.float32, True, False),
        (False, 4096, torch.float32, True, False),
        (True, 80, torch.float32, False, False),
        (True, 40, torch.bfloat16, True, True),
        (True, 40, torch.bfloat16, False, False),
        (True, 8, torch.bfloat16, True, False),
    ],
)
def test_attention_on_a_cpu_runs_compiled_code_where_that_is_faster(
    has_avx512, tokens, dtype, gradients, compiled, monkeypatch
):
    monkeypatch.setattr(_dispatch, "num_threads", lambda: 2)
    monkeypatch.setattr(_dispatch, "has_avx512", lambda: has_avx512)
    with torch.set_grad_enabled(gradients):
        assert _dispatch.is_faster_in_cpp(dtype, True, 4, tokens, 8, 32, tokens, 8) == compiled
        assert not _dispatch.is_faster_in_cpp(dtype, False, 4, 513, 8, 32, 513, 8)


@pytest.mark.parametrize(("tokens", "said"), [(63, "torch (dropout of fewer"), (64, "cpp (")])
def test_sdpa_with_dropout_on_a_cpu_runs_compiled_code_where_that_is_faster(tokens, said):
    x = torch.randn(2, 8, tokens, 64)
    assert f"scaled_dot_product_attention: {said}" in _dispatch.explain(
        scaled_dot_product_attention, x, x, x, dropout_p=0.5
    )


def test_sdpa_on_a_cpu_leaves_odd_arguments_of_large_calls_to_pytorch():
    x = torch.randn(2, 2, 512, 8)
    scale = torch.tensor(0.3)
    theirs = F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=scale)
    assert torch.equal(scaled_dot_product_attention(x, x, x, is_causal=True, scale=scale), theirs)
    for odd in ({"is_causal": 1}, {"is_causal": torch.ones(2) > 0}, {"scale": "a"}, {"dropout_p": None}):
        with pytest.raises(TypeError, match=f"argument '{next(iter(odd))}'"):
            scaled_dot_product_attention(x, x, x, **({"is_causal": True} | odd))


def test_sdpa_on_a_cpu_drops_the_share_that_is_asked_for():
    zeros, p = torch.zeros(1, 2, 512, 512), 0.2
    torch.manual_seed(0)
    out = scaled_dot_product_attention(zeros, zeros, torch.eye(512).expand(1, 2, 512, 512), dropout_p=p)
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 512 / (1 - p)))
    spread = (p * (1 - p) / kept.numel()) ** 0.5  # of the mean of as many independent draws
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * spread


class Doubled(Tensor):
    """A bias that knows PyTorch's function by its place, as torch.nn.attention.bias does."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            args, kwargs = tree_map_only(cls, lambda x: x.as_subclass(Tensor), (args, kwargs or {}))
            return 2 * function(*args, **kwargs)
        return super().__torch_function__(function, types, args, kwargs or {})


class Plain(Tensor):
    pass


BIASES = {
    "lower right": lambda Tq, Tk: causal_lower_right(Tq, Tk),
    "upper left": lambda Tq, Tk: causal_upper_left(Tq, Tk),
    "of the user": lambda Tq, Tk: torch.linspace(-1, 1, Tq * Tk).view(Tq, Tk).as_subclass(Doubled),
    "without rules": lambda Tq, Tk: torch.linspace(-1, 1, Tq * Tk).view(Tq, Tk).as_subclass(Plain),
}


@pytest.mark.parametrize("in_place", [False, True], ids=["called", "in torch's place"])
@pytest.mark.parametrize(("Tq", "Tk"), [(5, 9), (9, 5), (7, 7)])
@pytest.mark.parametrize("bias", BIASES)
def test_sdpa_of_a_bias_subclass_is_pytorchs(bias, Tq, Tk, in_place, kernel_device, monkeypatch):
    tensors = [torch.randn(2, 4, T, 32, device=kernel_device) for T in (Tq, Tk, Tk)]
    bias = BIASES[bias](Tq, Tk)

    def result(function, dtype=torch.float32):
        of_dtype = bias if isinstance(bias, CausalBias) else bias.to(kernel_device, dtype)
        return function(*(x.to(dtype) for x in tensors), attn_mask=of_dtype, scale=0.3)

    expected, truth = (result(F.scaled_dot_product_attention, dtype) for dtype in (torch.float32, torch.float64))
    if in_place:
        monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    found = result(scaled_dot_product_attention)
    assert type(found) is type(expected)
    with torch.device(kernel_device):  # a mode that sees every function
        again = result(scaled_dot_product_attention)
    for ours in (found, again):
        assert_accurate(*(x.as_subclass(Tensor) for x in (ours, expected, truth)))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("module_class", [torch.nn.MultiheadAttention, MultiheadAttention])
def test_multihead_attention_is_the_same_with_sdpa_in_torchs_place(module_class, is_causal, kernel_device, monkeypatch):
    layer = module_class(32, 4, batch_first=True, device=kernel_device)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True, device=kernel_device)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 32, device=kernel_device)

    def result(module, dtype=torch.float32):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(6, device=kernel_device, dtype=dtype)
        y = x.to(dtype)
        return module.to(dtype)(
            y, y, y, need_weights=False, attn_mask=mask if is_causal else None, is_causal=is_causal
        )[0]

    expected, truth = (result(theirs, dtype) for dtype in (torch.float32, torch.float64))
    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    assert_accurate(result(layer), expected, truth)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_sdpa_of_a_scale_that_is_no_number_is_pytorchs(scale, kernel_device):
    x = torch.rand(1, 2, 3, 8, device=kernel_device)
    ours, theirs = (f(x, x, x, scale=scale) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    assert torch.equal(ours.isnan(), theirs.isnan())


def test_sdpa_matches_float64_on_the_samples_of_torch(kernel_device):
    samples = [s for s in torch_samples("nn.functional.scaled_dot_product_attention") if not s.kwargs["dropout_p"]]
    assert len(samples) > 10
    for sample in samples:
        tensors = [x.to(kernel_device) for x in (sample.input, *sample.args)]
        three = [
            evaluated(function, tensors, dtype, sample.kwargs)
            for function, dtype in (
                (scaled_dot_product_attention, torch.float32),
                (F.scaled_dot_product_attention, torch.float32),
                (F.scaled_dot_product_attention, torch.float64),
            )
        ]
        for key in three[0]:
            assert_accurate(*(of_one[key] for of_one in three), f"{key} of {sample}")


def test_sdpa_drops_the_stated_share_and_scales_the_rest(kernel_device):
    zeros = torch.zeros(1, 1, 64, 64, device=kernel_device)
    values = torch.eye(64, device=kernel_device)[None, None]
    out = scaled_dot_product_attention(zeros, zeros, values, dropout_p=0.25)
    kept = out != 0
    assert_accurate(out[kept], *(torch.full_like(out[kept], 1 / 64 / 0.75, dtype=d) for d in (None, torch.float64)))
    spread = (0.25 * 0.75 / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - 0.75) < 4 * spread


def test_sdpa_under_autocast_computes_in_the_autocast_dtype(kernel_device):
    q, k, v = FORMS["causal"].tensors(kernel_device)
    low = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        mixed = scaled_dot_product_attention(q, low[1], v, is_causal=True)
        theirs = F.scaled_dot_product_attention(q, low[1], v, is_causal=True)
    truth = F.scaled_dot_product_attention(*(x.double() for x in low), is_causal=True)
    assert_accurate(mixed, theirs, truth)


X = torch.zeros(2, 4, 5, 8)
WRONG = {
    "features disagree": ((X, torch.zeros(2, 4, 5, 6), X), {}),
    "heads disagree": ((X, X[:, :3], X[:, :3]), {}),
    "heads are not divided": ((X, X[:, :3], X[:, :3]), {"enable_gqa": True}),
    "batches disagree": ((X, X.repeat(2, 1, 1, 1)[:3], X.repeat(2, 1, 1, 1)[:3]), {}),
    "dtypes disagree": ((X, X.half(), X.half()), {}),
    "keys and values disagree": ((X, X, X[:, :, :3]), {}),
    "one dimension": ((X[0, 0, 0], X, X), {}),
    "dropout above one": ((X, X, X), {"dropout_p": 1.5}),
    "dropout below zero": ((X, X, X), {"dropout_p": -0.1}),
    "mask does not broadcast": ((X, X, X), {"attn_mask": torch.ones(3, 5, dtype=torch.bool)}),
    "mask and causal": ((X, X, X), {"attn_mask": torch.ones(5, 5), "is_causal": True}),
    "mask of integers": ((X, X, X), {"attn_mask": torch.ones(5, 5, dtype=torch.int64)}),
    "no tensor": ((X, X, None), {}),
    "integers": ((X.long(), X.long(), X.long()), {}),
}


@pytest.mark.parametrize("name", WRONG)
def test_sdpa_refuses_what_pytorch_refuses_in_its_words(name, kernel_device):
    tensors, options = WRONG[name]
    tensors = [x if x is None else x.to(kernel_device) for x in tensors]
    outcomes = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        try:
            outcomes.append(function(*tensors, **of_device(options, kernel_device)))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    ours, theirs = outcomes
    if isinstance(theirs, Tensor):  # some versions of PyTorch take what others refuse
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def test_sdpa_has_pytorchs_arguments_and_defaults():
    documented = re.match(r"\w+\((.*?)\) ->", F.scaled_dot_product_attention.__doc__, re.DOTALL)[1].split(",")
    ours = inspect.signature(scaled_dot_product_attention).parameters.values()
    written = [p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default}" for p in ours]
    assert written == [argument.strip() for argument in documented]


def test_scaled_dot_product_attention_may_take_the_place_of_torchs(monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), expected)


def test_scaled_dot_product_attention_of_no_tensor_raises_as_torch():
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        scaled_dot_product_attention([1.0], [1.0], [1.0])
