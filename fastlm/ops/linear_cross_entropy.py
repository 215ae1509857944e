"""Cross entropy of a linear layer's logits, taken in chunks of rows so that the (N, V) logits never exist.

    logits = input @ linear_weight.T + linear_bias        loss_i = logsumexp(logits_i) - logits_i[target_i]

Gradient, with g = softmax(logits) - onehot(target), row i scaled by s_i (1 for a sum, 1 / valid rows for a mean):
dinput_i = s_i g_i @ linear_weight,  dlinear_weight = sum_i g_i^T (s_i input_i),  dlinear_bias = sum_i s_i g_i.
Both products follow while a chunk's g lies in the one reused buffer, so the forward of "sum" and "mean" already holds
all gradients and the backward only multiplies by the upstream gradient. The scale goes to the small input, not to g.
"none" recomputes its chunks in the backward, where each row's upstream gradient is known.
Source: chunking as in Hsu et al. 2024 (Liger Kernel), arXiv 2410.10989; weight gradients are summed in float32.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops.cross_entropy import cross_entropy

# Fewer rows lose to re-reading the weight and its gradient once per chunk; more rows only cost memory.
CHUNK_ROWS = {"cpu": 256, "cuda": 2048}
DEFAULT_IGNORE_INDEX = -100


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    *,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    reduction: str = "mean",
    num_classes: int | None = None,
) -> Tensor:
    """The op in plain PyTorch: every logit at once, columns from num_classes on cut off."""
    logits = F.linear(input, linear_weight, linear_bias)[..., :num_classes]
    losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=ignore_index, reduction=reduction)
    return losses.view(target.shape) if reduction == "none" else losses


# Raw op


def _losses_and_gradients(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    num_classes: int,
    chunk_rows: int,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses (N,) float32, dinput, dweight, dbias) of sum_i scale_i loss_i; a gradient not needed has no elements."""
    N, V = len(input), len(weight)
    losses, dinput, dweight, dbias = _outputs(
        input, weight, bias, target, scale, ignore_index, num_classes, chunk_rows, needs_input, needs_weight, needs_bias
    )
    operand = weight if weight.dtype == input.dtype else weight.to(input.dtype)  # one low-precision copy under autocast
    dsum = dweight if dweight.dtype == torch.float32 else torch.empty_like(dweight, dtype=torch.float32)
    rows = math.ceil(N / math.ceil(N / chunk_rows)) if N else 0  # equal chunks: no sliver at the end
    dtype = torch.float32 if input.is_cpu else input.dtype  # what the cross entropy kernel reads on this device
    buffer = torch.empty((rows, V), dtype=dtype, device=input.device)
    with_gradient = needs_input or needs_weight or needs_bias
    if with_gradient and not N:
        dsum.zero_()
    dbias.zero_()
    for start in range(0, N, rows or 1):
        chunk = slice(start, min(start + rows, N))
        x, logits = input[chunk], buffer[: chunk.stop - start]
        _write_logits(x, operand, bias, logits)
        if not with_gradient:
            losses[chunk] = torch.ops.fastlm.cross_entropy(logits, target[chunk], ignore_index, num_classes, False)[0]
            continue
        losses[chunk] = torch.ops.fastlm.cross_entropy_(logits, target[chunk], ignore_index, num_classes)
        g = logits if dtype == input.dtype else logits.to(input.dtype)
        s = None if scale is None else scale.expand(N)[chunk]
        if needs_weight:
            _add_product(dsum, g.T, x if s is None else (x * s[:, None]).to(x.dtype), first=start == 0)
        if needs_input:
            torch.mm(g, operand, out=dinput[chunk])
            if s is not None:
                dinput[chunk].mul_(s[:, None])
        if needs_bias:
            dbias.add_(logits.float().sum(0) if s is None else torch.mv(logits.float().T, s))
    if dsum is not dweight:
        dweight.copy_(dsum)
    return losses, dinput, dweight, dbias


def _write_logits(x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    """logits = x @ weight.T + bias, in the buffer's dtype."""
    if logits.dtype != x.dtype:
        logits.copy_(torch.mm(x, weight.T))
    else:
        torch.mm(x, weight.T, out=logits)
    if bias is not None:
        logits.add_(bias)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (float32) += a @ b, or = if this is the first: a fresh total then needs no pass of zeros."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif a.is_cuda:
        wide = torch.float32  # products of low precision, summed over all chunks in float32
        total.copy_(torch.mm(a, b, out_dtype=wide) if first else torch.addmm(total, a, b, out_dtype=wide))
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))


def _outputs(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    num_classes: int,
    chunk_rows: int,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = input.new_empty((len(input),), dtype=torch.float32)
    dinput = input.new_empty(input.shape if needs_input else (0, 0))
    dweight = weight.new_empty(weight.shape if needs_weight else (0, 0))
    dbias = weight.new_empty((len(weight) if needs_bias else 0,), dtype=torch.float32)
    return losses, dinput, dweight, dbias


_library = torch.library.Library("fastlm", "FRAGMENT")
_library.define(
    "linear_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? scale, int ignore_index,"
    " int num_classes, int chunk_rows, bool needs_input, bool needs_weight, bool needs_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _library.impl("linear_cross_entropy", _losses_and_gradients, _device)
torch.library.register_fake("fastlm::linear_cross_entropy", _outputs)


# Autograd


class _SummedLoss(torch.autograd.Function):
    """sum_i loss_i, divided by num_valid (1,) if that is given; its gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        num_valid: Tensor | None,
        *call: Any,
    ) -> Tensor:
        # The clamp gives gradients of 0, as torch's, where no row counts.
        scale = None if num_valid is None else num_valid.clamp(min=1).reciprocal()
        losses, *gradients = torch.ops.fastlm.linear_cross_entropy(input, weight, bias, target, scale, *call)
        ctx.call = call
        ctx.save_for_backward(input, weight, bias, target, scale, *gradients)
        return losses.sum() if num_valid is None else losses.sum() / num_valid[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, scale, *gradients = ctx.saved_tensors
        needs = ctx.call[-3:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            upstream = upstream if scale is None else upstream * scale
            found = _differentiable_gradients(input, weight, bias, target, upstream, *ctx.call)
        else:
            if not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph():
                # Nothing reads these again, so they are scaled where they lie: a new (V, C) tensor costs more in page
                # faults than a tenth of the whole op. PyTorch has no public name for "the graph is kept".
                for gradient in gradients:
                    rows = gradient if gradient.dim() == 2 else gradient[:, None]
                    torch.ops.fastlm.scale_rows_(rows, upstream.view(1))
            else:
                gradients = [(gradient * upstream).to(gradient.dtype) for gradient in gradients]
            found = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
        return *found, None, None, *(None for _ in ctx.call)


class _RowLosses(torch.autograd.Function):
    """loss_i of every row; the gradients are recomputed in the backward, where the upstream gradient is known."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: None, *call: Any
    ) -> Tensor:
        forward_only = *call[:-3], False, False, False
        losses = torch.ops.fastlm.linear_cross_entropy(input, weight, bias, target, None, *forward_only)[0]
        ctx.call = call
        ctx.save_for_backward(input, weight, bias, target)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, target = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            found = _differentiable_gradients(input, weight, bias, target, upstream, *ctx.call)
        else:
            made = torch.ops.fastlm.linear_cross_entropy(input, weight, bias, target, upstream.float(), *ctx.call)[1:]
            found = [gradient if needed else None for gradient, needed in zip(made, ctx.call[-3:], strict=True)]
        return *found, None, None, *(None for _ in ctx.call)


def _differentiable_gradients(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upstream: Tensor,
    ignore_index: int,
    num_classes: int,
    chunk_rows: int,
    *needs: bool,
) -> list[Tensor | None]:
    """Gradients of sum_i upstream_i loss_i that can be differentiated again."""
    arguments = input, weight.to(input.dtype), target, bias
    losses = linear_cross_entropy_reference(
        *arguments, ignore_index=ignore_index, reduction="none", num_classes=num_classes
    )
    wanted = [x for x, needed in zip((input, weight, bias), needs, strict=True) if needed and x is not None]
    found = iter(torch.autograd.grad((losses * upstream).sum(), wanted, create_graph=True))
    return [next(found) if needed else None for needed in needs]


# Public function


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_classes: int | None = None,
    shift: bool = False,
    memory_budget: int | None = None,
) -> Tensor:
    """Cross entropy of input @ linear_weight.T + linear_bias against target, without holding all logits.

    input          (..., C)   linear_weight (V, C)   linear_bias (V,)
    target         (...) class indices; ignore_index (None: -100) marks rows that do not count
    num_classes    columns from this one on are padding of the vocabulary: they count as -inf and get no gradient
    shift          score input[..., t, :] against target[..., t + 1], as a language model's labels are laid out
    memory_budget  bytes of logits held at a time; None is 256 rows on a CPU, 2048 on a GPU
    options        torch.nn.LinearCrossEntropyOptions; its batch_chunk_size sets the rows of a chunk
    returns        float32 under autocast, else the dtype of input; a scalar, or target's shape for "none"

    Equals cross_entropy(linear(input, linear_weight, linear_bias), target, ...) with the same arguments. Class weights,
    label smoothing, z_loss, softcap, class probabilities and float64 hold all logits for now.
    Raises ValueError if shapes or options disagree, TypeError for a dtype.
    """
    if shift:
        input, target = _shifted(input, target)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"linear_cross_entropy: reduction is {reduction!r}, expected 'none', 'mean' or 'sum'")
    autocast = torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64
    plain = weight is None and not label_smoothing and not z_loss and softcap is None
    indices = target.shape == input.shape[:-1] and not target.is_floating_point()
    if not plain or not indices or linear_weight.dim() != 2 or input.dtype == torch.float64:
        return _over_all_logits(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
            z_loss, softcap, num_classes,
        )  # fmt: skip
    _check(input, linear_weight, target, linear_bias, num_classes, autocast)
    result_dtype = torch.float32 if autocast else input.dtype
    if autocast:
        input = input.to(torch.get_autocast_dtype(input.device.type))
    ignored = DEFAULT_IGNORE_INDEX if ignore_index is None else ignore_index
    grad = torch.is_grad_enabled()
    needs = (
        grad and input.requires_grad,
        grad and linear_weight.requires_grad,
        grad and linear_bias is not None and linear_bias.requires_grad,
    )
    V = len(linear_weight)
    call = ignored, V if num_classes is None else num_classes, _chunk_rows(input, V, memory_budget, options), *needs
    rows, flat_target = input.reshape(target.numel(), input.shape[-1]), target.reshape(-1)
    if reduction == "none":
        losses = _RowLosses.apply(rows, linear_weight, linear_bias, flat_target, None, *call)
        return losses.view(target.shape).to(result_dtype)
    if reduction == "sum":
        return _SummedLoss.apply(rows, linear_weight, linear_bias, flat_target, None, *call).to(result_dtype)
    num_valid = (flat_target != ignored).sum(dtype=torch.float32).view(1)
    return _SummedLoss.apply(rows, linear_weight, linear_bias, flat_target, num_valid, *call).to(result_dtype)


def _shifted(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Every position but the last against the target that follows it."""
    if input.dim() < 2 or target.dim() != input.dim() - 1:
        shapes = f"input {tuple(input.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"linear_cross_entropy: shift needs input (..., T, C) and target (..., T), got {shapes}")
    return input[..., :-1, :], target[..., 1:]


def _chunk_rows(input: Tensor, num_columns: int, memory_budget: int | None, options: Any) -> int:
    """Rows whose logits are held at a time: by the budget, by torch's options, or the default of the device."""
    if memory_budget is not None:
        element = 4 if input.is_cpu else input.element_size()
        rows = memory_budget // (element * max(num_columns, 1))
        if rows < 1:
            needed = element * num_columns
            raise ValueError(
                f"linear_cross_entropy: memory_budget is {memory_budget} bytes, one row of logits needs {needed}"
            )
        return rows
    return getattr(options, "batch_chunk_size", None) or CHUNK_ROWS.get(input.device.type, CHUNK_ROWS["cuda"])


def _over_all_logits(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    num_classes: int | None,
) -> Tensor:
    """Every form that the chunks do not serve, as linear followed by cross_entropy."""
    V, *inner, C = linear_weight.shape
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, linear_weight.reshape(math.prod((V, *inner)), C), bias).view(*input.shape[:-1], V, *inner)
    shape = None
    if input.dim() > 2 and not inner:  # cross_entropy takes classes as the second dimension
        shape = target.shape if not target.is_floating_point() else target.shape[:-1]
        logits, target = logits.flatten(0, -2), target.reshape(-1, *target.shape[len(shape) :])
    losses = cross_entropy(
        logits,
        target,
        weight,
        ignore_index=DEFAULT_IGNORE_INDEX if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        num_classes=num_classes,
    )
    return losses.view(shape) if shape is not None and reduction == "none" else losses


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    num_classes: int | None,
    autocast: bool,
) -> None:
    V, C = linear_weight.shape
    if input.shape[-1] != C:
        shapes = f"input has {input.shape[-1]} features (shape {tuple(input.shape)}), linear_weight {C}"
        raise ValueError(f"linear_cross_entropy: {shapes}; they must agree")
    if linear_bias is not None and linear_bias.shape != (V,):
        raise ValueError(f"linear_cross_entropy: linear_bias has shape {tuple(linear_bias.shape)}, expected ({V},)")
    if num_classes is not None and not 0 < num_classes <= V:
        raise ValueError(
            f"linear_cross_entropy: num_classes is {num_classes}, expected 1 to {V} (rows of linear_weight)"
        )
    devices = {x.device for x in (input, linear_weight, target, linear_bias) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"linear_cross_entropy: tensors are on {', '.join(map(str, devices))}, expected one device")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"linear_cross_entropy: target is {target.dtype}, expected int64 class indices")
    if not autocast and (input.dtype != linear_weight.dtype or not input.is_floating_point()):
        kinds = f"input is {input.dtype} and linear_weight {linear_weight.dtype}"
        raise TypeError(f"linear_cross_entropy: {kinds}, expected one floating dtype")
