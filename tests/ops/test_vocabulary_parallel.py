"""Cross entropy with the vocabulary shared out over two processes equals that of one."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fastlm.ops.cross_entropy import cross_entropy, cross_entropy_reference
from fastlm.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.support.accuracy import assert_accurate
from tests.support.processes import run_ranks

N, C, V = 23, 12, 70  # V classes, of which each rank holds half
MODES = {
    "plain": {},
    "class weights": {"weight": True},
    "everything": {"weight": True, "label_smoothing": 0.2, "z_loss": 0.01, "softcap": 5.0},
    "padding on one rank": {"num_classes": 60},
    "one rank is padding": {"num_classes": 30, "label_smoothing": 0.1},
}
DTYPES = [torch.float32, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]


def given(mode, dtype, seed):
    """(tensors of the whole vocabulary, target, class weights, options), the same on every rank."""
    torch.manual_seed(seed)
    options = dict(MODES[mode])
    tensors = [torch.randn(N, C), torch.randn(V, C) / C**0.5, torch.randn(V), 3 * torch.randn(N, V)]
    target = torch.randint(options.get("num_classes", V), (N,))
    target[::4] = -100
    weight = torch.rand(V) + 0.1 if options.pop("weight", False) else None
    return [x.to(dtype) for x in tensors], target, weight, options


def evaluated(function, inputs, reduction, seed):
    """Loss and gradients of the inputs for an upstream gradient that is the same on every rank."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*leaves)
    upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(seed)) + 1.0
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]


def own_classes():
    """The classes of this rank."""
    return slice(dist.get_rank() * V // 2, (dist.get_rank() + 1) * V // 2)


def one_draw(mode, dtype, reduction, seed):
    """{function: (ours, PyTorch's, truth)}, each a list of the loss and this rank's share of every gradient."""
    (x, head, bias, logits), target, weight, options = given(mode, dtype, seed)
    own, options = own_classes(), options | {"reduction": reduction}
    shard = options | {"weight": None if weight is None else weight[own], "process_group": dist.group.WORLD}

    def whole(x, head, bias, logits):
        """By PyTorch, from the whole vocabulary."""
        loss, dlogits = evaluated(
            lambda z: cross_entropy_reference(z, target, weight, **options), [logits], reduction, seed
        )
        linear, dx, dhead, dbias = evaluated(
            lambda x, head, bias: linear_cross_entropy_reference(x, head, target, bias, weight=weight, **options),
            [x, head, bias], reduction, seed,
        )  # fmt: skip
        return {"cross_entropy": [loss, dlogits[:, own]], "linear": [linear, dx, dhead[own], dbias[own]]}

    def ours(inplace):
        loss = evaluated(
            lambda z: cross_entropy(z * 1, target, inplace=inplace, **shard), [logits[:, own]], reduction, seed
        )
        linear = evaluated(
            lambda x, head, bias: linear_cross_entropy(
                x, head, target, linear_bias=bias, memory_budget=4 * V // 2 * 5, **shard
            ),
            [x, head[own], bias[own]], reduction, seed,
        )  # fmt: skip
        return {"cross_entropy": loss, "linear": linear}

    found = (
        ours(inplace=seed % 2 == 0),
        whole(x, head, bias, logits),
        whole(*(t.double() for t in (x, head, bias, logits))),
    )
    return {name: [results[name] for results in found] for name in found[0]}


def assert_sharded_equals_whole(mode, dtype, reduction):
    """On this rank: its share of every result is as near to float64 as PyTorch's of the whole vocabulary."""
    draws = [one_draw(mode, dtype, reduction, seed) for seed in range(12)]
    for name in draws[0]:
        for part in range(len(draws[0][name][0])):
            joined = (torch.cat([draw[name][who][part].flatten() for draw in draws]) for who in range(3))
            assert_accurate(*joined, f"{name} {mode} {dtype} {reduction}: result {part} on rank {dist.get_rank()}")


def in_group(check):
    """Run a check as one rank of a gloo group."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=50))
    torch.set_num_threads(1)
    try:
        check()
    finally:
        dist.destroy_process_group()


def check_every_mode():
    for mode in MODES:
        for dtype in DTYPES:
            for reduction in REDUCTIONS:
                assert_sharded_equals_whole(mode, dtype, reduction)


def check_ranks_agree():
    """Losses and what all ranks hold of the gradients are the same bits on each."""
    (x, head, bias, logits), target, _, _ = given("plain", torch.float32, 0)
    own = own_classes()
    loss, _ = evaluated(
        lambda z: cross_entropy(z, target, reduction="none", process_group=dist.group.WORLD),
        [logits[:, own]],
        "none",
        0,
    )
    _, dx = evaluated(
        lambda x: linear_cross_entropy(x, head[own], target, linear_bias=bias[own], process_group=dist.group.WORLD),
        [x],
        "mean",
        0,
    )
    for tensor in (loss, dx):
        of_both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(of_both, tensor)
        assert torch.equal(*of_both)


def check_other_forms():
    """Where no kernel serves, the logits are gathered and PyTorch's code runs."""
    (_, _, _, logits), target, _, _ = given("plain", torch.float32, 0)
    own = own_classes()
    logits, weight = logits.double(), torch.rand(V, generator=torch.Generator().manual_seed(1)).double()
    ours = evaluated(
        lambda z: cross_entropy(z, target, weight[own], label_smoothing=0.1, process_group=dist.group.WORLD),
        [logits[:, own]], "mean", 0,
    )  # fmt: skip
    theirs = evaluated(
        lambda z: torch.nn.functional.cross_entropy(z, target, weight, label_smoothing=0.1), [logits], "mean", 0
    )
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1][:, own])


def check_refusals():
    group, x = dist.group.WORLD, torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([0, 1, 2, 5])
    with pytest.raises(IndexError, match="target 6 at row 3 is out of bounds, expected 0 to 5"):
        cross_entropy(torch.randn(4, 3).requires_grad_(), torch.tensor([0, 1, 2, 6]), process_group=group, inplace=True)
    with pytest.raises(ValueError, match="num_classes is 7, expected 1 to 6"):
        cross_entropy(x, target, process_group=group, num_classes=7)
    with pytest.raises(ValueError, match=r"process_group needs input \(N, V\)"):
        cross_entropy(x, torch.rand(4, 3), process_group=group)
    with pytest.raises(ValueError, match="process_group needs class indices"):
        linear_cross_entropy(x.double(), torch.randn(3, 3).double(), target, process_group=group)
    for loss in (
        cross_entropy(x, target, process_group=group, softcap=9.0),
        linear_cross_entropy(x, torch.randn(3, 3), target, process_group=group),
    ):
        with pytest.raises(RuntimeError, match=r"expected .*process_group=None with create_graph=True"):
            torch.autograd.grad(loss, x, create_graph=True)


def check_compiles():
    """In one graph, collectives included."""
    own = own_classes()
    (_, _, _, logits), target, _, _ = given("plain", torch.float32, 0)
    group = dist.group.WORLD

    def loss(z):
        return cross_entropy(z * 1, target, process_group=group, label_smoothing=0.1)

    eager = evaluated(loss, [logits[:, own]], "mean", 0)
    compiled = evaluated(torch.compile(loss, fullgraph=True, backend="aot_eager"), [logits[:, own]], "mean", 0)
    for one, other in zip(eager, compiled, strict=True):
        assert torch.equal(one, other)


CHECKS = [check_every_mode, check_ranks_agree, check_other_forms, check_refusals, check_compiles]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_vocabulary_shared_out_over_two_ranks(check, tmp_path):
    run_ranks(2, in_group, check, errors=tmp_path / "errors")
