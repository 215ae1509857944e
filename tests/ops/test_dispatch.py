"""One decision says which implementation runs a call; what it says is what runs."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlm import doctor, nn, ops
from fastlm.ops import _device, _dispatch, _library
from fastlm.ops._dispatch import CPU_MIN_NUMEL, DTYPES, TORCH, explain, route, table
from fastlm.ops._triton import HAS_TRITON
from fastlm.ops.attention import options_of
from fastlm.ops.attention_reference import UNLIMITED, Inputs, Options

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


FLOAT32, ONE_QUERY, KERNELS = "torch (plain float32", "torch (one query", "triton (a CUDA tensor)"
HALF = {"dtype": torch.bfloat16}
ON_A_GPU = {  # what the calls differ in, options and the answer
    "float32": ({}, {"causal": True}, FLOAT32),
    "float32 with a gradient": ({"requires_grad": True}, {}, KERNELS),
    "float32 of grouped heads": ({"Hk": 1}, {}, KERNELS),
    "float32 of other keys": ({"Tk": 9}, {"causal": True}, KERNELS),
    "float32 of features that are not aligned": ({"D": 6}, {}, KERNELS),
    "float32 with lse": ({}, {"return_lse": True}, KERNELS),
    "float32 with a window": ({}, {"window": (3, 0)}, KERNELS),
    "float32 by name": ({}, {"backend": "triton"}, KERNELS),
    "bfloat16": (HALF, {"causal": True}, KERNELS),
    "one query": (HALF | {"Tq": 1, "Hk": 1}, {"causal": True}, ONE_QUERY),
    "one query with a gradient": (HALF | {"Tq": 1, "requires_grad": True}, {}, KERNELS),
    "one query with a softcap": (HALF | {"Tq": 1}, {"softcap": 2.0}, KERNELS),
    "one query and no keys": (HALF | {"Tq": 1, "Tk": 0}, {}, KERNELS),
}


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("form", ON_A_GPU)
def test_attention_runs_torch_on_a_gpu_where_its_kernels_are_known_to_be_faster(form, monkeypatch):
    differs, options, said = ON_A_GPU[form]
    plain = {"Tq": 5, "Tk": 5, "H": 2, "Hk": 2, "D": 8, "dtype": torch.float32, "requires_grad": False}
    sizes = plain | differs
    chosen = {"causal": False, "window": None, "softcap": None, "backend": "auto", "return_lse": False} | options
    monkeypatch.setattr(_dispatch, "is_plain_tensor", lambda *tensors: True)  # fake tensors are a subclass
    with FakeTensorMode():
        q, k, v = (
            torch.empty(3, sizes[T], sizes[H], sizes["D"], dtype=sizes["dtype"], device="cuda")
            for T, H in (("Tq", "H"), ("Tk", "Hk"), ("Tk", "Hk"))
        )
    v.requires_grad_(sizes["requires_grad"])

    def answers() -> set[str]:
        masking = options_of(8, chosen["causal"], None, chosen["window"], chosen["softcap"], 0.0)
        routes = [route("attention", Inputs(q, k, v), (masking, chosen["backend"], False, chosen["return_lse"]))]
        if sizes == plain | {"dtype": sizes["dtype"]} and options.keys() <= {"causal"}:
            heads = [x.transpose(1, 2) for x in (q, k, v)]
            routes.append(route("scaled_dot_product_attention", heads, (None, 0.0, chosen["causal"], None, False)))
        return {f"{found.implementation} ({found.reason})" for found in routes}

    assert all(answer.startswith(said) for answer in answers())
    if sizes["requires_grad"]:
        with torch.no_grad():
            assert not any(answer.startswith(said) for answer in answers())


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_attention_without_data_runs_torch_by_any_backend_that_may(backend):
    q = torch.empty(1, 4, 2, 8, device="meta")
    assert explain(ops.attention, q, q, q, backend=backend).startswith("attention: torch (")


ON_NEWER_GPUS = (
    *(_dispatch.ON_GPU, _dispatch.ON_GPU, _dispatch.ON_GPU_BY_CUDA, _dispatch.BY_CHUNKS),
    *(_dispatch.ON_GPU, _dispatch.ON_GPU),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("architecture", "routes"),
    [
        (70, (*[_dispatch.OLD_GPU] * 4, *[_dispatch.OLD_TENSOR_CORES] * 2)),
        (75, (*ON_NEWER_GPUS[:4], *[_dispatch.OLD_TENSOR_CORES] * 2)),
        (80, ON_NEWER_GPUS),
        (120, ON_NEWER_GPUS),
    ],
)
def test_gpus_too_old_for_a_kernel_run_torch_in_every_dtype(monkeypatch, architecture, routes, dtype):
    monkeypatch.setattr(_device, "found_capability", lambda device: architecture)
    monkeypatch.setattr(_library, "LIBRARIES", {"cuda": _library.Library(True, "")})
    monkeypatch.setattr(_dispatch, "is_plain_tensor", lambda *tensors: True)  # CUDA tensors are fake without a GPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, target = torch.empty(8, 64, dtype=dtype, device="cuda"), torch.empty(8, dtype=torch.int64, device="cuda")
        q, options = x.view(1, 8, 1, 64), Options(False, 1.0, 4, UNLIMITED, 0.0, 0.0)  # plain calls may run torch
        found = [
            route("layer_norm", (x,), ((64,), None)),
            route("softmax", (x,), (None, -1, None)),
            route("cross_entropy", (x,), (target, None, False, True)),
            route("linear_cross_entropy", (x, x), (target, None, 64)),
            route("attention", Inputs(q, q, q), (options, "auto", False, False)),
            route("scaled_dot_product_attention", (q, q, q), (None, 0.1, False, None, False)),
        ]
    for got, expected in zip(found, routes, strict=True):
        assert got == (expected if HAS_TRITON or expected.implementation != "triton" else _dispatch.NO_TRITON)


def test_backend_triton_says_what_an_old_gpu_lacks(monkeypatch):
    monkeypatch.setattr(_device, "found_capability", lambda device: 75)
    with FakeTensorMode():
        q = torch.empty(1, 8, 1, 64, dtype=torch.float16, device="cuda")
        with pytest.raises(ValueError, match="triton: a GPU older than sm_80, whose tensor cores Triton does not use"):
            ops.attention(q, q, q, backend="triton")


@pytest.mark.parametrize(("architecture", "is_called"), [(75, False), (80, True)])
def test_packed_attention_of_an_old_gpu_does_not_call_flash_attention(monkeypatch, architecture, is_called):
    monkeypatch.setattr(_device, "found_capability", lambda device: architecture)
    attention = importlib.import_module("fastlm.ops.attention")  # by its name it is the function
    monkeypatch.setattr(attention, "varlen_by_sdpa", lambda inputs, options, longest: inputs.q)
    monkeypatch.setattr(attention, "is_plain_tensor", lambda *tensors: True)
    with FakeTensorMode():
        q, bounds = torch.empty(8, 2, 64, dtype=torch.float16, device="cuda"), torch.empty(3, dtype=torch.int32)
        inputs, options = Inputs(q, q, q, bounds), Options(False, 0.125, UNLIMITED, UNLIMITED, 0.0, 0.0)
        assert (attention.by_sdpa(inputs, options, False, (8, 8)) is not None) is is_called


def test_doctor_says_what_a_gpu_is_too_old_for(monkeypatch):
    monkeypatch.setattr(doctor, "architectures", lambda: [90, 75])
    monkeypatch.setattr(_library, "LIBRARIES", {"cuda": _library.Library(True, "")})
    said = {row.functions: doctor.on_gpu(row) for row in table()}
    assert said["scaled_dot_product_attention"] == (
        "PyTorch, for a GPU here is sm_75, and the kernels take sm_80 or newer"
    )
    assert said["cross_entropy"] == "CUDA"


def test_explain_leaves_nothing_behind_and_passes_errors_on():
    with pytest.raises(ValueError, match="weight has shape"):
        explain(ops.layer_norm, torch.randn(4, 8), (8,), torch.ones(7))
    with pytest.raises(TypeError, match="function is of type str, expected a function, not its name"):
        explain("layer_norm", torch.randn(4, 8), (8,))
    assert _dispatch.explained == []


def test_thresholds_are_from_where_the_kernel_runs(monkeypatch):
    monkeypatch.setattr(_library, "LIBRARIES", {"cpu": _library.Library(True, "")})
    for op, numel in CPU_MIN_NUMEL.items():
        if op in ("swiglu", "geglu", "bias_gelu", "gelu none", "gelu tanh", "rotary"):
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
    excused = ("AttentionSchedules", "explain", "flash_attn")
    missing = [name for name in ops.__all__ if name not in rows and not name.startswith(excused)]
    assert missing == []
