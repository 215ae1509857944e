"""Lists of tiles: how often they are made, and that calls which share them have the bits of calls that do not."""

import functools
import gc
import importlib

import pytest
import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from fastlm.models import GPT, GPTConfig, gpt
from fastlm.ops import AttentionSchedules, attention
from fastlm.ops._triton import HAS_TRITON
from fastlm.train.activation_checkpointing import ActivationKnobs, checkpoint_activations
from tests.support.attention_cases import boundaries
from tests.support.compilations import compilations

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

schedules_module = importlib.import_module("fastlm.ops.attention_schedules")
LENGTHS = (18, 0, 3, 15)
OTHER_LENGTHS = (1, 17, 18, 0)
TOTAL = sum(LENGTHS)
H, D = 1, 16


@pytest.fixture
def lists(monkeypatch):
    """Whether it is of blocks of keys, for each list of tiles that is made from now on."""
    made, launch = [], schedules_module.launch

    def note(*args, **constants):
        made.append(constants["OVER_KEYS"])
        launch(*args, **constants)

    monkeypatch.setattr(schedules_module, "launch", note)
    return made


def random_heads(device, total=TOTAL) -> list[Tensor]:
    return [torch.randn(total, H, D, device=device, requires_grad=True) for _ in range(3)]


def results(heads: list[Tensor], cu_seqlens: Tensor, **options) -> list[Tensor]:
    out = attention(*heads, backend="triton", cu_seqlens_q=cu_seqlens, **{"causal": True} | options)
    return [out, *torch.autograd.grad(out, heads, torch.ones_like(out))]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(map(torch.equal, one, two))


def test_a_call_lists_its_tiles_once_for_queries_and_once_for_keys(lists, kernel_device):
    heads, bounds = random_heads(kernel_device), boundaries(LENGTHS, kernel_device)
    with torch.no_grad():
        attention(*heads, causal=True, cu_seqlens_q=bounds, backend="triton")
    assert lists == [False]
    results(heads, bounds)
    results(heads, bounds)
    assert lists == [False, *[False, True] * 2]


def test_calls_share_the_tiles_of_the_first_and_have_the_bits_of_calls_alone(lists, kernel_device):
    layers, bounds = [random_heads(kernel_device) for _ in range(3)], boundaries(LENGTHS, kernel_device)
    alone = [results(heads, bounds) for heads in layers]
    del lists[:]
    shared = AttentionSchedules()
    assert all(same(results(heads, bounds, schedules=shared), one) for heads, one in zip(layers, alone, strict=True))
    assert len(lists) == 2


def test_calls_with_other_boundaries_or_options_share_no_tiles(lists, kernel_device):
    heads, shared = random_heads(kernel_device), AttentionSchedules()
    ours, others = (boundaries(lengths, kernel_device) for lengths in (LENGTHS, OTHER_LENGTHS))
    strided = boundaries((5, 31), kernel_device).repeat_interleave(2)[::2]
    wide = boundaries((5,), kernel_device).long()

    def out(heads, cu_seqlens, causal=True, **options):
        with torch.no_grad():
            return attention(*heads, causal=causal, cu_seqlens_q=cu_seqlens, backend="triton", **options)

    cases = [
        *((heads, bounds) for bounds in (ours, others, strided, ours[:3], wide, wide.view(torch.int32)[:2])),
        *((heads, q, True, k) for q, k in ((ours, others), (others, ours))),
        (heads, ours, False),
        (random_heads(kernel_device, TOTAL + 20), ours),
    ]
    for heads, bounds, *options in cases:
        call = functools.partial(out, heads, bounds, **dict(zip(("causal", "cu_seqlens_k"), options, strict=False)))
        assert torch.equal(call(schedules=shared), call()), (bounds, options)
    assert len(lists) == 2 * len(cases)
    del lists[:]
    for heads, bounds, *_ in cases[:3]:
        out(heads, bounds, schedules=shared)
    assert len(lists) == 1, "boundaries that are not contiguous are copied in each call, the others found"


def test_boundaries_that_are_known_by_their_address_are_not_freed(kernel_device):
    heads, bounds, shared = random_heads(kernel_device), boundaries(LENGTHS, kernel_device), AttentionSchedules()
    memory = StorageWeakRef(bounds.untyped_storage())
    attention(*heads, cu_seqlens_q=bounds, schedules=shared, backend="triton")
    del bounds
    assert not memory.expired()
    del shared
    gc.collect()  # the interpreter leaves cycles
    assert memory.expired()


def test_backward_of_recomputed_calls_takes_the_tiles_of_the_first_forward(lists, kernel_device):
    heads, bounds, shared = random_heads(kernel_device), boundaries(LENGTHS, kernel_device), AttentionSchedules()

    def layer(*heads):
        return attention(*heads, causal=True, cu_seqlens_q=bounds, schedules=shared, backend="triton")

    out = sum(checkpoint(layer, *heads, use_reentrant=False) for _ in range(3))
    torch.autograd.grad(out, heads, torch.ones_like(out))
    assert len(lists) == 2


def test_ops_that_a_profiler_sees_list_their_own_tiles(lists, kernel_device):
    heads, bounds, shared = random_heads(kernel_device), boundaries(LENGTHS, kernel_device), AttentionSchedules()
    alone = results(heads, bounds)
    with torch.profiler.profile() as profiler:
        seen = results(heads, bounds, schedules=shared)
    assert same(seen, alone)
    assert "fastlm::attention" in {event.key for event in profiler.key_averages()}
    assert len(lists) == 2 + 3


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_gpt_lists_tiles_as_often_as_one_of_its_layers(lists, checkpointing, kernel_device, monkeypatch):
    config = GPTConfig(vocab_size=64, sequence_length=18, num_layers=2, num_heads=1, hidden_size=16)
    model, tokens = GPT(config).to(kernel_device), torch.randint(64, (2, 18), device=kernel_device)
    checkpoint_activations(model, ActivationKnobs(activation_checkpointing=checkpointing))
    bounds = boundaries(LENGTHS, kernel_device)

    def step() -> tuple[list[Tensor], int]:
        del lists[:]
        loss, _ = model(tokens, tokens, cu_seqlens=bounds)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))], len(lists)

    shared, num_shared = step()
    monkeypatch.setattr(gpt, "AttentionSchedules", lambda: None)
    alone, num_alone = step()
    assert same(shared, alone)
    assert (num_shared, num_alone) == (2, 6 if checkpointing == "full" else 4)


def test_a_compiled_layer_takes_schedules_of_any_content_without_compiling_anew(kernel_device):
    heads, bounds, shared = random_heads(kernel_device), boundaries(LENGTHS, kernel_device), AttentionSchedules()

    def layer(heads, bounds, schedules):
        return attention(*heads, causal=True, cu_seqlens_q=bounds, schedules=schedules, backend="triton")

    layer(heads, bounds, shared)  # which leaves tiles in it
    calls = [(heads, bounds, schedules) for schedules in (AttentionSchedules(), shared, AttentionSchedules())]
    assert compilations(layer, calls, dynamic=False) == 1


def test_a_traced_call_keeps_no_schedules():
    shared = AttentionSchedules()
    traced = fx.symbolic_trace(lambda x: attention(x, x, x, cu_seqlens_q=boundaries((3, 1), "cpu"), schedules=shared))
    assert all("schedules" not in node.kwargs for node in traced.graph.nodes)


@pytest.mark.gpu
def test_calls_that_share_tiles_replay_from_a_cuda_graph_with_other_boundaries():
    device = torch.device("cuda")
    layers, bounds = [random_heads(device) for _ in range(2)], boundaries(LENGTHS, device)
    others = boundaries(OTHER_LENGTHS, device)

    def step() -> list[Tensor]:
        shared = AttentionSchedules()
        return [x for heads in layers for x in results(heads, bounds, schedules=shared)]

    step()  # compiles and loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    bounds.copy_(others)
    graph.replay()
    assert same(captured, [x for heads in layers for x in results(heads, others)])
