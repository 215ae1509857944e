"""Rotary embedding of q and k, forward and backward: large inputs (bandwidth), and small ones (host cost)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Case, Provider, Run, Size, Tensors, UnavailableError, Work, import_peer

CHECKED_TOKENS = 256


class Shape(NamedTuple):
    B: int
    T: int
    H: int  # heads of q
    Hk: int  # heads of k
    D: int
    interleaved: bool = False


SMALL = Shape(1, 8, 2, 2, 64)


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        shapes = [Shape(4, 512, 12, 12, 64), Shape(1, 128, 12, 12, 64), SMALL]
        return [_case(shape, device, torch.float32) for shape in shapes]
    shapes = [Shape(16, 4096, 12, 12, 64), Shape(8, 4096, 32, 8, 128), Shape(8, 4096, 32, 8, 128, True), SMALL]
    return [_case(shape, device, torch.bfloat16) for shape in shapes]


def _case(shape: Shape, device: torch.device, dtype: torch.dtype) -> Case:
    B, T, H, Hk, D, interleaved = shape
    element = dtype.itemsize
    kind = f"{str(dtype).removeprefix('torch.')}{' interleaved' * interleaved}, forward + backward"
    features = B * T * (H + Hk) * D
    checked = slice(None, None, max(1, T // CHECKED_TOKENS))

    def sample(outputs: Tensors) -> Tensors:
        return {name: tensor[:, checked] for name, tensor in outputs.items()}

    def inputs() -> Tensors:
        """q and k as views of one product, and gradients that attention gives."""
        q, k, _ = torch.randn(B, T, H + 2 * Hk, D, device=device).to(dtype).split([H, Hk, Hk], dim=2)
        dq, dk = (torch.randn(x.shape, device=device).to(dtype) for x in (q, k))
        angles = torch.arange(T)[:, None] * 1e4 ** -torch.linspace(0, 1, D // 2)
        cos, sin = angles.cos().to(device), angles.sin().to(device)
        return {"q": q.requires_grad_(), "k": k.requires_grad_(), "dq": dq, "dk": dk, "cos": cos, "sin": sin}

    def torchs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(_rotated(x, cos[:, None], sin[:, None], interleaved) for x in (q, k))

    return Case(
        name=f"B{B} T{T} heads {H}+{Hk} D{D} {kind}",
        device=device,
        inputs=inputs,
        truth=lambda given: sample(_gradients_of(torchs)(_double(given))),
        sample=sample,
        reference="torch eager",
        providers=[
            Provider("fastlm", lambda: _fastlm(interleaved), "ours"),
            Provider("torch eager", lambda: _gradients_of(torchs)),
            Provider("torch.compile", lambda: _gradients_of(torch.compile(torchs, dynamic=False))),
            Provider("liger", lambda: _liger(interleaved, device), mutates=("dq", "dk")),
        ],
        # Forward reads q and k and writes them rotated; backward does the same with their gradients. cos and sin are
        # the same for every head and every row of the batch, and nothing beside them.
        work=()
        if shape == SMALL
        else (Work("byte", 4.0 * features * element, f"4 B T (H + Hk) D {element} bytes: q, k in and out, twice"),),
        size=Size(kind, features, "elements of q and k"),
        is_small=shape == SMALL,
    )


def _double(given: Tensors) -> Tensors:
    return {name: tensor.double().requires_grad_(name in ("q", "k")) for name, tensor in given.items()}


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As PyTorch's users write it, but in float32, as the angles are."""
    x1, x2 = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    parts = (x1 * cos - x2 * sin, x2 * cos + x1 * sin)
    return (torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)).to(x.dtype)


def _gradients_of(function: Callable[..., tuple[Tensor, Tensor]]) -> Run:
    def run(given: Tensors) -> Tensors:
        q, k = given["q"], given["k"]
        outputs = function(q, k, given["cos"], given["sin"])
        dq, dk = torch.autograd.grad(outputs, (q, k), (given["dq"], given["dk"]))
        return {"q": outputs[0], "k": outputs[1], "dq": dq, "dk": dk}

    return run


def _fastlm(interleaved: bool) -> Run:
    from fastlm.ops import apply_rotary

    return _gradients_of(lambda q, k, cos, sin: apply_rotary(q, k, cos, sin, interleaved=interleaved))


def _liger(interleaved: bool, device: torch.device) -> Run:
    liger = import_peer("liger_kernel.transformers.functional", "liger-kernel", device)
    if interleaved:
        raise UnavailableError("not timed: it has no interleaved layout")

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """It takes heads before tokens, expects each angle twice, and overwrites gradients that are contiguous."""
        cos, sin = (torch.cat([x, x], dim=-1)[None] for x in (cos, sin))
        turned = liger.liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return tuple(x.transpose(1, 2) for x in turned)

    return _gradients_of(rope)
