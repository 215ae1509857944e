"""Cross entropy of a linear layer's logits, taken in chunks of rows so that the (N, V) logits never exist.

    logits = input @ linear_weight.T + linear_bias        loss_i = cross_entropy(logits_i, target_i)

Gradient, with g_i = d loss_i / d logits_i, row i scaled by s_i (1 for a sum, one over the divisor for a mean):
dinput_i = s_i g_i @ linear_weight,  dlinear_weight = sum_i g_i^T (s_i input_i),  dlinear_bias = sum_i s_i g_i.
Both products follow while a chunk's g lies in the one reused buffer, so the forward of "sum" and "mean" already holds
all gradients and the backward only multiplies by the upstream gradient. The scale goes to the small input, not to g.
"none" recomputes its chunks in the backward, where each row's upstream gradient is known.

Over a process group each rank has some rows of linear_weight and all of input; dinput is the sum over the ranks.

Source: chunking as in Hsu et al. 2024 (Liger Kernel), arXiv 2410.10989; weight gradients are summed in float32.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.utils.flop_counter import register_flop_formula

from fastlm.ops._dispatch import TORCH, autocast_dtype, is_one_of, route
from fastlm.ops._fx import recorded
from fastlm.ops._register import differentiable_gradients, is_double_backward, register
from fastlm.ops.cross_entropy import (
    OPTIONS_SCHEMA,
    Options,
    Shards,
    advise_large_pages_op,
    as_integer,
    check_options,
    cross_entropy,
    cross_entropy_in_place_op,
    cross_entropy_op,
    cross_entropy_reference,
    gathered_parts,
    may_overwrite_saved,
    mean_divisor,
    reference_losses,
    row_scale,
    scale_rows_op,
    shard_options,
    shards_of,
    summed_over_ranks,
)

if TYPE_CHECKING:  # some builds of PyTorch have no process groups
    from torch.distributed import ProcessGroup

# Fewer rows lose to re-reading the weight and its gradient once per chunk; more rows only cost memory.
CHUNK_ROWS = {"cpu": 512, "cuda": 2048}
CPU_COLUMNS = 1024  # logits of a row that a CPU multiplies out at a time: with their weights they stay in its caches
MOST_ROWS = 1 << 40  # of a chunk: a larger number is none that the op's int could hold
DEFAULT_IGNORE_INDEX = -100


def linear_cross_entropy_reference(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    """The op in plain PyTorch: every logit at once. options are those of cross_entropy_reference."""
    logits = F.linear(input, linear_weight, linear_bias).flatten(0, -2)
    losses = cross_entropy_reference(logits, target.flatten(), **options)
    return losses.view(target.shape) if losses.dim() else losses


# Raw op


class Call(NamedTuple):
    """What a call computes beside its tensors."""

    options: Options
    chunk_rows: int
    shards: Shards | None
    needs: tuple[bool, bool, bool]  # gradients of input, weight and bias

    def flat(self) -> tuple[Any, ...]:
        """The last arguments of the raw op."""
        return *self.options, self.chunk_rows, *(self.shards or ("", 1, 0)), *self.needs

    @classmethod
    def of(cls, flat: Sequence[Any]) -> "Call":
        *options, chunk_rows, group_name, num_ranks, rank, needs_input, needs_weight, needs_bias = flat
        shards = Shards(group_name, num_ranks, rank) if group_name else None
        return cls(Options(*options), chunk_rows, shards, (needs_input, needs_weight, needs_bias))


def losses_and_gradients(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    scale: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses (N,) float32, dinput, dweight, dbias) of sum_i scale_i loss_i; a gradient not needed has no elements."""
    options, chunk_rows, shards, needs = Call.of(flat)
    needs_input, needs_weight, needs_bias = needs
    N, V = input.shape[0], weight.shape[0]
    losses, dinput, dweight, dbias = outputs(input, weight, bias, target, class_weight, scale, *flat)
    # On a CPU products of low precision would round every chunk's share of dweight, and most CPUs have none that are
    # faster: there everything is float32.
    dtype = torch.float32 if input.is_cpu else input.dtype
    operand = weight.to(dtype)
    rows = math.ceil(N / math.ceil(N / chunk_rows)) if N else 0  # equal chunks: no sliver at the end
    buffer = torch.empty((rows, V), dtype=dtype, device=input.device)
    for fresh in (buffer, dweight):
        advise_large_pages_op(fresh)
    if not N:
        dweight.zero_()
    dbias_sum = torch.zeros_like(dbias, dtype=torch.float64)  # in float32 its error would grow with the chunks
    top: Tensor | float = 1.0
    if scale is not None and dtype == torch.float16 and N:
        # Times the scale itself, 1 / N or a loss scaler's, float16 would lose small inputs or hold infinite ones.
        top = scale.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    for start in range(0, N, rows or 1):
        chunk = slice(start, min(start + rows, N))
        x, g = input[chunk].to(dtype), buffer[: chunk.stop - start]
        for columns in range(0, V, CPU_COLUMNS if input.is_cpu else V):
            own = slice(columns, columns + CPU_COLUMNS) if input.is_cpu else slice(None)
            torch.mm(x, operand[own].t(), out=g[:, own])
        if bias is not None:
            g.add_(bias)
        parts = gathered_parts(g, target[chunk], class_weight, options, shards)
        if not any(needs):
            found = cross_entropy_op(g, target[chunk], class_weight, None, parts, *options, False)
            losses[chunk] = found[0]
            continue
        losses[chunk] = cross_entropy_in_place_op(g, target[chunk], class_weight, None, parts, *options)
        s = None if scale is None else scale.expand(N)[chunk]
        if needs_weight:
            add_product(dweight, g.t(), x if s is None else (x * (s / top)[:, None]).to(dtype), first=start == 0)
        if needs_input:
            write_product(dinput[chunk], g, operand, s)
        if needs_bias:
            # g is needed no more. A product with s would sum all rows in one float32 chain, PyTorch's sum does not.
            dbias_sum.add_((g.float() if s is None else g.float().mul_(s[:, None])).sum(0))
    dbias.copy_(dbias_sum)
    if dtype == torch.float16:
        dweight.mul_(top)
    return losses, summed_over_ranks(dinput, shards) if needs_input else dinput, dweight, dbias


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (float32) += a @ b, or = if this is the first: a fresh total then needs no pass of zeros."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif first:  # products of low precision, summed over all chunks in float32
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)


def write_product(target: Tensor, a: Tensor, b: Tensor, scale: Tensor | None) -> None:
    """target = scale * (a @ b), row by row, in float32 or in the dtype of a and b."""
    if target.dtype == torch.float32:
        add_product(target, a, b, first=True)
    else:
        torch.mm(a, b, out=target)
    if scale is not None:
        target.mul_(scale[:, None])


def outputs(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    scale: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients are float32: what scales them in the backward comes before their rounding, and in float16 their range.

    But for dinput of a GPU's bfloat16, which its product rounds; in float32 that would take twice the memory.
    """
    needs_input, needs_weight, needs_bias = Call.of(flat).needs
    keeps_dtype = not input.is_cpu and input.dtype == torch.bfloat16
    losses = input.new_empty((input.shape[0],), dtype=torch.float32)
    dinput = input.new_empty(
        input.shape if needs_input else (0, 0), dtype=input.dtype if keeps_dtype else torch.float32
    )
    dweight = weight.new_empty(weight.shape if needs_weight else (0, 0), dtype=torch.float32)
    dbias = weight.new_empty((weight.shape[0] if needs_bias else 0,), dtype=torch.float32)
    return losses, dinput, dweight, dbias


linear_cross_entropy_op = register(
    "linear_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight,"
    f" Tensor? scale, {OPTIONS_SCHEMA}, SymInt chunk_rows, str group_name, int num_ranks, int rank,"
    " bool needs_input, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    losses_and_gradients,
    outputs,
)


@register_flop_formula(torch.ops.fastlm.linear_cross_entropy)
def flops(input: torch.Size, weight: torch.Size, *flat: Any, **out: Any) -> int:
    """Of the logits and the two gradients, each one product, as torch.utils.flop_counter counts them."""
    *_, needs_input, needs_weight, _ = flat
    (N, C), V = input, weight[0]
    return 2 * N * C * V * (1 + needs_input + needs_weight)


# Autograd


class SummedLossFunction(torch.autograd.Function):
    """sum_i loss_i, divided by divisor (1,) if that is given; its gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        divisor: Tensor | None,
        call: Call,
    ) -> Tensor:
        scale = None if divisor is None else row_scale(target, divisor, call.options)
        losses, *gradients = linear_cross_entropy_op(input, weight, bias, target, class_weight, scale, *call.flat())
        ctx.call = call
        ctx.save_for_backward(input, weight, bias, target, class_weight, divisor, *gradients)
        return losses.sum() if divisor is None else losses.sum() / divisor[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, class_weight, divisor, *gradients = ctx.saved_tensors
        call: Call = ctx.call
        if is_double_backward():
            upstream = upstream if divisor is None else upstream * row_scale(target, divisor, call.options)
            found = gradients_in_pytorch(input, weight, bias, target, class_weight, upstream, call)
        else:
            if may_overwrite_saved(upstream):
                # Scaled where they lie: a new (V, C) tensor costs more in page faults than a tenth of the whole op.
                for gradient in gradients:
                    rows = gradient if gradient.dim() == 2 else gradient[:, None]
                    scale_rows_op(rows, upstream.view(1))
            else:
                gradients = [gradient * upstream for gradient in gradients]
            found = rounded(gradients, (input, weight, bias), call.needs)
        return *found, None, None, None, None


class RowLossesFunction(torch.autograd.Function):
    """loss_i of every row; the gradients are recomputed in the backward, where the upstream gradient is known."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        call: Call,
    ) -> Tensor:
        forward_only = call._replace(needs=(False, False, False)).flat()
        losses, *_ = linear_cross_entropy_op(input, weight, bias, target, class_weight, None, *forward_only)
        ctx.call = call
        ctx.save_for_backward(input, weight, bias, target, class_weight)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, class_weight = ctx.saved_tensors
        call: Call = ctx.call
        if is_double_backward():
            found = gradients_in_pytorch(input, weight, bias, target, class_weight, upstream, call)
        else:
            scale = upstream.float()
            _, *gradients = linear_cross_entropy_op(input, weight, bias, target, class_weight, scale, *call.flat())
            found = rounded(gradients, (input, weight, bias), call.needs)
        return *found, None, None, None


def rounded(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are needed, each in the dtype of its input."""
    return [
        gradient.to(x.dtype) if needed and x is not None else None
        for gradient, x, needed in zip(gradients, inputs, needs, strict=True)
    ]


def gradients_in_pytorch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    upstream: Tensor,
    call: Call,
) -> list[Tensor | None]:
    """Gradients of sum_i upstream_i loss_i, which autograd can differentiate again."""
    if call.shards is not None:
        raise RuntimeError(
            "linear_cross_entropy: a second derivative needs all logits, and process_group splits them; "
            "expected process_group=None with create_graph=True"
        )

    def loss(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        logits = F.linear(x.float(), w.float(), None if b is None else b.float())
        return (reference_losses(logits, target, class_weight, call.options) * upstream).sum()

    return differentiable_gradients(loss, (input, weight, bias), call.needs, [torch.ones_like(upstream.sum())])


# What the public function decides and checks


def shifted(input: Tensor, target: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Every position but the last ones against the target that lies shift further on."""
    if shift < 0:
        raise ValueError(f"linear_cross_entropy: shift is {shift}, expected 0 or more positions")
    if input.dim() < 2 or target.dim() != input.dim() - 1:
        shapes = f"input {tuple(input.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"linear_cross_entropy: shift needs input (..., T, C) and target (..., T), got {shapes}")
    return input[..., :-shift, :], target[..., shift:]


def rows_of_chunk(input: Tensor, num_columns: int, memory_budget: int | None, options: Any) -> int:
    """Rows whose logits are held at a time: by the budget, by torch's options, or the default of the device."""
    if options is not None and not hasattr(options, "batch_chunk_size"):
        raise TypeError(f"linear_cross_entropy: options is {options!r}, expected torch.nn.LinearCrossEntropyOptions")
    if memory_budget is None:
        return getattr(options, "batch_chunk_size", None) or CHUNK_ROWS.get(input.device.type, CHUNK_ROWS["cuda"])
    memory_budget = as_integer("linear_cross_entropy", "memory_budget", memory_budget)
    needed = (4 if input.is_cpu else input.element_size()) * max(num_columns, 1)
    if memory_budget < needed:
        raise ValueError(
            f"linear_cross_entropy: memory_budget is {memory_budget} bytes, one row of logits needs {needed}"
        )
    return min(memory_budget // needed, MOST_ROWS)


def over_all_logits(
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
    process_group: "ProcessGroup | None",
) -> Tensor:
    """Every form that the chunks do not support, as linear followed by cross_entropy."""
    if process_group is not None:
        raise ValueError(
            "linear_cross_entropy: process_group needs class indices, a linear_weight (V, C) and no float64, "
            f"got {target.dtype} target, linear_weight {tuple(linear_weight.shape)} and {input.dtype} input"
        )
    check_all_logits(input, linear_weight, target, ignore_index, num_classes)
    V, *inner, C = linear_weight.shape
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, linear_weight.reshape(math.prod((V, *inner)), C), bias).view(*input.shape[:-1], V, *inner)
    if input.dim() > 2:  # cross_entropy takes classes as the second dimension
        logits, target = logits.flatten(0, -2), target.flatten(0, input.dim() - 2)
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
    return losses.view(input.shape[:-1]) if input.dim() > 2 and reduction == "none" else losses


def check_layer(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    if input.dim() < 1 or linear_weight.dim() < 2:
        shapes = f"input {tuple(input.shape)} and linear_weight {tuple(linear_weight.shape)}"
        raise ValueError(f"linear_cross_entropy: expected input (..., C) and linear_weight (V, C), got {shapes}")
    C = linear_weight.shape[-1]
    if input.shape[-1] != C:
        shapes = f"input has {input.shape[-1]} features (shape {tuple(input.shape)}), linear_weight {C}"
        raise ValueError(f"linear_cross_entropy: {shapes}; they must agree")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        shapes = f"linear_bias has shape {tuple(linear_bias.shape)}, expected {tuple(linear_weight.shape[:-1])}"
        raise ValueError(f"linear_cross_entropy: {shapes}, as linear_weight without its features")


def check_all_logits(
    input: Tensor, linear_weight: Tensor, target: Tensor, ignore_index: int | None, num_classes: int | None
) -> None:
    """Raise what PyTorch raises; logits alone would not show that dimensions have changed places."""
    V, *inner, C = linear_weight.shape
    if inner and input.dim() != 2:
        shapes = (
            f"linear_weight {tuple(linear_weight.shape)} is that of a K-dimensional loss, input {tuple(input.shape)}"
        )
        raise ValueError(f"linear_cross_entropy: {shapes}; expected input (N, {C})")
    shape, leading = tuple(target.shape), input.shape[:-1]
    if not target.is_floating_point():
        if shape != (*leading, *inner):
            raise ValueError(f"linear_cross_entropy: target has shape {shape}, expected {(*leading, *inner)}")
        return
    classes = shape[len(leading)] if len(shape) > len(leading) else 0
    if shape != (*leading, classes, *inner) or not is_one_of(classes, V, num_classes or V):
        expected = f"class probabilities {(*leading, V, *inner)} or class indices {(*leading, *inner)}"
        raise ValueError(f"linear_cross_entropy: target is {target.dtype} {shape}, expected {expected}")
    if ignore_index is not None:
        raise ValueError(
            f"linear_cross_entropy: ignore_index is {ignore_index} and target holds class probabilities, of which no "
            "row can be ignored; expected ignore_index=None"
        )


def check_arguments(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    V: int,
    num_classes: int | None,
    autocast: bool,
) -> None:
    columns = linear_weight.shape[0]
    # Of the whole vocabulary's weights, the padding's may be missing.
    short = columns if num_classes is None or columns != V else num_classes
    if weight is not None and (weight.dim() != 1 or not is_one_of(weight.shape[0], columns, short)):
        raise ValueError(
            f"linear_cross_entropy: weight has shape {tuple(weight.shape)}, expected ({columns},), one for each class"
        )
    if num_classes is not None and not 0 < num_classes <= V:
        raise ValueError(
            f"linear_cross_entropy: num_classes is {num_classes}, expected 1 to {V} (rows of linear_weight)"
        )
    others = {"linear_weight": linear_weight, "target": target, "linear_bias": linear_bias, "weight": weight}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            there = f"{input.device}, where input is; move it there"
            raise ValueError(f"linear_cross_entropy: {name} is on {tensor.device}, expected {there}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"linear_cross_entropy: target is {target.dtype}, expected int64 class indices")
    if not autocast and (input.dtype != linear_weight.dtype or not input.is_floating_point()):
        kinds = f"input is {input.dtype} and linear_weight {linear_weight.dtype}"
        raise TypeError(f"linear_cross_entropy: {kinds}, expected one floating dtype")
    if linear_bias is not None and not linear_bias.is_floating_point():
        raise TypeError(f"linear_cross_entropy: linear_bias is {linear_bias.dtype}, expected a floating dtype")


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
    shift: bool | int = False,
    memory_budget: int | None = None,
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """Cross entropy of input @ linear_weight.T + linear_bias against target, without holding all logits.

    input          (..., C)   linear_weight (V, C)   linear_bias (V,)
    target         (...) class indices; ignore_index (None: -100) marks targets that are not valid
    weight, reduction, label_smoothing, z_loss, softcap, num_classes    as in fastlm.ops.cross_entropy
    options        torch.nn.LinearCrossEntropyOptions; its batch_chunk_size sets the rows of a chunk
    shift          score input[..., t, :] against target[..., t + shift]: True, or 1, is how a language model's labels
                   are laid out
    memory_budget  bytes of logits held at a time; None is 512 rows on a CPU, 2048 on a GPU
    process_group  vocab-parallel: the vocabulary is split over the ranks of this group. linear_weight, linear_bias and
                   weight hold the classes of this rank, as many on each, in the order of the ranks; input and target
                   are the same on all. Every rank gets the same loss, the gradients of its own classes and input's
    returns        float32 under autocast, else the dtype of input; a scalar, or target's shape for "none"

    Equals cross_entropy(linear(input, linear_weight, linear_bias), target, ...) with the same arguments. Class
    probabilities, a K-dimensional loss and float64 hold all logits.
    Raises ValueError if shapes or options disagree, TypeError for a dtype.
    """
    if isinstance(input, Proxy) or isinstance(linear_weight, Proxy) or isinstance(target, Proxy):
        return recorded(linear_cross_entropy, locals())
    if shift := as_integer("linear_cross_entropy", "shift", shift):
        input, target = shifted(input, target, shift)
    check_options("linear_cross_entropy", reduction, label_smoothing, z_loss, softcap, num_classes)
    check_layer(input, linear_weight, linear_bias)
    product_dtype = autocast_dtype(input)
    if route("linear_cross_entropy", (input, linear_weight), (target, weight)).implementation == TORCH:
        return over_all_logits(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
            z_loss, softcap, num_classes, process_group,
        )  # fmt: skip
    shards = shards_of(process_group)
    columns = linear_weight.shape[0]
    V = columns * (1 if shards is None else shards.num_ranks)
    check_arguments(input, linear_weight, target, linear_bias, weight, V, num_classes, product_dtype is not None)
    result_dtype = torch.float32 if product_dtype else input.dtype
    if product_dtype:
        input = input.to(product_dtype)
    V = num_classes or V
    ignored = DEFAULT_IGNORE_INDEX if ignore_index is None else ignore_index
    shape = Options(ignored, V, 0, V, label_smoothing, z_loss, softcap or 0.0)
    shape = shard_options(shape, columns, shards)
    grad = torch.is_grad_enabled()
    needs = (
        grad and input.requires_grad,
        grad and linear_weight.requires_grad,
        grad and linear_bias is not None and linear_bias.requires_grad,
    )
    rows = rows_of_chunk(input, columns, memory_budget, options)
    call = Call(shape, rows, shards, needs)
    class_weight = None if weight is None else weight.float()
    flat_target = target.reshape(-1)
    tensors = input.reshape(target.numel(), input.shape[-1]), linear_weight, linear_bias, flat_target, class_weight
    if reduction == "none":
        return RowLossesFunction.apply(*tensors, call).view(target.shape).to(result_dtype)
    divisor = mean_divisor(flat_target, class_weight, shape, shards).view(1) if reduction == "mean" else None
    return SummedLossFunction.apply(*tensors, divisor, call).to(result_dtype)
