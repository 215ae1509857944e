"""What every op keeps to, whatever it computes: one row for each public function, one test for each promise.

A row names the function, what it equals in plain PyTorch and small arguments; each test takes every row by every
implementation that the row lists. A new op needs a row here and no test of these promises of its own. What its numbers
are on grids of shapes, dtypes and special values stays with the op.
"""

import functools
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastlm import ops
from fastlm.ops.cross_entropy import cross_entropy_reference
from fastlm.ops.linear_logprobs import linear_logprobs_reference
from fastlm.ops.rotary import apply_rotary_reference
from fastlm.ops.softmax import softmax_reference
from tests.support.sample_checks import Call, Noise, are_same, gradients, of_tensors, outcome, tensors_in

pytestmark = pytest.mark.filterwarnings("ignore:.*not yet supported in forward AD:UserWarning")

IMPLEMENTATIONS = {  # as layer_device of tests/conftest.py
    "default": pytest.param("cpu"),  # what a user's CPU runs of so few elements: PyTorch's code, where the op has it
    "interpreted": pytest.param("cpu", marks=pytest.mark.interpreted),
    "gpu": pytest.param("cuda", marks=pytest.mark.gpu),
    "compiled": pytest.param("compiled"),
    "portable": pytest.param("portable"),  # differs from compiled in the instructions alone, in no line of Python
}
ALL = tuple(IMPLEMENTATIONS)
KERNELS = ALL[1:]
KINDS_OF_KERNEL = KERNELS[:3]  # for what no instruction decides
ONE_OF_EACH_DEVICE = KERNELS[1:3]  # for what Python code decides that all share
Arguments = Mapping[str, Any]


class Row(NamedTuple):
    """A public function with certain options."""

    ours: Callable[..., Any]
    plain: Callable[..., Any]  # PyTorch's own function, or the composition of them that ours equals
    draw: Callable[[int, int], Arguments]  # of N rows of C elements; by name, floating tensors in float32
    forward: str  # the raw op, torch.ops.fastlm.*
    backward: str | None
    options: Arguments = MappingProxyType({})
    constant: tuple[str, ...] = ()  # floating tensors without a gradient
    by: tuple[str, ...] = ALL  # implementations
    fallback: Callable[..., Any] | None = None  # what runs where no kernel does, if that is not plain
    is_exact: bool = True  # whether plain, or fallback, has the bits of that code under every transform
    shares_work: bool = False  # one pass gives several gradients, so a frozen input spares none
    by_blas: bool = False  # which adds in another order for another layout
    unchecked: tuple[str, ...] = ()  # faults of arguments that are left to PyTorch, to refuse or to compute
    untold: tuple[str, ...] = ()  # faults that pass, or whose message does not say all: each wants mending
    excused: Mapping[str, str] = MappingProxyType({})  # by the name of a test, why the row is not held to it


# The rows


def rows_of(N: int, C: int, *names: str) -> Arguments:
    return {name: torch.randn(N, C) for name in names}


def norm_arguments(*inputs: str, bias: bool = True) -> Callable[[int, int], Arguments]:
    def draw(N: int, C: int) -> Arguments:
        parameters = {"weight": torch.randn(C)} | ({"bias": torch.randn(C)} if bias else {})
        return rows_of(N, C, *inputs) | {"normalized_shape": (C,)} | parameters

    return draw


def added(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The norm of a sum, and the sum."""

    def composed(x: Tensor, residual: Tensor, normalized_shape: tuple[int, ...], **named: Any):
        dropout = {name: named.pop(name) for name in ("dropout_p", "seed") if name in named}
        if dropout:  # what a seed drops, the op says of a row of ones
            ones = torch.ones(x.shape, device=x.device)
            x = x * ops.add_layer_norm(ones, 0 * ones, normalized_shape, **dropout)[1].to(x.dtype)
        total = residual + x
        return norm(total, normalized_shape, **named), total

    return composed


def softmax_arguments(mask: str | None = None) -> Callable[[int, int], Arguments]:
    def draw(N: int, C: int) -> Arguments:
        kept = torch.rand(N, C) < 0.6
        masks = {"boolean": kept, "added": torch.randn(N, C).masked_fill(~kept, -torch.inf)}
        return {"input": torch.randn(2, N, C)} | ({"mask": masks[mask]} if mask else {})

    return draw


def masked(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """softmax or log_softmax of scores; a row of which nothing is left is taken out before, and filled after."""

    def composed(input: Tensor, dim: int, scale: float = 1.0, mask: Tensor | None = None, causal: bool = False):
        s, hidden = input * scale, torch.zeros(input.shape, dtype=torch.bool, device=input.device)
        if causal:
            hidden = torch.ones_like(hidden).triu(1 + input.shape[-1] - input.shape[-2])
        is_masked = hidden
        if mask is not None and mask.dtype == torch.bool:
            is_masked = hidden = hidden | ~mask
        elif mask is not None:
            s, is_masked = s + mask, hidden | mask.isneginf()
        fully_masked = is_masked.all(dim, keepdim=True)
        y = function(s.masked_fill(hidden, -torch.inf).masked_fill(fully_masked, 0), dim)
        return y.masked_fill(fully_masked, -torch.inf if function is F.log_softmax else 0)

    return composed


def softmax_row(name: str, mask: str | None = None, **options: Any) -> Row:
    function = getattr(ops, name)
    row = Row(function, getattr(F, name), softmax_arguments(mask), "softmax", "softmax_backward", {"dim": -1} | options)
    if not mask and not options:
        return row._replace(unchecked=("input dtype",))
    reference = functools.partial(softmax_reference, log=name == "log_softmax")
    return row._replace(plain=masked(getattr(F, name)), fallback=reference, by=KERNELS)


def rotary_arguments(N: int, C: int) -> Arguments:
    angles = torch.arange(N)[:, None] * 10.0 ** -torch.linspace(0, 2, C // 4)
    return {
        "q": torch.randn(2, N, 3, C),
        "k": torch.randn(2, N, 1, C),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, positions: Tensor | None = None):
    cos, sin = (x[:, None] if positions is None else x[positions][..., None, :] for x in (cos, sin))
    return tuple(apply_rotary_reference(x, cos, sin, interleaved) for x in (q, k))


def heads(*names: str, num_key_heads: int = 2, dim: int = 2) -> Callable[[int, int], Arguments]:
    """Tensors (2, N, heads, C), or with the heads in another dimension."""

    def draw(N: int, C: int) -> Arguments:
        numbers = 2, num_key_heads, num_key_heads
        return {name: torch.randn(2, N, H, C).movedim(2, dim) for name, H in zip(names, numbers, strict=True)}

    return draw


def documents(N: int, C: int) -> Arguments:
    bounds = torch.tensor([0, N // 3, N // 3, N - N // 3], dtype=torch.int32)  # one is empty, and tokens lie behind
    return {name: torch.randn(N, 2, C) for name in "qkv"} | {"cu_seqlens_q": bounds}


def biased_heads(N: int, C: int) -> Arguments:
    return heads(*"qkv")(N, C) | {"alibi_slopes": torch.rand(2), "sinks": torch.randn(2)}


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    options = {"is_causal": causal, "scale": max(1, q.shape[-1]) ** -0.5, "enable_gqa": k.shape[2] != q.shape[2]}
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)


def in_simple_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """With PyTorch's only attention that can be differentiated twice, or forward."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return function(*args, **kwargs)

    return called


def by_scores(
    q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor, sinks: Tensor, softcap: float, window: tuple[int, int],
    return_lse: bool, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T = q.shape[1]
    distance = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    s = torch.einsum("bihd,bjhd->bhij", q, k) * max(1, q.shape[-1]) ** -0.5
    s = softcap * torch.tanh(s / softcap) - alibi_slopes[:, None, None] * distance.abs()
    s = s.masked_fill((distance < 0) | (distance > window[0]), -torch.inf)
    s = torch.cat([s, sinks[:, None, None].expand(*s.shape[:3], 1)], -1)
    lse = s.logsumexp(-1).to(torch.promote_types(q.dtype, torch.float32))
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1)[..., :T], v), lse


def by_documents(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, causal: bool) -> Tensor:
    T = len(q)
    document = (torch.arange(T, device=q.device)[:, None] >= cu_seqlens_q[1:]).sum(1)
    mask = (document[:, None] == document).tril()
    s = torch.einsum("ihd,jhd->hij", q, k).masked_fill(~mask, -torch.inf) * max(1, q.shape[-1]) ** -0.5
    out = torch.einsum("hij,jhd->ihd", s.softmax(-1), v)
    return out.masked_fill((document == len(cu_seqlens_q) - 1)[:, None, None], 0)


def logits_arguments(N: int, C: int) -> Arguments:
    target = torch.randint(max(1, C), (N,))
    target[1::3] = -100
    return {"input": torch.randn(N, max(1, C)), "target": target}


def weighted_logits_arguments(N: int, C: int) -> Arguments:
    return logits_arguments(N, C) | {"weight": torch.rand(max(1, C)) + 0.1}


def z_loss_added(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    z_loss, softcap, reduction = options.pop("z_loss"), options.pop("softcap", None), options.pop("reduction", "mean")
    x = input if softcap is None else softcap * torch.tanh(input / softcap)
    counts = target != -100
    losses = F.cross_entropy(x, target, weight, reduction="none", **options)
    losses = losses + torch.where(counts, z_loss * x.logsumexp(1).square(), 0)
    return losses if reduction == "none" else losses.sum() / counts.sum()


def head_arguments(N: int, C: int) -> Arguments:
    logits = logits_arguments(N, 13)
    return {
        "input": torch.randn(N, C),
        "linear_weight": torch.randn(13, C) / max(C, 1) ** 0.5,
        "linear_bias": torch.randn(13),
        "target": logits["target"],
    }


def of_all_logits(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor, target: Tensor, memory_budget: int, **options: Any
) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)


def of_all_tokens(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor, target: Tensor, memory_budget: int, **options: Any
) -> tuple[Tensor, ...]:
    x = F.linear(input, linear_weight, linear_bias)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if "softcap" in options:
        x = options["softcap"] * torch.tanh(x / options["softcap"])
    logp = (x / options.get("temperature", 1.0)).log_softmax(-1)
    counts = target != -100
    found = [logp.gather(1, target.clamp(min=0)[:, None])[:, 0], torch.special.entr(logp.exp()).sum(1)]
    return tuple(torch.where(counts, x, 0) for x in found[: 1 + ("entropy" in options)])


def all_logprobs(memory_budget: int, **arguments: Any) -> tuple[Tensor, ...]:
    return linear_logprobs_reference(**arguments)


NORM = {"forward": "norm", "backward": "norm_backward"}
GELU = {"forward": "gelu", "backward": "gelu_backward", "unchecked": ("input dtype", "x dtype", "bias dtype")}
GLU = {"forward": "glu", "backward": "glu_backward", "unchecked": ("gate dtype", "up dtype")}
ATTENTION = {"forward": "attention", "backward": "attention_backward", "shares_work": True}
BY_TRITON = ("default", "interpreted", "gpu")
BY_LIBRARY = ("compiled", "portable", "gpu")
LOGPROBS = {
    "forward": "linear_logprobs",
    "backward": "linear_logprobs_backward",
    "options": {"memory_budget": 4 * 13 * 4},
    "by": BY_LIBRARY,
    "fallback": all_logprobs,
    "by_blas": True,
    "excused": {"test_op_leaves_tensor_subclasses_to_pytorch": "a linear_bias of one, alone, goes to the raw op"},
}
DROPOUT = {"dropout_p": 0.4, "seed": 7}
ROWS = {
    "layer_norm": Row(ops.layer_norm, F.layer_norm, norm_arguments("input"), **NORM),
    "rms_norm": Row(
        ops.rms_norm,
        F.rms_norm,
        norm_arguments("input", bias=False),
        options={"eps": 1e-6},
        unchecked=("weight dtype",),
        **NORM,
    ),
    "add_layer_norm": Row(ops.add_layer_norm, added(F.layer_norm), norm_arguments("x", "residual"), **NORM),
    "add_rms_norm": Row(
        ops.add_rms_norm, added(F.rms_norm), norm_arguments("x", "residual", bias=False), options={"eps": 1e-6}, **NORM
    ),
    "add_layer_norm with dropout": Row(
        ops.add_layer_norm,
        added(F.layer_norm),
        norm_arguments("x", "residual"),
        options=DROPOUT,
        excused={
            "test_op_leaves_float64_to_pytorch": "of another dtype a seed may drop other elements",
            "test_op_leaves_tensor_subclasses_to_pytorch": "PyTorch's code drops other elements than the kernels",
        },
        **NORM,
    ),
    "softmax": softmax_row("softmax"),
    "log_softmax": softmax_row("log_softmax"),
    "softmax of a boolean mask": softmax_row("softmax", "boolean", scale=0.5, causal=True),
    "softmax of an added mask": softmax_row("softmax", "added", scale=0.5),
    "log_softmax of a boolean mask": softmax_row("log_softmax", "boolean", scale=0.5),
    "log_softmax of an added mask": softmax_row("log_softmax", "added", scale=0.5, causal=True),
    "gelu": Row(ops.gelu, F.gelu, lambda N, C: rows_of(N, C, "input"), **GELU),
    "gelu tanh": Row(ops.gelu, F.gelu, lambda N, C: rows_of(N, C, "input"), options={"approximate": "tanh"}, **GELU),
    "bias_gelu": Row(
        ops.bias_gelu,
        lambda x, bias, approximate: F.gelu(x + bias),
        lambda N, C: rows_of(N, C, "x") | {"bias": torch.randn(C)},
        options={"approximate": "none"},
        **GELU,
    ),
    "swiglu": Row(
        ops.swiglu,
        lambda gate, up: F.silu(gate) * up,
        lambda N, C: rows_of(N, C, "gate", "up"),
        **GLU,
    ),
    "geglu": Row(
        ops.geglu,
        lambda gate, up, approximate: F.gelu(gate, approximate=approximate) * up,
        lambda N, C: rows_of(N, C, "gate", "up"),
        options={"approximate": "tanh"},
        **GLU,
    ),
    "apply_rotary": Row(ops.apply_rotary, rotated, rotary_arguments, "rotary", "rotary", constant=("cos", "sin")),
    "apply_rotary of positions": Row(
        ops.apply_rotary,
        rotated,
        lambda N, C: rotary_arguments(N, C) | {"positions": torch.randint(max(N, 1), (2, N))},
        "rotary",
        "rotary",
        options={"interleaved": True},
        constant=("cos", "sin"),
    ),
    "scaled_dot_product_attention": Row(
        ops.scaled_dot_product_attention,
        in_simple_code(F.scaled_dot_product_attention),
        heads("query", "key", "value", dim=1),
        options={"is_causal": True},
        by=BY_TRITON,
        fallback=F.scaled_dot_product_attention,
        excused={"test_op_says_what_is_wrong_with_which_argument": "PyTorch refuses, see the tests of this op"},
        **ATTENTION,
    ),
    "attention with biases": Row(
        ops.attention,
        by_scores,
        biased_heads,
        options={"causal": True, "window": (3, 0), "softcap": 2.0, "return_lse": True},
        by=KERNELS,
        fallback=functools.partial(ops.attention, backend="torch"),
        is_exact=False,
        **ATTENTION,
    ),
    "attention": Row(
        ops.attention,
        in_simple_code(by_sdpa),
        heads(*"qkv", num_key_heads=1),
        options={"causal": True},
        by=BY_TRITON,
        fallback=by_sdpa,
        **ATTENTION,
    ),
    "attention of documents": Row(
        ops.attention,
        by_documents,
        documents,
        options={"causal": True},
        by=KERNELS,
        fallback=functools.partial(ops.attention, backend="torch"),
        is_exact=False,
        **ATTENTION,
    ),
    "cross_entropy with z_loss": Row(
        ops.cross_entropy,
        z_loss_added,
        logits_arguments,
        "cross_entropy",
        None,
        options={"z_loss": 0.1},
        by=BY_LIBRARY,
        fallback=cross_entropy_reference,
        unchecked=("target device",),
        untold=("input dtype",),
    ),
    "cross_entropy": Row(
        ops.cross_entropy,
        F.cross_entropy,
        logits_arguments,
        "cross_entropy",
        None,
        by=("default",),
        unchecked=("input dtype", "target device"),
        is_exact=False,  # of 16 bits, a kernel runs whatever the size
    ),
    "cross_entropy of each row": Row(
        ops.cross_entropy,
        z_loss_added,
        weighted_logits_arguments,
        "cross_entropy",
        None,
        options={"z_loss": 0.1, "softcap": 5.0, "label_smoothing": 0.1, "reduction": "none"},
        constant=("weight",),
        by=BY_LIBRARY,
        fallback=cross_entropy_reference,
        unchecked=("target device", "weight device"),
        untold=("input dtype", "weight dtype"),
    ),
    "linear_cross_entropy": Row(
        ops.linear_cross_entropy,
        of_all_logits,
        head_arguments,
        "linear_cross_entropy",
        None,
        options={"memory_budget": 4 * 13 * 4},
        by=BY_LIBRARY,
        by_blas=True,
    ),
    "linear_cross_entropy of each row": Row(
        ops.linear_cross_entropy,
        of_all_logits,
        head_arguments,
        "linear_cross_entropy",
        "linear_cross_entropy",
        options={"memory_budget": 4 * 13 * 4, "reduction": "none"},
        by=BY_LIBRARY,
        by_blas=True,
        excused={"test_op_leaves_tensor_subclasses_to_pytorch": "a linear_bias of one, alone, goes to the raw op"},
    ),
    "linear_logprobs": Row(ops.linear_logprobs, of_all_tokens, head_arguments, **LOGPROBS),
    "linear_logprobs with entropy": Row(
        ops.linear_logprobs,
        of_all_tokens,
        head_arguments,
        **LOGPROBS | {"options": {"memory_budget": 4 * 13 * 4, "softcap": 4.0, "temperature": 0.8, "entropy": True}},
    ),
}
# They name the arguments of attention as flash-attn does; test_flash_attn.py holds them to the bits of attention.
WITHOUT_A_ROW = {
    "AttentionSchedules",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
}


def test_every_public_function_has_a_row():
    assert sorted({row.ours.__name__ for row in ROWS.values()} | WITHOUT_A_ROW) == ops.__all__
    assert all(name in globals() for row in ROWS.values() for name in row.excused)


# The battery


def every_case(row: Row, implementation: str) -> bool:
    return True


def holds(*implementations: str, of: Callable[[Row, str], bool] = every_case) -> Callable[..., Any]:
    """Runs a test once for each row that is not excused from it, by each of these implementations that the row has."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        cases = [
            pytest.param(row, *how.values, id=f"{name}-{implementation}", marks=how.marks)
            for name, row in ROWS.items()
            for implementation, how in IMPLEMENTATIONS.items()
            if implementation in row.by and implementation in implementations
            if of(row, implementation) and test.__name__ not in row.excused
        ]
        return pytest.mark.parametrize(("row", "layer_device"), cases, indirect=["layer_device"])(test)

    return decorate


def arguments(row: Row, device: torch.device, dtype: torch.dtype = torch.float32, N: int = 6, C: int = 24) -> Arguments:
    def convert(x: Tensor) -> Tensor:
        return x.to(device, dtype if x.is_floating_point() else None)

    return pytree.tree_map_only(Tensor, convert, row.draw(N, C))


def trainable(row: Row, given: Arguments) -> list[str]:
    floats = [name for name, x in given.items() if torch.is_tensor(x) and x.is_floating_point()]
    return [name for name in floats if name not in row.constant]


def with_leaves(row: Row, given: Arguments, trained: list[str] | None = None) -> Arguments:
    """Fresh leaves over the same memory, of which these require a gradient, or all that can."""
    trained = trainable(row, given) if trained is None else trained
    return {name: x.detach().requires_grad_(name in trained) if torch.is_tensor(x) else x for name, x in given.items()}


def outputs_of(row: Row, given: Arguments, function: Callable[..., Any] | None = None) -> list[Tensor]:
    return tensors_in((function or row.ours)(**given, **row.options))


def evaluated(
    row: Row,
    given: Arguments,
    function: Callable[..., Any] | None = None,
    trained: list[str] | None = None,
) -> list[Tensor]:
    """The results, and the gradients of what is trained."""
    leaves = with_leaves(row, given, trained)
    results = outputs_of(row, leaves, function)
    wanted = [x for x in tensors_in(leaves) if x.requires_grad]
    return [*results, *(gradients(results, wanted, Noise(0).like(results)) if wanted else [])]


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in expected]
    for place, pair in enumerate(zip(ours, expected, strict=True)):
        assert are_same(*([x.detach()] for x in pair)), f"tensor {place} differs"


class RawCalls(TorchDispatchMode):
    """Notes the calls of our raw ops, with their results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op.namespace == "fastlm":
            self.calls.append((op, pytree.tree_map_only(Tensor, Tensor.detach, args), tensors_in(result)))
        return result

    def names(self) -> set[str]:
        return {op.name().removeprefix("fastlm::") for op, *_ in self.calls}


def raw_calls(row: Row, given: Arguments, trained: list[str] | None = None) -> RawCalls:
    with RawCalls() as noted:
        evaluated(row, given, None, trained)
    return noted


def is_first(row: Row, implementation: str = "") -> bool:
    """Whether no earlier row has the same function."""
    return next(other for other in ROWS.values() if other.ours is row.ours) is row


def is_quick(row: Row, implementation: str) -> bool:
    """Leaves out what takes the interpreter seconds, but for one row of each function."""
    return implementation != "interpreted" or not row.shares_work or is_first(row)


def has_kernels(row: Row, request: pytest.FixtureRequest) -> bool:
    return not request.node.callspec.id.endswith("default")


def each_alone(row: Row, given: Arguments) -> list[list[str]]:
    return [[name] for name in trainable(row, given)]


@holds(*ALL)
def test_op_runs_its_raw_ops_where_it_has_kernels(row, layer_device, request):
    given = arguments(row, layer_device)
    with RawCalls() as noted:
        results = outputs_of(row, with_leaves(row, given))
    assert (row.forward in noted.names()) == has_kernels(row, request)
    if row.backward and has_kernels(row, request):
        with RawCalls() as noted:
            torch.autograd.backward(results, Noise(0).like(results))
        assert row.backward in noted.names()


@holds(*ONE_OF_EACH_DEVICE)
def test_raw_ops_pass_opcheck(row, layer_device):
    """As the op calls them, for all gradients, the first alone, the last alone or none; and with another dtype."""
    given = arguments(row, layer_device)
    calls = raw_calls(row, given).calls
    others = [pytree.tree_map_only(torch.dtype, lambda dtype: torch.bfloat16, args) for _, args, _ in calls]
    found = [
        *((op, args) for op, args, _ in calls),
        *((op, args) for (op, *_), args in zip(calls, others, strict=True)),
    ]
    for trained in ([], *each_alone(row, given)[:: max(1, len(trainable(row, given)) - 1)]):
        found += [(op, args) for op, args, _ in raw_calls(row, given, trained).calls]
    assert found
    for op, args in {str(pytree.tree_map_only(Tensor, as_meta, call)): call for call in found}.values():
        torch.library.opcheck(op, args)


def as_meta(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype


def with_layout(args: Any, change: Callable[[Tensor], Tensor], kept: set[int]) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x if x.data_ptr() in kept else change(x), args)


def spread(x: Tensor) -> Tensor:
    """The same numbers, no two of them beside each other in memory; of indices and seeds the tensor itself."""
    if not x.is_floating_point():
        return x
    wide = torch.stack([x.mT.contiguous().mT if x.dim() > 1 else x, torch.zeros_like(x)], -1)
    return wide[..., 0]


@holds(*KINDS_OF_KERNEL, of=lambda row, how: not row.by_blas)
def test_raw_ops_take_any_strides(row, layer_device):
    """A compiler may hand them tensors in a layout of its own choice, past the public function."""
    own = set()  # memory of what the raw ops made themselves: nobody else lays it out
    for op, args, results in raw_calls(row, arguments(row, layer_device)).calls:
        if not op._schema.is_mutable:
            views, copies = (with_layout(args, change, own) for change in (spread, torch.clone))
            assert_same(tensors_in(op(*views)), tensors_in(op(*copies)))
        own |= {x.data_ptr() for x in results}


@holds("default", *KINDS_OF_KERNEL, of=lambda row, how: how != "interpreted" or is_first(row))
def test_op_compiles_in_one_graph_with_its_raw_ops(row, layer_device, request):
    """For known sizes by the interpreter, and for any sizes by the others: all share what is traced."""
    nodes = set()

    def note(graph: Any, _: Any) -> Any:
        nodes.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    is_interpreted = request.node.get_closest_marker("interpreted") is not None
    compiled = torch.compile(row.ours, fullgraph=True, dynamic=not is_interpreted, backend=backend)
    given = arguments(row, layer_device)
    assert_same(evaluated(row, given, compiled), evaluated(row, given))
    expected = {f"fastlm.{op}.default" for op in (row.forward, row.backward) if op}
    assert nodes >= expected if has_kernels(row, request) else not nodes & expected


def call_of(row: Row, given: Arguments, plain: Callable[..., Any], change: Callable[..., Any] | None = None) -> Call:
    """The row as functions of its floating tensors; change may prepare these first."""
    leaves = {name: x for name, x in with_leaves(row, given).items() if torch.is_tensor(x) and x.is_floating_point()}
    others = {name: x for name, x in given.items() if name not in leaves} | row.options

    def of(function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
        return of_tensors(leaves, lambda values: function(**(change(values) if change else values), **others))

    tensors = tensors_in(leaves)
    return Call(row.ours.__name__, tensors, list(leaves), of(row.ours), of(plain), of(row.plain))


def equals_plain(row: Row, given: Arguments, check: str, change: Callable[..., Any] | None = None) -> None:
    result = outcome(call_of(row, given, row.plain, change), check)
    assert result != "refused by both"


@holds(*KERNELS, of=lambda row, how: not row.shares_work)
def test_op_and_its_gradients_equal_plain_pytorch(row, layer_device):
    equals_plain(row, arguments(row, layer_device), "backward")


@holds(*ONE_OF_EACH_DEVICE)
def test_second_derivatives_equal_plain_pytorch(row, layer_device):
    equals_plain(row, arguments(row, layer_device), "double backward")


@holds(*ONE_OF_EACH_DEVICE)
@pytest.mark.parametrize("made_of_the_first", [False, True])
def test_second_derivatives_equal_plain_pytorch_where_one_input_is_made_of_another(
    row, layer_device, made_of_the_first
):
    """No gradient may take in another's: an op that saves its inputs finds the one behind the other."""
    given = arguments(row, layer_device)
    names = trainable(row, given)

    def entangled(values: Arguments) -> Arguments:
        made, sources = (names[1:], names[:1]) if made_of_the_first else (names[:1], names[1:])
        term = sum(values[name].tanh().mean() for name in sources)
        return values | {name: values[name] + term for name in made}

    equals_plain(row, given, "double backward", entangled)


@holds(*ONE_OF_EACH_DEVICE)
def test_gradients_of_many_rows_at_once_equal_plain_pytorch(row, layer_device):
    equals_plain(row, arguments(row, layer_device), "batched gradients")


@holds(*KINDS_OF_KERNEL, of=lambda row, how: how != "interpreted" or not row.shares_work)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_op_under_autocast_equals_plain_pytorch(row, layer_device, dtype):
    equals_plain(row, arguments(row, layer_device, dtype), "autocast to bfloat16")


@holds("default", "compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_of_meta_tensors_has_the_shapes_of_plain_pytorch(row, layer_device, dtype):
    equals_plain(row, arguments(row, torch.device("meta"), dtype), "meta")


def falls_back(row: Row, given: Arguments, check: str) -> None:
    """Not only equal: what runs is that very code."""
    if row.is_exact:
        result = outcome(call_of(row, given, row.fallback or row.plain), check)
        # PyTorch's fused attention has no forward mode.
        assert result == "the same bits" or (result, check) == ("refused by both", "forward mode")
    else:
        equals_plain(row, given, check)


@holds(*KINDS_OF_KERNEL)
@pytest.mark.parametrize("transform", ["vmap", "vmap of one tensor", "vmap of gradients", "forward mode"])
def test_op_leaves_transforms_to_pytorch(row, layer_device, transform):
    falls_back(row, arguments(row, layer_device), transform)


@holds(*ONE_OF_EACH_DEVICE, of=is_first)
def test_compiled_gradient_of_torch_func_equals_plain_pytorch(row, layer_device):
    """Traced into the raw op, which has no derivative, it would silently miss a part."""
    given = arguments(row, layer_device)
    first, *_ = trainable(row, given)

    def gradient(function: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda x: sum(y.square().sum() for y in outputs_of(row, given | {first: x}, function)))

    torch.compiler.reset()
    compiled = torch.compile(gradient(row.ours), fullgraph=True, backend="aot_eager")
    assert_same([compiled(given[first])], [gradient(row.fallback or row.plain)(given[first])])


@holds("default", *KINDS_OF_KERNEL)
def test_op_leaves_float64_to_pytorch(row, layer_device):
    given = arguments(row, layer_device, torch.float64)
    assert_same(evaluated(row, given), evaluated(row, given, row.fallback or row.plain))


@holds("default")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_op_of_few_elements_on_a_cpu_is_pytorchs(row, layer_device, dtype):
    falls_back(row, arguments(row, layer_device, dtype), "backward")


class Marked(Tensor):
    """A subclass that PyTorch's functions hand on."""


@holds("default", *KINDS_OF_KERNEL)
def test_op_leaves_tensor_subclasses_to_pytorch(row, layer_device):
    given = arguments(row, layer_device)
    for name in trainable(row, given):
        marked = given | {name: given[name].as_subclass(Marked)}
        ours, plain = (outputs_of(row, marked, function) for function in (row.ours, row.fallback or row.plain))
        assert [type(x) for x in ours] == [type(x) for x in plain]
        assert_same([x.as_subclass(Tensor) for x in ours], [x.as_subclass(Tensor) for x in plain])


VIEWS = {
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "outermost last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "sliced": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],  # no longer on 16 bytes
    "one row repeated": lambda x: x[:1].expand_as(x) if x.dim() > 1 else x,
    "one column repeated": lambda x: x[..., :1].expand_as(x),
}


@holds(*KERNELS, of=lambda row, how: row.by_blas)
def test_op_of_views_equals_plain_pytorch(row, layer_device):
    equals_plain(row, arguments(row, layer_device), "not contiguous")


@holds(*KERNELS, of=lambda row, how: not row.by_blas and is_quick(row, how))
@pytest.mark.parametrize("view", VIEWS)
def test_op_of_views_equals_that_of_copies(row, layer_device, view):
    """Of upstream gradients too."""
    given = arguments(row, layer_device)
    tensors = {name: x for name, x in given.items() if torch.is_tensor(x) and x.is_floating_point()}
    views = given | {name: VIEWS[view](x) for name, x in tensors.items()}

    def of(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = with_leaves(row, {name: change(x) if name in tensors else x for name, x in views.items()})
        results = outputs_of(row, leaves)
        upstream = [change(VIEWS[view](dy)) if dy.dim() else dy for dy in Noise(0).like(results)]
        return [*results, *gradients(results, [leaves[name] for name in trainable(row, leaves)], upstream)]

    assert_same(of(lambda x: x), of(lambda x: x.clone(memory_format=torch.contiguous_format)))


@holds(*KERNELS, of=is_quick)
def test_gradients_do_not_depend_on_what_else_is_frozen(row, layer_device):
    given = arguments(row, layer_device)
    names = trainable(row, given)
    num_results = len(outputs_of(row, given))
    full = dict(zip(names, evaluated(row, given)[num_results:], strict=True))
    for trained in (*each_alone(row, given), *([names[1:], names[:-1]] if len(names) > 2 else [])):
        found = evaluated(row, given, None, trained)[num_results:]
        assert_same(found, [full[name] for name in trained])


@holds(*KINDS_OF_KERNEL, of=lambda row, how: not row.shares_work)
def test_op_does_no_work_for_what_is_frozen(row, layer_device):
    given = arguments(row, layer_device)
    calls = [raw_calls(row, given, trained).calls for trained in each_alone(row, given)]
    made = row.backward or row.forward
    for (name,), noted in zip(each_alone(row, given), calls, strict=True):
        sizes = [sum(x.numel() for x in results) for op, _, results in noted if op.name() == f"fastlm::{made}"]
        losses = len(given[name]) if "cross_entropy" in made else 0
        assert sizes[-1] <= given[name].numel() + losses


@holds(*KINDS_OF_KERNEL)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_op_without_gradients_equals_that_with(row, layer_device, mode):
    given = arguments(row, layer_device, torch.bfloat16)
    expected = outputs_of(row, with_leaves(row, given))
    with mode():
        results = outputs_of(row, with_leaves(row, given))
    assert not any(x.requires_grad for x in results)
    assert_same(results, [x.detach() for x in expected])


@holds(*KERNELS)
def test_op_leaves_its_inputs_as_they_were_and_gives_each_gradient_its_own_memory(row, layer_device):
    given = arguments(row, layer_device)
    leaves = with_leaves(row, given)
    before = [x.clone() for x in tensors_in(given)]
    results = outputs_of(row, leaves)
    upstream = Noise(0).like(results)
    torch.autograd.backward(results, upstream)
    assert_same(tensors_in(given), before)
    assert_same(upstream, Noise(0).like(results))
    owned = [leaves[name].grad for name in trainable(row, given)]
    memory = [x.untyped_storage().data_ptr() for x in (*owned, *tensors_in(given), *upstream)]
    assert len(set(memory)) == len(memory)


@holds(*KERNELS)
def test_op_gives_the_same_bits_on_every_run(row, layer_device, request):
    given = arguments(row, layer_device, N=40)
    first = evaluated(row, given)
    is_interpreted = request.node.get_closest_marker("interpreted")
    for _ in range(1 if is_interpreted else 50):
        assert_same(evaluated(row, given), first)


@holds("gpu")
def test_op_never_waits_for_the_device_and_replays_from_a_cuda_graph(row, layer_device):
    leaves = with_leaves(row, arguments(row, layer_device))
    wanted = [leaves[name] for name in trainable(row, leaves)]
    upstream = Noise(0).like(outputs_of(row, leaves))

    def step() -> list[Tensor]:
        results = outputs_of(row, leaves)
        return [*results, *gradients(results, wanted, upstream)]

    expected = step()  # loads and compiles the kernels, which a stream that is captured may not
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = step()
    torch.cuda.current_stream().wait_stream(side)
    assert_same(beside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, expected)


@holds(*ONE_OF_EACH_DEVICE)
def test_a_kept_graph_gives_the_same_gradients_again(row, layer_device):
    leaves = with_leaves(row, arguments(row, layer_device))
    results, wanted = outputs_of(row, leaves), [leaves[name] for name in trainable(row, leaves)]
    upstream = Noise(0).like(results)
    first = gradients(results, wanted, upstream, retain_graph=True)
    copies = [x.clone() for x in first]
    for x in first:
        x.zero_()  # a caller owns the gradients it was given
    assert_same(gradients(results, wanted, upstream), copies)


@holds(*ONE_OF_EACH_DEVICE)
def test_gradients_are_the_same_under_checkpointing(row, layer_device):
    def checkpointed(**given: Any) -> Any:
        return checkpoint(row.ours, use_reentrant=False, **given)

    given = arguments(row, layer_device)
    assert_same(evaluated(row, given, checkpointed), evaluated(row, given))


@holds(*KERNELS)
def test_any_result_may_go_unused(row, layer_device):
    given = arguments(row, layer_device)
    num_results = len(outputs_of(row, given))
    for used in range(num_results if num_results > 1 else 0):
        leaves = [with_leaves(row, given) for _ in range(2)]
        results = [outputs_of(row, x) for x in leaves]
        upstream = Noise(0).like(results[0])
        zeros = [dy if place == used else torch.zeros_like(dy) for place, dy in enumerate(upstream)]
        wanted = [[x[name] for name in trainable(row, given)] for x in leaves]
        alone = gradients(results[0][used : used + 1], wanted[0], upstream[used : used + 1])
        assert_same(alone, gradients(results[1], wanted[1], zeros))


@holds(*KERNELS)
@pytest.mark.parametrize(("N", "C"), [(0, 8), (6, 0)], ids=["no rows", "no columns"])
def test_op_accepts_empty_tensors(row, layer_device, N, C):
    equals_plain(row, arguments(row, layer_device, N=N, C=C), "backward")


WRONG = {
    "device": (lambda x: x.to("meta"), ValueError, "{name} is on meta, expected {device}"),
    "dtype": (lambda x: x.to(torch.int64), TypeError, "{name}.*torch.int64.*expected"),
    "shape": (lambda x: torch.cat([x, x[..., :1]], -1), ValueError, "{name}.*{columns}.*(expected|agree)"),
}


def attempted(row: Row, given: Arguments, function: Callable[..., Any]) -> list[Tensor] | str:
    try:
        return outputs_of(row, given, function)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@holds("default", "interpreted", "compiled")
@pytest.mark.parametrize("fault", WRONG)
def test_op_says_what_is_wrong_with_which_argument(row, layer_device, fault):
    change, error, message = WRONG[fault]
    given = arguments(row, layer_device)
    tensors = {name: x for name, x in given.items() if torch.is_tensor(x)}
    floats = [name for name, x in tensors.items() if x.is_floating_point()]
    for name in {"device": list(tensors)[1:], "dtype": floats, "shape": floats[1:]}[fault]:
        wrong = given | {name: change(given[name])}
        ours = attempted(row, wrong, row.ours)
        if f"{name} {fault}" in row.unchecked:
            assert str(ours) == str(attempted(row, wrong, row.plain))
            continue
        words = message.format(name=name, device=layer_device, columns=given[name].shape[-1] + 1)
        is_told = re.match(f"{error.__name__}: {row.ours.__name__}: .*{words}", str(ours)) is not None
        assert is_told == (f"{name} {fault}" not in row.untold), f"{name}: {ours}"
