"""Cross entropy of a linear layer's logits, taken in chunks of rows so that the (N, V) logits never exist.

    logits = logit_scale * (input @ linear_weight.T + linear_bias)        loss_i = cross_entropy(logits_i, target_i)

Row i of the gradient is scaled by s_i: 1 for a sum, one over the divisor for a mean. The forward of "sum" and "mean"
already holds all gradients (_chunks.py), and the backward only multiplies by the upstream gradient. "none" recomputes
its chunks in the backward, where each row's upstream gradient is known.

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

from fastlm.ops._chunks import (
    Chunks,
    Gradients,
    Needs,
    check_layer,
    check_positive,
    check_rows,
    empty_gradients,
    rounded,
    rows_of_chunk,
    shifted,
    valid_rows,
    wanted_gradients,
)
from fastlm.ops._dispatch import FEW_LOGITS, TORCH, autocast_dtype, is_one_of, route
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
    cross_entropy_op,
    cross_entropy_over,
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

DEFAULT_IGNORE_INDEX = -100


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    **options: Any,
) -> Tensor:
    """The op in plain PyTorch: every logit at once. options are those of cross_entropy_reference."""
    logits = F.linear(input, linear_weight, linear_bias).flatten(0, -2)
    losses = cross_entropy_reference(logits * logit_scale, target.flatten(), **options)
    return losses.view(target.shape) if losses.dim() else losses


# Raw op


class Call(NamedTuple):
    """What a call computes beside its tensors."""

    options: Options
    logit_scale: float
    chunk_rows: int
    shards: Shards | None
    needs: Needs

    def flat(self) -> tuple[Any, ...]:
        """The last arguments of the raw op."""
        return *self.options, self.logit_scale, self.chunk_rows, *(self.shards or ("", 1, 0)), *self.needs

    @classmethod
    def of(cls, flat: Sequence[Any]) -> "Call":
        *options, logit_scale, chunk_rows, group_name, num_ranks, rank, needs_input, needs_weight, needs_bias = flat
        shards = Shards(group_name, num_ranks, rank) if group_name else None
        return cls(Options(*options), logit_scale, chunk_rows, shards, (needs_input, needs_weight, needs_bias))


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
    options, logit_scale, chunk_rows, shards, needs = Call.of(flat)
    losses, dinput, dweight, dbias = outputs(input, weight, bias, target, class_weight, scale, *flat)
    rows = valid_rows(target, options.ignore_index)
    if rows is not None:
        losses.zero_()
    chunks = Chunks(input, weight, bias, rows, chunk_rows, logit_scale)
    for fresh in (chunks.buffer, dweight):
        advise_large_pages_op(fresh)
    gradients = Gradients(chunks, (dinput, dweight, dbias), scale, needs)
    for chunk in chunks:
        wanted, logits = target[chunk.rows], chunk.logits
        parts = gathered_parts(logits, wanted, class_weight, options, shards)
        if any(needs):
            factor = gradients.scale_of_logits(chunk)
            losses[chunk.rows] = cross_entropy_over(
                logits, chunk.gradient, wanted, class_weight, factor, parts, options
            )
            gradients.add(chunk)
        else:
            losses[chunk.rows] = cross_entropy_op(logits, wanted, class_weight, None, parts, *options, False)[0]
    gradients.finish()
    return losses, summed_over_ranks(dinput, shards) if needs[0] else dinput, dweight, dbias


def outputs(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    scale: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = input.new_empty((input.shape[0],), dtype=torch.float32)
    return losses, *empty_gradients(input, weight, Call.of(flat).needs)


linear_cross_entropy_op = register(
    "linear_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight,"
    f" Tensor? scale, {OPTIONS_SCHEMA}, float logit_scale, SymInt chunk_rows, str group_name, int num_ranks, int rank,"
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
        logits = F.linear(x.float(), w.float(), None if b is None else b.float()) * call.logit_scale
        return (reference_losses(logits, target, class_weight, call.options) * upstream).sum()

    return differentiable_gradients(loss, (input, weight, bias), call.needs, [torch.ones_like(upstream.sum())])


# What the public function decides and checks


def over_all_logits(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    logit_scale: float,
    z_loss: float,
    softcap: float | None,
    num_classes: int | None,
    dtype: torch.dtype | None,
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
    logits = logits if logit_scale == 1 else logits * logit_scale
    logits = logits if dtype is None else logits.to(torch.promote_types(logits.dtype, dtype))
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
    losses = losses if dtype is None else losses.to(dtype)
    return losses.view(input.shape[:-1]) if input.dim() > 2 and reduction == "none" else losses


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
    tensors = {"linear_weight": linear_weight, "target": target, "linear_bias": linear_bias, "weight": weight}
    check_rows("linear_cross_entropy", input, tensors, V, num_classes, autocast)


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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    num_classes: int | None = None,
    shift: bool | int = False,
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """Cross entropy of input @ linear_weight.T + linear_bias against target, without holding all logits.

    input          (..., C)   linear_weight (V, C)   linear_bias (V,)
    target         (...) class indices; ignore_index (None: -100) marks targets that are not valid
    weight, reduction, label_smoothing, z_loss, softcap, num_classes    as in fastlm.ops.cross_entropy
    logit_scale    logits are first multiplied by it, before softcap; 1 / temperature
    options        torch.nn.LinearCrossEntropyOptions; its batch_chunk_size sets the rows of a chunk
    shift          score input[..., t, :] against target[..., t + shift]: True, or 1, is how a language model's labels
                   are laid out
    dtype          of the result; None is float32 under autocast, else that of input
    memory_budget  bytes of logits held at a time; None is 512 rows on a CPU, 2048 on a GPU
    process_group  vocab-parallel: the vocabulary is split over the ranks of this group. linear_weight, linear_bias and
                   weight hold the classes of this rank, as many on each, in the order of the ranks; input and target
                   are the same on all. Every rank gets the same loss, the gradients of its own classes and input's
    returns        a scalar, or target's shape for "none"

    Equals cross_entropy(linear(input, linear_weight, linear_bias), target, ...) with the same arguments. On a CPU rows
    whose target is not valid take no time. Class probabilities, a K-dimensional loss and float64 hold all logits, as
    do up to 65,536 of float32 on a CPU.
    Raises ValueError if shapes or options disagree, TypeError for a dtype.
    """
    if isinstance(input, Proxy) or isinstance(linear_weight, Proxy) or isinstance(target, Proxy):
        return recorded(linear_cross_entropy, locals())
    if shift := as_integer("linear_cross_entropy", "shift", shift):
        input, target = shifted("linear_cross_entropy", input, target, shift)
    check_options("linear_cross_entropy", reduction, label_smoothing, z_loss, softcap, num_classes)
    check_positive("linear_cross_entropy", "logit_scale", logit_scale)
    check_layer("linear_cross_entropy", input, linear_weight, linear_bias)
    product_dtype = autocast_dtype(input)
    is_torchs_form = not z_loss and softcap is None and process_group is None and memory_budget is None
    classes = (num_classes or linear_weight.shape[0]) if is_torchs_form else None
    found = route("linear_cross_entropy", (input, linear_weight), (target, weight, classes))
    if found.implementation == TORCH and found is not FEW_LOGITS:
        return over_all_logits(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
            logit_scale, z_loss, softcap, num_classes, dtype, process_group,
        )  # fmt: skip
    shards = shards_of(process_group)
    columns = linear_weight.shape[0]
    V = columns * (1 if shards is None else shards.num_ranks)
    check_arguments(input, linear_weight, target, linear_bias, weight, V, num_classes, product_dtype is not None)
    result_dtype = dtype or (torch.float32 if product_dtype else input.dtype)
    if product_dtype:
        input = input.to(product_dtype)
    V = num_classes or V
    ignored = DEFAULT_IGNORE_INDEX if ignore_index is None else ignore_index
    shape = Options(ignored, V, 0, V, label_smoothing, z_loss, softcap or 0.0)
    shape = shard_options(shape, columns, shards)
    if memory_budget is not None:
        memory_budget = as_integer("linear_cross_entropy", "memory_budget", memory_budget)
    rows = rows_of_chunk("linear_cross_entropy", input, columns, memory_budget, options)
    if found is FEW_LOGITS:
        bias = None if linear_bias is None else linear_bias.to(input.dtype)
        if columns > V:  # no product of the padding
            linear_weight, bias = linear_weight[:V], None if bias is None else bias[:V]
        class_weight = None if weight is None else weight[:V].to(torch.promote_types(input.dtype, result_dtype))
        return over_all_logits(
            input, linear_weight, target.long(), bias, class_weight, reduction, ignored, label_smoothing, logit_scale,
            z_loss, softcap, None, dtype, process_group,
        )  # fmt: skip
    call = Call(shape, float(logit_scale), rows, shards, wanted_gradients(input, linear_weight, linear_bias))
    class_weight = None if weight is None else weight.float()
    flat_target = target.reshape(-1)
    tensors = input.reshape(target.numel(), input.shape[-1]), linear_weight, linear_bias, flat_target, class_weight
    if reduction == "none":
        return RowLossesFunction.apply(*tensors, call).view(target.shape).to(result_dtype)
    divisor = mean_divisor(flat_target, class_weight, shape, shards).view(1) if reduction == "mean" else None
    return SummedLossFunction.apply(*tensors, divisor, call).to(result_dtype)
