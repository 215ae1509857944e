"""Layer norm: large inputs (bandwidth), and small ones (what a call costs the host)."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, Provider, Run, Size, Tensors, UnavailableError, Work

EPS = 1e-5
CHECKED_ROWS = 256  # of y and dx; the gradients of weight and bias sum over all rows


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [_case(device, N, C, torch.float32) for N, C in ((32768, 768), (1024, 768), (8, 64))]
    large = [(65536, 768), (65536, 1024), (32768, 1600), (16384, 4096), (16384, 8192)]
    return [_case(device, N, C, torch.bfloat16) for N, C in large] + [_case(device, 8, 64, torch.bfloat16)]


def _case(device: torch.device, N: int, C: int, dtype: torch.dtype) -> Case:
    element, kind = dtype.itemsize, f"{str(dtype).removeprefix('torch.')}, forward + backward"
    checked = torch.arange(N, device=device)[:: max(1, N // CHECKED_ROWS)]

    def sample(outputs: Tensors) -> Tensors:
        return {**outputs, "y": outputs["y"][checked], "dx": outputs["dx"][checked]}

    def inputs() -> Tensors:
        x, dy = (torch.randn(N, C, device=device).to(dtype) for _ in range(2))
        weight, bias = ((torch.randn(C, device=device)).to(dtype) for _ in range(2))
        return {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias.requires_grad_(), "dy": dy}

    return Case(
        name=f"{N} x {C} {kind}",
        device=device,
        inputs=inputs,
        truth=lambda given: sample(_gradients_of(_torch_layer_norm)(_double(given))),
        sample=sample,
        reference="torch eager",
        providers=[
            Provider("fastlm", _fastlm, "ours"),
            Provider("torch eager", lambda: _gradients_of(_torch_layer_norm)),
            Provider("torch.compile", lambda: _gradients_of(torch.compile(_torch_layer_norm, dynamic=False))),
            Provider("liger", lambda: _liger(device)),
        ],
        # Forward reads x and writes y; backward reads x and dy and writes dx. The (C,) vectors are nothing beside them.
        work=(Work("byte", 5.0 * N * C * element, f"5 N C {element} bytes: x, y; x, dy, dx"),) if N > 8 else (),
        size=Size(kind, N * C, "elements"),
        is_small=N <= 8,
    )


def _double(given: Tensors) -> Tensors:
    return {name: tensor.double().requires_grad_(name != "dy") for name, tensor in given.items()}


def _torch_layer_norm(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def _gradients_of(layer_norm) -> Run:
    def run(given: Tensors) -> Tensors:
        x, weight, bias = given["x"], given["weight"], given["bias"]
        y = layer_norm(x, weight, bias)
        dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), given["dy"])
        return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}

    return run


def _fastlm() -> Run:
    from fastlm.ops import layer_norm

    return _gradients_of(lambda x, weight, bias: layer_norm(x, weight.shape, weight, bias, EPS))


def _liger(device: torch.device) -> Run:
    if device.type == "cpu":
        raise UnavailableError("not timed: its Triton kernels need a GPU")
    try:
        from liger_kernel.transformers.functional import liger_layer_norm
    except ImportError:
        raise UnavailableError("not timed: liger-kernel is not installed") from None
    return _gradients_of(lambda x, weight, bias: liger_layer_norm(x, weight, bias, EPS))
