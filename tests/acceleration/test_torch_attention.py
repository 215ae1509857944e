"""PyTorch's flash attention ops with our kernels in their place, called as PyTorch calls them."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from fastlm.acceleration import torch_attention
from tests.support.accuracy import assert_accurate

aten = torch.ops.aten

B, H, D = 2, 4, 40
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
WINDOWS = [None, (5, 0), (3, 4), (-1, 2)]


@pytest.fixture
def flash_ops(kernel_device):
    """The device whose flash attention ops run our kernels: PyTorch has none of its own for a CPU."""
    overrides = torch_attention.override(kernel_device.type.upper())
    yield kernel_device
    overrides.remove()


def heads(device, dtype, Tq, Tk, Hk=H, layout="tokens first"):
    """q, k, v (B, H, T, D), with tokens or heads first in memory, that need gradients."""
    tensors = []
    for T, n in ((Tq, H), (Tk, Hk), (Tk, Hk)):
        shape = (B, T, n, D) if layout == "tokens first" else (B, n, T, D)
        x = torch.randn(shape, dtype=dtype, device=device)
        tensors.append((x.transpose(1, 2) if layout == "tokens first" else x).requires_grad_())
    return tensors


def visible(Tq, Tk, causal, window):
    """Which keys each query sees, positions aligned at the end."""
    distance = torch.arange(Tq)[:, None] + (Tk - Tq) - torch.arange(Tk)
    left, right = window or (-1, -1)
    if causal:
        right = 0
    seen = torch.ones(Tq, Tk, dtype=torch.bool)
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= distance >= -right
    return seen


def in_pytorch(q, k, v, causal=False, window=None, scale=None):
    """By the formula, each head's scores at once."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = visible(q.shape[2], k.shape[2], causal, window).to(q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def with_gradients(function, tensors, upstream, dtype=None):
    tensors = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


def check(function, reference, tensors):
    upstream = torch.randn_like(reference(*tensors))
    found, theirs = (with_gradients(run, tensors, upstream) for run in (function, reference))
    truth = with_gradients(reference, tensors, upstream, torch.float64)
    for name, *results in zip(("out", "dq", "dk", "dv"), found, theirs, truth, strict=True):
        assert_accurate(*results, name)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("Tq", "Tk", "Hk", "causal", "scale"),
    [(37, 37, H, True, None), (37, 37, 2, False, 0.3), (5, 19, 1, True, None), (1, 23, H, False, None)],
)
def test_scaled_dot_product_op_matches_reference_with_gradients(flash_ops, dtype, Tq, Tk, Hk, causal, scale):
    def flash(q, k, v):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[0]

    def reference(q, k, v):
        return in_pytorch(q, k, v, causal, scale=scale)

    check(flash, reference, heads(flash_ops, dtype, Tq, Tk, Hk))


@pytest.mark.parametrize("window", WINDOWS)
def test_flash_op_matches_reference_with_windows(flash_ops, window):
    left, right = window or (None, None)

    def flash(q, k, v):
        arguments = (None, None, 21, 21, 0.0, False, False)
        options = {"scale": 0.3, "window_size_left": left, "window_size_right": right}
        out, *_ = aten._flash_attention_forward(*torch_attention.exchanged(q, k, v), *arguments, **options)
        return out.transpose(1, 2)

    def reference(q, k, v):
        return in_pytorch(q, k, v, window=window, scale=0.3)

    check(flash, reference, heads(flash_ops, torch.float32, 21, 21))


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (4, 0)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_varlen_attn_matches_separate_sequences(flash_ops, dtype, window):
    from torch.nn.attention import varlen

    lengths, bounds = (7, 1, 19), torch.tensor([0, 7, 8, 27], dtype=torch.int32, device=flash_ops)

    def packed(q, k, v):
        return varlen.varlen_attn(q, k, v, bounds, bounds, 19, 19, window_size=window)

    def separate(q, k, v):
        rows = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([in_pytorch(*row, window=window)[0].transpose(0, 1) for row in rows])

    tensors = [torch.randn(27, H, D, dtype=dtype, device=flash_ops) for _ in range(3)]
    check(packed, separate, tensors)
    if hasattr(varlen, "AuxRequest"):
        wanted = varlen.AuxRequest(lse=True)
        _, lse = varlen.varlen_attn(*tensors, bounds, bounds, 19, 19, window_size=window, return_aux=wanted)
        assert lse.shape == (H, 27)


def test_logsumexp_is_that_of_the_scores(flash_ops):
    q, k, v = heads(flash_ops, torch.float32, 11, 17)
    _, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=0.2)
    scores = 0.2 * q @ k.mT
    assert_accurate(lse, scores.logsumexp(-1), (0.2 * q.double() @ k.double().mT).logsumexp(-1))


def test_the_op_with_an_output_writes_it(flash_ops):
    if not hasattr(aten, "_flash_attention_forward_no_dropout_inplace"):
        pytest.skip("this PyTorch has no such op")
    q, k, v = torch_attention.exchanged(*(x.detach() for x in heads(flash_ops, torch.float32, 9, 9)))
    arguments = (q, k, v, None, None, 9, 9, 0.0, True, False)
    out = torch.empty_like(q)
    lse = aten._flash_attention_forward_no_dropout_inplace(out, *arguments)
    expected = aten._flash_attention_forward(*arguments)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
def test_results_have_the_shapes_strides_and_dtypes_that_compiled_programs_expect(flash_ops, layout):
    tensors = [x.detach() for x in heads(flash_ops, torch.bfloat16, 9, 13, 2, layout)]
    found = aten._scaled_dot_product_flash_attention(*tensors)
    on_meta = [torch.empty_like(x, device="meta") for x in tensors]
    expected = aten._scaled_dot_product_flash_attention(*on_meta)
    forms = [
        [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in results]
        for results in (found, expected)
    ]
    assert forms[0] == forms[1]
    arguments = (None, None, 9, 13, 0.0, False)
    gradients = [
        aten._scaled_dot_product_flash_attention_backward(
            torch.zeros_like(inputs[0]), *inputs, results[0], results[1], *arguments, results[6], results[7]
        )
        for inputs, results in ((tensors, found), (on_meta, expected))
    ]
    assert [x.stride() for x in gradients[0]] == [x.stride() for x in gradients[1]]


@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
def test_a_compiled_program_calls_our_kernels(flash_ops, layout):
    def doubled(q, k, v):
        return 2 * aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]

    tensors = heads(flash_ops, torch.float32, 9, 9, layout=layout)
    upstream = torch.randn(B, H, 9, D, device=flash_ops)
    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    found, expected = (with_gradients(function, tensors, upstream) for function in (compiled, doubled))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout_p", 0.1),
        ("return_debug_mask", True),
        ("alibi_slopes", torch.ones(H)),
        ("seqused_k", torch.ones(B, dtype=torch.int32)),
        ("block_table", torch.zeros(B, 1, dtype=torch.int32)),
    ],
)
def test_what_changes_the_result_and_is_not_supported_is_refused_by_name(flash_ops, name, value):
    q, k, v = torch_attention.exchanged(*heads(flash_ops, torch.float32, 9, 9))
    value = value.to(flash_ops) if isinstance(value, torch.Tensor) else value
    arguments = {"dropout_p": 0.0, "is_causal": False, "return_debug_mask": False, name: value}
    with pytest.raises(ValueError, match=rf"_flash_attention_forward: {name} is .*restore_flash_attention_impl"):
        torch_attention.flash_attention_forward(q, k, v, None, None, 9, 9, **arguments)


def test_wrong_calls_are_refused(flash_ops):
    q, k, v = heads(flash_ops, torch.float32, 9, 9)
    bounds = torch.tensor([0, 9], dtype=torch.int32, device=flash_ops)
    with pytest.raises(ValueError, match="cum_seq_q and cum_seq_k"):
        aten._flash_attention_forward(q[0], k[0], v[0], bounds, None, 9, 9, 0.0, False, False)
    with pytest.raises(ValueError, match="D is 512, the kernels take 1 to 256"):
        aten._scaled_dot_product_flash_attention(*(torch.zeros(1, 1, 2, 512, device=flash_ops) for _ in range(3)))
    with pytest.raises(ValueError, match="disagree"):
        aten._scaled_dot_product_flash_attention(q, k[..., :8], v)


def test_a_tensor_that_no_kernel_takes_is_refused():
    overrides = torch_attention.override("CPU")  # without the interpreter
    try:
        with pytest.raises(ValueError, match="TRITON_INTERPRET"):
            aten._scaled_dot_product_flash_attention(*heads("cpu", torch.float32, 3, 3))
    finally:
        overrides.remove()


def test_removed_kernels_leave_the_ops_as_they_were():
    tensors = heads("cpu", torch.float32, 3, 3)
    overrides = torch_attention.override("CPU")
    overrides.remove()
    with pytest.raises(NotImplementedError):
        aten._scaled_dot_product_flash_attention(*tensors)
    del overrides  # not before: its end would remove them too


def is_ours(name):
    return f"aten/{name}/CUDA" in torch.library._impls


@pytest.mark.filterwarnings("ignore:Overriding a previously registered kernel")
def test_the_switch_of_pytorch_activates_and_restores():
    attention = torch.nn.attention
    if not hasattr(attention, "restore_flash_attention_impl"):
        pytest.skip("this PyTorch cannot restore its flash attention kernels, or has no registry of others")
    torch_attention.register()
    torch_attention.register()
    assert "fastlm" in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() is None, "registering activates nothing"
    assert not any(map(is_ours, torch_attention.KERNELS))
    known = [name for name in torch_attention.KERNELS if hasattr(aten, name)]  # to this PyTorch
    assert "_scaled_dot_product_flash_attention_backward" in known
    for _ in range(2):
        attention.activate_flash_attention_impl("fastlm")
        assert attention.current_flash_attention_impl() == "fastlm"
        assert all(map(is_ours, known))
        attention.restore_flash_attention_impl()
        assert attention.current_flash_attention_impl() is None
        assert not any(map(is_ours, torch_attention.KERNELS))


def test_a_pytorch_without_the_registry_is_named(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(ImportError, match=r"torch_attention.register: PyTorch \S+ has no .*fastlm.accelerate"):
        torch_attention.register()


@pytest.mark.parametrize(
    "name", ["_flash_attention_forward", "_flash_attention_backward", "_scaled_dot_product_flash_attention"]
)
def test_kernels_have_the_arguments_of_the_schema(name):
    schema = [(a.name, a.kwarg_only) for a in getattr(aten, name).default._schema.arguments]
    parameters = inspect.signature(torch_attention.KERNELS[name]).parameters.values()
    ours = [(p.name, p.kind is p.KEYWORD_ONLY) for p in parameters]
    assert [argument for argument in ours if argument in schema] == schema, "an older PyTorch has fewer"
    assert all(is_keyword for _, is_keyword in ours[len(schema) :])
