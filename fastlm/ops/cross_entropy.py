"""Cross entropy of logits against class indices.

    x = softcap * tanh(input / softcap)                   where softcap is given
    lse_i = log(sum_c exp(x_ic))
    loss_i = (1 - label_smoothing) w_target_i (lse_i - x_i,target_i) + label_smoothing / V sum_c w_c (lse_i - x_ic)
             + z_loss * lse_i^2                           0 where target_i is ignore_index; w is weight, or 1

    d loss_i / d x_ic = softmax(x_i)_c - (c == target_i)  where neither is given; else csrc/cross_entropy_math.h

The softmax is at hand while the loss is computed, so the forward pass writes the gradient at once, already divided for
"mean", into a new tensor or over the logits. The backward pass multiplies it by the upstream gradient, and where that
is 1 it makes no pass over it.

A 16-bit gradient would so be rounded twice, and lose in float16 what a loss scaler is there to keep. Where upstream is
not 1 the backward therefore makes it again, from logits that are kept for a second derivative anyway. Where none are
kept (in place, in a compiled graph, over a process group) 16-bit gradients are made in the backward alone; but for
bfloat16 in place with "mean" or "sum", which are made at once and multiplied: exact for a power of two.

A compiled graph may not multiply a saved gradient where it lies: the product would read and write it once more. On a
GPU, which waits for memory, it makes every gradient in the backward instead, and only reads the logits once more.

Vocab-parallel, over a process group, each rank holds some columns. It computes their partial statistics of each row,
six numbers; all ranks gather these, merge them in the same order, and each writes the gradient of its own columns.

Source: the sum beside a running maximum, Milakov, Gimelshein 2018, arXiv 1805.02867; z_loss, Chowdhery et al. 2022,
arXiv 2204.02311; softcap, Gemma Team 2024, arXiv 2408.00118; vocab-parallel, Shoeybi et al. 2019,
arXiv 1909.08053.
"""

import math
import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import _reduction

from fastlm.ops import _torch
from fastlm.ops._dispatch import TORCH, is_one_of, is_plain_tensor, route
from fastlm.ops._fx import recorded
from fastlm.ops._register import differentiable_gradients, is_double_backward, register

if TYPE_CHECKING:  # some builds of PyTorch have no process groups
    from torch.distributed import ProcessGroup

REDUCTIONS = ("none", "mean", "sum")
LATE_IF_COMPILED = ("cuda",)  # devices to which reading logits once more is cheaper than the product with upstream


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
    dim = class_dim(input)
    x = input if input.dtype == torch.float64 else input.float()
    x, target, weight = only_classes(x, target, weight, num_classes)
    weight = None if weight is None else weight.to(x.dtype)
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    losses = _torch.cross_entropy(
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


def class_dim(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0


def only_classes(
    input: Tensor, target: Tensor, weight: Tensor | None, num_classes: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, target and weight without the columns from num_classes on; what is cut off gets gradient 0."""
    if num_classes is None:
        return input, target, weight
    if target.is_floating_point() and target.shape == input.shape:
        target = target.narrow(class_dim(input), 0, num_classes)
    return input.narrow(class_dim(input), 0, num_classes), target, None if weight is None else weight[:num_classes]


# Raw ops. The kernels are in csrc/; the functions here run where no kernel is loaded for the device.


class Options(NamedTuple):
    """What shapes the loss and is the same for all rows, in the order of the raw ops' arguments."""

    ignore_index: int
    num_classes: int  # columns from this one on count as -inf
    first_class: int  # the class of column 0
    total_classes: int  # in the whole vocabulary
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none


def losses_and_gradient(
    input: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor | None, parts: Tensor | None, *call: Any
) -> tuple[Tensor, Tensor]:
    """(losses (N,) float32, scale * d losses.sum() / d input of input's shape and dtype, or (0,))."""
    *options, with_gradient = call
    if parts is not None:
        raise RuntimeError("cross_entropy: no kernel is loaded that takes a part of the vocabulary on this device")
    x = input.detach().float()
    if not with_gradient:
        return reference_losses(x, target, weight, Options(*options)), input.new_empty(0)
    with torch.enable_grad():
        losses = reference_losses(x.requires_grad_(), target, weight, Options(*options))
    upstream = torch.ones_like(losses) if scale is None else scale.reshape(-1).expand_as(losses)
    (gradient,) = torch.autograd.grad(losses, x, upstream)
    return losses.detach(), gradient.to(input.dtype)


def losses_over_input(
    input: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor | None, parts: Tensor | None, *options: Any
) -> Tensor:
    """The same losses; input becomes the gradient."""
    losses, gradient = losses_and_gradient(input, target, weight, scale, parts, *options, True)
    input.copy_(gradient)
    return losses


def gradient_again(
    gradient: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    upstream: Tensor,
    *options: Any,
) -> None:
    """gradient, made with this scale, becomes that with scale * upstream; a kernel leaves rows whose upstream is 1."""
    scale = upstream if scale is None else scale * upstream
    gradient.copy_(losses_and_gradient(input, target, weight, scale, None, *options, True)[1])


def reference_losses(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """cross_entropy_reference of every row, with the options of a raw op; input holds the whole vocabulary."""
    return cross_entropy_reference(
        input, target.long(), weight, options.ignore_index, "none", options.label_smoothing,
        z_loss=options.z_loss, softcap=options.softcap or None, num_classes=options.num_classes,
    )  # fmt: skip


def scale_rows(input: Tensor, scale: Tensor) -> None:
    """input[i] *= scale[i], or scale[0] for all; a kernel passes over no row whose scale is 1."""
    input.mul_(scale.reshape(-1, 1))


def part_of_vocabulary(input: Tensor, *_: Any) -> Tensor:
    raise RuntimeError(f"cross_entropy: no kernel is loaded that takes a part of the vocabulary on {input.device}")


def fake_losses_and_gradient(input: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    with_gradient = call[-1]
    return fake_losses(input), input.new_empty(input.shape if with_gradient else (0,))


def fake_losses(input: Tensor, *_: Any) -> Tensor:
    return input.new_empty(input.shape[:1], dtype=torch.float32)


def fake_part(input: Tensor, *_: Any) -> Tensor:
    """(N, 6): maximum, sum of exponentials, sum of weights, weighted sum, target's logit, target's weight."""
    return input.new_empty((input.shape[0], 6), dtype=torch.float32)


OPTIONS_SCHEMA = (
    "SymInt ignore_index, SymInt num_classes, SymInt first_class, SymInt total_classes,"
    " float label_smoothing, float z_loss, float softcap"
)
ANY_DEVICE = ["CompositeExplicitAutograd"]  # C++ and CUDA of csrc/ take their place on their devices
cross_entropy_op = register(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight, Tensor? scale, Tensor? parts,"
    f" {OPTIONS_SCHEMA}, bool with_gradient) -> (Tensor losses, Tensor gradient)",
    losses_and_gradient,
    fake_losses_and_gradient,
    ANY_DEVICE,
)
cross_entropy_in_place_op = register(
    "cross_entropy_(Tensor(a!) input, Tensor target, Tensor? weight, Tensor? scale, Tensor? parts,"
    f" {OPTIONS_SCHEMA}) -> Tensor losses",
    losses_over_input,
    fake_losses,
    ANY_DEVICE,
)
cross_entropy_again_op = register(
    "cross_entropy_again_(Tensor(a!) gradient, Tensor input, Tensor target, Tensor? weight, Tensor? scale,"
    f" Tensor upstream, {OPTIONS_SCHEMA}) -> ()",
    gradient_again,
    lambda *call: None,
    ANY_DEVICE,
)
cross_entropy_part_op = register(
    f"cross_entropy_part(Tensor input, Tensor target, Tensor? weight, {OPTIONS_SCHEMA}) -> Tensor",
    part_of_vocabulary,
    fake_part,
    ANY_DEVICE,
)
scale_rows_op = register(
    "scale_rows_(Tensor(a!) input, Tensor scale) -> ()", scale_rows, lambda input, scale: None, ANY_DEVICE
)
advise_large_pages_op = register(  # of CPU memory alone
    "advise_large_pages(Tensor fresh) -> ()", lambda fresh: None, lambda fresh: None, ANY_DEVICE
)


def cross_entropy_over(
    logits: Tensor,
    gradient: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    parts: Tensor | None,
    options: Options,
) -> Tensor:
    """The losses; the logits become their gradient, in the dtype of gradient, whose rows begin where theirs do."""
    if gradient.dtype == logits.dtype:
        return cross_entropy_in_place_op(logits, target, weight, scale, parts, *options)
    return torch.ops.fastlm.cross_entropy_narrow_(gradient, logits, target, weight, scale, parts, *options)


# Vocab-parallel: a vocabulary split over a process group


class Shards(NamedTuple):
    """The ranks over which the vocabulary is split; all hold as many columns, in the order of the ranks."""

    group_name: str
    num_ranks: int
    rank: int


def shards_of(process_group: "ProcessGroup | None") -> Shards | None:
    """The ranks of a group by the name that PyTorch's collectives know it by, or None where the vocabulary is whole."""
    if process_group is None:
        return None
    return Shards(process_group.group_name, process_group.size(), process_group.rank())


def shard_options(options: Options, num_columns: int, shards: Shards | None) -> Options:
    """The options of this rank's columns, given those of the whole vocabulary."""
    if shards is None:
        return options
    first = shards.rank * num_columns
    own = min(max(options.total_classes - first, 0), num_columns)
    return options._replace(num_classes=own, first_class=min(first, options.total_classes))


def gathered_parts(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, shards: Shards | None
) -> Tensor | None:
    """(ranks, N, 6): what the columns of each rank contribute to each row; None where the vocabulary is whole."""
    if shards is None:
        return None
    part = cross_entropy_part_op(logits, target, weight, *options)
    parts = torch.ops._c10d_functional.all_gather_into_tensor(part, shards.num_ranks, shards.group_name)
    return torch.ops._c10d_functional.wait_tensor(parts).view(shards.num_ranks, *part.shape)


def summed_over_ranks(tensor: Tensor, shards: Shards | None) -> Tensor:
    """The sum of every rank's tensor; the tensor itself where the vocabulary is whole."""
    if shards is None:
        return tensor
    total = torch.ops._c10d_functional.all_reduce(tensor, "sum", shards.group_name)
    return torch.ops._c10d_functional.wait_tensor(total)


def mean_divisor(target: Tensor, weight: Tensor | None, options: Options, shards: Shards | None) -> Tensor:
    """What "mean" divides by: the valid targets, each by the weight of its class."""
    counts = target != options.ignore_index
    if weight is None:
        return counts.sum(dtype=torch.float32)
    column = target - options.first_class
    counts = counts & (column >= 0) & (column < options.num_classes)
    weights = weight.index_select(0, column.clamp(0, weight.shape[0] - 1))  # the kernel refuses a target out of range
    return summed_over_ranks(torch.where(counts, weights, 0).sum(), shards)


def row_scale(target: Tensor, divisor: Tensor, options: Options) -> Tensor:
    """(N,) 1 / divisor for valid rows, 0 for the others: their gradient is 0, also where the divisor is."""
    return torch.where(target != options.ignore_index, divisor.reciprocal(), 0.0)


# Autograd


class SaveLogits(torch.autograd.Function):
    """Keeps the logits for a second derivative without the first one's reading them.

    Saved by CrossEntropyFunction itself, they would be checked at every backward, and logits changed in place after the
    loss, which PyTorch allows, would be an error.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return input.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        return None


class CrossEntropyFunction(torch.autograd.Function):
    """The reduced loss; saves its gradient, in a new tensor or over the logits, or, if late, the logits themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        logits_keeper: Tensor | None,
        options: Options,
        shards: Shards | None,
        reduction: str,
        inplace: bool,
        late: bool,
    ) -> Tensor:
        divisor = mean_divisor(target, weight, options, shards) if reduction == "mean" else None
        scale = None if divisor is None else divisor.reciprocal()
        saved = logits = input.detach()
        parts = gathered_parts(logits, target, weight, options, shards)
        if inplace and not late:
            losses = cross_entropy_in_place_op(logits, target, weight, scale, parts, *options)
        else:
            losses, made = cross_entropy_op(logits, target, weight, scale, parts, *options, not late)
            saved = logits if late else made
        if inplace:
            mark_overwritten(logits)
        ctx.call = options, shards, reduction
        ctx.inplace, ctx.late = inplace, late
        ctx.save_for_backward(saved, target, weight, logits_keeper, scale, parts)
        return reduced(losses, reduction, divisor)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, target, weight, logits_keeper, scale, parts = ctx.saved_tensors
        options, may_overwrite = ctx.call[0], may_overwrite_saved(upstream)
        logits = gradient if ctx.late else None if gradient.dtype == torch.float32 else unchanged_logits(logits_keeper)
        if is_double_backward():
            gradient = gradient_in_pytorch(logits_keeper, target, weight, upstream, *ctx.call)
        elif logits is not None and (ctx.late or not may_overwrite):
            gradient = gradient_for_upstream(
                upstream, logits, target, weight, scale, parts, options, over_logits=ctx.inplace and may_overwrite
            )
        elif not may_overwrite:
            gradient = (gradient * upstream.reshape(-1)[:, None]).to(gradient.dtype)
        else:
            if logits is None:
                scale_rows_op(gradient, upstream.reshape(-1))
            else:
                cross_entropy_again_op(gradient, logits, target, weight, scale, upstream, *options)
            mark_overwritten(gradient)
        return gradient, None, None, None, None, None, None, None, None


def gradient_for_upstream(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    parts: Tensor | None,
    options: Options,
    over_logits: bool,
) -> Tensor:
    """The gradient of 16-bit logits, rounded once, now that the upstream gradient is known."""
    if is_batch(upstream):  # the raw ops know no batch
        wide = cross_entropy_op(logits.float(), target, weight, scale, parts, *options, True)[1]
        return (wide * upstream.reshape(-1)[:, None]).to(logits.dtype)
    scale = upstream if scale is None else upstream * scale
    if not over_logits:
        return cross_entropy_op(logits, target, weight, scale, parts, *options, True)[1]
    cross_entropy_in_place_op(logits, target, weight, scale, parts, *options)
    mark_overwritten(logits)
    return logits


def unchanged_logits(logits_keeper: Tensor | None) -> Tensor | None:
    """The logits, unless they are not kept or have been changed in place since the loss, which PyTorch allows."""
    if logits_keeper is None:
        return None
    keeper: Any = logits_keeper.grad_fn
    try:
        return keeper.saved_tensors[0].detach()
    except RuntimeError:
        return None


def may_overwrite_saved(upstream: Tensor) -> bool:
    """Whether a backward may scale the gradients where they lie, because nothing reads them again.

    PyTorch has no public name for "the graph is kept".
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and not is_batch(upstream)
    )


def is_batch(upstream: Tensor) -> bool:
    """Whether these are many upstream gradients as one, a tensor of no device's own kind, of which each is needed."""
    return not torch.compiler.is_compiling() and (
        torch._C._dispatch_keys(upstream).has(torch._C.DispatchKey.AutogradOther) or not is_plain_tensor(upstream)
    )


def mark_overwritten(tensor: Tensor) -> None:
    """Bumps the version counter, which kernels know nothing of: else autograd would trust a value saved elsewhere."""
    if not torch.compiler.is_compiling():  # a compiled graph sees the mutation in the op's schema
        torch.autograd.graph.increment_version(tensor)


def gradient_in_pytorch(
    logits_keeper: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    upstream: Tensor,
    options: Options,
    shards: Shards | None,
    reduction: str,
) -> Tensor:
    """The gradient in PyTorch's code, so that it can be differentiated again."""
    if shards is not None:
        raise RuntimeError(
            "cross_entropy: a second derivative needs all logits, and process_group splits them; "
            "expected gathered logits and process_group=None with create_graph=True"
        )
    if logits_keeper is None:
        raise RuntimeError(
            "cross_entropy: inplace=True has overwritten the logits, which a second derivative needs; "
            "expected inplace=False with create_graph=True"
        )
    divisor = mean_divisor(target, weight, options, None) if reduction == "mean" else None
    keeper: Any = logits_keeper.grad_fn
    (gradient,) = differentiable_gradients(
        lambda logits: reduced(reference_losses(logits.float(), target, weight, options), reduction, divisor),
        keeper.saved_tensors,
        [True],
        [upstream],
    )
    assert gradient is not None, "a loss depends on its logits"
    return gradient


def reduced(losses: Tensor, reduction: str, divisor: Tensor | None) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if divisor is None else losses.sum() / divisor


# What the public function decides and checks


def check_arguments(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    num_classes: int | None,
    shards: Shards | None,
) -> None:
    check_options("cross_entropy", reduction, label_smoothing, z_loss, softcap, num_classes)
    if input.dim() == 2 and target.dim() == 1 and target.shape[0] != input.shape[0]:
        shapes = f"target has shape {tuple(target.shape)}, expected ({input.shape[0]},)"
        raise ValueError(f"cross_entropy: {shapes} to match the rows of input {tuple(input.shape)}")
    if not input.dim():
        return
    columns = input.shape[class_dim(input)]
    V = columns if shards is None else columns * shards.num_ranks
    if num_classes is not None and not 0 < num_classes <= V:
        raise ValueError(f"cross_entropy: num_classes is {num_classes}, expected 1 to {V}, the classes of input")
    short = columns if num_classes is None or shards is not None else num_classes
    if weight is not None and (weight.dim() != 1 or not is_one_of(weight.shape[0], columns, short)):
        raise ValueError(
            f"cross_entropy: weight has shape {tuple(weight.shape)}, expected ({columns},), one for each class of input"
        )
    if shards is not None and (input.dim() != 2 or target.dim() != 1 or target.is_floating_point()):
        shapes = f"input {tuple(input.shape)} and {target.dtype} target {tuple(target.shape)}"
        raise ValueError(f"cross_entropy: process_group needs input (N, V) and class indices (N,), got {shapes}")


def check_options(
    name: str,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    num_classes: int | None,
) -> None:
    """Raise ValueError, or TypeError, unless each option can be meant, in the name of the function that was called."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction is {reduction!r}, expected 'none', 'mean' or 'sum'")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}, expected 0 to 1")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{name}: z_loss is {z_loss}, expected a number from 0 on")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}: softcap is {softcap}, expected a positive number or None")
    if num_classes is not None:
        as_integer(name, "num_classes", num_classes)


def as_integer(name: str, option: str, value: Any) -> int:
    """An option that must be an integer, or TypeError in the name of the function that was called."""
    if isinstance(value, int):  # of a symbolic one, operator.index would make a constant
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {option} is {value!r}, expected an integer") from None


class AllGatherColumns(torch.autograd.Function):
    """Every rank's columns beside each other; the gradient is that of the rank's own, for all take the same loss."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, shards: Shards) -> Tensor:
        ctx.own = shards.rank * columns.shape[-1], columns.shape[-1]
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(
            columns.t().contiguous(), shards.num_ranks, shards.group_name
        )
        return torch.ops._c10d_functional.wait_tensor(gathered).t()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream.narrow(-1, *ctx.own), None


def whole_vocabulary(input: Tensor, weight: Tensor | None, shards: Shards) -> tuple[Tensor, Tensor | None]:
    """All logits (N, V), and all weights, on every rank: for the forms that no kernel supports."""
    whole_weight = None if weight is None else AllGatherColumns.apply(weight[None], shards)[0]
    return AllGatherColumns.apply(input, shards), whole_weight


def rows_lie_apart(input: Tensor) -> bool:
    """Whether each row is contiguous and shares no element with another, so that it can be overwritten."""
    rows, columns = input.shape
    return (columns <= 1 or input.stride(1) == 1) and (rows <= 1 or input.stride(0) >= columns)


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
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """Cross entropy between logits and class indices or class probabilities.

        loss = log(sum_c exp(input[c])) - input[target]

    input            (N, V), or as in PyTorch (V,) or (N, V, d1, ...); float32, float16, bfloat16 or float64
    target           (N,) class indices; those equal to ignore_index are not valid. Or probabilities of input's shape
    weight           (V,) weight of each class
    reduction        "none", "mean" over the valid targets, each by the weight of its class, or "sum"
    label_smoothing  the share of probability spread over all classes
    z_loss           adds z_loss * logsumexp(input)^2 to each valid row; "mean" divides as without it
    softcap          logits are first softcap * tanh(input / softcap)
    num_classes      columns from this one on are padding of the vocabulary: they count as -inf and get gradient 0
    inplace          lets the op overwrite input with its gradient, which spares the memory and time of a second (N, V)
                     tensor: in the forward, or in the backward for float16 and for "none" in bfloat16. input is kept
                     where no gradient is asked for or no kernel supports the call
    process_group    vocab-parallel: the vocabulary is split over the ranks of this group. input, and weight if given,
                     hold the columns of this rank, as many on each, in the order of the ranks; target and num_classes
                     speak of the whole vocabulary. Every rank gets the same loss, and the gradient of its own columns
    returns          a scalar, or (N,) for "none"; dtype of input

    Equals torch.nn.functional.cross_entropy where the keyword-only arguments are left out. The kernels support (N, V)
    logits in float32, float16 and bfloat16 against class indices, in every mode, with float32 statistics;
    probabilities, other shapes, float64 and, on a CPU unless inplace, up to 65,536 float32 logits run PyTorch's.
    Raises ValueError if a shape, a reduction or an option is wrong, IndexError for a target out of range (on a GPU,
    whose targets the host does not see, a device-side assertion, as PyTorch's own).
    """
    if isinstance(input, Proxy) or isinstance(target, Proxy) or isinstance(weight, Proxy):
        return recorded(cross_entropy, locals())
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    shards = shards_of(process_group)
    check_arguments(input, target, weight, reduction, label_smoothing, z_loss, softcap, num_classes, shards)
    is_torchs_form = not z_loss and softcap is None and shards is None
    found = route("cross_entropy", (input,), (target, weight, inplace, is_torchs_form))
    if found.implementation == TORCH:
        if shards is not None:
            input, weight = whole_vocabulary(input, weight, shards)
        if z_loss or softcap is not None:
            return cross_entropy_reference(
                input, target, weight, ignore_index, reduction, label_smoothing,
                z_loss=z_loss, softcap=softcap, num_classes=num_classes,
            )  # fmt: skip
        input, target, weight = only_classes(input, target, weight, num_classes)
        return _torch.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    columns = input.shape[1]
    V = num_classes or columns * (1 if shards is None else shards.num_ranks)
    options = Options(ignore_index, V, 0, V, label_smoothing, z_loss, softcap or 0.0)
    options = shard_options(options, columns, shards)
    weight = None if weight is None else weight.detach().float()
    if torch.is_grad_enabled() and input.requires_grad:
        inplace = inplace and rows_lie_apart(input)
        keep = not (inplace or shards or torch.compiler.is_compiling())
        logits_keeper = SaveLogits.apply(input) if keep else None
        at_once = keep or (inplace and input.dtype == torch.bfloat16 and reduction != "none")
        late = input.dtype != torch.float32 and not at_once
        if torch.compiler.is_compiling() and input.device.type in LATE_IF_COMPILED:
            late = True
        loss = CrossEntropyFunction.apply(
            input, target, weight, logits_keeper, options, shards, reduction, inplace, late
        )
    else:
        parts = gathered_parts(input, target, weight, options, shards)
        losses, _ = cross_entropy_op(input, target, weight, None, parts, *options, False)
        loss = reduced(
            losses, reduction, mean_divisor(target, weight, options, shards) if reduction == "mean" else None
        )
    # PyTorch's own is float32 under autocast, whatever the logits are.
    return loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)
