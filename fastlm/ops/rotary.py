"""Rotary position embedding: pairs of features are rotated by an angle that grows with the position.

    y_1 = x_1 cos - x_2 sin,    y_2 = x_2 cos + x_1 sin

A pair is (x_i, x_{i + R/2}) of the first R features, or (x_2i, x_2i+1) if interleaved; features from R on pass through.
The gradient is the same rotation by the negative angle: one kernel computes both, and only cos, sin and the positions
are saved. One launch rotates q and k, views of any strides, and looks up cos and sin by the position of each token.
On a CPU csrc/rotary_cpu.cpp does the same.

Source: Su et al. 2021, arXiv 2104.09864.
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

from fastlm.ops._dispatch import TORCH, is_plain_tensor, route, use_cpp
from fastlm.ops._fx import recorded
from fastlm.ops._launch import launch, launch_on
from fastlm.ops._register import LIBRARY, apply, is_double_backward, register
from fastlm.ops._triton import DYNAMIC_SIZES, Heads, cdiv, heads_of, next_power_of_2, tl, triton

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def apply_rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate x (..., H, D) by cos, sin that broadcast to (..., H, R / 2), in plain PyTorch, float32 inside."""
    R = 2 * cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    is_whole = x.shape[-1] == R  # a slice or a concatenation costs a small x as much as a product
    pairs, rest = (x, None) if is_whole else x.split((R, x.shape[-1] - R), dim=-1)
    x1, x2 = (half.to(dtype) for half in halves(pairs, interleaved))
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    # Not flatten, for which is_grads_batched has no rule.
    y = torch.stack((y1, y2), dim=-1).reshape(pairs.shape) if interleaved else torch.cat((y1, y2), dim=-1)
    y = y.to(x.dtype)
    return y if rest is None else torch.cat((y, rest), dim=-1)


def halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second member of every pair, as views."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    x1, x2 = x.chunk(2, dim=-1)
    return x1, x2


def angles_of_tokens(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin of every token of x, broadcast over heads: (..., T, 1, R / 2)."""
    T = x.shape[-3]
    if positions is not None:
        # Not cos[positions], which counts negative ones from the end.
        cos, sin = (F.embedding(positions.long(), table) for table in (cos, sin))
    elif cos.shape[0] != T:
        cos, sin = cos[:T], sin[:T]
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


class Rotation(NamedTuple):
    """q or k, and where it is written."""

    heads: Heads | None  # None without k: Triton cannot compare a group that holds a None with None
    num_heads: Any
    y_ptr: Any  # (B, T, num_heads, D) contiguous, or None to overwrite the heads


class Angles(NamedTuple):
    """The tables of the angles, and which row of them each token takes."""

    cos_ptr: Any  # (P, R / 2)
    sin_ptr: Any
    positions_ptr: Any  # (B, T) contiguous, or None to count from 0


@triton.jit
def rotate_heads(
    rotation,
    cos,  # (rows, BLOCK_R) float32
    sin,  # (rows, BLOCK_R) float32
    batch,  # (rows, 1) int64
    token,  # (rows, 1) int64
    head,  # (rows, 1)
    in_bounds,  # (rows, 1): whether that token exists
    T,
    R: tl.constexpr,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    IN_PLACE: tl.constexpr = rotation.y_ptr is None
    heads = rotation.heads
    in_bounds = in_bounds & (head < rotation.num_heads)
    x_ptr = heads.ptr + (batch * heads.stride_batch + token * heads.stride_token + head * heads.stride_head)
    y_ptr = x_ptr if IN_PLACE else rotation.y_ptr + ((batch * T + token) * rotation.num_heads + head) * D
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_R)[None, :]
        x = tl.load(x_ptr + cols, mask=in_bounds & (cols < R), other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, [x.shape[0], BLOCK_R, 2]))
        y = tl.reshape(tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin), x.shape)
        tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=in_bounds & (cols < R))
    else:
        cols = tl.arange(0, BLOCK_R)[None, :]
        mask = in_bounds & (cols < R // 2)
        x1 = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + R // 2 + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + cols, (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_ptr + R // 2 + cols, (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty), mask=mask)
    if R < D and not IN_PLACE:
        rest = R + tl.arange(0, BLOCK_REST)[None, :]
        mask = in_bounds & (rest < D)
        tl.store(y_ptr + rest, tl.load(x_ptr + rest, mask=mask), mask=mask)


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def rotary_kernel(
    q,
    k,
    angles,
    B,
    T,
    P,
    STRIDE_ANGLES: tl.constexpr,  # constant, because Triton would not know that 40 or 56 keeps rows aligned
    R: tl.constexpr,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    q_blocks = tl.cdiv(q.num_heads, BLOCK_H)
    head_blocks = q_blocks if k.heads is None else q_blocks + tl.cdiv(k.num_heads, BLOCK_H)
    head_block = tl.program_id(0) % head_blocks  # programs side by side take the heads of the same tokens
    row = tl.arange(0, BLOCK_T * BLOCK_H)[:, None]
    index = (tl.program_id(0) // head_blocks).to(tl.int64) * BLOCK_T + row // BLOCK_H
    batch, token = index // T, index % T
    in_bounds = batch < B

    position = token
    if angles.positions_ptr is not None:
        position = tl.load(angles.positions_ptr + index, mask=in_bounds, other=0).to(tl.int64)
    valid_position = in_bounds & (position >= 0) & (position < P)
    pairs = tl.arange(0, BLOCK_R)[None, :]
    mask, angle = valid_position & (pairs < R // 2), position * STRIDE_ANGLES + pairs
    # A position outside the tables must not be read, and NaN shows the mistake.
    cos = tl.load(angles.cos_ptr + angle, mask=mask, other=float("nan")).to(tl.float32)
    sin = tl.load(angles.sin_ptr + angle, mask=mask, other=float("nan")).to(tl.float32)
    if INVERSE:
        sin = -sin

    head = row % BLOCK_H
    if head_block < q_blocks:
        head = head_block * BLOCK_H + head
        rotate_heads(q, cos, sin, batch, token, head, in_bounds, T, R, D, INTERLEAVED, BLOCK_R, BLOCK_REST)
    elif k.heads is not None:
        head = (head_block - q_blocks) * BLOCK_H + head
        rotate_heads(k, cos, sin, batch, token, head, in_bounds, T, R, D, INTERLEAVED, BLOCK_R, BLOCK_REST)


class Tile(NamedTuple):
    """What one program takes: tokens, heads, and pairs of features of each head."""

    block_t: int
    block_h: int
    block_r: int


PAIRS = 1024  # of a tile: 8 per thread are two 16-byte loads of bfloat16
NUM_WARPS = 4
BLOCK_H = 4  # heads lie side by side: with 64 features of bfloat16, four of them are 512 bytes


def choose_tile(R: int) -> Tile:
    """All pairs of BLOCK_H heads, and as many tokens as fill the tile."""
    block_r = max(16, next_power_of_2(R // 2))
    return Tile(max(1, PAIRS // (BLOCK_H * block_r)), BLOCK_H, block_r)


def rotate_into(
    outputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Fills outputs with the rotated tensors, q alone or q and k; outputs are contiguous, or the tensors themselves."""
    if cos.stride(1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    if use_cpp(tensors[0]):
        positions = None if positions is None else positions.to(torch.int64).contiguous()
        for x, y in zip(tensors, outputs, strict=True):
            x, y = (tensor if tensor.dim() == 4 else tensor[None] for tensor in (x, y))
            torch.ops.fastlm.rotary_rows(x, cos, sin, positions, interleaved, inverse, y)
        return
    R = 2 * cos.shape[1]
    q = tensors[0]
    B = len(q) if q.dim() == 4 else 1
    T, _, D = q.shape[-3:]
    in_place = outputs[0] is q
    rotations = [
        Rotation(heads_of(x), x.shape[-2], None if in_place else y) for x, y in zip(tensors, outputs, strict=True)
    ]
    tile = choose_tile(R)
    head_blocks = sum(cdiv(rotation.num_heads, tile.block_h) for rotation in rotations)
    with launch_on(q):
        launch(
            rotary_kernel,
            cdiv(B * T, tile.block_t) * head_blocks,
            rotations[0],
            rotations[1] if len(rotations) > 1 else Rotation(None, None, None),
            Angles(cos, sin, None if positions is None else positions.contiguous()),
            B,
            T,
            len(cos),
            STRIDE_ANGLES=cos.stride(0),
            R=R,
            D=D,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            BLOCK_T=tile.block_t,
            BLOCK_H=tile.block_h,
            BLOCK_R=tile.block_r,
            BLOCK_REST=max(16, next_power_of_2(D - R)),
            num_warps=NUM_WARPS,
        )


def rotate_reference(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> list[Tensor]:
    """The rotated tensors, by the reference: autograd and every transform can follow it."""
    cos, sin = angles_of_tokens(tensors[0], cos, sin, positions)
    return [apply_rotary_reference(x, cos, -sin if inverse else sin, interleaved) for x in tensors]


def rotate(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> list[Tensor]:
    """The rotated tensors, by the kernel where it supports them."""
    has_elements = cos.numel() and any(map(Tensor.numel, tensors))
    if has_elements and route("rotary", (*tensors, cos, sin)).implementation != TORCH:
        outputs = rotated_outputs(tensors, cos, sin, positions, interleaved, inverse)
        tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
        rotate_into(outputs, tensors, cos, sin, positions, interleaved, inverse)
        return outputs
    return rotate_reference(tensors, cos, sin, positions, interleaved, inverse)


def rotated_outputs(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> list[Tensor]:
    """What rotate returns, before anything fills it: this alone is what a traced program needs to know."""
    return [x.new_empty(x.shape) for x in tensors]


def rotate_in_place(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> None:
    """Overwrites the tensors with the rotated ones."""
    if (
        cos.numel()
        and route("rotary", (*tensors, cos, sin)).implementation != TORCH
        and all(map(can_be_overwritten, tensors))
    ):
        rotate_into(tensors, tensors, cos, sin, positions, interleaved, inverse)
        torch.autograd.graph.increment_version(tensors)  # as copy_ does: a kernel alone would not be noticed
        return
    for x, y in zip(tensors, rotate(tensors, cos, sin, positions, interleaved, inverse), strict=True):
        x.copy_(y)


def can_be_overwritten(x: Tensor) -> bool:
    """Whether heads are contiguous, and no dimension is expanded, which copy_ refuses."""
    return x.numel() > 0 and x.stride(-1) == 1 and 0 not in x.stride()


rotary_op = register(
    "rotary(Tensor[] tensors, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> Tensor[]",
    rotate,
    rotated_outputs,
    keys=["CompositeExplicitAutograd"],  # on any device: the kernels support two, the reference all
)
LIBRARY.impl("rotary", rotate_reference, "Batched")  # is_grads_batched=True passes many upstream gradients as one
rotary_in_place_op = register(
    "rotary_(Tensor(a!)[] tensors, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> ()",
    rotate_in_place,
    lambda *arguments: None,
    keys=["CompositeExplicitAutograd"],
)


class RotaryFunction(torch.autograd.Function):
    """The raw op as a differentiable function of q, or of q and k."""

    @staticmethod
    def forward(
        ctx: Any, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        return tuple(rotary_op(tensors, cos, sin, positions, interleaved, False))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[-len(upstream) :]
        found = iter(rotated_back(ctx, [dy for dy, needed in zip(upstream, needs, strict=True) if needed]))
        return None, None, None, None, *[next(found) if needed else None for needed in needs]


class RotaryInPlaceFunction(torch.autograd.Function):
    """Tells autograd that x becomes the rotated x; the raw op overwrites it after that.

    It takes one tensor, as the first argument: autograd allows no more to a function that changes a view, and q is one
    of a packed qkv.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return rotated_back(ctx, [dy])[0], None, None, None, None


def rotated_back(ctx: Any, upstream: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients of the inputs, given those of the results."""
    cos, sin, positions = ctx.saved_tensors
    gradients_of = rotate_reference if is_double_backward() else rotary_op
    return gradients_of(upstream, cos, sin, positions, ctx.interleaved, True)


def overwrite(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Sequence[Tensor]:
    """The tensors, rotated in place; they are the results for autograd too, as of PyTorch's in-place ops."""
    angles = cos, sin, positions, interleaved
    if torch.compiler.is_compiling() or not is_plain_tensor(*tensors, cos, sin) or not lie_apart(*tensors):
        return [x.copy_(y) for x, y in zip(tensors, rotated(tensors, *angles), strict=True)]
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                RotaryInPlaceFunction.apply(x, *angles)
    rotary_in_place_op([x.detach() for x in tensors], *angles, False)  # detached, they share the version counters
    return tensors


def rotated(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Sequence[Tensor]:
    """New tensors, by the raw op, or by PyTorch's code where that is faster or autograd needs it."""
    by_pytorch = route("rotary", (*tensors, cos, sin)).implementation == TORCH
    if by_pytorch or cos.requires_grad or sin.requires_grad:
        return rotate_reference(tensors, cos, sin, positions, interleaved, False)
    return apply(RotaryFunction, cos, sin, positions, interleaved, *tensors)


def lie_apart(x: Tensor, *others: Tensor) -> bool:
    """Whether x and the other tensor, if there is one, certainly share no element."""
    if not others or x.untyped_storage().data_ptr() != others[0].untyped_storage().data_ptr():
        return True
    first, second = sorted((x, *others), key=Tensor.storage_offset)
    distance = second.storage_offset() - first.storage_offset()
    strides = {*first.stride(), *second.stride()}
    # Cut the storage into periods: the tensors are disjoint if each keeps to a part of its own in every period.
    return distance >= extent(first, math.inf) or any(
        all(stride < period or stride % period == 0 for stride in strides)
        and extent(first, period) <= distance % period <= period - extent(second, period)
        for period in strides
        if period
    )


def extent(x: Tensor, period: float) -> int:
    """Elements from the first to behind the last, along the dimensions whose stride is below the period."""
    steps = zip(x.shape, x.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps if stride < period)


def check_arguments(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    tokens = q.shape[:-2]
    if q.dim() not in (3, 4):
        raise ValueError(f"apply_rotary: q has shape {tuple(q.shape)}, expected (B, T, H, D) or (total, H, D)")
    if k is not None and (k.shape[:-2] != tokens or k.shape[-1] != q.shape[-1]):
        expected = f"expected that of q but for the heads, {tuple(q.shape)}"
        raise ValueError(f"apply_rotary: k has shape {tuple(k.shape)}, {expected}")
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > q.shape[-1]:
        shapes = f"cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        raise ValueError(f"apply_rotary: {shapes}, expected both (positions, R / 2) with R <= {q.shape[-1]}")
    if positions is None and cos.shape[0] < tokens[-1]:
        raise ValueError(f"apply_rotary: cos has {cos.shape[0]} positions, q has {tokens[-1]} tokens")
    if positions is not None and positions.shape != tokens:
        raise ValueError(f"apply_rotary: positions has shape {tuple(positions.shape)}, expected {tuple(tokens)} as q")
    for name, tensor in (("k", k), ("cos", cos), ("sin", sin), ("positions", positions)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"apply_rotary: {name} is on {tensor.device}, expected {q.device}, where q is; move it")
    for name, tensor in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"apply_rotary: {name} is {tensor.dtype}, expected a floating-point tensor")
    if positions is not None and positions.dtype not in INTEGERS:
        raise TypeError(f"apply_rotary: positions is {positions.dtype}, expected integers")


def apply_rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotate q and k by the angles of their positions.

    q, k       (B, T, H, D) or (total, H, D)  float32, float16 or bfloat16 for the kernel, not copied if their last
                                              dimension is contiguous. k may be None, or have a different H
    cos, sin   (P, R / 2) with R <= D         any of those; the features from R on pass through
    positions  (B, T) or (total,) integers    rows of cos and sin; None counts from 0 along the tokens
    inplace    overwrite q and k, unless cos or sin require a gradient: they become the results, as of PyTorch's
               in-place ops, and autograd raises if another op saved the old values. What q and k share is rotated once
    returns    (q, k) rotated, of their shapes and dtypes, float32 inside; k None if it was

    A position outside of cos and sin gives NaN where the Triton kernel runs, and IndexError elsewhere. Raises
    ValueError if shapes or devices disagree, TypeError for a dtype. Source: Su et al. 2021, arXiv 2104.09864.
    """
    if isinstance(q, Proxy) or isinstance(k, Proxy) or isinstance(cos, Proxy) or isinstance(positions, Proxy):
        return recorded(apply_rotary, locals())
    check_arguments(q, k, cos, sin, positions)
    tensors = (q,) if k is None or (inplace and k is q) else (q, k)
    if inplace and not (cos.requires_grad or sin.requires_grad):
        results = overwrite(tensors, cos, sin, positions, interleaved)
    else:
        results = rotated(tensors, cos, sin, positions, interleaved)
    return results[0], None if k is None else results[-1]
