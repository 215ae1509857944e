"""Cross entropy of logits against class indices.

    x = softcap * tanh(input / softcap)                   where softcap is given
    lse_i = log(sum_c exp(x_ic))
    loss_i = lse_i - x_i,target_i + z_loss * lse_i^2      0 where target_i is ignore_index

    d loss_i / d x_ic = softmax(x_i)_c - (c == target_i)  for z_loss = 0

The softmax is at hand while the loss is computed, so the forward pass writes the gradient at once, already divided by
the number of valid rows for "mean", into a new tensor or over the logits. That gradient is all that is saved; the
backward pass multiplies it by the upstream gradient, and where that is 1 it makes no pass over it.

Source: the sum beside a running maximum, Milakov, Gimelshein 2018, arXiv 1805.02867; z_loss, Chowdhery et al. 2022,
arXiv 2204.02311; softcap, Gemma Team 2024, arXiv 2408.00118.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import _reduction

from fastlm.ops._library import has_cross_entropy

REDUCTIONS = ("none", "mean", "sum")
SMALL = 1 << 16  # logits: on a CPU, up to here the cost of the call exceeds what the kernel saves over PyTorch's code


def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_classes: int | None = None,
) -> Tensor:
    """The formula in plain PyTorch, in float32 (float64 for float64 input), for every form of target."""
    dim = _class_dim(input)
    x = input if input.dtype == torch.float64 else input.float()
    x, target, weight = _only_classes(x, target, weight, num_classes)
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    losses = F.cross_entropy(
        x, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    if target.is_floating_point():  # probabilities of the classes: every row counts, and counts once
        valid = torch.ones_like(losses, dtype=torch.bool)
        divisor = valid.sum()
    else:
        valid = target != ignore_index
        divisor = valid.sum() if weight is None else weight[target.masked_fill(~valid, 0)].masked_fill(~valid, 0).sum()
    if z_loss:
        losses = losses + torch.where(valid, z_loss * torch.logsumexp(x, dim).square(), 0.0)
    if reduction != "none":
        losses = losses.sum() / divisor if reduction == "mean" else losses.sum()
    return losses.to(input.dtype)


def _class_dim(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0


def _only_classes(
    input: Tensor, target: Tensor, weight: Tensor | None, num_classes: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, target and weight without the columns from num_classes on; what is cut off gets gradient 0."""
    if num_classes is None:
        return input, target, weight
    if target.is_floating_point() and target.shape == input.shape:
        target = target.narrow(_class_dim(input), 0, num_classes)
    return input.narrow(_class_dim(input), 0, num_classes), target, None if weight is None else weight[:num_classes]


# Raw ops. The kernels are in csrc/; the functions here run where no kernel is loaded for the device.


def _losses_and_gradient(
    input: Tensor, target: Tensor, ignore_index: int, num_classes: int, with_gradient: bool, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(losses (N,) float32, scale * d losses.sum() / d input of input's shape and dtype, or (0,))."""
    ignored = (target == ignore_index)[:, None]  # (N, 1)
    index = target.long()[:, None].masked_fill(ignored, 0)
    log_p = F.log_softmax(input[:, :num_classes].float(), dim=1)
    losses = -log_p.gather(1, index).masked_fill(ignored, 0)[:, 0]
    if not with_gradient:
        return losses, input.new_empty(0)
    softmax = log_p.exp()
    gradient = softmax.scatter_add(1, index, softmax.new_full((1, 1), -1.0).expand_as(index))
    gradient = gradient if scale is None else gradient * scale.reshape(-1, 1)
    return losses, F.pad(gradient.masked_fill(ignored, 0), (0, input.shape[1] - num_classes)).to(input.dtype)


def _losses_over_input(
    input: Tensor, target: Tensor, ignore_index: int, num_classes: int, scale: Tensor | None = None
) -> Tensor:
    """The same losses; input becomes the gradient."""
    losses, gradient = _losses_and_gradient(input, target, ignore_index, num_classes, True, scale)
    input.copy_(gradient)
    return losses


def _scale_rows(input: Tensor, scale: Tensor) -> None:
    """input[i] *= scale[i], or scale[0] for all; a kernel passes over no row whose scale is 1."""
    input.mul_(scale.reshape(-1, 1))


def _fake_losses_and_gradient(
    input: Tensor, target: Tensor, ignore_index: int, num_classes: int, with_gradient: bool, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _fake_losses(input), input.new_empty(input.shape if with_gradient else (0,))


def _fake_losses(input: Tensor, *_: Any) -> Tensor:
    return input.new_empty(input.shape[:1], dtype=torch.float32)


_library = torch.library.Library("fastlm", "FRAGMENT")
_library.define(
    "cross_entropy(Tensor input, Tensor target, int ignore_index, int num_classes, bool with_gradient,"
    " Tensor? scale=None) -> (Tensor losses, Tensor gradient)"
)
_library.define(
    "cross_entropy_(Tensor(a!) input, Tensor target, int ignore_index, int num_classes, Tensor? scale=None)"
    " -> Tensor losses"
)
_library.define("scale_rows_(Tensor(a!) input, Tensor scale) -> ()")
_library.impl("cross_entropy", _losses_and_gradient, "CompositeExplicitAutograd")
_library.impl("cross_entropy_", _losses_over_input, "CompositeExplicitAutograd")
_library.impl("scale_rows_", _scale_rows, "CompositeExplicitAutograd")
torch.library.register_fake("fastlm::cross_entropy", _fake_losses_and_gradient)
torch.library.register_fake("fastlm::cross_entropy_", _fake_losses)
torch.library.register_fake("fastlm::scale_rows_", lambda input, scale: None)


# Autograd


class _KeepLogits(torch.autograd.Function):
    """Keeps the logits for a second derivative without the first one's reading them.

    Saved by _CrossEntropy itself, they would be checked at every backward, and logits changed in place after the loss,
    which PyTorch allows, would be an error.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return input.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        return None


class _CrossEntropy(torch.autograd.Function):
    """The reduced loss; saves its gradient with respect to the logits, in a new tensor or over them."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        logits_keeper: Tensor | None,
        ignore_index: int,
        num_classes: int,
        reduction: str,
        inplace: bool,
    ) -> Tensor:
        num_valid = _num_valid(target, ignore_index) if reduction == "mean" else None
        scale = None if num_valid is None else num_valid.reciprocal()
        logits = input.detach()
        if inplace:
            gradient = logits
            losses = torch.ops.fastlm.cross_entropy_(logits, target, ignore_index, num_classes, scale)
            _mark_overwritten(gradient)
        else:
            losses, gradient = torch.ops.fastlm.cross_entropy(logits, target, ignore_index, num_classes, True, scale)
        ctx.call = ignore_index, num_classes, reduction
        ctx.save_for_backward(gradient, target, logits_keeper)
        return _reduce(losses, reduction, num_valid)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, target, logits_keeper = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradient = _differentiable_gradient(logits_keeper, target, upstream, *ctx.call)
        elif torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
            gradient = (gradient * upstream.reshape(-1, 1)).to(gradient.dtype)
        else:
            # Nothing reads it again, so it is scaled where it lies. PyTorch has no public name for "the graph is kept".
            torch.ops.fastlm.scale_rows_(gradient, upstream.reshape(-1))
            _mark_overwritten(gradient)
        return gradient, None, None, None, None, None, None


def _mark_overwritten(tensor: Tensor) -> None:
    """Bumps the version counter, which kernels know nothing of: else autograd would trust a value saved elsewhere."""
    if not torch.compiler.is_compiling():  # a compiled graph sees the mutation in the op's schema
        torch.autograd.graph.increment_version(tensor)


def _differentiable_gradient(
    logits_keeper: Tensor | None, target: Tensor, upstream: Tensor, ignore_index: int, num_classes: int, reduction: str
) -> Tensor:
    """The gradient in PyTorch's code, so that it can be differentiated again."""
    if logits_keeper is None:
        raise RuntimeError(
            "cross_entropy: inplace=True has overwritten the logits, which a second derivative needs; "
            "expected inplace=False with create_graph=True"
        )
    keeper: Any = logits_keeper.grad_fn
    (input,) = keeper.saved_tensors
    loss = cross_entropy_reference(input, target, None, ignore_index, reduction, num_classes=num_classes)
    return torch.autograd.grad(loss, input, upstream.to(loss.dtype), create_graph=True)[0]


def _num_valid(target: Tensor, ignore_index: int) -> Tensor:
    return (target != ignore_index).sum(dtype=torch.float32)


def _reduce(losses: Tensor, reduction: str, num_valid: Tensor | None) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if num_valid is None else losses.sum() / num_valid


# Public function


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_classes: int | None = None,
    inplace: bool = False,
) -> Tensor:
    """Cross entropy between logits and class indices or class probabilities.

        loss = log(sum_c exp(input[c])) - input[target]

    input            (N, V), or as in PyTorch (V,) or (N, V, d1, ...); the kernels take float32, on a GPU also float16
                     and bfloat16
    target           (N,) class indices; those equal to ignore_index do not count. Or probabilities of input's shape
    weight           (V,) weight of each class
    reduction        "none", "mean" over the rows that count, or "sum"
    label_smoothing  the share of probability spread over all classes
    z_loss           adds z_loss * logsumexp(input)^2 to each row that counts; "mean" divides as without it
    softcap          logits are first softcap * tanh(input / softcap)
    num_classes      columns from this one on are padding of the vocabulary: they count as -inf and get gradient 0
    inplace          lets the forward overwrite input with its gradient, which spares the memory and time of a second
                     (N, V) tensor; input is kept where no gradient is asked for or no kernel serves the call
    returns          a scalar, or (N,) for "none"; dtype of input

    Equals torch.nn.functional.cross_entropy where the four last arguments are left out. The kernels serve (N, V) logits
    against class indices; weight, label_smoothing, z_loss, softcap, probabilities, other shapes, other dtypes and, on a
    CPU unless inplace, a few thousand logits run PyTorch's code.
    Raises ValueError if a shape, reduction or num_classes is wrong, IndexError for a target out of range (on a CPU).
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    _check(input, target, reduction, softcap, num_classes)
    plain = weight is None and not label_smoothing and not z_loss and softcap is None
    if not plain or not _kernel_serves(input, target, inplace):
        if z_loss or softcap is not None:
            return cross_entropy_reference(
                input, target, weight, ignore_index, reduction, label_smoothing,
                z_loss=z_loss, softcap=softcap, num_classes=num_classes,
            )  # fmt: skip
        input, target, weight = _only_classes(input, target, weight, num_classes)
        return F.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    V = input.shape[1] if num_classes is None else num_classes
    if torch.is_grad_enabled() and input.requires_grad:
        inplace = inplace and _rows_lie_apart(input)
        logits_keeper = None if inplace or torch.compiler.is_compiling() else _KeepLogits.apply(input)
        loss = _CrossEntropy.apply(input, target, logits_keeper, ignore_index, V, reduction, inplace)
    else:
        losses, _ = torch.ops.fastlm.cross_entropy(input, target, ignore_index, V, False)
        loss = _reduce(losses, reduction, _num_valid(target, ignore_index) if reduction == "mean" else None)
    # PyTorch's own is float32 under autocast, whatever the logits are.
    return loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)


def _check(input: Tensor, target: Tensor, reduction: str, softcap: float | None, num_classes: int | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"cross_entropy: reduction is {reduction!r}, expected 'none', 'mean' or 'sum'")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"cross_entropy: softcap is {softcap}, expected a positive number or None")
    if input.dim() == 2 and target.dim() == 1 and target.shape[0] != input.shape[0]:
        shapes = f"target has shape {tuple(target.shape)}, expected ({input.shape[0]},)"
        raise ValueError(f"cross_entropy: {shapes} to match the rows of input {tuple(input.shape)}")
    if num_classes is not None and input.dim() and not 0 < num_classes <= input.shape[_class_dim(input)]:
        columns = input.shape[_class_dim(input)]
        raise ValueError(f"cross_entropy: num_classes is {num_classes}, expected 1 to {columns}, the classes of input")


def _kernel_serves(input: Tensor, target: Tensor, inplace: bool) -> bool:
    """Whether a kernel is loaded for (N, V) logits of this device and dtype, against class indices beside them."""
    if not inplace and input.is_cpu and input.numel() <= SMALL and target.dtype == torch.int64:
        return False
    return (
        input.dim() == 2
        and target.dim() == 1
        and target.dtype in (torch.int64, torch.int32)
        and target.device == input.device
        and has_cross_entropy(input)
        and (torch.compiler.is_compiling() or _is_ordinary(input))
    )


def _is_ordinary(input: Tensor) -> bool:
    """No subclass and no torch.func or forward-mode transform: an autograd.Function over raw pointers knows none."""
    return (
        type(input) in (Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _rows_lie_apart(input: Tensor) -> bool:
    """Whether each row is contiguous and shares no element with another, so that it can be overwritten."""
    rows, columns = input.shape
    return (columns <= 1 or input.stride(1) == 1) and (rows <= 1 or input.stride(0) >= columns)
