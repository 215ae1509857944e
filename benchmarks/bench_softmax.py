"""Softmax: plain rows (bandwidth), causal scores of attention, and small ones (what a call costs the host)."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Provider, Run, Size, Tensors, UnavailableError, Work, import_peer

CHECKED_ROWS = 256


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        fp32 = torch.float32
        return [
            _case(device, (4096, 1024), fp32),
            _case(device, (256, 1024), fp32),
            _case(device, (16, 256, 256), fp32, True),
            _case(device, (8, 64), fp32),
        ]
    bf16 = torch.bfloat16
    rows = [(65536, 1024), (16384, 4096), (8192, 16384), (4096, 50304)]
    return [
        *(_case(device, shape, bf16) for shape in rows),
        _case(device, (96, 1024, 1024), bf16, True),
        _case(device, (8, 64), bf16),
    ]


def _case(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, causal: bool = False) -> Case:
    def inputs() -> Tensors:
        x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        return {"x": x.requires_grad_(), "dy": dy}

    def sample(outputs: Tensors) -> Tensors:
        rows = slice(None, None, max(1, math.prod(shape[:-1]) // CHECKED_ROWS))
        return {name: tensor.flatten(0, -2)[rows] for name, tensor in outputs.items()}

    torch_softmax = functools.partial(_torch_softmax, causal=causal)
    large = len(shape) > 2 or shape[0] > 8
    size = float(torch.Size(shape).numel() * dtype.itemsize)
    kind = f"{str(dtype).removeprefix('torch.')}{', causal' if causal else ''}, forward + backward"
    return Case(
        name=f"{' x '.join(map(str, shape))} {kind}",
        device=device,
        inputs=inputs,
        truth=lambda given: sample(
            _gradient_of(torch_softmax)({"x": given["x"].double().requires_grad_(), "dy": given["dy"].double()})
        ),
        sample=sample,
        reference="torch eager",
        providers=[
            Provider("fastlm", lambda: _fastlm(causal), "ours"),
            Provider("torch eager", lambda: _gradient_of(torch_softmax)),
            Provider("torch.compile", lambda: _gradient_of(torch.compile(torch_softmax, dynamic=False))),
            Provider("liger", lambda: _liger(device, causal)),
            Provider("quack", lambda: _quack(device, causal)),
        ],
        # Forward reads x and writes y; backward reads y and dy and writes dx. Causality spares reads, but no writes.
        work=(Work("byte", 5.0 * size, f"5 N C {dtype.itemsize} bytes: x, y; y, dy, dx"),) if large else (),
        size=Size(kind, math.prod(shape), "elements"),
        is_small=not large,
    )


def _torch_softmax(x: Tensor, causal: bool) -> Tensor:
    """As PyTorch's users write it."""
    if causal:
        hidden = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        x = x.masked_fill(hidden, float("-inf"))
    return F.softmax(x, -1)


def _gradient_of(softmax) -> Run:
    def run(given: Tensors) -> Tensors:
        y = softmax(given["x"])
        (dx,) = torch.autograd.grad(y, given["x"], given["dy"])
        return {"y": y, "dx": dx}

    return run


def _fastlm(causal: bool) -> Run:
    from fastlm.ops import softmax

    return _gradient_of(lambda x: softmax(x, -1, causal=causal))


def _liger(device: torch.device, causal: bool) -> Run:
    liger = import_peer("liger_kernel.transformers.functional", "liger-kernel", device)
    if causal:
        raise UnavailableError("not timed: it has no causal softmax")
    return _gradient_of(liger.liger_softmax)


def _quack(device: torch.device, causal: bool) -> Run:
    quack = import_peer("quack.softmax", "quack-kernels", device)
    if causal:
        raise UnavailableError("not timed: it has no causal softmax")
    return _gradient_of(quack.softmax)
