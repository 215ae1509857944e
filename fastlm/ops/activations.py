"""Activations of the feed-forward layer.

    gelu(x) = x g(x)          g(x) = (1 + erf(x / sqrt(2))) / 2,   g'(x) = exp(-x^2 / 2) / sqrt(2 pi)
         or, for "tanh",      g(x) = (1 + tanh(u / 2)) / 2 = sigmoid(u),   u = 2 sqrt(2 / pi) (x + 0.044715 x^3),
                              g'(x) = sigmoid(u) (1 - sigmoid(u)) du/dx
    bias_gelu(x, bias) = gelu(x + bias)
    silu(x) = x g(x)          g(x) = sigmoid(x),   g'(x) = sigmoid(x) (1 - sigmoid(x))
    swiglu(gate, up) = silu(gate) up,   geglu(gate, up) = gelu(gate) up

    dx = dy (g(x) + x g'(x)),   dbias = sum over rows of dx
    dgate = dy up (g(gate) + gate g'(gate)),   dup = dy gate g(gate)

Only the inputs are saved: the backward pass computes everything again from them, in float32, in one pass. The row
stride is free, so the two halves of one matrix need no copy. dbias is summed as in norm.py: a fixed number of programs
have partial sums, which are then added up in a fixed order. On a CPU csrc/activations_cpu.cpp does the same.

Source: Hendrycks, Gimpel 2016, arXiv 1606.08415; Shazeer 2020, arXiv 2002.05202.
"""

# mypy: disallow-untyped-defs=False
# (only the kernels have none: Triton gives their arguments types at each launch)

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from fastlm.ops import _torch
from fastlm.ops._dispatch import TORCH, route, use_cpp
from fastlm.ops._fx import recorded
from fastlm.ops._kernel_math import exp_nonpositive, quotient
from fastlm.ops._launch import launch, launch_on
from fastlm.ops._library import as_floats
from fastlm.ops._register import apply, differentiable_gradients, is_double_backward, register
from fastlm.ops._triton import (
    DYNAMIC_SIZES,
    cdiv,
    num_row_programs,
    num_sms,
    tl,
    triton,
)

# The activations of gated linear units; csrc/activations.h counts them in this order.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}  # what torch.nn.functional.gelu calls them


def gelu_reference(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(x + bias) in plain PyTorch, in float32 (float64 for float64 input)."""
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    x = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    if approximate == "tanh":
        half = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return (x * (1 + torch.tanh(half)) / 2).to(dtype)
    return (x * (1 + torch.erf(x / math.sqrt(2))) / 2).to(dtype)


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up in plain PyTorch, in float32 (float64 for float64 input)."""
    dtype = torch.promote_types(gate.dtype, up.dtype)
    gate, up = (x.to(torch.promote_types(dtype, torch.float32)) for x in (gate, up))
    if activation == "silu":
        return (gate * torch.sigmoid(gate) * up).to(dtype)
    return (gelu_reference(gate, approximate=APPROXIMATE[activation]) * up).to(dtype)


@triton.jit
def sigmoid_and_rest(x, dtype: tl.constexpr):
    """(sigmoid(x), 1 - sigmoid(x)) for a result of this dtype.

    Neither is a difference, which would cancel, and exp sees no positive number.
    """
    small = exp_nonpositive(-tl.abs(x), dtype)
    large = quotient(1.0, 1.0 + small, dtype)
    small *= large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def gelu_gate(x, TANH: tl.constexpr, dtype: tl.constexpr):
    """(g, g') for a result of this dtype: gelu(x) = x g(x), its derivative g + x g'."""
    if TANH:
        squared = tl.minimum(x * x, 1e4)  # g' is 0 long before, and must not be multiplied by infinity
        gate, rest = sigmoid_and_rest(x * (1.5957691216057308 + 0.07135481282703227 * squared), dtype)
        return gate, gate * rest * (1.5957691216057308 + 0.21406443848109681 * squared)
    gate = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return gate, 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def gate_of(x, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """(g, g') for a result of this dtype: the activation is x g(x), its derivative g + x g'."""
    if ACTIVATION == "silu":
        gate, rest = sigmoid_and_rest(x, dtype)
        return gate, gate * rest
    return gelu_gate(x, ACTIVATION == "gelu_tanh", dtype)


@triton.jit
def block_of_program(N, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """(rows, cols, mask) of a program's block; programs side by side take the blocks of a row in turn."""
    col_blocks = tl.cdiv(C, BLOCK_C)
    rows = (tl.program_id(0) // col_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    cols = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return rows, cols, (rows < N) & (cols < C)


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def gelu_kernel(
    x_ptr,  # (N, C)
    bias_ptr,  # (C,) or None
    y_ptr,  # (N, C) contiguous
    N,
    C,
    stride_x,
    TANH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows, cols, mask = block_of_program(N, C, BLOCK_N, BLOCK_C)
    x = tl.load(x_ptr + rows * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        # Pointers of one row would have a layout of their own: narrower loads, then a conversion in shared memory.
        bias_ptr += tl.broadcast_to(cols, [BLOCK_N, BLOCK_C])
        x += tl.load(bias_ptr, mask=mask, other=0.0).to(tl.float32)
    gate, _ = gelu_gate(x, TANH, y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows * C + cols, (x * gate).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def gelu_backward_kernel(
    dy_ptr,  # (N, C)
    x_ptr,  # (N, C)
    bias_ptr,  # (C,) or None
    dx_ptr,  # (N, C) contiguous, or None if it is not needed
    dbias_ptr,  # (row_programs, C) float32, or None
    N,
    C,
    stride_dy,
    stride_x,
    TANH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    col_blocks = tl.cdiv(C, BLOCK_C)
    program, row_programs = tl.program_id(0) // col_blocks, tl.num_programs(0) // col_blocks
    cols = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    in_row = cols < C
    if bias_ptr is not None:
        bias_ptr += tl.broadcast_to(cols, [BLOCK_N, BLOCK_C])
        bias = tl.load(bias_ptr, mask=in_row, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)

    for block in tl.range(program, tl.cdiv(N, BLOCK_N), row_programs, num_stages=NUM_STAGES):
        rows = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask = (rows < N) & in_row
        dy = tl.load(dy_ptr + rows * stride_dy + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x += bias
        gate, slope = gelu_gate(x, TANH, dy_ptr.dtype.element_ty)
        dx = dy * (gate + x * slope)
        if dx_ptr is not None:
            tl.store(dx_ptr + rows * C + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            dbias += dx  # elementwise: a sum over rows in every iteration would need a barrier each time

    if dbias_ptr is not None:
        tl.store(dbias_ptr + program.to(tl.int64) * C + cols, tl.sum(dbias, axis=0)[None, :], mask=in_row)


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def glu_kernel(
    gate_ptr,  # (N, C)
    up_ptr,  # (N, C)
    y_ptr,  # (N, C) contiguous
    N,
    C,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows, cols, mask = block_of_program(N, C, BLOCK_N, BLOCK_C)
    gate = tl.load(gate_ptr + rows * stride_gate + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * stride_up + cols, mask=mask, other=0.0).to(tl.float32)
    share, _ = gate_of(gate, ACTIVATION, y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows * C + cols, (gate * share * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def glu_backward_kernel(
    dy_ptr,  # (N, C)
    gate_ptr,  # (N, C)
    up_ptr,  # (N, C)
    dgate_ptr,  # (N, C) contiguous, or None if it is not needed
    dup_ptr,  # the same
    N,
    C,
    stride_dy,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows, cols, mask = block_of_program(N, C, BLOCK_N, BLOCK_C)
    dy = tl.load(dy_ptr + rows * stride_dy + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * stride_gate + cols, mask=mask, other=0.0).to(tl.float32)
    share, slope = gate_of(gate, ACTIVATION, dy_ptr.dtype.element_ty)
    if dgate_ptr is not None:
        up = tl.load(up_ptr + rows * stride_up + cols, mask=mask, other=0.0).to(tl.float32)
        dgate = dy * up * (share + gate * slope)
        tl.store(dgate_ptr + rows * C + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    if dup_ptr is not None:
        tl.store(dup_ptr + rows * C + cols, (dy * gate * share).to(dup_ptr.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    """How much of (N, C) a program takes at a time."""

    block_n: int
    block_c: int


ELEMENTS = 2048  # of a tile: 16 per thread are two 16-byte loads of bfloat16 from each tensor
NUM_WARPS = 4
WIDTHS = (512, 256, 128, 64)  # of a tile of several rows; in a wider one too few rows share the loads of bias


def choose_tile(N: int, C: int) -> Tile:
    """The widest tile whose padding is at most a sixteenth of a row; one row is cut into pieces of ELEMENTS."""
    if N == 1:
        return Tile(1, ELEMENTS)
    fitting = [width for width in WIDTHS if cdiv(C, width) * width <= C + C // 16]
    width = fitting[0] if fitting else WIDTHS[-1]
    return Tile(ELEMENTS // width, width)


def grid_of(N: int, C: int, tile: Tile) -> tuple[int]:
    """A program for every tile."""
    return (cdiv(N, tile.block_n) * cdiv(C, tile.block_c),)


def persistent_grid(N: int, C: int, tile: Tile, num_sms: int) -> tuple[int]:
    """As many programs as run at once: each leaves a row of partial sums to add up."""
    col_blocks = cdiv(C, tile.block_c)
    return (num_row_programs(cdiv(N, tile.block_n), col_blocks, NUM_WARPS, num_sms) * col_blocks,)


def as_matrices(tensors: Sequence[Tensor], flatten: bool) -> tuple[int, int, list[Tensor], list[int]]:
    """(N, C, tensors, their row strides): each as N rows of C, a view where possible, else a copy.

    flatten makes contiguous tensors a single row: then only its end can be unaligned, not that of every row.
    """
    if flatten and all(tensor.is_contiguous() for tensor in tensors):
        size = tensors[0].numel()
        return 1, size, list(tensors), [size] * len(tensors)
    C = tensors[0].shape[-1]
    matrices = [tensor.reshape(-1, C) for tensor in tensors]
    matrices = [matrix if matrix.stride(1) == 1 else matrix.contiguous() for matrix in matrices]
    return len(matrices[0]), C, matrices, [matrix.stride(0) for matrix in matrices]


def gelu_forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """gelu(x + bias), bias (C,) or None."""
    y = gelu_output(x, bias, tanh)
    if y.numel() == 0:
        return y
    N, C, (x,), (stride_x,) = as_matrices([x], flatten=bias is None)
    if use_cpp(x):
        torch.ops.fastlm.gelu_rows(N, x, as_floats(bias), tanh, y)
        return y
    tile = choose_tile(N, C)
    with launch_on(x):
        launch(
            gelu_kernel,
            grid_of(N, C, tile)[0],
            x,
            None if bias is None else bias.contiguous(),
            y,
            N,
            C,
            stride_x,
            TANH=tanh,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            num_warps=NUM_WARPS,
        )
    return y


def gelu_output(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """What gelu_forward returns, before a kernel fills it: this alone is what a traced program needs to know."""
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """(dx, dbias); what `needs` does not ask for is empty and costs nothing."""
    dx, dbias = gelu_gradients(dy, x, bias, tanh, needs)
    if x.numel() == 0:
        return dx, dbias.zero_()
    N, C, (dy, x), (stride_dy, stride_x) = as_matrices([dy, x], flatten=bias is None)
    if use_cpp(x):
        torch.ops.fastlm.gelu_backward_rows(
            N, dy, x, as_floats(bias), tanh, dx if needs[0] else None, dbias if needs[1] else None
        )
        return dx, dbias
    tile = choose_tile(N, C)
    grid = persistent_grid(N, C, tile, num_sms(x.device)) if needs[1] else grid_of(N, C, tile)
    partials = x.new_empty(grid[0] // cdiv(C, tile.block_c), C, dtype=torch.float32) if needs[1] else None
    with launch_on(x):
        launch(
            gelu_backward_kernel,
            grid[0],
            dy,
            x,
            None if bias is None else bias.contiguous(),
            dx if needs[0] else None,
            partials,
            N,
            C,
            stride_dy,
            stride_x,
            TANH=tanh,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            NUM_STAGES=2 if needs[1] else 1,  # without dbias the loop has one iteration
            num_warps=NUM_WARPS,
        )
    return dx, dbias if partials is None else dbias.copy_(partials.sum(0))


def gelu_gradients(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """What gelu_backward returns, before a kernel fills it."""
    dx = x.new_empty(x.shape if needs[0] else 0)
    if bias is None or not needs[1]:
        return dx, dx.new_empty(0)
    return dx, bias.new_empty(bias.shape)


def glu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, one of ACTIVATIONS."""
    y = glu_output(gate, up, activation)
    if y.numel() == 0:
        return y
    N, C, (gate, up), strides = as_matrices([gate, up], flatten=True)
    if use_cpp(gate):
        torch.ops.fastlm.glu_rows(N, gate, up, ACTIVATIONS.index(activation), y)
        return y
    tile = choose_tile(N, C)
    with launch_on(gate):
        launch(
            glu_kernel,
            grid_of(N, C, tile)[0],
            gate,
            up,
            y,
            N,
            C,
            *strides,
            ACTIVATION=activation,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            num_warps=NUM_WARPS,
        )
    return y


def glu_output(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """What glu_forward returns, before a kernel fills it."""
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """(dgate, dup); what `needs` does not ask for is empty and costs nothing."""
    dgate, dup = glu_gradients(dy, gate, up, activation, needs)
    if gate.numel() == 0:
        return dgate, dup
    N, C, tensors, strides = as_matrices([dy, gate, up], flatten=True)
    if use_cpp(gate):
        torch.ops.fastlm.glu_backward_rows(
            N, *tensors, ACTIVATIONS.index(activation), dgate if needs[0] else None, dup if needs[1] else None
        )
        return dgate, dup
    tile = choose_tile(N, C)
    with launch_on(gate):
        launch(
            glu_backward_kernel,
            grid_of(N, C, tile)[0],
            *tensors,
            dgate if needs[0] else None,
            dup if needs[1] else None,
            N,
            C,
            *strides,
            ACTIVATION=activation,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            num_warps=NUM_WARPS,
        )
    return dgate, dup


def glu_gradients(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """What glu_backward returns, before a kernel fills it."""
    return gate.new_empty(gate.shape if needs[0] else 0), up.new_empty(up.shape if needs[1] else 0)


gelu_op = register("gelu(Tensor x, Tensor? bias, bool tanh) -> Tensor", gelu_forward, gelu_output)
gelu_backward_op = register(
    "gelu_backward(Tensor dy, Tensor x, Tensor? bias, bool tanh, bool[2] needs) -> (Tensor, Tensor)",
    gelu_backward,
    gelu_gradients,
)
glu_op = register("glu(Tensor gate, Tensor up, str activation) -> Tensor", glu_forward, glu_output)
glu_backward_op = register(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, str activation, bool[2] needs) -> (Tensor, Tensor)",
    glu_backward,
    glu_gradients,
)


class GeluFunction(torch.autograd.Function):
    """Joins the two raw ops of gelu into one differentiable function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        return gelu_op(x, bias, approximate == "tanh")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if is_double_backward():
            gradients = differentiable_gradients(
                lambda x, bias: gelu_reference(x, bias, ctx.approximate), (x, bias), needs, (dy,)
            )
        else:
            gradients = gelu_backward_op(dy, x, bias, ctx.approximate == "tanh", needs)
        return *(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)), None


class GluFunction(torch.autograd.Function):
    """Joins the two raw ops of a gated linear unit into one differentiable function."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return glu_op(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if is_double_backward():
            gradients = differentiable_gradients(
                lambda gate, up: glu_reference(gate, up, ctx.activation), (gate, up), needs, (dy,)
            )
        else:
            gradients = glu_backward_op(dy, gate, up, ctx.activation, needs)
        return *(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)), None


def check_approximate(op: str, approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate is {approximate!r}, expected 'none' or 'tanh'")


def check_is_tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}, expected a tensor")


def check_gate_and_up(op: str, gate: Tensor, up: Tensor) -> None:
    check_is_tensor(op, "gate", gate)
    check_is_tensor(op, "up", up)
    if gate.shape != up.shape:
        raise ValueError(f"{op}: gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}, expected one shape")
    if gate.device != up.device:
        raise ValueError(f"{op}: up is on {up.device}, expected {gate.device}, where gate is; move it there")


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit, elementwise.

    input        any shape         float32, float16 or bfloat16 for the kernels; any other runs PyTorch's code
    approximate  "none" or "tanh"
    returns      shape and dtype of input

    Equals torch.nn.functional.gelu. Raises ValueError for another approximate.
    Source: Hendrycks, Gimpel 2016, arXiv 1606.08415.
    """
    if isinstance(input, Proxy):
        return recorded(gelu, locals())
    check_approximate("gelu", approximate)
    if route(f"gelu {approximate}", (input,)).implementation != TORCH:
        return apply(GeluFunction, input, None, approximate)
    return _torch.gelu(input, approximate=approximate)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise.

    gate, up  any shape, the same    float32, float16 or bfloat16 for the kernels; any other runs PyTorch's code.
                                     The halves of one tensor, as chunk gives them, are not copied
    returns   that shape             the dtype that PyTorch promotes them to

    Raises ValueError if the shapes or devices differ.
    Source: Shazeer 2020, arXiv 2002.05202.
    """
    if isinstance(gate, Proxy) or isinstance(up, Proxy):
        return recorded(swiglu, locals())
    check_gate_and_up("swiglu", gate, up)
    if route("swiglu", (gate, up)).implementation != TORCH:
        return apply(GluFunction, gate, up, "silu")
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up, elementwise.

    gate, up     any shape, the same    float32, float16 or bfloat16 for the kernels; any other runs PyTorch's code.
                                        The halves of one tensor, as chunk gives them, are not copied
    approximate  "none" or "tanh"
    returns      that shape             the dtype that PyTorch promotes them to

    Raises ValueError if the shapes or devices differ, or for another approximate.
    Source: Shazeer 2020, arXiv 2002.05202.
    """
    if isinstance(gate, Proxy) or isinstance(up, Proxy):
        return recorded(geglu, locals())
    check_approximate("geglu", approximate)
    check_gate_and_up("geglu", gate, up)
    if route("geglu", (gate, up)).implementation != TORCH:
        return apply(GluFunction, gate, up, "gelu" if approximate == "none" else "gelu_tanh")
    return _torch.gelu(gate, approximate=approximate) * up


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias).

    x            (..., C)          float32, float16 or bfloat16 for the kernels; any other runs PyTorch's code
    bias         (C,)              any of those
    approximate  "none" or "tanh"
    returns      (..., C)          the dtype that PyTorch promotes them to

    Raises ValueError if the shape or device of bias disagrees, or for another approximate.
    Source: Hendrycks, Gimpel 2016, arXiv 1606.08415.
    """
    if isinstance(x, Proxy) or isinstance(bias, Proxy):
        return recorded(bias_gelu, locals())
    check_approximate("bias_gelu", approximate)
    check_is_tensor("bias_gelu", "x", x)
    check_is_tensor("bias_gelu", "bias", bias)
    if x.dim() == 0:
        raise ValueError("bias_gelu: x has shape (), expected (..., C)")
    if bias.shape != x.shape[-1:]:
        expected = f"expected {tuple(x.shape[-1:])} to match the last dimension of x"
        raise ValueError(f"bias_gelu: bias has shape {tuple(bias.shape)}, {expected}")
    if bias.device != x.device:
        raise ValueError(f"bias_gelu: bias is on {bias.device}, expected {x.device}, where x is; move it there")
    if route("bias_gelu", (x, bias)).implementation != TORCH:
        return apply(GeluFunction, x, bias, approximate)
    return _torch.gelu(x + bias, approximate=approximate)
