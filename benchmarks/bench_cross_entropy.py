"""Cross entropy, forward and gradient with respect to the logits, as a training step needs both."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Provider, Run, Size, Tensors, UnavailableError, Work, import_peer

IGNORED = -100
CHECKED_ROWS = 256  # of the gradient; the loss sums over all rows
TRAINING = {"label_smoothing": 0.1, "z_loss": 1e-4}


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        fp32, bf16 = torch.float32, torch.bfloat16
        return [
            # GBs of logits: faulting them in and checking them takes most of its time.
            _case(device, 2048, 50304, fp32, weight=3.0),
            _case(device, 512, 50304, fp32, **TRAINING),
            _case(device, 512, 50257, fp32),  # GPT-2's own vocabulary: no row after the first is aligned
            _case(device, 512, 32000, bf16),
            _case(device, 16384, 1024, fp32),
        ]
    large = [(8192, 50304), (8192, 128256), (8192, 50257), (65536, 1024)]
    return [_case(device, N, V, torch.bfloat16) for N, V in large] + [_case(device, 4096, 50304, torch.float32)]


def _case(device: torch.device, N: int, V: int, dtype: torch.dtype, weight: float = 1.0, **options: float) -> Case:
    """options are label_smoothing and z_loss."""
    element = dtype.itemsize
    checked = evenly(N, CHECKED_ROWS)
    plain_torch = functools.partial(_torch_loss, **options)
    with_options = "".join(f", {name} {value:g}" for name, value in options.items())
    kind = f"{str(dtype).removeprefix('torch.')}{with_options}, forward + gradient"

    def inputs() -> Tensors:
        logits = torch.randn(N, V, device=device).to(dtype).requires_grad_()
        return {"logits": logits, "target": random_target(N, V, device)}

    return Case(
        name=f"{N} x {V} {kind}",
        device=device,
        inputs=inputs,
        truth=lambda given: _truth(plain_torch, given["logits"], given["target"], checked),
        # Some peers give the loss of bfloat16 logits in float32.
        sample=lambda outputs: {"loss": outputs["loss"].to(dtype), "dlogits": outputs["dlogits"][checked]},
        torch_error=lambda given: error_of_rows(
            functools.partial(F.cross_entropy, reduction="none"), given["logits"][checked], given["target"][checked]
        ),
        reference="torch eager",
        providers=[
            Provider("fastlm in place", lambda: _fastlm(inplace=True, **options), "ours", mutates=("logits",)),
            Provider("fastlm new tensor", lambda: _fastlm(inplace=False, **options), "ours"),
            Provider("torch eager", lambda: loss_and_gradients(plain_torch)),
            Provider("torch.compile", lambda: loss_and_gradients(torch.compile(plain_torch, dynamic=False))),
            Provider("liger in place", lambda: _liger(device, **options), mutates=("logits",)),
            Provider("quack in place", lambda: _quack(device, True, options), mutates=("logits",)),
            Provider("quack new tensor", lambda: _quack(device, False, options)),
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
        weight=weight,
        size=Size(kind, N * V, "logits"),
    )


def evenly(size: int, count: int) -> slice:
    """About count of size rows, evenly apart: what is checked of a large tensor."""
    return slice(None, None, max(1, size // count))


def random_target(N: int, V: int, device: torch.device) -> Tensor:
    """Classes of N rows, one in fifty ignored."""
    return torch.randint(V, (N,), device=device).masked_fill_(torch.rand(N, device=device) < 0.02, IGNORED)


def loss_and_gradients(loss_function: Callable[..., Tensor]) -> Run:
    """The mean loss of the inputs, and its gradient with respect to all of them but the target, the last."""

    def run(given: Tensors) -> Tensors:
        wanted = [name for name in given if name != "target"]
        loss = loss_function(*given.values())
        gradients = torch.autograd.grad(loss, [given[name] for name in wanted])
        return {"loss": loss, **{f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}}

    return run


def error_of_rows(row_losses: Callable[..., Tensor], *given: Tensor) -> dict[str, float]:
    """The largest error of single rows' losses. That of their mean is a matter of luck, and of no use as a measure."""
    truth = row_losses(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in given))
    return {"loss": (row_losses(*given) - truth).abs().max().item()}


def _torch_loss(logits: Tensor, target: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """As PyTorch's users write it."""
    loss = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    if z_loss:
        ignored = target == IGNORED
        squares = torch.logsumexp(logits, 1).square().masked_fill(ignored, 0)
        loss = loss + z_loss * squares.sum() / ignored.logical_not().sum()
    return loss


def _truth(loss_function: Callable[..., Tensor], logits: Tensor, target: Tensor, checked: slice) -> Tensors:
    """Loss over all rows, gradient of the checked rows, in float64; chunks keep the float64 copies small."""

    def share(rows: Tensor, rows_target: Tensor) -> Tensor:
        """What these rows add to the mean over all."""
        return loss_function(rows, rows_target) * (rows_target != IGNORED).sum() / (target != IGNORED).sum()

    chunks = zip(logits.split(256), target.split(256), strict=True)
    loss = torch.stack([share(rows.double(), rows_target) for rows, rows_target in chunks]).sum()
    rows = logits[checked].double().requires_grad_()
    (gradient,) = torch.autograd.grad(share(rows, target[checked]), rows)
    return {"loss": loss, "dlogits": gradient}


def _fastlm(**options: float) -> Run:
    from fastlm.ops import cross_entropy

    return loss_and_gradients(functools.partial(cross_entropy, **options))


def _liger(device: torch.device, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Run:
    liger = import_peer("liger_kernel.transformers.functional", "liger-kernel", device)
    options = {"label_smoothing": label_smoothing, "lse_square_scale": z_loss}
    return loss_and_gradients(functools.partial(liger.liger_cross_entropy, **options))


def _quack(device: torch.device, inplace: bool, options: dict[str, float]) -> Run:
    quack = import_peer("quack.cross_entropy", "quack-kernels", device)
    if options:
        raise UnavailableError(f"not timed: it has no {', '.join(options)}")
    return loss_and_gradients(functools.partial(quack.cross_entropy, inplace_backward=inplace))


def _copy_to_warm(N: int, V: int, dtype: torch.dtype, device: torch.device) -> Run:
    warm = torch.randn(N, V, device=device).to(dtype)
    return lambda given: {"copy": warm.copy_(given["logits"].detach())}


def _allocate_and_fill(given: Tensors) -> Tensors:
    """What a gradient in a new tensor costs before any arithmetic: on a CPU every fresh page is a fault."""
    return {"filled": torch.empty_like(given["logits"]).fill_(1.0)}
