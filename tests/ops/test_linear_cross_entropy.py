"""Chunked linear cross entropy against PyTorch's linear followed by cross_entropy, and what it may cost."""

import pytest
import torch
import torch.nn.functional as F

from fastlm.ops import _chunks
from fastlm.ops._library import facts, is_loaded
from fastlm.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.support.accuracy import assert_accurate
from tests.support.compilations import compilations

pytestmark = pytest.mark.usefixtures("kernels_of_few_logits")
C, V = 24, 67
ROWS_OF_LOGITS = 4 * V  # bytes of one row


def problem(N=37, dtype=torch.float32, ignored=(0, 5)):
    """Tensors and targets with logits of order one: no single sure row then decides the largest error."""
    target = torch.randint(V, (N,))
    for row in ignored:
        target[row : row + 1] = -100
    weight = torch.randn(V, C) / C**0.5
    return [torch.randn(N, C).to(dtype), weight.to(dtype), torch.randn(V).to(dtype)], target


def torch_loss(x, linear_weight, bias, target, *, num_classes=None, **options):
    return F.cross_entropy(F.linear(x, linear_weight, bias)[..., :num_classes], target, **options)


def our_loss(x, linear_weight, bias, target, **options):
    return linear_cross_entropy(x, linear_weight, target, linear_bias=bias, **options)


def evaluated(function, tensors, target, dtype, **options):
    """Loss and gradients for a random upstream gradient."""
    inputs = [None if x is None else x.to(dtype).requires_grad_() for x in tensors]
    loss = function(*inputs, target, **options)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(loss, [x for x in inputs if x is not None], upstream.to(loss.dtype))
    return [loss.detach(), *gradients]


def assert_equals_torch(tensors, target, dtype=torch.float32, ours=None, **options):
    ours = evaluated(our_loss, tensors, target, dtype, **options) if ours is None else ours
    options.pop("memory_budget", None)
    theirs = evaluated(torch_loss, tensors, target, dtype, **options)
    truth = evaluated(torch_loss, tensors, target, torch.float64, **options)
    for name, *results in zip(("loss", "dinput", "dweight", "dbias"), ours, theirs, truth, strict=False):
        assert_accurate(*results, name)


@pytest.fixture(params=["products in float32", "products in bfloat16"])
def products(request, monkeypatch):
    """What bfloat16 is multiplied in on a CPU; without units for bfloat16 its products are slow, not other ones."""
    if not is_loaded("cpu"):
        pytest.skip(facts()["_cpu"])
    monkeypatch.setattr(_chunks, "has_bf16_units", lambda: request.param == "products in bfloat16")


@pytest.mark.parametrize("rows", [1, 4, 37, 100])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_and_gradients_match_torch(reduction, rows):
    assert_equals_torch(*problem(), reduction=reduction, memory_budget=rows * ROWS_OF_LOGITS)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_matches_torch_without_bias(reduction):
    tensors, target = problem()
    assert_equals_torch([*tensors[:2], None], target, reduction=reduction, memory_budget=5 * ROWS_OF_LOGITS)


def test_few_logits_take_targets_of_one_token_in_int32_and_results_in_float64(small_is_usual):
    (x, weight, _), target, class_weight = *problem(), torch.rand(V)
    expected = F.cross_entropy(F.linear(x[1], weight).double(), target[1], class_weight.double())
    of_one = linear_cross_entropy(x[1], weight, target[1].int(), weight=class_weight, dtype=torch.float64)
    torch.testing.assert_close(of_one, expected, rtol=0, atol=0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_classes", [None, 60])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_few_logits_of_float32_are_torchs(reduction, num_classes, with_bias, small_is_usual):
    tensors, target = problem()
    tensors, target = [*tensors[:2], tensors[2] if with_bias else None], target.clamp(max=59)
    options = {"reduction": reduction, "num_classes": num_classes, "weight": torch.rand(V), "label_smoothing": 0.1}
    ours = evaluated(our_loss, tensors, target, torch.float32, **options)
    in_torch = [None if x is None else x[:num_classes] for x in tensors[1:]]
    options |= {"num_classes": None, "weight": options["weight"][:num_classes]}
    theirs = evaluated(torch_loss, [tensors[0], *in_torch], target, torch.float32, **options)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one[: len(other)] if one.dim() else one, other)
        assert not one.dim() or bool((one[len(other) :] == 0).all())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_padded_vocabulary_counts_for_nothing(reduction):
    tensors, target = problem()
    target[target >= 60] = 3
    options = {"reduction": reduction, "num_classes": 60, "memory_budget": 5 * ROWS_OF_LOGITS}
    ours = evaluated(our_loss, tensors, target, torch.float32, **options)
    assert_equals_torch(tensors, target, ours=ours, **options)
    assert bool((ours[2][60:] == 0).all())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("N", [511, 60_001])
def test_bias_gradient_over_many_rows_matches_float64(N, reduction):
    tensors, target = problem(N)
    tensors = [tensor[:9] if len(tensor) == V else tensor for tensor in tensors]
    target %= 9

    def gradient(function, dtype):
        return evaluated(function, tensors, target, dtype, reduction=reduction)[-1]

    assert_accurate(
        gradient(our_loss, torch.float32), gradient(torch_loss, torch.float32), gradient(torch_loss, torch.float64)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("N", [40, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_matches_torch(dtype, N, reduction, products):
    tensors, target = problem(N=N)
    assert_equals_torch(
        [x.to(dtype) for x in tensors], target, dtype, reduction=reduction, memory_budget=N // 5 * ROWS_OF_LOGITS
    )


@pytest.mark.parametrize("which", [0, 1], ids=["input", "weight"])
@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x[:1].expand_as(x),
        lambda x: x[:1, :1].expand_as(x),
    ],
    ids=["transposed", "every other column", "one row", "one number"],
)
def test_bfloat16_of_any_strides_is_multiplied(strided, which, products):
    tensors, target = problem(dtype=torch.bfloat16)
    tensors[which] = strided(tensors[which])
    assert_equals_torch(tensors, target, torch.bfloat16, memory_budget=9 * ROWS_OF_LOGITS)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [(), range(37)], ids=["none ignored", "all ignored"])
def test_linear_cross_entropy_matches_torch_however_many_rows_count(ignored, reduction):
    assert_equals_torch(*problem(ignored=ignored), reduction=reduction)


@pytest.mark.parametrize("reduction", ["sum", "none", "mean"])
def test_linear_cross_entropy_accepts_no_rows(reduction):
    assert_equals_torch(*problem(N=0), reduction=reduction)


def test_leading_dimensions_are_rows():
    tensors, target = problem(N=12)
    flat = our_loss(*tensors, target, reduction="none")
    shaped = our_loss(tensors[0].view(3, 4, C), *tensors[1:], target.view(3, 4), reduction="none")
    assert torch.equal(shaped, flat.view(3, 4))


def test_shift_scores_each_position_against_the_next_target():
    tensors, target = problem(N=12)
    x, target = tensors[0].view(3, 4, C), target.view(3, 4)
    shifted = our_loss(x, *tensors[1:], target, shift=True)
    assert torch.equal(shifted, our_loss(x[:, :-1].reshape(9, C), *tensors[1:], target[:, 1:].reshape(9)))


@pytest.mark.parametrize("shift", [0, 1, 3, 4, 9, torch.tensor(2)], ids=str)
def test_shift_scores_each_position_against_the_target_so_far_on(shift):
    tensors, target = problem(N=12)
    x, target, n = tensors[0].view(3, 4, C), target.view(3, 4), int(shift)
    kept = max(4 - n, 0)
    ours = our_loss(x, *tensors[1:], target, shift=shift, reduction="none")
    assert torch.equal(ours, our_loss(x[:, :kept], *tensors[1:], target[:, 4 - kept :], reduction="none"))


MODES = {
    "class weights": {"weight": torch.rand(V) + 0.1},
    "label smoothing": {"label_smoothing": 0.1},
    "z loss": {"z_loss": 0.01},
    "softcap": {"softcap": 3.0},
    "logit scale": {"logit_scale": 0.3},
    "everything": {
        "weight": torch.rand(V) + 0.1,
        "label_smoothing": 0.2,
        "z_loss": 0.01,
        "logit_scale": 1.7,
        "softcap": 5.0,
        "num_classes": 60,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_matches_torch_in_chunks(mode, reduction, dtype, monkeypatch):
    monkeypatch.setattr(_chunks, "has_bf16_units", lambda: is_loaded("cpu"))
    tensors, target = problem(dtype=dtype)
    target = torch.where(target < 0, target, target % 60)
    options = MODES[mode] | {"reduction": reduction}

    def of_torch(x, linear_weight, bias, target, **options):
        return linear_cross_entropy_reference(x, linear_weight, target, bias, **options)

    ours = evaluated(our_loss, tensors, target, dtype, memory_budget=5 * ROWS_OF_LOGITS, **options)
    theirs = evaluated(of_torch, tensors, target, dtype, **options)
    truth = evaluated(of_torch, tensors, target, torch.float64, **options)
    for name, *results in zip(("loss", "dinput", "dweight", "dbias"), ours, theirs, truth, strict=True):
        assert_accurate(*results, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_gradients_of_low_precision_are_summed_over_chunks_in_float32(dtype, products):
    """One row in a chunk, many chunks: rounding each chunk's share would exceed one rounding of the sum."""
    tensors, target = problem(N=200, dtype=dtype, ignored=())
    ours = evaluated(our_loss, tensors, target, dtype, reduction="sum", memory_budget=ROWS_OF_LOGITS)
    whole = evaluated(our_loss, tensors, target, dtype, reduction="sum")
    for one, other in zip(ours[1:], whole[1:], strict=True):
        assert (one - other).abs().max() <= torch.finfo(dtype).eps * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_linear_cross_entropy_of_16_bits_is_float32_on_request(kind, reduction, dtype):
    tensors, target = problem(dtype=dtype, ignored=())
    target = target if kind == "indices" else torch.rand(37, V).softmax(-1)

    def ours(x, linear_weight, bias, target, **options):
        return our_loss(x, linear_weight, bias, target, **options, dtype=torch.float32)

    def theirs(x, linear_weight, bias, target, **options):
        logits = F.linear(x, linear_weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, target.to(logits.dtype) if target.is_floating_point() else target, **options)

    results = [
        evaluated(function, tensors, target, of, reduction=reduction)
        for function, of in ((ours, dtype), (theirs, dtype), (theirs, torch.float64))
    ]
    for name, *three in zip(("loss", "dinput", "dweight", "dbias"), *results, strict=True):
        assert_accurate(*three, name)


@pytest.mark.parametrize("logit_scale", [1.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_without_a_valid_target_are_multiplied_by_nothing(reduction, logit_scale, monkeypatch):
    (x, weight, bias), target = problem(ignored=(*range(10), 20, 36))
    multiplied = []
    chunks = _chunks.Chunks.__iter__

    def recorded(self):
        for chunk in chunks(self):
            multiplied.append(len(chunk.input))
            yield chunk

    monkeypatch.setattr(_chunks.Chunks, "__iter__", recorded)
    options = {"reduction": reduction, "logit_scale": logit_scale, "memory_budget": 10 * ROWS_OF_LOGITS}
    x = x.masked_fill((target < 0)[:, None], torch.inf)
    ours = evaluated(our_loss, [x, weight, bias], target, torch.float32, **options)
    assert multiplied == [9, 9, 7] * (1 + (reduction == "none"))
    kept = target >= 0
    of_kept = evaluated(our_loss, [x[kept], weight, bias], target[kept], torch.float32, **options)
    if reduction != "none":  # whose upstream gradients belong to other rows
        assert all(map(torch.equal, ours[2:], of_kept[2:]))
        assert torch.equal(ours[1][kept], of_kept[1])
    assert not ours[1][~kept].any()
    assert torch.equal(ours[0] if reduction != "none" else ours[0][kept], of_kept[0])


def test_class_weights_that_want_a_gradient_are_refused_as_by_torch():
    tensors, target = problem()
    weight = torch.rand(V, requires_grad=True)
    for function in (our_loss, torch_loss):
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
            function(*tensors, target, weight=weight)


def test_class_probabilities_match_torch():
    tensors, _ = problem()
    probabilities = torch.rand(37, V).softmax(-1)
    ours = our_loss(*tensors, probabilities)
    truth = torch_loss(*(x.double() for x in tensors), probabilities.double())
    assert_accurate(ours, torch_loss(*tensors, probabilities), truth)


def test_without_gradients_only_losses_are_made(monkeypatch):
    tensors, target = problem()
    with_grad = our_loss(*(x.requires_grad_() for x in tensors), target)
    monkeypatch.setattr(_chunks, "add_product", None)
    with torch.no_grad():
        assert torch.equal(our_loss(*tensors, target), with_grad)
    with torch.inference_mode():
        assert torch.equal(our_loss(*tensors, target), with_grad)


def test_linear_cross_entropy_of_float16_keeps_small_gradients_for_a_loss_scaler():
    x, weight, target = torch.randn(512, 16).half(), (0.05 * torch.randn(4000, 16)).half(), torch.randint(4000, (512,))

    def scaled(function, dtype):
        inputs = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        loss = function(*inputs, None, target)
        return torch.autograd.grad(loss.float() * 4096.0 if dtype == torch.float16 else loss * 4096.0, inputs)

    results = scaled(our_loss, torch.float16), scaled(torch_loss, torch.float16), scaled(torch_loss, torch.float64)
    for ours, theirs, truth in zip(*results, strict=True):
        error, allowed = ((found.double() - truth).norm() for found in (ours, theirs))
        assert error <= 2 * allowed + torch.finfo(torch.float16).eps * truth.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("options", "upstream"),
    [({}, -0.6875), ({"z_loss": 1.0}, 0.6875), ({"weight": torch.full((V,), -100.0)}, 2.0**-10 + 2.0**-12)],
    ids=["upstream", "z_loss", "negative weights"],
)
def test_linear_cross_entropy_rounds_a_16_bit_gradient_once_and_within_its_range(
    options, upstream, dtype, reduction, monkeypatch
):
    """But for products in bfloat16, which round the logits' gradient too."""
    monkeypatch.setattr(_chunks, "has_bf16_units", lambda: False)
    (x, weight, bias), target = problem(N=300, dtype=dtype)
    tensors = [30 * x, weight, bias]

    def gradients(dtype):
        inputs = [x.to(dtype).requires_grad_() for x in tensors]
        loss = our_loss(*inputs, target, reduction=reduction, **options)
        return torch.autograd.grad(loss, inputs, torch.full_like(loss, upstream))

    for ours, wide in zip(gradients(dtype), gradients(torch.float32), strict=True):
        assert torch.equal(ours, wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear_cross_entropy_of_weights_that_are_zero_is_nan_as_in_torch(dtype):
    tensors, target = problem(N=6, dtype=dtype)
    options = {"weight": torch.zeros(V, dtype=dtype)}
    ours, theirs = (evaluated(function, tensors, target, dtype, **options) for function in (our_loss, torch_loss))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


def test_class_weights_may_leave_out_the_padding():
    tensors, target = problem()
    weight, target = torch.rand(V), target.clamp(max=59)
    whole, short = (our_loss(*tensors, target, num_classes=60, weight=w) for w in (weight, weight[:60]))
    assert torch.equal(whole, short)


def test_a_budget_beyond_all_rows_holds_them_all():
    tensors, target = problem()
    assert torch.equal(our_loss(*tensors, target, memory_budget=10**30), our_loss(*tensors, target))


def test_no_more_logits_than_the_budget_are_held(monkeypatch):
    tensors, target = problem(N=64, ignored=())
    held = []
    empty = torch.empty

    def recorded(shape, *args, **kwargs):
        made = empty(shape, *args, **kwargs)
        held.append(made.numel() * made.element_size())
        return made

    monkeypatch.setattr(_chunks.torch, "empty", recorded)
    our_loss(*tensors, target, memory_budget=9 * ROWS_OF_LOGITS)
    assert held == [8 * ROWS_OF_LOGITS]  # 64 rows in 8 equal chunks


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
        ({"num_classes": V + 1}, ValueError, f"num_classes is {V + 1}, expected 1 to {V}"),
        ({"memory_budget": 10}, ValueError, f"memory_budget is 10 bytes, one row of logits needs {ROWS_OF_LOGITS}"),
        ({"memory_budget": 1e9}, TypeError, "memory_budget is 1000000000.0, expected an integer"),
        ({"num_classes": 60.0}, TypeError, r"num_classes is 60.0, expected an integer"),
        ({"options": 5}, TypeError, "options is 5, expected torch.nn.LinearCrossEntropyOptions"),
        ({"linear_bias": torch.zeros(3)}, ValueError, r"linear_bias has shape \(3,\)"),
        ({"linear_bias": torch.zeros(V, dtype=torch.int64)}, TypeError, "linear_bias is torch.int64, expected"),
        ({"linear_bias": torch.zeros(V, device="meta")}, ValueError, "linear_bias is on meta, expected cpu"),
        ({"linear_weight": torch.zeros(V, C + 1)}, ValueError, f"input has {C} features"),
        ({"linear_weight": torch.zeros(V, C).half()}, TypeError, "one floating dtype"),
        ({"shift": True}, ValueError, "shift needs input"),
        ({"shift": -1}, ValueError, "shift is -1, expected 0 or more"),
        ({"shift": 1.0}, TypeError, "shift is 1.0, expected an integer"),
        ({"shift": None}, TypeError, "shift is None, expected an integer"),
        ({"weight": torch.rand(3)}, ValueError, rf"weight has shape \(3,\), expected \({V},\)"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing is -0.1, expected 0 to 1"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale is 0.0, expected a positive number"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0, expected a positive number"),
        ({"target": torch.full((37,), V)}, IndexError, str(V)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_linear_cross_entropy_says_what_is_wrong(change, error, message):
    (x, weight, _), target = problem()
    arguments = {"linear_weight": weight, "target": target} | change
    if "shift" in change:
        x = x[0]
        arguments["target"] = target[0]
    with pytest.raises(error, match=message):
        linear_cross_entropy(x, **arguments)


@pytest.mark.parametrize(
    ("input", "linear_weight", "target", "options", "message"),
    [
        ((3,), (2, 4, 3), torch.rand(2, 4), {}, r"K-dimensional loss, input \(3,\); expected input \(N, 3\)"),
        ((5, 2, 3), (2, 4, 3), torch.zeros(5, 2, 4).long(), {}, r"expected input \(N, 3\)"),
        ((5, 3), (2, 4, 3), torch.zeros(5).long(), {}, r"target has shape \(5,\), expected \(5, 4\)"),
        ((5, 3), (2, 4, 3), torch.rand(5, 4, 2), {}, r"expected class probabilities \(5, 2, 4\)"),
        ((6, 4, 3), (7, 3), torch.zeros(4, 6).long(), {}, r"target has shape \(4, 6\), expected \(6, 4\)"),
        ((5, 3), (2, 4, 3), torch.zeros(5, 4).long(), {"linear_bias": torch.zeros(4, 2)}, r"expected \(2, 4\)"),
        ((5, 3), (7, 3), torch.rand(5, 7), {"ignore_index": 0}, "expected ignore_index=None"),
        ((5, 3), (3,), torch.zeros(5).long(), {}, r"expected input \(\.\.\., C\) and linear_weight \(V, C\)"),
    ],
)
def test_linear_cross_entropy_refuses_shapes_that_torch_refuses(input, linear_weight, target, options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(torch.randn(input), torch.randn(linear_weight), target, **options)


def sized(N=20, columns=V):
    return torch.randn(N, C), torch.randn(columns, C), torch.randint(columns, (N,))


@pytest.mark.parametrize("option", ["linear_bias", "weight"])
def test_linear_cross_entropy_compiles_a_vector_that_comes_after_a_size_became_dynamic(option):
    calls = [
        (*sized(), None),
        (*sized(columns=96), None),
        (*sized(), torch.rand(V)),
        (*sized(columns=80), torch.rand(80)),
    ]
    assert compilations(lambda *call: linear_cross_entropy(*call[:3], **{option: call[3]}), calls, dynamic=None) <= 4


@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        (lambda x, w, y, n: linear_cross_entropy(x, w, y), lambda n: (*sized(20 + n, 60 + n), n)),
        (lambda x, w, y, n: linear_cross_entropy(x, w, y, memory_budget=n), lambda n: (*sized(), 1000 + n)),
        (
            lambda x, w, y, n: linear_cross_entropy(x, w, y, num_classes=n),
            lambda n: (*sized()[:2], torch.arange(20), 30 + n),
        ),
    ],
    ids=["sizes", "memory_budget", "num_classes"],
)
def test_linear_cross_entropy_compiles_once_for_every_size(call, sizes):
    assert compilations(call, map(sizes, range(10))) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leading", [(3,), (2, 3), (0,)])
def test_linear_cross_entropy_of_no_features_is_that_of_the_bias(dtype, leading):
    bias = torch.randn(5, dtype=dtype)
    target = torch.randint(5, leading)
    input, weight = torch.empty(*leading, 0, dtype=dtype), torch.empty(5, 0, dtype=dtype)
    ours = linear_cross_entropy(input, weight, target, linear_bias=bias, reduction="none")
    logits = bias.expand(*leading, 5)
    one, truth = (
        F.cross_entropy(x.flatten(0, -2), target.flatten(), reduction="none") for x in (logits, logits.double())
    )
    assert_accurate(ours, one.view(leading), truth.view(leading))
