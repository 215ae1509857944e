"""Log-probabilities of given tokens under a linear layer's logits, which are taken in chunks of rows.

    z = logit_scale * (input @ linear_weight.T + linear_bias)
    x = softcap * tanh(z / softcap) / temperature            or z / temperature
    logp_ic = x_ic - log(sum_c exp(x_ic))                     logprobs_i = logp_i,target_i
    entropy_i = -sum_c p_ic logp_ic                           p = exp(logp)

Gradient, with u_i upstream of logprobs_i and v_i upstream of entropy_i:

    dx_ic = u_i ((c == target_i) - p_ic) - v_i p_ic (logp_ic + entropy_i)

The backward makes the logits of each chunk again, where u and v are known. Without v the gradient is that of cross
entropy, by whose kernels it runs. Temperature divides what softcap leaves, as in sampling; since
softcap tanh(z / softcap) / temperature is the same with z and softcap both divided, it costs nothing.

Source: the losses of RLHF take these: Ouyang et al. 2022, arXiv 2203.02155.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
from fastlm.ops._dispatch import TORCH, autocast_dtype, route
from fastlm.ops._fx import recorded
from fastlm.ops._register import differentiable_gradients, is_double_backward, register
from fastlm.ops.cross_entropy import (
    Options,
    advise_large_pages_op,
    as_integer,
    cross_entropy_op,
    cross_entropy_over,
)

DEFAULT_IGNORE_INDEX = -100
NO_TOKEN = -1  # the argmax of a row without a valid target: it equals no target
# Logits whose entropy is taken at a time, in float32: on a CPU they stay in its caches.
BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}


class LinearLogprobs(NamedTuple):
    """What linear_logprobs found of each row; None is what it was not asked for."""

    logprobs: Tensor
    entropy: Tensor | None = None
    argmax: Tensor | None = None


def linear_logprobs_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    num_classes: int | None = None,
    entropy: bool = False,
    argmax: bool = False,
) -> LinearLogprobs:
    """The op in plain PyTorch, every logit at once, in float32 (float64 for float64 input) after the product."""
    logits = F.linear(input, linear_weight, linear_bias)[..., :num_classes]
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    x = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    logp = x.log_softmax(-1)  # a method: ours may take the name of the function
    valid = target != (DEFAULT_IGNORE_INDEX if ignore_index is None else ignore_index)
    logprobs = logp.gather(-1, target.masked_fill(~valid, 0).long()[..., None])[..., 0]
    return LinearLogprobs(
        logprobs.masked_fill(~valid, 0),
        entropy_of(logp).masked_fill(~valid, 0) if entropy else None,
        logits.detach().argmax(-1).masked_fill(~valid, NO_TOKEN) if argmax else None,
    )


def entropy_of(logp: Tensor) -> Tensor:
    """-sum p logp of the last dimension, to which an impossible token adds 0."""
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)


# Rows of logits, of which columns from num_classes on are padding


def blocks_of(logits: Tensor) -> Iterator[slice]:
    """Rows whose logits fit in a block."""
    N, V = logits.shape
    rows = max(1, BLOCK.get(logits.device.type, BLOCK["cuda"]) // max(V, 1))
    return (slice(start, start + rows) for start in range(0, N, rows))


def capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits.float() / softcap) if softcap else logits.float()


class Distribution(NamedTuple):
    """softmax(x), x = max + d: e = exp(d), their sums, and the mean of d; log p = d - log(sum)."""

    d: Tensor
    e: Tensor
    sum: Tensor  # (N, 1), as mean
    mean: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Distribution":
        # Not by log_softmax, which on a CPU sums a row in few chains: of 70,000 columns that costs two digits.
        d = x.sub(x.amax(1, keepdim=True)).clamp_(min=torch.finfo(x.dtype).min)  # finite, so that an e of 0 makes it 0
        e = d.exp()
        total = e.sum(1, keepdim=True)
        return cls(d, e, total, (e * d).sum(1, keepdim=True).div_(total))


def entropies(logits: Tensor, num_classes: int, softcap: float) -> Tensor:
    """(N,) float32."""
    found = logits.new_empty((logits.shape[0],), dtype=torch.float32)
    for rows in blocks_of(logits):
        row = Distribution.of(capped(logits[rows, :num_classes], softcap))
        found[rows] = (row.sum.log() - row.mean)[:, 0]
    return found


def gradient_over_logits(
    logits: Tensor,
    gradient: Tensor,
    target: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor,
    num_classes: int,
    softcap: float,
) -> None:
    """Overwrite the logits with their gradient, given those of their log-probabilities and entropies.

    gradient   the logits, or the same memory with smaller elements, of which as many begin where each row does
    """
    for rows in blocks_of(logits):
        z = logits[rows, :num_classes]
        x = capped(z, softcap)
        row = Distribution.of(x)
        u, v = dlogprobs[rows, None], dentropy[rows, None]
        p = row.e.div_(row.sum)  # log p + entropy is d - mean
        g = row.d.sub_(row.mean).mul_(v).add_(u).mul_(p).neg_().scatter_add_(1, target[rows, None], u)
        if softcap:
            g.mul_(1 - (x / softcap).square())
        gradient[rows, :num_classes] = g
    gradient[:, num_classes:] = 0


# Raw ops


class Call(NamedTuple):
    """What shapes the logits and is the same for all rows, in the order of the raw ops' arguments."""

    ignore_index: int
    num_classes: int
    logit_scale: float  # over temperature
    softcap: float  # over temperature; 0: none
    chunk_rows: int

    def options(self) -> Options:
        """Those of cross entropy for the same logits."""
        return Options(self.ignore_index, self.num_classes, 0, self.num_classes, 0.0, 0.0, self.softcap)


CALL_SCHEMA = "SymInt ignore_index, SymInt num_classes, float logit_scale, float softcap, SymInt chunk_rows"


def logprobs(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs (N,) float32, entropy (N,) float32, argmax (N,) int64); what is not asked for has no elements."""
    *shared, with_entropy, with_argmax = flat
    call = Call(*shared)
    found, entropy, argmax = logprobs_outputs(input, weight, bias, target, *flat)
    rows = valid_rows(target, call.ignore_index)
    chunks = Chunks(input, weight, bias, rows, call.chunk_rows, call.logit_scale)
    advise_large_pages_op(chunks.buffer)
    found.zero_()
    for chunk in chunks:
        wanted, logits = target[chunk.rows], chunk.logits
        losses, _ = cross_entropy_op(logits, wanted, None, None, None, *call.options(), False)
        found[chunk.rows] = -losses
        if with_entropy:
            entropy[chunk.rows] = entropies(logits, call.num_classes, call.softcap)
        if with_argmax:
            argmax[chunk.rows] = logits[:, : call.num_classes].argmax(1)
    is_ignored = target == call.ignore_index
    return (
        found,
        entropy.masked_fill_(is_ignored, 0) if with_entropy else entropy,
        (argmax.masked_fill_(is_ignored, NO_TOKEN) if with_argmax else argmax),
    )


def logprobs_outputs(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, with_entropy, with_argmax = flat
    N = input.shape[0]
    return (
        input.new_empty((N,), dtype=torch.float32),
        input.new_empty((N if with_entropy else 0,), dtype=torch.float32),
        input.new_empty((N if with_argmax else 0,), dtype=torch.int64),
    )


def gradients(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dinput, dweight, dbias); one that is not needed has no elements."""
    *shared, needs_input, needs_weight, needs_bias = flat
    call, needs = Call(*shared), (needs_input, needs_weight, needs_bias)
    found = empty_gradients(input, weight, needs)
    scale, u, v = -dlogprobs, dlogprobs, dentropy
    if v is not None:
        # The larger of both goes to the small input, as of a loss: in float16 the logits' gradient keeps its range.
        scale = torch.maximum(u.abs(), v.abs())
        scale = scale.masked_fill(scale == 0, 1)
        is_ignored = target == call.ignore_index
        u, v = (x.div(scale).masked_fill(is_ignored, 0) for x in (u, v))
    chunks = Chunks(input, weight, bias, valid_rows(target, call.ignore_index), call.chunk_rows, call.logit_scale)
    for fresh in (chunks.buffer, found[1]):
        advise_large_pages_op(fresh)
    total = Gradients(chunks, found, scale, needs)
    for chunk in chunks:
        rows, wanted = chunk.rows, target[chunk.rows]
        if v is None:
            factor = total.scale_of_logits(chunk)
            cross_entropy_over(chunk.logits, chunk.gradient, wanted, None, factor, None, call.options())
        else:
            index = wanted.long().clamp(0, call.num_classes - 1)  # of a row that is ignored, any will do
            factor = total.scale_of_logits(chunk)
            own = (u[rows], v[rows]) if factor is None else (u[rows] * factor, v[rows] * factor)
            gradient_over_logits(chunk.logits, chunk.gradient, index, *own, call.num_classes, call.softcap)
        total.add(chunk)
    total.finish()
    return found


def gradient_outputs(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(input, weight, flat[-3:])  # type: ignore[arg-type]


logprobs_op = register(
    f"linear_logprobs(Tensor input, Tensor weight, Tensor? bias, Tensor target, {CALL_SCHEMA},"
    " bool with_entropy, bool with_argmax) -> (Tensor, Tensor, Tensor)",
    logprobs,
    logprobs_outputs,
)
logprobs_backward_op = register(
    "linear_logprobs_backward(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor dlogprobs,"
    f" Tensor? dentropy, {CALL_SCHEMA}, bool needs_input, bool needs_weight, bool needs_bias)"
    " -> (Tensor, Tensor, Tensor)",
    gradients,
    gradient_outputs,
)


@register_flop_formula(torch.ops.fastlm.linear_logprobs)
def flops(input: torch.Size, weight: torch.Size, *flat: Any, **out: Any) -> int:
    """Of the logits, one product, as torch.utils.flop_counter counts them."""
    (N, C), V = input, weight[0]
    return 2 * N * C * V


@register_flop_formula(torch.ops.fastlm.linear_logprobs_backward)
def backward_flops(input: torch.Size, weight: torch.Size, *flat: Any, **out: Any) -> int:
    """Of the logits, made again, and of the gradients."""
    *_, needs_input, needs_weight, _ = flat
    return flops(input, weight) * (1 + needs_input + needs_weight)


# Autograd


class LinearLogprobsFunction(torch.autograd.Function):
    """The two raw ops as one differentiable function, of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        call: Call,
        needs: Needs,
        with_entropy: bool,
        with_argmax: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        found, entropy, argmax = logprobs_op(input, weight, bias, target, *call, with_entropy, with_argmax)
        ctx.mark_non_differentiable(*([argmax] if with_entropy else [entropy, argmax]))
        ctx.call, ctx.needs, ctx.with_entropy = call, needs, with_entropy
        ctx.save_for_backward(input, weight, bias, target)
        return found, entropy, argmax

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor, dentropy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, target = ctx.saved_tensors
        upstream = (dlogprobs, dentropy) if ctx.with_entropy else (dlogprobs, None)
        if is_double_backward():
            found = gradients_in_pytorch(input, weight, bias, target, upstream, ctx.call, ctx.needs)
        else:
            made = logprobs_backward_op(input, weight, bias, target, *upstream, *ctx.call, *ctx.needs)
            found = rounded(made, (input, weight, bias), ctx.needs)
        return *found, None, None, None, None, None


def gradients_in_pytorch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upstream: Sequence[Tensor | None],
    call: Call,
    needs: Needs,
) -> list[Tensor | None]:
    """The gradients, which autograd can differentiate again."""

    def wide(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        found = linear_logprobs_reference(
            x.float(), w.float(), target, linear_bias=None if b is None else b.float(),
            ignore_index=call.ignore_index, logit_scale=call.logit_scale, softcap=call.softcap or None,
            num_classes=call.num_classes, entropy=upstream[1] is not None,
        )  # fmt: skip
        return tuple(x for x in found if x is not None)

    return differentiable_gradients(wide, (input, weight, bias), needs, [x for x in upstream if x is not None])


# Public function


def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    num_classes: int | None = None,
    entropy: bool = False,
    argmax: bool = False,
    shift: bool | int = False,
    memory_budget: int | None = None,
) -> LinearLogprobs:
    """Log-probability of each target under softmax(input @ linear_weight.T + linear_bias), without holding all logits.

        policy = linear_logprobs(hidden, head, tokens, shift=True, temperature=0.7, entropy=True)
        policy.logprobs, policy.entropy

    input          (..., C)   linear_weight (V, C)   linear_bias (V,)   one of float32, float16, bfloat16
    target         (...) tokens; ignore_index (None: -100) marks positions that count for nothing
    logit_scale    logits are first multiplied by it
    softcap        then they are softcap * tanh(logits / softcap)
    temperature    then they are divided by it, as in sampling
    num_classes    rows of linear_weight from this one on are padding of the vocabulary: no probability, gradient 0
    entropy        whether the entropy of each position's distribution is wanted too
    argmax         whether the likeliest token is wanted too
    shift          score input[..., t, :] against target[..., t + shift]: True, or 1, is how a language model's labels
                   are laid out
    memory_budget  bytes of logits held at a time; None is 512 rows on a CPU, 2048 on a GPU
    returns        LinearLogprobs(logprobs, entropy, argmax), each of target's shape; where the target is ignored
                   0, 0 and -1. logprobs and entropy (in nats) are float32 and differentiable; None is what was not
                   asked for. The mean of (argmax == target)[target != ignore_index] is the accuracy

    -logprobs equals linear_cross_entropy(..., reduction="none", dtype=torch.float32). On a CPU ignored positions take
    no time. float64 holds all logits and gives float64. A vocabulary split over ranks is not supported.
    Raises ValueError if shapes or options disagree, TypeError for a dtype, IndexError for a target out of range.
    """
    if isinstance(input, Proxy) or isinstance(linear_weight, Proxy) or isinstance(target, Proxy):
        return recorded(linear_logprobs, locals())
    op = "linear_logprobs"
    if shift := as_integer(op, "shift", shift):
        input, target = shifted(op, input, target, shift)
    check_layer(op, input, linear_weight, linear_bias)
    if linear_weight.dim() != 2 or target.shape != input.shape[:-1]:
        shapes = f"target has shape {tuple(target.shape)} and linear_weight {tuple(linear_weight.shape)}"
        raise ValueError(f"{op}: {shapes}, expected {tuple(input.shape[:-1])} and (V, {input.shape[-1]})")
    check_positive(op, "logit_scale", logit_scale)
    check_positive(op, "temperature", temperature)
    if softcap is not None:
        check_positive(op, "softcap", softcap)
    V, product_dtype = linear_weight.shape[0], autocast_dtype(input)
    classes = V if num_classes is None else as_integer(op, "num_classes", num_classes)
    tensors = {"linear_weight": linear_weight, "target": target, "linear_bias": linear_bias}
    check_rows(op, input, tensors, V, classes, product_dtype is not None)
    if route(op, (input, linear_weight), (target, None, None)).implementation == TORCH:
        return linear_logprobs_reference(
            input, linear_weight, target, linear_bias=linear_bias, ignore_index=ignore_index, logit_scale=logit_scale,
            temperature=temperature, softcap=softcap, num_classes=num_classes, entropy=entropy, argmax=argmax,
        )  # fmt: skip
    if memory_budget is not None:
        memory_budget = as_integer(op, "memory_budget", memory_budget)
    if product_dtype:
        input = input.to(product_dtype)
    call = Call(
        DEFAULT_IGNORE_INDEX if ignore_index is None else ignore_index,
        classes,
        logit_scale / temperature,
        softcap / temperature if softcap else 0.0,
        rows_of_chunk(op, input, V, memory_budget),
    )
    rows = input.reshape(target.numel(), input.shape[-1]), linear_weight, linear_bias, target.reshape(-1)
    of_rows, of_entropy, of_argmax = LinearLogprobsFunction.apply(
        *rows, call, wanted_gradients(input, linear_weight, linear_bias), entropy, argmax
    )
    return LinearLogprobs(
        of_rows.view(target.shape),
        of_entropy.view(target.shape) if entropy else None,
        of_argmax.view(target.shape) if argmax else None,
    )
