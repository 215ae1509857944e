"""The seeds of dropout: where they come from, and what is refused."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlm.ops import add_layer_norm, add_rms_norm, attention
from fastlm.ops._dropout import check_dropout, seed_tensor, uniform
from fastlm.ops.norm import dropout_factors


class CopiesFromHost(TorchDispatchMode):
    """Notes the ops that bring a CPU tensor's numbers to a GPU: the host waits for these, CUDA graphs refuse them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sources, targets = (
            {x.device.type for x in tree_leaves(tree) if isinstance(x, torch.Tensor)} for tree in (args, result)
        )
        if "cpu" in sources and "cuda" in targets:
            self.found.append(str(function))
        return result


DROPOUTS = {
    "attention": lambda x, **dropout: attention(
        *[x.flatten(0, 1)] * 3, causal=True, cu_seqlens_q=torch.arange(3, device=x.device), **dropout
    ),
    "add_layer_norm": lambda x, **dropout: add_layer_norm(x, x, (8,), **dropout),
    "add_rms_norm": lambda x, **dropout: add_rms_norm(x, x, (8,), **dropout),
}


@pytest.mark.parametrize("seed", [7, None])
@pytest.mark.parametrize("op", DROPOUTS)
def test_seed_reaches_a_gpu_without_a_copy_from_the_host(op, seed):
    with FakeTensorMode(), CopiesFromHost() as copies:
        DROPOUTS[op](torch.empty(2, 4, 2, 8, device="cuda"), dropout_p=0.1, seed=seed)
    assert not copies.found


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("column", [16, 17, 18, 19])
def test_kernels_keep_what_is_drawn_at_p_and_drop_what_is_below(column, above, kernel_device):
    x, seed = torch.ones(1, 128, device=kernel_device), torch.tensor(5, device=kernel_device)
    groups, zero = torch.arange(32, device=kernel_device)[None], torch.zeros((), dtype=torch.int64, device=x.device)
    p = uniform(seed, groups, zero, zero, zero).flatten()[column]
    p = torch.nextafter(p, p + 1) if above else p
    _, kept = add_layer_norm(x, torch.zeros_like(x), (128,), dropout_p=p.item(), seed=seed)
    assert bool(kept[0, column] == 0) is above
    assert torch.equal(kept, dropout_factors(x, 128, p.item(), seed))


def test_seed_tensor_fills_in_an_int_draws_none_and_keeps_a_tensor():
    device = torch.device("cpu")
    for seed in (0, -(2**63), 2**63 - 1):
        assert torch.equal(seed_tensor(seed, device), torch.tensor(seed))
    given = torch.tensor(3)
    assert seed_tensor(given, device) is given
    drawn = [seed_tensor(None, device) for _ in range(8)]
    assert len({int(x) for x in drawn}) == 8
    assert {x.dtype for x in drawn} == {torch.int64}


@pytest.mark.parametrize(
    ("dropout_p", "seed", "error", "message"),
    [
        (-0.1, None, ValueError, "op: dropout_p is -0.1, expected a probability between 0 and 1"),
        (float("nan"), None, ValueError, "op: dropout_p is nan, expected a probability"),
        (0.1, 2**63, ValueError, "op: seed is 9223372036854775808, expected a signed number of 64 bits"),
        (0.1, torch.ones(()), TypeError, "op: seed is a tensor of torch.float32, expected torch.int64"),
        (0.1, torch.arange(2), ValueError, r"op: seed has shape \(2,\), expected one element"),
        (0.1, torch.zeros((), dtype=torch.int64, device="meta"), ValueError, "op: seed is on meta, expected cpu"),
        (0.1, "7", TypeError, "op: seed is a str, expected an int, a tensor or None"),
    ],
)
def test_check_dropout_says_what_is_wrong(dropout_p, seed, error, message):
    with pytest.raises(error, match=message):
        check_dropout("op", "x", torch.zeros(1), dropout_p, seed)
