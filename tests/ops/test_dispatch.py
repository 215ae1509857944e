"""One decision says which implementation runs a call; what it says is what runs."""

import pytest
import torch

from fastlm import nn, ops
from fastlm.ops import _dispatch, _library
from fastlm.ops._dispatch import CPU_MIN_NUMEL, TORCH, explain, route, table

NEEDS_LIBRARY = pytest.mark.skipif(not _library.is_loaded("cpu"), reason="the compiled CPU code is not built")
LARGE = torch.randn(1 << 14, 64)  # as many elements as layer_norm's threshold


def kernels_run(function, *args, **kwargs) -> set[str]:
    """The raw ops of fastlm that a call runs."""
    with torch.profiler.profile() as profile:
        function(*args, **kwargs)
    return {event.key.removeprefix("fastlm::") for event in profile.key_averages() if "fastlm::" in event.key}


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    ("call", "said", "runs"),
    [
        (lambda: ops.layer_norm(LARGE, (64,)), "layer_norm: cpp (a CPU tensor)", "norm"),
        (lambda: ops.layer_norm(LARGE[:9], (64,)), "layer_norm: torch (fewer than 1,048,576 elements", None),
        (lambda: ops.rms_norm(LARGE.double(), (64,)), "rms_norm: torch (the kernels take float32", None),
        (
            lambda: ops.softmax(LARGE, 0, scale=2.0),
            "softmax with options: torch (the kernels work along the last",
            None,
        ),
        (lambda: ops.softmax(LARGE, -1, scale=2.0), "softmax with options: cpp", "softmax"),
        (lambda: ops.softmax(LARGE, -1), "softmax: torch (no kernel is faster on a CPU)", None),
        (lambda: torch.func.vmap(ops.swiglu)(LARGE[None], LARGE[None]), "swiglu: torch (a tensor subclass", None),
        (lambda: ops.cross_entropy(LARGE[:9], torch.zeros(9, dtype=torch.long)), "cross_entropy: torch (up to", None),
        (lambda: ops.cross_entropy(LARGE, LARGE), "cross_entropy: torch (the kernels take logits (N, V)", None),
        (
            lambda: ops.cross_entropy(LARGE, torch.zeros(1 << 14, dtype=torch.long)),
            "cross_entropy: cpp",
            "cross_entropy",
        ),
        (lambda: ops.attention(*LARGE[:24].view(3, 1, 4, 2, 64)), "attention: torch (plain scores on a CPU", None),
        (lambda: ops.attention(*LARGE[:24].view(3, 1, 4, 2, 64), softcap=2.0), "attention: cpp", "attention"),
    ],
)
def test_explain_says_what_runs(call, said, runs):
    assert explain(call).startswith(said)
    names = kernels_run(call)
    assert runs in names if runs else not names


def test_explain_names_every_op_of_a_model_in_their_order():
    model = torch.nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.RMSNorm(8))
    lines = explain(model, torch.randn(4, 8)).splitlines()
    assert [line.split(":")[0] for line in lines] == ["layer_norm", "gelu none", "rms_norm"]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_attention_without_data_runs_torch_by_any_backend_that_may(backend):
    q = torch.empty(1, 4, 2, 8, device="meta")
    assert explain(ops.attention, q, q, q, backend=backend).startswith("attention: torch (")


def test_explain_leaves_nothing_behind_and_passes_errors_on():
    with pytest.raises(ValueError, match="weight has shape"):
        explain(ops.layer_norm, torch.randn(4, 8), (8,), torch.ones(7))
    assert _dispatch.explained == []


def test_thresholds_are_from_where_the_kernel_runs(monkeypatch):
    monkeypatch.setattr(_library, "LIBRARIES", {"cpu": _library.Library(True, "")})
    for op, numel in CPU_MIN_NUMEL.items():
        if op in ("swiglu", "bias_gelu", "gelu none", "gelu tanh", "rotary"):
            x = torch.empty(1).expand(int(numel))
            assert route(op, (x,)).implementation == ("triton" if _dispatch.use_triton(x) else "cpp")
            if not _dispatch.use_triton(x):
                assert route(op, (x[1:],)).implementation == TORCH


def test_without_a_library_every_op_runs_torch_and_says_why(monkeypatch):
    monkeypatch.setattr(_library, "LIBRARIES", {})
    if not _dispatch.use_triton(LARGE):
        assert explain(ops.layer_norm, LARGE, (64,)).startswith("layer_norm: torch (the compiled library")


def test_table_has_a_row_for_every_public_function():
    rows = " ".join(row.functions for row in table())
    missing = [
        name for name in ops.__all__ if name not in rows and not name.startswith("flash_attn") and name != "explain"
    ]
    assert missing == []
