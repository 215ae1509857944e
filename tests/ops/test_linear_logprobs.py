"""Log-probabilities, entropies and likeliest tokens of a linear layer's logits, against PyTorch's own steps."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastlm.ops import _chunks, linear_cross_entropy, linear_logprobs
from fastlm.ops._library import is_loaded
from fastlm.ops.linear_logprobs import NO_TOKEN
from tests.support.accuracy import assert_accurate
from tests.support.compilations import compilations

C, V = 24, 67
ROWS_OF_LOGITS = 4 * V  # bytes of one row


def problem(N=37, dtype=torch.float32, ignored=(0, 5), classes=V):
    """Tensors and targets with logits of order one: no single sure row then decides the largest error."""
    target = torch.randint(classes, (N,))
    for row in ignored:
        target[row : row + 1] = -100
    weight = torch.randn(V, C) / C**0.5
    return [torch.randn(N, C).to(dtype), weight.to(dtype), torch.randn(V).to(dtype)], target


def of_torch(
    x, weight, bias, target, *, logit_scale=1.0, temperature=1.0, softcap=None, num_classes=None, entropy=False
):  # fmt: skip
    """What everyone writes: all logits, their log softmax, and a gather."""
    logits = F.linear(x, weight, bias)[..., :num_classes]
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = F.log_softmax(z / temperature, -1)
    valid = target != -100
    found = [logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]]
    if entropy:
        found.append(torch.special.entr(logp.exp()).sum(-1))
    return [torch.where(valid, x, 0.0) for x in found]


def ours(x, weight, bias, target, **options):
    found = linear_logprobs(x, weight, target, linear_bias=bias, **options)
    return [x for x in (found.logprobs, found.entropy) if x is not None]


def evaluated(function, tensors, target, dtype, **options):
    """The results, and the gradients for random upstream gradients of each."""
    inputs = [None if x is None else x.to(dtype).requires_grad_() for x in tensors]
    results = function(*inputs, target, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    gradients = torch.autograd.grad(results, [x for x in inputs if x is not None], upstream)
    return [*(x.detach() for x in results), *gradients]


def assert_equals_torch(tensors, target, dtype=torch.float32, **options):
    found = evaluated(ours, tensors, target, dtype, **options)
    options.pop("memory_budget", None)
    theirs = evaluated(of_torch, tensors, target, dtype, **options)
    truth = evaluated(of_torch, tensors, target, torch.float64, **options)
    names = ["logprobs", *(["entropy"] if options.get("entropy") else []), "dinput", "dweight", "dbias"]
    for name, *results in zip(names, found, theirs, truth, strict=False):
        assert_accurate(*results, name)
    return found


MODES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "logit scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 3.0},
    "padding": {"num_classes": 60},
    "everything": {"temperature": 1.7, "logit_scale": 1.3, "softcap": 4.0, "num_classes": 60},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_linear_logprobs_and_gradients_match_torch(mode, entropy, dtype, monkeypatch):
    monkeypatch.setattr(_chunks, "has_bf16_units", lambda: is_loaded("cpu"))
    options = MODES[mode] | {"entropy": entropy}
    found = assert_equals_torch(*problem(dtype=dtype, classes=60), dtype, memory_budget=5 * ROWS_OF_LOGITS, **options)
    if "num_classes" in options:
        assert not found[-1][60:].any()
        assert not found[-2][60:].any()


@pytest.mark.parametrize("rows", [1, 4, 37, 100])
@pytest.mark.parametrize("entropy", [False, True])
def test_linear_logprobs_match_torch_in_chunks_of_any_size(entropy, rows):
    assert_equals_torch(*problem(), entropy=entropy, memory_budget=rows * ROWS_OF_LOGITS)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    ("N", "ignored"), [(0, ()), (1, ()), (37, ()), (37, range(37))], ids=["empty", "one", "none ignored", "all ignored"]
)
def test_linear_logprobs_match_torch_however_many_rows_count(N, ignored, entropy):
    tensors, target = problem(N=N, ignored=ignored)
    assert_equals_torch([*tensors[:2], None], target, entropy=entropy)


def test_entropy_of_more_columns_than_a_block_of_the_cache_matches_torch():
    x, weight, target = torch.randn(9, 8), torch.randn(70_001, 8), torch.randint(70_001, (9,))
    assert_equals_torch([x, weight, None], target, entropy=True)


def test_logprobs_are_minus_the_losses_of_linear_cross_entropy():
    (x, weight, bias), target = problem(dtype=torch.bfloat16)
    options = {"linear_bias": bias, "softcap": 3.0}
    losses = linear_cross_entropy(x, weight, target, reduction="none", dtype=torch.float32, **options)
    assert torch.equal(linear_logprobs(x, weight, target, **options).logprobs, -losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_argmax_is_the_likeliest_token_and_gives_the_accuracy(dtype):
    (x, weight, bias), target = problem(dtype=dtype, classes=60)
    found = linear_logprobs(x, weight, target, linear_bias=bias, num_classes=60, argmax=True, temperature=0.5)
    logits = F.linear(x.double(), weight.double(), bias.double())[:, :60]
    best = logits.amax(1)
    chosen = logits.gather(1, found.argmax.clamp(min=0)[:, None])[:, 0]
    valid = target != -100
    assert ((best - chosen)[valid] <= 4 * torch.finfo(dtype).eps * best[valid].abs()).all()
    assert (found.argmax[~valid] == NO_TOKEN).all()
    assert found.entropy is None
    assert not found.argmax.requires_grad


@pytest.mark.parametrize("entropy", [False, True])
def test_an_impossible_token_adds_nothing_to_entropy_or_gradients(entropy):
    (x, weight, bias), target = problem(classes=60)
    masked = bias.masked_fill(torch.arange(V) >= 60, -torch.inf)
    found = evaluated(ours, [x, weight, masked], target, torch.float32, entropy=entropy)
    theirs, truth = (
        evaluated(of_torch, [x, weight, bias], target, dtype, entropy=entropy, num_classes=60)
        for dtype in (torch.float32, torch.float64)
    )
    for results in zip(found, theirs, truth, strict=True):
        assert_accurate(*results)


def test_entropy_of_a_sure_row_and_of_an_even_one():
    x, weight = torch.tensor([[1.0], [0.0]]), torch.tensor([[1000.0], [0.0], [0.0]])
    found = linear_logprobs(x, weight, torch.tensor([0, 2]), entropy=True)
    assert found.entropy.tolist() == [0.0, pytest.approx(math.log(3), rel=1e-6)]
    assert found.logprobs.tolist() == [0.0, pytest.approx(-math.log(3), rel=1e-6)]


def test_linear_logprobs_leave_rows_without_a_target_alone():
    """Whatever they hold."""
    (x, weight, bias), target = problem()
    wild = x.masked_fill((target < 0)[:, None], torch.nan)
    for entropy in (False, True):
        found = evaluated(ours, [wild, weight, bias], target, torch.float32, entropy=entropy)
        assert all(map(torch.equal, found, evaluated(ours, [x, weight, bias], target, torch.float32, entropy=entropy)))


@pytest.mark.parametrize("entropy", [False, True])
def test_linear_logprobs_of_float16_keep_gradients_within_their_range(entropy):
    """The logits' gradients are made for upstream gradients of one, whatever a loss scaler makes of them."""
    tensors, target = problem(dtype=torch.float16)
    for factor in (2.0**-24, 2.0**20):
        inputs = [[x.to(dtype).requires_grad_() for x in tensors] for dtype in (torch.float16, torch.float32)]
        found = [
            torch.autograd.grad(sum(x.sum() for x in ours(*xs, target, entropy=entropy)) * factor, xs) for xs in inputs
        ]
        for small, wide in zip(*found, strict=True):
            assert torch.equal(small, wide.to(torch.float16))


def test_leading_dimensions_and_shift_are_those_of_linear_cross_entropy():
    (x, weight, _), target = problem(N=12)
    x, target = x.view(3, 4, C), target.view(3, 4)
    found = linear_logprobs(x, weight, target, shift=True, entropy=True, argmax=True)
    plain = linear_logprobs(x[:, :-1].reshape(9, C), weight, target[:, 1:].reshape(9), entropy=True, argmax=True)
    assert all(torch.equal(one, other.view(3, 3)) for one, other in zip(found, plain, strict=True))


@pytest.mark.parametrize("entropy", [False, True])
def test_linear_logprobs_hold_no_more_logits_than_a_chunk(entropy):
    (x, weight, bias), target = problem(N=64, ignored=())
    inputs = [x.requires_grad_() for x in (x, weight, bias)]
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(x))
            return result

    with Sizes():
        results = ours(*inputs, target, entropy=entropy, memory_budget=8 * ROWS_OF_LOGITS)
        torch.autograd.grad(sum(x.sum() for x in results), inputs)
    assert max(sizes) == max(64 * C, V * C)
    assert max(sizes) < 64 * V


def sized(N=20, columns=V):
    return torch.randn(N, C), torch.randn(columns, C), torch.randint(columns, (N,))


@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        (lambda x, w, y, n: linear_logprobs(x, w, y, entropy=True)[1], lambda n: (*sized(20 + n, 60 + n), n)),
        (lambda x, w, y, n: linear_logprobs(x, w, y, memory_budget=n)[0], lambda n: (*sized(), 1000 + n)),
        (
            lambda x, w, y, n: linear_logprobs(x, w, y, num_classes=n)[0],
            lambda n: (*sized()[:2], torch.arange(20), 30 + n),
        ),
    ],
    ids=["sizes", "memory_budget", "num_classes"],
)
def test_linear_logprobs_compiles_once_for_every_size(call, sizes):
    assert compilations(call, map(sizes, range(10))) == 1


def test_linear_logprobs_give_the_same_gradients_when_the_graph_is_kept():
    (x, weight, bias), target = problem()
    inputs = [x.requires_grad_() for x in (x, weight, bias)]
    results = ours(*inputs, target, entropy=True)
    first, second = (torch.autograd.grad(sum(x.sum() for x in results), inputs, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(("entropy", "argmax"), [*itertools.product([False, True], repeat=2)])
def test_what_is_not_asked_for_is_none(entropy, argmax):
    (x, weight, _), target = problem()
    for dtype in (torch.float32, torch.float64):
        found = linear_logprobs(x.to(dtype), weight.to(dtype), target, entropy=entropy, argmax=argmax)
        assert [x is None for x in found] == [False, not entropy, not argmax]
        assert found.logprobs.dtype == dtype


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_classes": V + 1}, ValueError, f"num_classes is {V + 1}, expected 1 to {V}"),
        ({"num_classes": 60.0}, TypeError, "num_classes is 60.0, expected an integer"),
        ({"memory_budget": 10}, ValueError, f"memory_budget is 10 bytes, one row of logits needs {ROWS_OF_LOGITS}"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0, expected a positive number"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale is -1.0, expected a positive number"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0, expected a positive number"),
        ({"linear_bias": torch.zeros(3)}, ValueError, r"linear_bias has shape \(3,\)"),
        ({"linear_bias": torch.zeros(V, device="meta")}, ValueError, "linear_bias is on meta, expected cpu"),
        ({"linear_weight": torch.zeros(V, C + 1)}, ValueError, f"input has {C} features"),
        ({"linear_weight": torch.zeros(V, 2, C)}, ValueError, r"linear_weight \(67, 2, 24\), expected \(37,\)"),
        ({"linear_weight": torch.zeros(V, C).half()}, TypeError, "one floating dtype"),
        ({"target": torch.zeros(36).long()}, ValueError, r"target has shape \(36,\)"),
        ({"target": torch.zeros(37)}, TypeError, "target is torch.float32, expected int64 class indices"),
        ({"shift": -1}, ValueError, "shift is -1, expected 0 or more"),
        ({"target": torch.full((37,), V)}, IndexError, str(V)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("entropy", [False, True])
def test_linear_logprobs_says_what_is_wrong(change, error, message, entropy):
    (x, weight, _), target = problem()
    arguments = {"linear_weight": weight, "target": target, "entropy": entropy} | change
    with pytest.raises(error, match=message):
        linear_logprobs(x, **arguments)
