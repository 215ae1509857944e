"""MultiheadAttention is torch.nn's module in everything but the code that runs."""

import copy
import importlib

import pytest
import torch

from fastlm.nn.attention import MultiheadAttention
from tests.support.accuracy import assert_accurate

module = importlib.import_module("fastlm.nn.attention")

C, H, B, Tq, Tk = 12, 3, 2, 5, 7
CONSTRUCTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "bias of keys and values": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "other features": {"kdim": 5, "vdim": 4, "batch_first": True},
    "other features of values alone": {"vdim": 4},
}
CAUSAL = torch.ones(Tq, Tk, dtype=torch.bool).triu(1)  # True hides, in torch.nn
PADDING = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
CALLS = {
    "weights": {},
    "weights of each head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "causal": {"need_weights": False, "attn_mask": CAUSAL, "is_causal": True},
    "causal, added": {"need_weights": False, "attn_mask": torch.where(CAUSAL, -torch.inf, 0.0), "is_causal": True},
    "causal and weights": {"attn_mask": CAUSAL, "is_causal": True},
    "mask": {"need_weights": False, "attn_mask": CAUSAL},
    "mask of each head": {"need_weights": False, "attn_mask": CAUSAL.expand(B * H, Tq, Tk)},
    "padding": {"need_weights": False, "key_padding_mask": PADDING},
    "padding and causal": {
        "need_weights": False,
        "key_padding_mask": PADDING,
        "attn_mask": CAUSAL,
        "is_causal": True,
    },
}
FAST_CONSTRUCTIONS = {"plain", "batch first", "no bias", "other features", "other features of values alone"}
FAST_CALLS = {"no weights", "causal", "causal, added", "mask", "padding"}  # not causal and padding of other lengths


def pair(device="cpu", **arguments):
    """(ours, torch.nn's) with the same random weights."""
    theirs = torch.nn.MultiheadAttention(C, H, **arguments)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=C**-0.5)
    ours = MultiheadAttention(C, H, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(device), theirs.to(device)


def inputs_of(attention, device="cpu", self_attention=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if self_attention:
        x = torch.randn(B, Tk, C, generator=generator)
        return [(x if attention.batch_first else x.transpose(0, 1)).to(device)] * 3
    shapes = (B, Tq, C), (B, Tk, attention.kdim), (B, Tk, attention.vdim)
    tensors = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return [x if attention.batch_first else x.transpose(0, 1) for x in tensors]


def evaluated(attention, tensors, options):
    """The result, the weights if any, and the gradients of inputs and parameters."""
    dtype, device = attention.out_proj.weight.dtype, tensors[0].device
    leaves = {id(x): x.detach().to(dtype).requires_grad_() for x in tensors}  # one tensor given thrice stays one
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    masks = {k: v.to(dtype) for k, v in options.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    out, weights = attention(*(leaves[id(x)] for x in tensors), **(options | masks))
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    wanted = [*leaves.values(), *attention.parameters()]
    results = [out, *([] if weights is None else [weights]), *torch.autograd.grad(out, wanted, dout)]
    return [x.detach() for x in results]


def assert_equal_to_torchs(ours, theirs, options, device, self_attention=False):
    roads = ours, theirs, copy.deepcopy(theirs).double()
    draws = []
    for seed in range(4):  # of a few numbers PyTorch's largest error may be small by luck
        tensors = inputs_of(ours, device, self_attention, seed)
        draws.append([evaluated(road, tensors, options) for road in roads])
    for index in range(len(draws[0][0])):
        assert {len(road) for road in draws[0]} == {len(draws[0][0])}
        assert_accurate(*(torch.stack([draw[road][index] for draw in draws]) for road in range(3)), f"result {index}")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_multihead_attention_and_gradients_match_torchs(construction, call, kernel_device):
    ours, theirs = pair(kernel_device, **CONSTRUCTIONS[construction])
    assert_equal_to_torchs(ours, theirs, CALLS[call], kernel_device)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_multihead_self_attention_matches_torchs(bias, batch_first, kernel_device):
    ours, theirs = pair(kernel_device, bias=bias, batch_first=batch_first)
    causal = torch.ones(Tk, Tk, dtype=torch.bool).triu(1)
    for options in ({"need_weights": False}, {"need_weights": False, "attn_mask": causal, "is_causal": True}):
        assert_equal_to_torchs(ours, theirs, options, kernel_device, self_attention=True)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_multihead_attention_asks_the_kernels_for_what_they_serve(construction, call, kernel_device, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "scaled_dot_product_attention", lambda q, *_, **options: calls.append(options) or q)
    monkeypatch.setattr(module, "attention", lambda q, *_, **options: calls.append(options) or q)
    ours, _ = pair(kernel_device, **CONSTRUCTIONS[construction])
    evaluated_call = {k: v.to(kernel_device) if isinstance(v, torch.Tensor) else v for k, v in CALLS[call].items()}
    ours(*inputs_of(ours, kernel_device), **evaluated_call)
    assert len(calls) == (construction in FAST_CONSTRUCTIONS and call in FAST_CALLS)


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_multihead_attention_on_a_plain_cpu_matches_torchs(construction):
    ours, theirs = pair(**CONSTRUCTIONS[construction])
    for options in CALLS.values():
        assert_equal_to_torchs(ours, theirs, options, "cpu")


def test_multihead_attention_without_a_batch_matches_torchs(kernel_device):
    ours, theirs = pair(kernel_device)
    q, k, v = (x[:, 0] for x in inputs_of(ours, kernel_device))
    assert torch.equal(ours(q, k, v, need_weights=False)[0], theirs(q, k, v, need_weights=False)[0])


def test_multihead_attention_drops_in_training_only(kernel_device):
    ours, theirs = pair(kernel_device, dropout=0.5)
    x = inputs_of(ours, kernel_device, self_attention=True)
    first, second = (ours(*x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    ours.eval(), theirs.eval()
    assert_equal_to_torchs(ours, theirs, {"need_weights": False}, kernel_device, self_attention=True)


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_multihead_attention_state_loads_either_way(construction):
    ours, theirs = (
        cls(C, H, **CONSTRUCTIONS[construction]) for cls in (MultiheadAttention, torch.nn.MultiheadAttention)
    )
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(*both) for both in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert repr(ours) == repr(theirs)


def test_multihead_attention_starts_as_torchs_does():
    made = []
    for cls in (MultiheadAttention, torch.nn.MultiheadAttention):
        torch.manual_seed(0)
        made.append(cls(C, H, add_bias_kv=True))
    assert all(torch.equal(*both) for both in zip(made[0].parameters(), made[1].parameters(), strict=True))


@pytest.mark.parametrize("change", ["features", "keys without values", "causal without a mask", "mask of integers"])
def test_multihead_attention_refuses_what_torchs_refuses_in_its_words(change, kernel_device):
    ours, theirs = pair(kernel_device)
    q, k, v = inputs_of(ours, kernel_device)
    integers = CAUSAL.long().to(kernel_device)
    tensors, options = {
        "features": ((q[..., :4], k, v), {}),
        "keys without values": ((q, k, v[:3]), {}),
        "causal without a mask": ((q, k, v), {"is_causal": True}),
        "mask of integers": ((q, k, v), {"attn_mask": integers, "is_causal": True}),
    }[change]
    errors = []
    for attention in (ours, theirs):
        with pytest.raises((RuntimeError, AssertionError)) as caught:
            attention(*tensors, need_weights=False, **options)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_multihead_attention_serves_a_transformer_layer(kernel_device):
    theirs = torch.nn.TransformerDecoderLayer(C, H, 16, dropout=0.0, batch_first=True).to(kernel_device)
    ours = copy.deepcopy(theirs)
    for name in ("self_attn", "multihead_attn"):
        getattr(ours, name).__class__ = MultiheadAttention
    x, memory = (torch.randn(B, Tk, C, device=kernel_device) for _ in range(2))
    causal = torch.nn.Transformer.generate_square_subsequent_mask(Tk, device=kernel_device)
    results = [
        layer(x.to(dtype), memory.to(dtype), tgt_mask=causal.to(dtype), tgt_is_causal=True)
        for layer, dtype in (
            (ours, torch.float32),
            (theirs, torch.float32),
            (copy.deepcopy(theirs).double(), torch.float64),
        )
    ]
    assert_accurate(*results)


@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_refuses_batches_that_differ_as_torchs_does(batch_first, kernel_device):
    ours, theirs = pair(kernel_device, batch_first=batch_first)
    q, k = torch.randn(2, 5, C, device=kernel_device), torch.randn(1, 7, C, device=kernel_device)
    q, k = (q, k) if batch_first else (q.transpose(0, 1), k.transpose(0, 1))
    for attention in (ours, theirs):
        with pytest.raises(RuntimeError):
            attention(q, k, k, need_weights=False)
