"""RMS norm, and both norms after a residual addition. Layer norm alone is bench_layer_norm.

Dropout is not among the cases: everyone drops other elements, so there is no common truth to hold them to.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Provider, Run, Size, Tensors, UnavailableError, Work, import_peer

EPS = 1e-5
CHECKED_ROWS = 256  # of results and gradients per row; those of weight and bias sum over all rows
SUMS = ("dweight", "dbias")
Norm = Callable[..., tuple[Tensor, ...]]  # of x, residual if any, weight, bias if any: y, and the new residual if any


def cases(device: torch.device) -> list[Case]:
    sizes, dtype = [(16384, 768)], torch.float32
    if device.type != "cpu":
        sizes, dtype = [(65536, 768), (65536, 1024), (32768, 1600), (16384, 4096), (16384, 8192)], torch.bfloat16
    names = ("rms_norm", "add_layer_norm", "add_rms_norm")
    return [_case(device, name, N, C, dtype) for name in names for N, C in sizes]


def _case(device: torch.device, name: str, N: int, C: int, dtype: torch.dtype) -> Case:
    element, is_added = dtype.itemsize, name != "rms_norm"
    kind = f"{str(dtype).removeprefix('torch.')}, forward + backward"
    checked = torch.arange(N, device=device)[:: max(1, N // CHECKED_ROWS)]
    rows, vectors = (
        (("x", "residual") if is_added else ("x",)),
        (("weight", "bias") if "layer" in name else ("weight",)),
    )

    def inputs() -> Tensors:
        shapes = {**dict.fromkeys(rows, (N, C)), **dict.fromkeys(vectors, (C,))}
        leaves = {key: torch.randn(shape, device=device).to(dtype).requires_grad_() for key, shape in shapes.items()}
        upstream = ("dy", "dh") if is_added else ("dy",)
        return leaves | {key: torch.randn(N, C, device=device).to(dtype) for key in upstream}

    def sample(outputs: Tensors) -> Tensors:
        return {key: tensor if key in SUMS else tensor[checked] for key, tensor in outputs.items()}

    def gradients_of(norm: Norm) -> Run:
        return functools.partial(_results_and_gradients, norm, (*rows, *vectors))

    def truth(given: Tensors) -> Tensors:
        leaves = {key: tensor.double().requires_grad_(key in (*rows, *vectors)) for key, tensor in given.items()}
        return sample(gradients_of(_in_torch(name))(leaves))

    return Case(
        name=f"{name}, {N} x {C} {kind}",
        device=device,
        inputs=inputs,
        truth=truth,
        sample=sample,
        reference="torch eager",
        providers=[
            Provider("fastlm", lambda: gradients_of(_fastlm(name)), "ours"),
            Provider("torch eager", lambda: gradients_of(_in_torch(name))),
            Provider("torch.compile", lambda: gradients_of(_compiled(name, device))),
            *(
                Provider(peer, lambda build=build: gradients_of(build(name, device)))
                for peer, build in PEERS.items()
                if name != "add_layer_norm"  # neither has it
            ),
        ],
        # rms_norm: forward reads x and writes y; backward reads x and dy and writes dx.
        # add: forward reads x and residual, writes their sum h and y; backward reads dy, dh and h, and writes one
        # gradient for x and residual. The (C,) vectors are nothing beside them.
        work=(
            Work("byte", 8.0 * N * C * element, f"8 N C {element} bytes: x, residual, h, y; dy, dh, h, dx")
            if is_added
            else Work("byte", 5.0 * N * C * element, f"5 N C {element} bytes: x, y; x, dy, dx"),
        ),
        size=Size(f"{name} {kind}", N * C, "elements"),
    )


def _results_and_gradients(norm: Norm, names: tuple[str, ...], given: Tensors) -> Tensors:
    leaves = [given[name] for name in names]
    results = norm(*leaves)
    upstream = [given[name] for name in ("dy", "dh")[: len(results)]]
    gradients = torch.autograd.grad(results, leaves, upstream)
    named = {f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return dict(zip(("y", "h"), results, strict=False)) | named


def _in_torch(name: str) -> Norm:
    if name == "rms_norm":
        return lambda x, weight: (F.rms_norm(x, weight.shape, weight, EPS),)
    norm = F.rms_norm if name == "add_rms_norm" else F.layer_norm

    def add_norm(x, residual, weight, *bias):
        h = residual + x
        return norm(h, weight.shape, weight, *bias, EPS), h

    return add_norm


def _compiled(name: str, device: torch.device) -> Norm:
    if device.type == "cpu" and "rms" in name:
        raise UnavailableError("not timed: on a CPU its dweight has 4 times the error allowed (torch 2.13)")
    return torch.compile(_in_torch(name), dynamic=False)


def _fastlm(name: str) -> Norm:
    from fastlm import ops

    if name == "rms_norm":
        return lambda x, weight: (ops.rms_norm(x, weight.shape, weight, EPS),)
    norm = getattr(ops, name)
    return lambda x, residual, weight, *bias: norm(x, residual, weight.shape, weight, *bias, EPS)


def _liger(name: str, device: torch.device) -> Norm:
    """In place it would write dx over dy, which the next run needs."""
    liger = import_peer("liger_kernel.transformers.functional", "liger-kernel", device)
    if name == "rms_norm":
        return lambda x, weight: (liger.liger_rms_norm(x, weight, EPS, in_place=False),)
    return lambda x, residual, weight: liger.liger_fused_add_rms_norm(x, residual, weight, EPS, in_place=False)


def _quack(name: str, device: torch.device) -> Norm:
    quack = import_peer("quack.rmsnorm", "quack-kernels", device)
    if name == "rms_norm":
        return lambda x, weight: (quack.rmsnorm(x, weight, eps=EPS),)
    return lambda x, residual, weight: quack.rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)


PEERS: dict[str, Callable[[str, torch.device], Norm]] = {"liger": _liger, "quack": _quack}
