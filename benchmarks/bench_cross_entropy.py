"""Cross entropy, forward and gradient with respect to the logits, as a training step needs both."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Provider, Run, Tensors, UnavailableError, Work

CHECKED_ROWS = 256


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [_case(device, 2048, 50304, torch.float32)]
    return [_case(device, 8192, 50304, torch.bfloat16), _case(device, 8192, 128256, torch.bfloat16)]


def _case(device: torch.device, N: int, V: int, dtype: torch.dtype) -> Case:
    element = dtype.itemsize
    checked = torch.arange(N, device=device)[:: max(1, N // CHECKED_ROWS)]

    def inputs() -> Tensors:
        logits = torch.randn(N, V, device=device).to(dtype).requires_grad_()
        target = torch.randint(V, (N,), device=device)
        target[torch.rand(N, device=device) < 0.02] = -100
        return {"logits": logits, "target": target}

    return Case(
        name=f"{N} x {V} {str(dtype).removeprefix('torch.')}, forward + gradient",
        device=device,
        inputs=inputs,
        truth=lambda given: _truth(given["logits"], given["target"], checked),
        sample=lambda outputs: {"loss": outputs["loss"], "gradient": outputs["gradient"][checked]},
        reference="torch eager",
        providers=[
            Provider("fastlm in place", lambda: _fastlm(inplace=True), "ours", mutates=("logits",)),
            Provider("fastlm new tensor", lambda: _fastlm(inplace=False), "ours"),
            Provider("torch eager", lambda: _gradient_of(F.cross_entropy)),
            Provider("torch.compile", _compiled),
            Provider("liger", lambda: _liger(device), mutates=("logits",)),
            Provider("copy to a warm buffer", lambda: _copy_to_warm(N, V, dtype, device), "floor"),
            Provider("allocate and fill the gradient", lambda: _allocate_and_fill, "floor"),
        ],
        # The least a forward with gradient can move: each logit is read once and its gradient is written once.
        work=(
            Work(
                "byte",
                2.0 * N * V * element,
                f"2 N V {element} bytes: every logit read once, every gradient written once",
            ),
        ),
        weight=3.0,  # GBs of logits: faulting them in and checking them takes most of it
    )


def _truth(logits: Tensor, target: Tensor, checked: Tensor) -> Tensors:
    """Loss over all rows, gradient of the checked rows, in float64; chunks keep the float64 copies small."""
    num_valid = (target != -100).sum()
    chunks = zip(logits.split(256), target.split(256), strict=True)
    loss = torch.stack([F.cross_entropy(rows.double(), t, reduction="sum") for rows, t in chunks]).sum() / num_valid
    rows = logits[checked].double().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(rows, target[checked], reduction="sum") / num_valid, rows)
    return {"loss": loss, "gradient": gradient}


def _gradient_of(loss_function) -> Run:
    def run(given: Tensors) -> Tensors:
        loss = loss_function(given["logits"], given["target"])
        (gradient,) = torch.autograd.grad(loss, given["logits"])
        return {"loss": loss, "gradient": gradient}

    return run


def _fastlm(inplace: bool) -> Run:
    from fastlm.ops import cross_entropy

    return _gradient_of(lambda logits, target: cross_entropy(logits, target, inplace=inplace))


def _compiled() -> Run:
    return _gradient_of(torch.compile(lambda logits, target: F.cross_entropy(logits, target), dynamic=False))


def _liger(device: torch.device) -> Run:
    if device.type == "cpu":
        raise UnavailableError("not timed: its Triton kernels need a GPU")
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        raise UnavailableError("not timed: liger-kernel is not installed") from None
    return _gradient_of(liger_cross_entropy)


def _copy_to_warm(N: int, V: int, dtype: torch.dtype, device: torch.device) -> Run:
    warm = torch.randn(N, V, device=device).to(dtype)
    return lambda given: {"copy": warm.copy_(given["logits"].detach())}


def _allocate_and_fill(given: Tensors) -> Tensors:
    """What a gradient in a new tensor costs before any arithmetic: on a CPU every fresh page is a fault."""
    return {"filled": torch.empty_like(given["logits"]).fill_(1.0)}
