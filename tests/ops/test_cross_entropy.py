"""Cross entropy: every kernel of this CPU, the op round it, and the forms that PyTorch's code serves."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd

from fastlm.ops import _library
from fastlm.ops._library import facts
from fastlm.ops.cross_entropy import (
    Options,
    cross_entropy,
    cross_entropy_op,
    losses_and_gradient,
    losses_over_input,
)
from tests.support import instruction_sets
from tests.support.accuracy import assert_accurate
from tests.support.compilations import compilations

instruction_set = instruction_sets.instruction_set
NEEDS_LIBRARY = pytest.mark.skipif(not hasattr(torch.ops.fastlm, "cpu_instruction_set"), reason=facts()["_cpu"])
SHAPES = [(1, 1), (7, 1), (3, 15), (5, 16), (7, 17), (13, 1023), (5, 1024), (3, 1025), (11, 4097), (2, 50257)]
REDUCTIONS = ["none", "mean", "sum"]


pytestmark = pytest.mark.usefixtures("kernels_of_few_logits")


@pytest.fixture
def one_thread():
    """For thousands of small calls: handing each to other threads costs more than the call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(N, V, ignored=True):
    """Logits (N, V), and targets of which every third is ignored."""
    logits, target = torch.randn(N, V), torch.randint(V, (N,))
    if ignored:
        target[1::3] = -100
    return logits, target


def plain(num_classes):
    """The options of a raw op for a loss without any."""
    return Options(-100, num_classes, 0, num_classes, 0.0, 0.0, 0.0)


def loss_and_gradient(function, logits, target, upstream=None, **options):
    """(loss, its gradient) at a copy of logits, or at logits themselves where a copy would lose their strides."""
    leaf = (logits.clone() if logits.is_contiguous() else logits.detach()).requires_grad_()
    loss = function(leaf, target, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]


def of_torch(x, target, weight=None, **options):
    """The loss in PyTorch's operations at the dtype of x."""
    V = options.pop("num_classes", None) or x.shape[1]
    softcap, z_loss, reduction = (
        options.pop(k, d) for k, d in (("softcap", None), ("z_loss", 0), ("reduction", "mean"))
    )
    x = x[:, :V] if softcap is None else softcap * torch.tanh(x[:, :V] / softcap)
    weight = torch.ones(V, dtype=x.dtype, device=x.device) if weight is None else weight[:V].to(x.dtype)
    target = target.long()
    losses = F.cross_entropy(x, target, weight, reduction="none", **options)
    counts = target != options.get("ignore_index", -100)
    if z_loss:
        losses = losses + torch.where(counts, z_loss * x.logsumexp(1).square(), 0)
    if reduction == "mean":
        return losses.sum() / torch.where(counts, weight[target.clamp(0, V - 1)], 0).sum()
    return losses if reduction == "none" else losses.sum()


def results(logits, target, upstream=None, **options):
    """(ours, torch's, truth), each (loss, gradient)."""
    of_ours = loss_and_gradient(cross_entropy, logits, target, upstream, **options)
    options.pop("inplace", None)
    truth = loss_and_gradient(of_torch, logits.double(), target, upstream, **options)
    return of_ours, loss_and_gradient(of_torch, logits, target, upstream, **options), truth


def assert_matches_torch(*draws):
    """Loss and gradient of cross_entropy are as near to float64 as those of PyTorch.

    draws are results of one kind: over several, no error of a few roundings is small or large by luck.
    """
    for part, name in enumerate(("loss", "gradient")):
        assert_accurate(*(torch.cat([draw[who][part].flatten() for draw in draws]) for who in range(3)), name)


# The kernels


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("N", "V"), SHAPES)
def test_kernels_match_torch_at_every_size(instruction_set, N, V, inplace):
    assert_matches_torch(*(results(*rows(N, V), inplace=inplace, reduction="sum") for _ in range(4)))


MODES = {
    "plain": {},
    "weight": {"weight": True},
    "label smoothing": {"label_smoothing": 0.1},
    "nothing but smoothing": {"label_smoothing": 1.0, "weight": True},
    "z loss": {"z_loss": 0.01},
    "softcap": {"softcap": 3.0},
    "padding": {"num_classes": True},
    "everything": {"weight": True, "label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 5.0, "num_classes": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_kernels_match_torch_in_every_mode(instruction_set, one_thread, mode, dtype):
    shapes = [(64, 1), (64, 2), (33, 19), (17, 257), (11, 1031), (2, 9001)]
    for case, ((N, V), reduction) in enumerate(itertools.product(shapes, REDUCTIONS)):
        inplace = case % 2 == 0  # each shape and each reduction both ways
        assert_matches_torch(*(random_results(N, V, mode, dtype, inplace, reduction) for _ in range(12)))


def random_results(N, V, mode, dtype, inplace, reduction):
    logits, target = rows(N, V)
    options = MODES[mode] | {"reduction": reduction, "inplace": inplace}
    if "weight" in options:
        options["weight"] = (torch.rand(V) + 0.1).to(dtype)
    if "num_classes" in options:
        options["num_classes"] = (V + 1) // 2
        target = torch.where(target < 0, target, target % options["num_classes"])
    upstream = torch.rand(N if reduction == "none" else ()) + 1.0  # of one magnitude: a few large ones would decide
    return results((3 * logits).to(dtype), target, upstream, **options)


@pytest.mark.parametrize("mode", MODES)
def test_kernels_give_a_row_the_same_bits_in_any_batch(instruction_set, mode):
    """A batch is shared out by rows, few rows by slices: that must not be seen."""
    logits, target = rows(40, 9001)
    options = MODES[mode] | {"reduction": "none"}
    if "weight" in options:
        options["weight"] = torch.rand(9001)
    if "num_classes" in options:
        options["num_classes"], target = 8500, target % 8500
    whole = loss_and_gradient(cross_entropy, logits, target, **options)
    for start, end in [(0, 1), (4, 7), (12, 40)]:
        part = loss_and_gradient(cross_entropy, logits[start:end], target[start:end], **options)
        for one, other in zip(part, whole, strict=True):
            assert torch.equal(one, other[start:end])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_round_as_torch_does(instruction_set, dtype):
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2049.0, 2051.0, -2049.0, 65520.0, 3e-8, 6e-5])
    special = torch.tensor([0.0, -0.0, 7e4, -1e30, float("nan"), float("inf"), -float("inf")])
    values = torch.cat([torch.randn(3000) * 10.0 ** torch.randint(-8, 6, (3000,)), ties, special])
    rounded = torch.ones(len(values), 37, dtype=dtype)  # whole vectors and a tail, by any instruction set
    torch.ops.fastlm.scale_rows_(rounded, values)
    for column in rounded.T:
        torch.testing.assert_close(column, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("column", [1, 39])  # in a vector, and in the tail of a row
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_exponentials_of_16_bit_logits_are_exact_to_17_bits(instruction_set, dtype, column):
    every = torch.arange(2**15, dtype=torch.int32).add(2**15).to(torch.int16).view(dtype)  # numbers below 0
    x = every[every >= -16]
    logits = torch.full((len(x), 40), -torch.inf, dtype=dtype)
    logits[:, 0], logits[:, column] = 0, x
    target = torch.zeros(len(x), dtype=torch.int64)
    options = Options(-100, 40, 0, 40, 0.0, 0.0, 0.0)
    losses, _ = cross_entropy_op(logits, target, None, None, None, *options, False)
    e = x.double().exp()
    assert bool(((losses.double() - e.log1p()).abs() <= 2.0**-17 * e / (1 + e) + 2.0**-23).all())


def test_denormal_gradients_of_bfloat16_are_the_same_in_every_row(instruction_set):
    """An instruction that rounds vectors flushes them, and where a vector begins depends on the row's address."""
    row = torch.full((1, 1001), -20.0).bfloat16()
    row[0, 0] = 0
    target, options = torch.zeros(8, dtype=torch.int64), Options(-100, 1001, 0, 1001, 0.0, 0.0, 0.0)
    scale = torch.tensor([3e-30])
    _, gradient = cross_entropy_op(row.expand(8, 1001).clone(), target, None, scale, None, *options, True)
    assert bool((gradient == gradient[0]).all())


def test_kernels_find_rows_beyond_two_to_the_31st_element(tmp_path):
    file, stride = tmp_path / "sparse", 2**31 + 64
    storage = torch.from_file(str(file), shared=True, size=stride + 5000, dtype=torch.bfloat16)  # holes take no space
    logits, target = storage.as_strided((2, 5000), (stride, 1)), torch.tensor([7, 4999])
    logits.copy_(torch.randn(2, 5000))
    expected = loss_and_gradient(cross_entropy, logits.clone(), target, reduction="none")
    ours = loss_and_gradient(cross_entropy, logits, target, reduction="none", inplace=True)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("inplace", [False, True])
def test_kernels_take_the_largest_vocabulary(instruction_set, inplace):
    assert_matches_torch(results(*rows(3, 2**18), inplace=inplace))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("mode", ["label smoothing", "z loss", "softcap"])
@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
def test_modes_treat_infinity_and_nan_as_torch(instruction_set, value, mode, inplace):
    logits, target = rows(5, 2051, ignored=False)
    logits[1, :1030], logits[2, 1500:], logits[3] = value, value, value
    options = MODES[mode] | {"reduction": "none"}
    ours = loss_and_gradient(cross_entropy, logits, target, inplace=inplace, **options)
    theirs = loss_and_gradient(of_torch, logits, target, **options)
    truth = loss_and_gradient(of_torch, logits.double(), target, **options)
    for name, *results in zip(("loss", "gradient"), ours, theirs, truth, strict=True):
        assert_accurate(*results, name)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("num_classes", [1, 16, 1000, 1024])
def test_kernels_give_padding_no_gradient(instruction_set, num_classes, inplace):
    logits, target = rows(7, 1024)
    logits[:, num_classes:] = 1e30
    target = target.clamp(max=num_classes - 1)
    assert_matches_torch(results(logits, target, num_classes=num_classes, inplace=inplace, reduction="sum"))
    _, gradient = loss_and_gradient(cross_entropy, logits, target, num_classes=num_classes, inplace=inplace)
    assert gradient[:, num_classes:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_kernels_match_torch_for_large_logits(instruction_set, inplace, dtype):
    logits, target = rows(7, 2051)
    for large in (1e4 * logits, logits + 1e4, 1e2 * logits - 1e4):  # of both signs, above and below zero
        assert_matches_torch(results(large.to(dtype), target, inplace=inplace, reduction="none"))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
@pytest.mark.parametrize("where", [slice(3, 4), slice(0, 1030), slice(1500, 2051), slice(None)])
def test_kernels_treat_infinity_and_nan_as_torch(instruction_set, value, where, inplace):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        logits, target = rows(5, 2051, ignored=False)
        logits[2, where] = value
        logits = logits.to(dtype)
        ours = loss_and_gradient(cross_entropy, logits, target, reduction="none", inplace=inplace)
        theirs = loss_and_gradient(F.cross_entropy, logits, target, reduction="none")
        truth = loss_and_gradient(F.cross_entropy, logits.double(), target, reduction="none")
        for name, *results in zip(("loss", "gradient"), ours, theirs, truth, strict=True):
            assert_accurate(*results, f"{name} in {dtype}")


def test_kernels_lose_infinitely_where_the_target_is_impossible(instruction_set):
    logits, target = rows(5, 33, ignored=False)
    logits[torch.arange(5), target] = float("-inf")
    assert_matches_torch(results(logits, target, reduction="none"))
    assert cross_entropy(logits, target, reduction="none").eq(float("inf")).all()


def test_kernels_give_unlikely_classes_relatively_accurate_gradients(instruction_set):
    logits, target = torch.linspace(-80, 0, 4096)[None], torch.tensor([4095])
    others = slice(0, 4095)
    truth = loss_and_gradient(F.cross_entropy, logits.double(), target)[1][:, others]
    theirs = loss_and_gradient(F.cross_entropy, logits, target)[1][:, others]
    ours = loss_and_gradient(cross_entropy, logits, target)[1][:, others]
    assert_accurate((ours / truth).float(), (theirs / truth).float(), torch.ones_like(truth), "gradient / truth")


def test_kernels_take_exp_within_its_stated_bound(instruction_set):
    others = -22 - 65 * torch.rand(2000, 64)  # all together too small to make the sum anything but 1
    logits, target = torch.cat([torch.zeros(2000, 1), others], 1), torch.zeros(2000, dtype=torch.int64)
    _, gradient = torch.ops.fastlm.cross_entropy(logits, target, None, None, None, *plain(65), True)
    truth = others.double().exp()
    ulp = torch.ldexp(torch.ones_like(truth), truth.float().frexp().exponent - 24)
    worst = ((gradient[:, 1:].double() - truth) / ulp).abs().max()
    assert worst <= 1.02, f"{worst} ulp: more than csrc/cross_entropy_math.h promises"


@NEEDS_LIBRARY
def test_kernels_give_the_same_bits_on_any_number_of_threads():
    logits, target = rows(37, 3001)
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(loss_and_gradient(cross_entropy, logits, target))
    torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@NEEDS_LIBRARY
@pytest.mark.parametrize("scale", [None, torch.tensor(0.25), torch.rand(9)], ids=["none", "one", "each"])
def test_kernels_equal_the_python_code_of_the_raw_ops(scale):
    logits, target = rows(9, 130)
    target.clamp_(max=99)
    call = logits, target, None, scale, None, *plain(100)
    ours = torch.ops.fastlm.cross_entropy(*call, True)
    theirs = losses_and_gradient(*call, True)
    truth_scale = None if scale is None else scale.double()
    log_p = F.log_softmax(logits[:, :100].double(), 1)
    valid = (target >= 0)[:, None]
    onehot = F.one_hot(target.clamp(min=0), 100)
    truth = (log_p.exp() - onehot) * valid * (1.0 if truth_scale is None else truth_scale.reshape(-1, 1))
    assert_accurate(ours[0], theirs[0], -(log_p * onehot * valid).sum(1), "losses")
    assert_accurate(ours[1], theirs[1], F.pad(truth, (0, 30)), "gradient")
    for function in (torch.ops.fastlm.cross_entropy_, losses_over_input):
        overwritten = logits.clone()
        losses = function(overwritten, *call[1:])
        assert torch.equal(losses, ours[0] if function is torch.ops.fastlm.cross_entropy_ else theirs[0])
        assert torch.equal(overwritten, ours[1] if function is torch.ops.fastlm.cross_entropy_ else theirs[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.tensor([1.0, 0.3, 0.0, -2.0, 1.0])], ids=["one", "each"])
def test_scale_rows_multiplies_each_row(dtype, scale):
    values = torch.randn(5, 33).to(dtype)
    expected = (values.float() * scale.reshape(-1, 1)).to(dtype)
    torch.ops.fastlm.scale_rows_(values, scale)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("N", [1, 9])  # in slices, and in rows
def test_the_gradient_made_again_is_that_of_its_scale_and_leaves_rows_whose_upstream_is_one(instruction_set, N):
    logits, target = rows(N, 5000)
    upstream = torch.tensor([0.7, 1.0, 0.0, -2.0, 1.0, 1.0, 3.0, 1.0, 0.5])[:N]
    call = logits.bfloat16(), target, None, torch.tensor(0.1), upstream, *plain(5000)
    gradient = torch.full_like(call[0], 5.0)
    torch.ops.fastlm.cross_entropy_again_(gradient, *call)
    made = torch.ops.fastlm.cross_entropy(call[0], target, None, 0.1 * upstream, None, *plain(5000), True)[1]
    assert torch.equal(gradient, torch.where(upstream[:, None] == 1, 5.0, made))


# The op


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_gradients_follow_the_upstream_gradient(reduction, inplace):
    logits, target = rows(23, 129)
    upstream = torch.randn(23) if reduction == "none" else torch.tensor(-0.7)
    assert_matches_torch(results(logits, target, upstream, reduction=reduction, inplace=inplace))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_accepts_empty_batch(reduction, inplace):
    logits, target = rows(0, 9)
    ours = loss_and_gradient(cross_entropy, logits, target, reduction=reduction, inplace=inplace)
    for one, other in zip(ours, loss_and_gradient(F.cross_entropy, logits, target, reduction=reduction), strict=True):
        assert one.shape == other.shape
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_of_ignored_rows_alone_is_what_torch_gives(reduction, inplace):
    logits, target = torch.randn(6, 9), torch.full((6,), -100)
    ours = loss_and_gradient(cross_entropy, logits, target, reduction=reduction, inplace=inplace)
    for one, other in zip(ours, loss_and_gradient(F.cross_entropy, logits, target, reduction=reduction), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("ignore_index", [-1, 3])
def test_cross_entropy_ignores_the_index_it_is_told(ignore_index):
    logits, target = rows(11, 9, ignored=False)
    target[::2] = ignore_index
    assert_matches_torch(results(logits, target, ignore_index=ignore_index))


def test_cross_entropy_accepts_int32_targets():
    logits, target = rows(11, 33)
    assert torch.equal(cross_entropy(logits, target.int()), cross_entropy(logits, target))


VIEWS = {
    "transposed": lambda x: x.T[:64, :96],
    "every second column": lambda x: x[:, ::2],
    "every second row": lambda x: x[::2],
    "columns of a wider tensor": lambda x: x[:, 3:-2],
    "one row repeated": lambda x: x[:1].expand(96, 128),
    "one column repeated": lambda x: x[:, :1].expand(96, 128),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("inplace", [False, True])
def test_cross_entropy_accepts_any_strides(view, inplace):
    logits = view(torch.randn(96, 128))
    target = torch.randint(logits.shape[1], (len(logits),))
    expected = loss_and_gradient(cross_entropy, logits.contiguous(), target)
    ours = loss_and_gradient(cross_entropy, logits, target, inplace=inplace)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


def test_cross_entropy_in_place_leaves_what_lies_beside_the_logits():
    wide, target = torch.randn(8, 40), torch.randint(33, (8,))
    before, logits = wide.clone(), wide[:, 3:36]
    _, expected = loss_and_gradient(cross_entropy, logits.clone(), target)
    _, gradient = loss_and_gradient(cross_entropy, logits, target, inplace=True)
    assert torch.equal(gradient, expected)
    assert torch.equal(wide[:, :3], before[:, :3])
    assert torch.equal(wide[:, 36:], before[:, 36:])


@NEEDS_LIBRARY
def test_cross_entropy_in_place_turns_logits_into_their_gradient():
    leaf, target = torch.randn(8, 33, requires_grad=True), torch.randint(33, (8,))
    _, expected = loss_and_gradient(cross_entropy, leaf.detach(), target)
    logits = leaf * 1
    version = logits._version
    loss = cross_entropy(logits, target, inplace=True)
    assert torch.equal(logits.detach(), expected)
    assert logits._version > version
    loss.backward()
    assert torch.equal(leaf.grad, expected)


@NEEDS_LIBRARY
def test_cross_entropy_in_place_is_an_error_for_others_who_need_the_logits():
    leaf, target = torch.randn(8, 33, requires_grad=True), torch.randint(33, (8,))
    logits = leaf * 1
    other = logits.square().sum()
    cross_entropy(logits, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_cross_entropy_overwrites_nothing_unasked():
    logits, target = rows(8, 33)
    before = logits.clone()
    loss_and_gradient(cross_entropy, logits, target)
    cross_entropy(logits, target, inplace=True)  # no gradient is asked for: there is nothing to write
    with torch.no_grad():
        cross_entropy(logits.requires_grad_(), target, inplace=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_runs_torchs_code_for_few_logits_on_a_cpu(reduction, small_is_usual):
    logits, target = rows(8, 33)
    ours = loss_and_gradient(cross_entropy, logits, target, reduction=reduction)
    for one, other in zip(ours, loss_and_gradient(F.cross_entropy, logits, target, reduction=reduction), strict=True):
        assert torch.equal(one, other)
    with_padding = loss_and_gradient(cross_entropy, logits, target % 30, reduction=reduction, num_classes=30)
    assert torch.equal(with_padding[0], F.cross_entropy(logits[:, :30], target % 30, reduction=reduction))
    assert torch.equal(with_padding[1][:, 30:], torch.zeros(8, 3))


def test_cross_entropy_of_few_float16_logits_is_summed_in_float32(small_is_usual):
    logits, target = (30 * torch.randn(3, 9001)).half(), torch.randint(9001, (3,))
    truth = F.cross_entropy(logits.double(), target, label_smoothing=1.0)
    in_float32 = F.cross_entropy(logits.float(), target, label_smoothing=1.0).half()
    assert_accurate(cross_entropy(logits, target, label_smoothing=1.0), in_float32, truth)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_can_go_backward_again_on_a_kept_graph(reduction, inplace):
    leaf, target = torch.randn(8, 33, requires_grad=True), torch.randint(33, (8,))
    loss = cross_entropy(leaf * 1, target, reduction=reduction, inplace=inplace)
    upstream = torch.randn(loss.shape)
    first = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0], first)
    assert torch.equal(torch.autograd.grad(loss, leaf, upstream)[0], first)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_cross_entropy_of_float16_keeps_small_gradients_for_a_loss_scaler(kept, inplace):
    logits, target = rows(512, 4000)

    def scaled(function, dtype, **options):
        leaf = logits.half().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            loss = function(leaf * 1, target, **options)
        return torch.autograd.grad(loss * 65536.0, leaf, retain_graph=kept)[0][target >= 0]

    truth = scaled(F.cross_entropy, torch.float64)
    ours, theirs = scaled(cross_entropy, torch.float16, inplace=inplace), scaled(F.cross_entropy, torch.float16)
    assert_accurate((ours / truth).half(), (theirs / truth).half(), torch.ones_like(truth), "gradient / truth")


EXTREMES = {
    "z loss of large logits": {"z_loss": 1.0, "logits": 40.0},
    "negative weights": {"weight": -100.0},
    "large weights": {"weight": 60000.0},
    "negative weights and smoothing": {"weight": -300.0, "label_smoothing": 0.5},
    "everything": {"weight": -500.0, "label_smoothing": 0.3, "z_loss": 0.5, "softcap": 50.0, "logits": 90.0},
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("scaler", [1.0, 2.0**-14, 16.0])
@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES)
def test_cross_entropy_of_float16_is_finite_where_its_gradient_is(extreme, scaler, inplace):
    options = dict(extreme)
    logits, target = rows(64, 300)
    logits[:, 3] = options.pop("logits", 0.0)
    if "weight" in options:
        options["weight"] = torch.full((300,), options["weight"])

    def scaled(function, dtype, **inplace):
        leaf = logits.half().to(dtype).requires_grad_()
        return torch.autograd.grad(function(leaf * 1, target, **options, **inplace).to(torch.float64) * scaler, leaf)[0]

    ours = scaled(cross_entropy, torch.float16, inplace=inplace)
    truth = scaled(of_torch, torch.float64)
    assert_accurate(ours, scaled(of_torch, torch.float32).half(), truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("reduction", "inplace"), [("none", False), ("none", True), ("mean", False), ("sum", False), ("mean", True)]
)
def test_cross_entropy_rounds_a_16_bit_gradient_once(reduction, inplace, kept, dtype):
    logits, target = (0.1 * torch.randn(37, 600)).to(dtype), torch.randint(600, (37,))
    in_place_at_once = inplace and reduction == "mean" and dtype == torch.bfloat16
    upstream = (
        torch.tensor(0.25) if in_place_at_once else torch.randn(37) if reduction == "none" else torch.tensor(-0.7)
    )

    def gradient(function, leaf_dtype, **inplace):
        leaf = logits.to(leaf_dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=leaf_dtype == dtype):
            loss = function(leaf * 1, target, reduction=reduction, **inplace)
        return torch.autograd.grad(loss, leaf, upstream.to(loss.dtype), retain_graph=kept)[0]

    truth = gradient(F.cross_entropy, torch.float64)
    ours = gradient(cross_entropy, dtype, inplace=inplace)
    half_a_unit = torch.finfo(dtype).eps / 2 * truth.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    worst = ((ours.double() - truth).abs() / half_a_unit).max()
    assert worst <= 1.02, f"{worst} half units in the last place: of two roundings it would be up to 2"


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy_rounds_a_16_bit_gradient_once_in_a_compiled_graph(reduction):
    leaf = torch.randn(37, 60).bfloat16().requires_grad_()
    target, upstream = torch.randint(60, (37,)), torch.randn(37) if reduction == "none" else torch.tensor(0.7)

    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            return (cross_entropy(x * 2, target, reduction=reduction) * upstream).sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(*(torch.autograd.grad(function(leaf), leaf)[0] for function in (compiled, step)))


def test_cross_entropy_of_16_bit_logits_changed_after_the_loss_multiplies_what_it_has():
    leaf, target = torch.randn(8, 33).bfloat16().requires_grad_(), torch.randint(33, (8,))
    _, expected = loss_and_gradient(cross_entropy, leaf.detach(), target)
    logits = leaf * 1
    loss = cross_entropy(logits, target)
    logits.zero_()
    (loss * 4).backward()
    assert torch.equal(leaf.grad, expected * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cross_entropy_of_weights_that_are_zero_is_nan_as_in_torch(dtype):
    logits, target = rows(6, 9)
    weight = torch.zeros(9, dtype=dtype)
    for one, other in zip(
        loss_and_gradient(cross_entropy, logits.to(dtype), target, weight=weight),
        loss_and_gradient(F.cross_entropy, logits.to(dtype), target, weight=weight),
        strict=True,
    ):
        assert torch.equal(one.isnan(), other.isnan())


def test_cross_entropy_allows_logits_to_change_after_the_loss():
    leaf, target = torch.randn(8, 33, requires_grad=True), torch.randint(33, (8,))
    _, expected = loss_and_gradient(cross_entropy, leaf.detach(), target)
    logits = leaf * 1
    loss = cross_entropy(logits, target)
    logits.zero_()
    loss.backward()
    assert torch.equal(leaf.grad, expected)


@NEEDS_LIBRARY
def test_cross_entropy_in_place_refuses_second_derivatives():
    leaf, target = torch.randn(8, 33, requires_grad=True), torch.randint(33, (8,))
    loss = cross_entropy(leaf * 1, target, inplace=True)
    with pytest.raises(RuntimeError, match="expected inplace=False"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_compiles_without_graph_breaks(reduction, inplace):
    leaf, target = torch.randn(8, 33, requires_grad=True), torch.randint(33, (8,))

    def step(x):
        return cross_entropy(x * 2, target, reduction=reduction, inplace=inplace).square().sum()

    expected = torch.autograd.grad(step(leaf), leaf)[0]
    torch.compiler.reset()  # or these cases together exceed the compilations allowed for one function
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(leaf), leaf)[0], expected)
    with torch.no_grad():
        assert torch.equal(compiled(leaf), step(leaf))


@NEEDS_LIBRARY
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_compiled_for_a_gpu_makes_the_gradient_once(reduction, dtype, inplace, monkeypatch):
    module = sys.modules["fastlm.ops.cross_entropy"]
    monkeypatch.setattr(module, "LATE_IF_COMPILED", (*module.LATE_IF_COMPILED, "cpu"))
    leaf, target = torch.randn(8, 33).to(dtype).requires_grad_(), torch.randint(33, (8,))
    upstream = torch.randn(8) if reduction == "none" else torch.tensor(0.7)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(x, function=cross_entropy, **inplace):
        return (function(x * 2, target, reduction=reduction, **inplace) * upstream).sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    wide = leaf.detach().double().requires_grad_()
    ours, torchs, truth = (
        torch.autograd.grad(loss, x)[0]
        for loss, x in (
            (compiled(leaf, inplace=inplace), leaf),
            (step(leaf, F.cross_entropy), leaf),
            (step(wide, F.cross_entropy), wide),
        )
    )
    assert_accurate(ours, torchs, truth)

    def whole(graph):
        """Nodes of the graph that write a tensor of the logits' shape."""
        values = [(node, node.meta.get("val")) for node in graph.graph.nodes if node.op == "call_function"]
        named = [node.target.__name__ for node, value in values if getattr(value, "shape", None) == leaf.shape]
        return [name for name in named if name != "detach.default"]

    assert list(map(whole, graphs)) == [["mul.Tensor"], ["getitem", "mul.Tensor"]]  # x * 2, its gradient


def test_cross_entropy_compiles_once_for_every_number_of_rows_and_classes():
    calls = [(torch.randn(20 + n, 50 + n), torch.randint(40, (20 + n,)), 40 + n) for n in range(10)]
    assert compilations(lambda x, y, V: cross_entropy(x, y, num_classes=V, z_loss=0.1), calls) == 1


def test_cross_entropy_compiles_class_weights_that_come_after_a_size_became_dynamic():
    sizes = [(64, None), (96, None), (64, torch.rand(64)), (90, torch.rand(90))]
    calls = [(*rows(12, V, False), weight) for V, weight in sizes]
    assert compilations(cross_entropy, calls, None) <= 4


def test_raw_op_of_a_scale_for_each_row_passes_opcheck():
    call = *rows(9, 33), None, torch.rand(9), None, *plain(33), True
    torch.library.opcheck(torch.ops.fastlm.cross_entropy.default, call)


def test_raw_ops_that_overwrite_pass_opcheck():
    logits, target = rows(9, 33)
    call = logits, target, torch.rand(33), torch.rand(9), None, *plain(33)
    torch.library.opcheck(torch.ops.fastlm.cross_entropy_.default, call)
    torch.library.opcheck(torch.ops.fastlm.scale_rows_.default, (logits, torch.rand(9)))
    torch.library.opcheck(
        torch.ops.fastlm.cross_entropy_again_.default,
        (logits.clone(), logits, target, torch.rand(33), torch.rand(9), torch.rand(9), *plain(33)),
    )


# The forms that PyTorch's code serves


def probabilities(*shape):
    return torch.randn(shape).softmax(1)


FORMS = {
    "probabilities": lambda: (torch.randn(8, 5), probabilities(8, 5), {}),
    "images": lambda: (torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4)), {}),
    "image probabilities": lambda: (torch.randn(2, 5, 3), probabilities(2, 5, 3), {}),
    "weighted images": lambda: (
        torch.randn(2, 5, 3, 4),
        torch.randint(5, (2, 3, 4)),
        {"weight": torch.rand(5), "label_smoothing": 0.1},
    ),
    "one row": lambda: (torch.randn(5), torch.tensor(3), {}),
    "float64": lambda: (torch.randn(8, 5).double(), torch.randint(5, (8,)), {}),
    "uint8 targets": lambda: (torch.randn(8, 5), torch.randint(5, (8,), dtype=torch.uint8), {}),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_cross_entropy_runs_torchs_code_for_other_forms(form, reduction):
    logits, target, options = form()
    ours = loss_and_gradient(cross_entropy, logits, target, reduction=reduction, inplace=True, **options)
    theirs = loss_and_gradient(F.cross_entropy, logits, target, reduction=reduction, **options)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("size_average", "reduce"), [(False, None), (None, False), (True, True)])
def test_cross_entropy_obeys_the_arguments_of_old(size_average, reduce):
    logits, target = torch.randn(8, 5).double(), torch.randint(5, (8,))
    with pytest.warns(UserWarning, match="deprecated"):
        ours = cross_entropy(logits, target, None, size_average, -100, reduce)
    with pytest.warns(UserWarning, match="deprecated"):
        theirs = F.cross_entropy(logits, target, None, size_average, -100, reduce)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", [name for name in FORMS if name not in ("uint8 targets", "one row")])
def test_cross_entropy_with_z_loss_softcap_and_padding_follows_its_formula(form, reduction):
    logits, target, options = FORMS[form]()
    padded = torch.cat([logits, torch.full_like(logits[:, :2], 9.0)], 1)
    if target.is_floating_point():
        target_padded = F.pad(target.movedim(1, -1), (0, 2)).movedim(-1, 1)
    else:
        target_padded = target.clone()
        target_padded[0] = target[0] = -100

    def formula(x, target, weight=None, **options):
        x = 3.0 * torch.tanh(x[:, :5] / 3.0)
        weight = None if weight is None else weight.to(x.dtype)
        target = target.to(x.dtype) if target.is_floating_point() else target
        losses = F.cross_entropy(x, target, weight, **options | {"reduction": "none"})
        valid = torch.ones_like(losses) if target.is_floating_point() else (target != -100).to(x.dtype)
        losses = losses + 0.01 * valid * x.exp().sum(1).log() ** 2
        if reduction == "none":
            return losses
        if weight is not None and not target.is_floating_point():
            valid = valid * weight[target.clamp(min=0)]
        return losses.sum() / valid.sum() if reduction == "mean" else losses.sum()

    extras = {"z_loss": 0.01, "softcap": 3.0, "num_classes": 5}
    ours = loss_and_gradient(cross_entropy, padded, target_padded, reduction=reduction, **options, **extras)
    theirs = loss_and_gradient(formula, padded, target, reduction=reduction, **options)
    truth = loss_and_gradient(formula, padded.double(), target, reduction=reduction, **options)
    for name, *results in zip(("loss", "gradient"), ours, theirs, truth, strict=True):
        assert_accurate(*results, name)


def large(**changes):
    """More logits than SMALL, and targets; with changes made to them."""
    logits, target = torch.randn(64, 2000), torch.randint(1900, (64,))
    return {"input": logits.requires_grad_(), "target": target} | changes


DOCUMENTED = {
    "logits (N, V) float32, class indices": lambda: large(),
    "logits (N, V) float16, class indices": lambda: large(input=torch.randn(64, 2000).half()),
    "logits (N, V) bfloat16, class indices": lambda: large(input=torch.randn(64, 2000).bfloat16()),
    "int32 class indices": lambda: large(target=torch.randint(1900, (64,), dtype=torch.int32)),
    "class weights": lambda: large(weight=torch.rand(2000)),
    "label smoothing": lambda: large(label_smoothing=0.1),
    "z_loss, softcap, num_classes": lambda: large(z_loss=0.1, softcap=9.0, num_classes=1900),
    "no gradient wanted": lambda: large(input=torch.randn(64, 2000)),
    "rows apart in memory, or one row repeated": lambda: large(input=torch.randn(1, 2000).expand(64, 2000)),
    "logits (N, V) float64": lambda: large(input=torch.randn(64, 2000).double()),
    "class probabilities": lambda: large(target=torch.rand(64, 2000)),
    "logits (N, V, d1, ...)": lambda: {"input": torch.randn(64, 2000, 2), "target": torch.randint(9, (64, 2))},
    "logits (V,)": lambda: {"input": torch.randn(200000), "target": torch.tensor(3)},
    "torch.func transforms, forward-mode derivatives": lambda: large(input=None),
}


@NEEDS_LIBRARY
def test_the_documented_table_says_what_a_kernel_serves(small_is_usual):
    def served(given):
        if given["input"] is None:
            return recorded(lambda: torch.func.grad(lambda x: cross_entropy(x, given["target"]))(torch.randn(64, 2000)))
        return recorded(lambda: cross_entropy(**given))

    def recorded(call):
        with torch.profiler.profile() as profile:
            call()
        return any(event.key == "fastlm::cross_entropy" for event in profile.key_averages())

    table = [f"| {form} | {'kernel' if served(given()) else 'PyTorch'} |" for form, given in DOCUMENTED.items()]
    page = (Path(__file__).resolve().parents[2] / "docs" / "losses.md").read_text()
    section = page.split("## What the kernels support")[1].split("##")[0]
    assert [line for line in section.splitlines() if line.startswith("|")][2:] == table


def test_cross_entropy_without_a_library_runs_torchs_code(monkeypatch):
    logits, target = rows(8, 33)
    monkeypatch.setattr(_library, "LIBRARIES", {})
    ours = loss_and_gradient(cross_entropy, logits, target, inplace=True)
    for one, other in zip(ours, loss_and_gradient(F.cross_entropy, logits, target), strict=True):
        assert torch.equal(one, other)


# What is refused


@NEEDS_LIBRARY
@pytest.mark.parametrize("wrong", [-1, 33, 2**40])
def test_cross_entropy_rejects_target_out_of_range_and_writes_nothing(wrong):
    logits, target = torch.randn(8, 33, requires_grad=True), torch.randint(33, (8,))
    target[5] = wrong
    before = logits.detach().clone()
    with pytest.raises(IndexError, match=rf"target {wrong} at row 5 is out of bounds, expected 0 to 32"):
        cross_entropy(logits, target, inplace=True)
    assert torch.equal(logits, before)


def test_cross_entropy_rejects_a_fractional_number_of_classes():
    with pytest.raises(TypeError, match=r"num_classes is 15.0, expected an integer"):
        cross_entropy(torch.randn(8, 33), torch.zeros(8, dtype=torch.int64), num_classes=15.0)


def test_cross_entropy_rejects_target_of_the_padding():
    with pytest.raises(IndexError, match="expected 0 to 29"):
        cross_entropy(torch.randn(8, 33), torch.full((8,), 30), num_classes=30)


@pytest.mark.parametrize(
    ("message", "target_rows", "options"),
    [
        (r"target has shape \(7,\), expected \(8,\)", 7, {}),
        ("reduction is 'average', expected", 8, {"reduction": "average"}),
        ("num_classes is 34, expected 1 to 33", 8, {"num_classes": 34}),
        ("num_classes is 0, expected 1 to 33", 8, {"num_classes": 0}),
        ("softcap is -1.0, expected a positive number", 8, {"softcap": -1.0}),
        ("z_loss is -1.0, expected a number from 0 on", 8, {"z_loss": -1.0}),
        ("label_smoothing is 1.5, expected 0 to 1", 8, {"label_smoothing": 1.5}),
    ],
)
def test_cross_entropy_rejects_wrong_arguments(message, target_rows, options):
    with pytest.raises(ValueError, match=message):
        cross_entropy(torch.randn(8, 33), torch.randint(30, (target_rows,)), **options)


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    ("message", "input", "target", "num_classes", "scale"),
    [
        (r"expected \(N, V\)", torch.randn(8), torch.zeros(8).long(), 8, None),
        (r"target has shape \(7,\), expected \(8,\)", torch.randn(8, 9), torch.zeros(7).long(), 9, None),
        ("target is Float, expected", torch.randn(8, 9), torch.zeros(8), 9, None),
        ("num_classes is 10, expected 0 to 9", torch.randn(8, 9), torch.zeros(8).long(), 10, None),
        ("input is Double, expected", torch.randn(8, 9).double(), torch.zeros(8).long(), 9, None),
        ("scale has shape", torch.randn(8, 9), torch.zeros(8).long(), 9, torch.rand(9)),
        ("scale is Double", torch.randn(8, 9), torch.zeros(8).long(), 9, torch.rand(8).double()),
        ("input is ComplexFloat, expected", torch.randn(8, 9) + 0j, torch.zeros(8).long(), 9, None),
        ("cannot be overwritten", torch.randn(9, 8).T, torch.zeros(8).long(), 9, None),
        ("cannot be overwritten", torch.randn(1, 9).expand(8, 9), torch.zeros(8).long(), 9, None),
    ],
)
def test_raw_op_rejects_what_the_kernel_cannot_read(message, input, target, num_classes, scale):
    with pytest.raises(ValueError, match=message):
        torch.ops.fastlm.cross_entropy_(input, target, None, scale, None, *plain(num_classes))


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("N", "V"), [*SHAPES, (37, 32000), (5, 50304), (3, 128257), (2, 262144)])
def test_gpu_kernel_matches_torch(N, V, dtype, inplace):
    logits, target = rows(N, V)
    assert_matches_torch(
        logits.to("cuda", dtype), target.cuda(), torch.randn(N).cuda(), reduction="none", inplace=inplace
    )
    assert_matches_torch(results(logits.to("cuda", dtype), target.cuda(), reduction="mean", inplace=inplace))
