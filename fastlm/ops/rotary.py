"""Rotary position embedding: pairs of features turn by an angle that grows with the position.

    y_1 = x_1 cos - x_2 sin,    y_2 = x_2 cos + x_1 sin

A pair is (x_i, x_{i + R/2}) of the first R features, or (x_2i, x_2i+1) if interleaved; features from R on pass through.
Gradient: the same rotation by the negative angle, so only cos and sin are saved.
Source: Su et al. 2021, arXiv 2104.09864.
"""

from typing import Any

import torch
from torch import Tensor


def apply_rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate x (..., H, D) by cos, sin that broadcast to (..., H, R / 2), in plain PyTorch, float32 inside."""
    R = 2 * cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = (half.to(dtype) for half in _halves(x[..., :R], interleaved))
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    y = torch.stack((y1, y2), dim=-1).flatten(-2) if interleaved else torch.cat((y1, y2), dim=-1)
    return torch.cat((y.to(x.dtype), x[..., R:]), dim=-1)


def _halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second member of every pair, as views."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    middle = x.shape[-1] // 2
    return x[..., :middle], x[..., middle:]


# Raw ops


def _rotate_into(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    """y = rotated x, for y apart from x; one pass per product and no temporary at full precision."""
    R = 2 * cos.shape[-1]
    sign = -1 if inverse else 1
    if x.dtype in (torch.float16, torch.bfloat16):  # products of rounded values would be rounded again
        y.copy_(apply_rotary_reference(x, cos, sin * sign, interleaved))
        return
    (x1, x2), (y1, y2) = _halves(x[..., :R], interleaved), _halves(y[..., :R], interleaved)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    y[..., R:].copy_(x[..., R:])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rotate_into(y, x, cos, sin, interleaved, inverse)
    return y


def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    x.copy_(_rotate(x, cos, sin, interleaved, inverse))


def _rotate_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_library = torch.library.Library("fastlm", "FRAGMENT")
_library.define("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor")
_library.define("rotary_(Tensor(a!) x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> ()")
for _device in ("CPU", "CUDA"):
    _library.impl("rotary", _rotate, _device)
    _library.impl("rotary_", _rotate_in_place, _device)
torch.library.register_fake("fastlm::rotary", _rotate_fake)
torch.library.register_fake("fastlm::rotary_", lambda x, cos, sin, interleaved, inverse: None)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, inplace: bool
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.flags = interleaved, inverse
        if not inplace:
            return torch.ops.fastlm.rotary(x, cos, sin, interleaved, inverse)
        x = x.detach()  # shares x's version counter, so autograd still refuses another user of the overwritten x
        torch.ops.fastlm.rotary_(x, cos, sin, interleaved, inverse)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        interleaved, inverse = ctx.flags
        return _Rotary.apply(dy, *ctx.saved_tensors, interleaved, not inverse, False), None, None, None, None, None


# Public function


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

    q, k       (B, T, H, D) or (total, H, D); k may be None and may have other heads
    cos, sin   (positions, R / 2) with R <= D: the rest of the features passes through
    positions  (B, T) or (total,) rows of cos and sin; None counts from 0 along the tokens
    inplace    overwrite q and k; gradients still flow, and autograd refuses whoever else needs the old values
    returns    (q, k) rotated, k None if it was

    Raises ValueError if shapes disagree.
    """
    cos, sin = _angles(q, cos, sin, positions)
    rotated = [None if x is None else _rotated(x, cos, sin, interleaved, inplace) for x in (q, k)]
    assert rotated[0] is not None, "q is never None"
    return rotated[0], rotated[1]


def _angles(q: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin of every token, broadcast over heads: (..., T, 1, R / 2)."""
    tokens = q.shape[:-2]
    if q.dim() not in (3, 4):
        raise ValueError(f"apply_rotary: q has shape {tuple(q.shape)}, expected (B, T, H, D) or (total, H, D)")
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > q.shape[-1]:
        shapes = f"cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        raise ValueError(f"apply_rotary: {shapes}, expected both (positions, R / 2) with R <= {q.shape[-1]}")
    if positions is None:
        if len(cos) < tokens[-1]:
            raise ValueError(f"apply_rotary: cos has {len(cos)} positions, q has {tokens[-1]} tokens")
        cos, sin = cos[: tokens[-1]], sin[: tokens[-1]]
    elif positions.shape != tokens:
        raise ValueError(f"apply_rotary: positions has shape {tuple(positions.shape)}, expected {tuple(tokens)} as q")
    else:
        cos, sin = cos[positions], sin[positions]
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inplace: bool) -> Tensor:
    if cos.requires_grad or sin.requires_grad:
        return apply_rotary_reference(x, cos, sin, interleaved)
    return _Rotary.apply(x, cos, sin, interleaved, False, inplace)
