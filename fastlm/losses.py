"""The losses of post-training: formulas over the log-probabilities that fastlm.ops.linear_logprobs gives.

    tokens = labels.masked_fill(is_prompt, -100)                                           # (B, T)
    policy = linear_logprobs(hidden, head, tokens, shift=True).logprobs                    # (B, T - 1), 0 at the prompt
    chosen, rejected = policy.sum(-1).chunk(2)                                             # (B / 2,) each
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)

Those of preferences take log-probabilities of whole responses, summed over their tokens or averaged, as each says.
Where a response ends is the caller's to say, by -100 in the targets or by a mask.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._chunks import (
    Chunk,
    Chunks,
    Gradients,
    Needs,
    check_layer,
    check_positive,
    check_rows,
    empty_gradients,
    rounded,
    rows_of_chunk,
    valid_rows,
    wanted_gradients,
)
from fastlm.ops._dispatch import autocast_dtype
from fastlm.ops._register import differentiable_gradients, is_double_backward, register
from fastlm.ops.cross_entropy import advise_large_pages_op
from fastlm.ops.linear_logprobs import Distribution, blocks_of

__all__ = ["distillation_loss", "dpo_loss", "grpo_loss", "kto_loss", "orpo_loss", "simpo_loss"]

REDUCTIONS = ("none", "mean", "sum")
GRPO_LOSS_TYPES = ("grpo", "dapo", "dr_grpo")


def reduced(op: str, losses: Tensor, reduction: str) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}, expected 'none', 'mean' or 'sum'")
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def preference(op: str, margin: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(margin) of a preference that is wrong with a chance of label_smoothing."""
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, expected 0 to 0.5")
    losses = -F.logsigmoid(margin)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margin)
    return losses


# Preferences


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Direct preference optimisation.

        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        loss = -(1 - label_smoothing) log sigmoid(margin) - label_smoothing log sigmoid(-margin)

    chosen, rejected          (B,) summed log-probabilities of the responses under the policy
    ref_chosen, ref_rejected  (B,) the same under the reference model
    returns                   a scalar, or (B,) for reduction "none"

    Equals TRL's loss_type "sigmoid" where label_smoothing is 0.
    Source: Rafailov et al. 2023, arXiv 2305.18290; label smoothing, Mitchell 2023, and cDPO in arXiv 2403.00409.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return reduced("dpo_loss", preference("dpo_loss", margin, label_smoothing), reduction)


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Simple preference optimisation, without a reference model.

        margin = beta * (chosen - rejected) - gamma
        loss = -(1 - label_smoothing) log sigmoid(margin) - label_smoothing log sigmoid(-margin)

    chosen, rejected  (B,) average log-probabilities of the responses' tokens
    returns           a scalar, or (B,) for reduction "none"

    Source: Meng, Xia, Chen 2024, arXiv 2405.14734.
    """
    margin = beta * (chosen - rejected) - gamma
    return reduced("simpo_loss", preference("simpo_loss", margin, label_smoothing), reduction)


def orpo_loss(
    chosen: Tensor, rejected: Tensor, nll: Tensor | None = None, *, beta: float = 0.1, reduction: str = "mean"
) -> Tensor:
    """Odds ratio preference optimisation, without a reference model.

        log odds(p) = log p - log(1 - p)
        loss = nll - beta * log sigmoid(log odds(exp(chosen)) - log odds(exp(rejected)))

    chosen, rejected  (B,) average log-probabilities of the responses' tokens, below 0
    nll               (B,) or a scalar: what fine-tuning on the chosen responses would minimise; None is -chosen
    returns           a scalar, or (B,) for reduction "none"

    Source: Hong, Lee, Thorne 2024, arXiv 2403.07691, where beta is lambda.
    """
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return reduced("orpo_loss", (-chosen if nll is None else nll) - beta * F.logsigmoid(log_odds), reduction)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0."""
    return torch.log(-torch.expm1(x))


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    kl: Tensor | float = 0.0,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Kahneman-Tversky optimisation: of responses each of which is known to be desirable or not.

        r = logprobs - ref_logprobs
        loss = desirable_weight * (1 - sigmoid(beta * (r - kl)))        of a desirable response
               undesirable_weight * (1 - sigmoid(beta * (kl - r)))      of another

    logprobs, ref_logprobs  (B,) summed log-probabilities of the responses under the policy and the reference
    desirable               (B,) bool
    kl                      estimate of the policy's KL divergence from the reference, a scalar without gradient: the
                            mean of r over prompts with other prompts' responses, where that is above 0
    returns                 a scalar, or (B,) for reduction "none"

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8.
    """
    kl = kl.detach() if isinstance(kl, Tensor) else kl
    gain = logprobs - ref_logprobs - kl
    losses = torch.where(
        desirable,
        desirable_weight * torch.sigmoid(-beta * gain),
        undesirable_weight * torch.sigmoid(beta * gain),
    )
    return reduced("kto_loss", losses, reduction)


# Rewards


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: str = "dapo",
    num_tokens: Tensor | float | None = None,
    max_completion_length: int | None = None,
    sequence_level: bool = False,
) -> Tensor:
    """Group relative policy optimisation: clipped policy gradient, with a penalty for leaving the reference.

        ratio = exp(logprobs - old_logprobs)
        kl = exp(ref_logprobs - logprobs) - (ref_logprobs - logprobs) - 1
        loss_it = -min(ratio * advantage, clip(ratio, 1 - epsilon, 1 + epsilon_high) * advantage) + beta * kl

    logprobs               (B, T) of the completions' tokens under the policy
    advantages             (B,) or (B, T)
    mask                   (B, T) bool or number: the tokens that count
    old_logprobs           (B, T) under the policy that sampled them; None: the same policy, so that ratio is 1
    ref_logprobs           (B, T) under the reference model, needed unless beta is 0
    epsilon_high           None: epsilon
    loss_type              "grpo": the mean over sequences of each one's mean over its tokens
                           "dapo": the sum over tokens / num_tokens (None: the tokens here); give the number in the
                           whole batch where it is split over steps or ranks
                           "dr_grpo": the sum over tokens / (B * max_completion_length (None: T))
    sequence_level         a sequence's tokens share the ratio of their mean, as in GSPO
    returns                a scalar

    Equals TRL's loss of that loss_type. Raises ValueError for an unknown loss_type or a missing ref_logprobs.
    Source: Shao et al. 2024, arXiv 2402.03300; DAPO, Yu et al. 2025, arXiv 2503.14476; Dr. GRPO, Liu et al. 2025,
    arXiv 2503.20783; GSPO, Zheng et al. 2025, arXiv 2507.18071; this estimator of the divergence, Schulman 2020.
    """
    if loss_type not in GRPO_LOSS_TYPES:
        raise ValueError(f"grpo_loss: loss_type is {loss_type!r}, expected one of {', '.join(GRPO_LOSS_TYPES)}")
    if beta and ref_logprobs is None:
        raise ValueError(f"grpo_loss: beta is {beta} and ref_logprobs is None, expected (B, T) log-probabilities")
    mask = mask.to(logprobs.dtype)
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    log_ratio = logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs)
    if sequence_level:
        log_ratio = mean_of_tokens(log_ratio, mask)[:, None]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    if beta and ref_logprobs is not None:
        away = ref_logprobs - logprobs
        losses = losses + beta * (away.exp() - away - 1)
    if loss_type == "grpo":
        return mean_of_tokens(losses, mask).mean()
    total = (losses * mask).sum()
    if loss_type == "dr_grpo":
        return total / (mask.shape[0] * (max_completion_length or mask.shape[1]))
    return total / (mask.sum() if num_tokens is None else torch.as_tensor(num_tokens)).clamp(min=1)


def mean_of_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """(B,) of x (B, T) or (B, 1); 0 for a sequence without tokens."""
    return (x * mask).sum(-1) / mask.sum(-1).clamp(min=1)


# Distillation


def distillation_loss_reference(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    mask: Tensor,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """The divergence of each row in plain PyTorch, all logits at once; 0 where mask is False."""
    student = (F.linear(input, linear_weight, linear_bias) / temperature).log_softmax(-1)
    teacher = (F.linear(teacher_input, teacher_weight, teacher_bias) / temperature).log_softmax(-1)
    p, q = (student, teacher) if reverse else (teacher, student)
    return torch.where(mask, F.kl_div(q, p, reduction="none", log_target=True).sum(-1), 0)


def divergences_and_gradients(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    mask: Tensor,
    temperature: float,
    reverse: bool,
    chunk_rows: int,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(divergences (N,), dinput, dweight, dbias of their sum)."""
    found, *gradients = divergence_outputs(input, weight, *(None,) * 7, *needs)
    rows = valid_rows(mask, False)
    student = Chunks(input, weight, bias, rows, chunk_rows, 1 / temperature)
    teacher = Chunks(teacher_input, teacher_weight, teacher_bias, rows, chunk_rows, 1 / temperature)
    for fresh in (student.buffer, teacher.buffer, gradients[1]):
        advise_large_pages_op(fresh)
    total = Gradients(student, (gradients[0], gradients[1], gradients[2]), None, (needs[0], needs[1], needs[2]))
    found.zero_()
    for chunk, taught in zip(student, teacher, strict=True):
        counts = mask[chunk.rows]
        factor = total.scale_of_logits(chunk)
        found[chunk.rows] = divergence_over_logits(chunk, taught.logits, counts, factor, reverse)
        if any(needs):
            total.add(chunk)
    total.finish()
    return found, gradients[0], gradients[1], gradients[2]


def divergence_over_logits(chunk: Chunk, teacher: Tensor, mask: Tensor, factor: Tensor | None, reverse: bool) -> Tensor:
    """The divergence (N,) of each row of a chunk, whose logits become its gradient, times factor (N,).

    Forward: sum_c q_c (log q_c - log p_c), p the student's and q the teacher's; its gradient is p - q. Reverse:
    sum_c p_c (log p_c - log q_c), with the gradient p_c (log p_c - log q_c - divergence).
    """
    found = teacher.new_empty((teacher.shape[0],), dtype=torch.float32)
    for rows in blocks_of(chunk.logits):
        student, taught = (Distribution.of(x[rows].float()) for x in (chunk.logits, teacher))
        p, q = student.e.div_(student.sum), taught.e.div_(taught.sum)
        # log p - log q, which is finite, so that p or q of 0 makes it 0
        ratio = student.d.sub_(taught.d).sub_(student.sum.log() - taught.sum.log())
        divergence = (p * ratio).sum(1, keepdim=True) if reverse else -(q * ratio).sum(1, keepdim=True)
        g = ratio.sub_(divergence).mul_(p) if reverse else p.sub_(q)
        counts = mask[rows]
        g = g if factor is None else g.mul_(factor[rows, None])
        chunk.gradient[rows] = g.masked_fill_(~counts[:, None], 0).to(chunk.gradient.dtype)
        found[rows] = divergence[:, 0].masked_fill(~counts, 0)
    return found


def divergence_outputs(input: Tensor, weight: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = input.new_empty((input.shape[0],), dtype=torch.float32)
    needs_input, needs_weight, needs_bias = call[-3:]
    return losses, *empty_gradients(input, weight, (needs_input, needs_weight, needs_bias))


divergence_op = register(
    "distillation(Tensor input, Tensor weight, Tensor? bias, Tensor teacher_input, Tensor teacher_weight,"
    " Tensor? teacher_bias, Tensor mask, float temperature, bool reverse, SymInt chunk_rows, bool needs_input,"
    " bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    divergences_and_gradients,
    divergence_outputs,
)


class DistillationFunction(torch.autograd.Function):
    """The sum of the divergences, whose gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: tuple[Tensor, Tensor, Tensor | None],
        mask: Tensor,
        temperature: float,
        reverse: bool,
        chunk_rows: int,
        needs: Needs,
    ) -> Tensor:
        found, *made = divergence_op(input, weight, bias, *teacher, mask, temperature, reverse, chunk_rows, *needs)
        ctx.call = temperature, reverse, needs
        ctx.save_for_backward(input, weight, bias, *teacher, mask, *made)
        return found.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, teacher_input, teacher_weight, teacher_bias, mask, *made = ctx.saved_tensors
        temperature, reverse, needs = ctx.call

        def total(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return distillation_loss_reference(
                x.float(), w.float(), teacher_input.float(), teacher_weight.float(), mask,
                linear_bias=None if b is None else b.float(), temperature=temperature, reverse=reverse,
                teacher_bias=None if teacher_bias is None else teacher_bias.float(),
            ).sum()  # fmt: skip

        if is_double_backward():
            found = differentiable_gradients(total, (input, weight, bias), needs, [upstream])
        else:
            found = rounded([gradient * upstream for gradient in made], (input, weight, bias), needs)
        return *found, None, None, None, None, None, None


def distillation_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
    reduction: str = "mean",
    memory_budget: int | None = None,
) -> Tensor:
    """KL divergence between a teacher's distributions and a student's, with neither's logits ever held in full.

        p = softmax((input @ linear_weight.T + linear_bias) / temperature)        q the same of the teacher
        loss = sum_c q_c (log q_c - log p_c)         or, reverse, sum_c p_c (log p_c - log q_c)

    input          (..., C)   linear_weight (V, C)   linear_bias (V,)   of the student: float32, float16 or bfloat16
    teacher_...    the same of the teacher, whose features may be others; they get no gradient
    mask           (...) bool: the positions that count; None: all
    reverse        which makes the student seek the teacher's modes, where the forward one covers them
    reduction      "mean" over the positions that count, or "sum", to be divided by the number in the whole batch
    memory_budget  bytes of logits held at a time for each of the two; None is 512 rows on a CPU, 2048 on a GPU
    returns        a float32 scalar; times temperature^2 its gradient is as large at every temperature

    Equals TRL's generalized_jsd_loss with beta 0, or reverse with beta 1. float64 is not supported.
    Raises ValueError if shapes disagree, TypeError for a dtype.
    Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531; reverse: Gu et al. 2023, arXiv 2306.08543.
    """
    op = "distillation_loss"
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{op}: reduction is {reduction!r}, expected 'mean' or 'sum'")
    check_positive(op, "temperature", temperature)
    check_layer(op, input, linear_weight, linear_bias)
    check_layer(op, teacher_input, teacher_weight, teacher_bias)
    V, leading = linear_weight.shape[0], input.shape[:-1]
    mask = torch.ones(leading, dtype=torch.bool, device=input.device) if mask is None else mask.bool()
    if teacher_weight.shape[0] != V or teacher_input.shape[:-1] != leading or mask.shape != leading:
        shapes = f"teacher_weight {tuple(teacher_weight.shape)}, teacher_input {tuple(teacher_input.shape)}"
        expected = f"({V}, C), {(*map(int, leading), 'C')} and {tuple(leading)}"
        raise ValueError(f"{op}: {shapes} and mask {tuple(mask.shape)}, expected {expected}")
    if input.dtype == torch.float64:
        raise TypeError(f"{op}: input is torch.float64, expected float32, float16 or bfloat16")
    product_dtype, indices = autocast_dtype(input), mask.long()
    for x, weight, bias in ((input, linear_weight, linear_bias), (teacher_input, teacher_weight, teacher_bias)):
        tensors = {"linear_weight": weight, "target": indices, "linear_bias": bias}
        check_rows(op, x, tensors, V, None, product_dtype is not None)
    if product_dtype:
        input, teacher_input = input.to(product_dtype), teacher_input.to(product_dtype)
    teacher = (
        teacher_input.reshape(-1, teacher_input.shape[-1]).detach(),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
    )
    loss = DistillationFunction.apply(
        input.reshape(-1, input.shape[-1]), linear_weight, linear_bias, teacher, mask.reshape(-1), float(temperature),
        reverse, rows_of_chunk(op, input, V, memory_budget), wanted_gradients(input, linear_weight, linear_bias),
    )  # fmt: skip
    return loss / mask.sum().clamp(min=1) if reduction == "mean" else loss
