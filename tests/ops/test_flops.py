"""torch.utils.flop_counter counts the raw ops as it counts PyTorch's own products and fused attention."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastlm.ops import (
    attention,
    flash_attn_varlen_func,
    linear_cross_entropy,
    linear_logprobs,
    scaled_dot_product_attention,
)

pytestmark = pytest.mark.usefixtures("kernels_of_few_logits")
D = 8


def counted(function, *tensors, backward=True):
    """FLOPs of a call and, if asked, of its backward."""
    inputs = [x.requires_grad_(backward) for x in tensors]
    with FlopCounterMode(display=False) as counter:
        result = function(*inputs)
        if backward:
            result.sum().backward()
    return counter.get_total_flops()


def by_torchs_formula(*batches, backward=True):
    """Of batches (B, H, Tq, Tk), every score counted."""
    total = 0
    for B, H, Tq, Tk in batches:
        q, k = (B, H, Tq, D), (B, H, Tk, D)
        total += sdpa_flop_count(q, k, k) + (sdpa_backward_flop_count(q, q, k, k) if backward else 0)
    return total


OPTIONS = [{}, {"causal": True}, {"causal": True, "window": (2, 0), "softcap": 3.0}, {"sinks": torch.zeros(4)}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_attention_counts_every_score_whichever_code_runs(options, backward):
    q, k, v = (torch.randn(2, T, heads, D) for T, heads in ((5, 4), (7, 2), (7, 2)))
    expected = by_torchs_formula((2, 4, 5, 7), backward=backward)
    assert counted(lambda *x: attention(*x, **options), q, k, v, backward=backward) == expected


def test_attention_counts_the_same_in_triton(kernel_device):
    q, k, v = (torch.randn(1, T, heads, D, device=kernel_device) for T, heads in ((5, 2), (7, 1), (7, 1)))
    assert counted(lambda *x: attention(*x, causal=True), q, k, v) == by_torchs_formula((1, 2, 5, 7))


def test_attention_varlen_counts_the_scores_within_them():
    q, k, v = (torch.randn(total, 4, D) for total in (9, 10, 10))
    bounds_q, bounds_k = torch.tensor([0, 3, 3, 8], dtype=torch.int32), torch.tensor([0, 2, 6, 10], dtype=torch.int32)
    expected = by_torchs_formula((1, 4, 3, 2), (1, 4, 0, 4), (1, 4, 5, 4))
    of_flash_attn = counted(lambda *x: flash_attn_varlen_func(*x, bounds_q, bounds_k, 5, 4, causal=True), q, k, v)
    of_attention = counted(lambda *x: attention(*x, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k), q, k, v)
    assert of_flash_attn == of_attention == expected


def test_attention_of_fake_boundaries_counts_the_most_they_allow():
    with FakeTensorMode():
        q, bounds = torch.empty(9, 4, D), torch.empty(4, dtype=torch.int32)
        assert counted(lambda x: attention(x, x, x, cu_seqlens_q=bounds), q) == by_torchs_formula((1, 4, 9, 9))


@pytest.mark.parametrize("function", [F.scaled_dot_product_attention, scaled_dot_product_attention])
def test_torchs_attention_on_a_cpu_counts_as_on_a_gpu(function):
    q, k, v = torch.randn(2, 4, 128, D), torch.randn(2, 4, 128, D), torch.randn(2, 4, 128, D)
    assert counted(lambda *x: function(*x, is_causal=True), q, k, v) == by_torchs_formula((2, 4, 128, 128))


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)])
def test_linear_cross_entropy_counts_as_linear_and_its_backward(frozen):
    x, weight, target = torch.randn(512, 4), torch.randn(9, 4), torch.randint(9, (512,))

    def of(loss):
        tensors = [x.detach(), weight.detach()]
        for index in {0, 1} - set(frozen):
            tensors[index].requires_grad_()
        with FlopCounterMode(display=False) as counter:
            found = loss(*tensors)
            if found.requires_grad:
                found.backward()
        return counter.get_total_flops()

    plain = of(lambda x, weight: F.cross_entropy(F.linear(x, weight), target))
    assert of(lambda x, weight: linear_cross_entropy(x, weight, target)) == plain
    assert plain == 2 * 512 * 9 * 4 * (3 - len(frozen))


def test_linear_cross_entropy_of_every_row_counts_the_logits_it_makes_again():
    x, weight, target = torch.randn(7, 4), torch.randn(9, 4), torch.randint(9, (7,))
    rows = counted(lambda x, weight: linear_cross_entropy(x, weight, target, reduction="none"), x, weight)
    assert rows == 4 * 2 * 7 * 9 * 4


def test_linear_logprobs_counts_the_logits_it_makes_again():
    x, weight, target = torch.randn(7, 4), torch.randn(9, 4), torch.randint(9, (7,))

    def found(x, weight):
        return linear_logprobs(x, weight, target, entropy=True).logprobs

    assert counted(found, x, weight) == 4 * 2 * 7 * 9 * 4
    assert counted(lambda weight: found(x.detach(), weight), weight) == 3 * 2 * 7 * 9 * 4
